"""Draw how the bundled model fills a canvas at two confidence thresholds, as an animated GIF.

    bin/bench canvas

Left: the reference threshold; right: a lower one. Each frame is a denoising step; a token's colour is the confidence
with which it was unmasked.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from baselines import Plain, unmask
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.patches import Rectangle

from dilaserve.models.checkpoint import locate
from dilaserve.tokenizer.tokenizer import Text

COLUMNS = 8  # tokens in a row of the picture
FRAME, HOLD = 700, 4  # milliseconds of a step, and how often the last one is shown


class Cell(NamedTuple):
    """One position after a step; a mask has no text."""

    text: str | None
    confidence: float


def steps_of(model: Plain, text: Text, prompt: str, length: int, threshold: float) -> list[list[Cell]]:
    """The canvas before the first step and after each, up to the end of the text; one block, no cache."""
    ids = text.encode_chat([{"role": "user", "content": prompt}])
    x = torch.tensor([ids + [model.mask_id] * length])
    confidences = torch.zeros(length)
    found = [[Cell(None, 0.0)] * length]
    while bool((x == model.mask_id).any()):
        before = x[0, len(ids) :].clone()
        logits, _ = model.forward(x)
        logits = logits[:, len(ids) :]
        unmask(x, logits, len(ids), x.shape[1], model.mask_id, threshold)
        after = x[0, len(ids) :]
        taken = F.softmax(logits[0], -1).gather(-1, after[:, None])[:, 0]
        confidences = torch.where(before == after, confidences, taken)
        found.append([cell(text, model, int(i), float(c)) for i, c in zip(after, confidences, strict=True)])
    return found


def cell(text: Text, model: Plain, id: int, confidence: float) -> Cell:
    if id == model.mask_id:
        return Cell(None, 0.0)
    shown = text.decode([id])
    return Cell(repr(shown)[1:-1].replace(" ", "␣") if shown else "end", confidence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="Start with 11: -8 +6 +4 -3 -2 -6")
    parser.add_argument("--length", type=int, default=48, help="tokens of the canvas behind the prompt")
    parser.add_argument("--thresholds", type=float, nargs=2, default=(0.9, 0.6))
    parser.add_argument("--out", type=Path, default=Path("bench/results/canvas.gif"))
    args = parser.parse_args()
    directory = locate("dilaserve-tiny")
    model, text = Plain(directory), Text(directory)
    text.load_template()
    runs = [steps_of(model, text, args.prompt, args.length, threshold) for threshold in args.thresholds]
    text.close()
    for threshold, run in zip(args.thresholds, runs, strict=True):
        print(f"threshold {threshold:g}: {len(run) - 1} steps")
    draw(args.prompt, args.thresholds, runs, args.out)


def draw(prompt: str, thresholds: tuple[float, ...], runs: list[list[list[Cell]]], file: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.7), layout="constrained")
    figure.suptitle(prompt, fontsize=10)
    colors = plt.get_cmap("YlGn")

    def frame(number: int) -> None:
        for axis, threshold, run in zip(axes, thresholds, runs, strict=True):
            step = min(number, len(run) - 1)
            axis.clear()
            done = "done after" if step == len(run) - 1 else "step"
            plural = " steps" if step == len(run) - 1 else ""
            axis.set_title(f"threshold {threshold:g}: {done} {step}{plural}", fontsize=9)
            for place, one in enumerate(run[step]):
                row, column = divmod(place, COLUMNS)
                color = "0.88" if one.text is None else colors(0.05 + 0.5 * max(0.0, 2 * one.confidence - 1))
                axis.add_patch(Rectangle((column, -row), 0.94, 0.9, facecolor=color, linewidth=0))
                if one.text is not None:
                    faint = one.text == "end"
                    axis.text(column + 0.47, -row + 0.43, one.text, ha="center", va="center", family="monospace",
                              fontsize=7 if faint else 9, color="0.45" if faint else "black")  # fmt: skip
            axis.set(xlim=(0, COLUMNS), ylim=(-((len(run[0]) - 1) // COLUMNS), 1.0))
            axis.axis("off")

    frames = max(map(len, runs)) + HOLD
    file.parent.mkdir(parents=True, exist_ok=True)
    FuncAnimation(figure, frame, frames=frames, interval=FRAME).save(file, PillowWriter(fps=1000 / FRAME), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
