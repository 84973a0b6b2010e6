"""What changing the plan is worth on real workers: a load that swings from idle to twice the knee, on two cores.

    python bench/swing.py [--seconds 80] [--plans auto,2x1,1x2] [--width 640] [--layers 10]

The model has random weights in LLaDA's format, made for the run, large enough that two cores together are faster than
one. Its requests unmask in a fixed number of steps. Step costs are measured first, by degree, and given to the server
as a profile. Each plan then serves the same requests, half of them with deadlines of .8x and half of 2x the unloaded
latency on one core. 1.0x load is what the law of steps gives data-parallel instances.
"""

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from dilaserve import Config, Engine, Options
from dilaserve.calibrate.calibrate import machine
from dilaserve.calibrate.kept import Measurements
from dilaserve.calibrate.step_timing import step_costs
from dilaserve.errors import DilaserveError
from dilaserve.models.checkpoint import locate
from dilaserve.planner.step_pace import Kind, paced
from dilaserve.plans import spelled
from dilaserve.profile import profile_file
from dilaserve.profile.decode_speed import ANY, PARTS, QualityProfile, TaskProfile
from dilaserve.profile.forecast import Forecast
from dilaserve.profile.profile_file import ModelProfile, cost_key
from dilaserve.profile.step_cost import StepCost, fit
from dilaserve.sim.h200 import law_for
from dilaserve.sim.workload import poisson

PROMPT, ANSWER, BLOCK, STEPS = 32, 64, 32, 16
VOCAB, MASK, END = 384, 258, 257  # as the bundled tokenizer has them
CLASSES = {"tight": 0.8, "loose": 2.0}
ROWS, TOKENS = 6, 256  # of one step


class Fate(NamedTuple):
    at: float
    kind: str
    latency: float | None
    met: bool


class Served(NamedTuple):
    fates: list[Fate]
    changes: list[str]


def make(directory: Path, width: int, layers: int) -> int:
    """Write the checkpoint; returns its number of parameters."""
    torch.manual_seed(0)
    mlp = round(2.7 * width / 64) * 64
    block = {"q_proj": (width, width), "k_proj": (width, width), "v_proj": (width, width), "attn_out": (width, width)}
    block |= {"ff_proj": (mlp, width), "up_proj": (mlp, width), "ff_out": (width, mlp)}
    shapes = {"wte": (VOCAB, width), "ff_out": (VOCAB, width)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    norms = ["ln_f", *(f"blocks.{i}.{name}" for i in range(layers) for name in ("attn_norm", "ff_norm"))]
    tensors = {name: torch.randn(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
    tensors |= {name: torch.ones(width) for name in norms}
    save_file(
        {f"model.transformer.{name}.weight": tensor for name, tensor in tensors.items()},
        directory / "model.safetensors",
    )
    config = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": width,
        "n_layers": layers,
        "n_heads": 8,
        "mlp_hidden_size": mlp,
        "vocab_size": VOCAB,
        "embedding_size": VOCAB,
        "max_sequence_length": 512,
        "weight_tying": False,
        "mask_token_id": MASK,
        "eos_token_id": END,
    }
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate("dilaserve-tiny") / name, directory)
    return sum(tensor.numel() for tensor in tensors.values())


def configured(directory: Path, plan: str) -> Config:
    return Config.of(
        model=str(directory),
        devices="cpu,cpu",
        plan=plan,
        max_model_len=PROMPT + ANSWER,
        max_num_seqs=ROWS,
        max_num_batched_tokens=TOKENS,
        max_queue=1024,
        threshold_control="fixed",
        accuracy_budget="off",
        slo_class=",".join(f"{name}={scale}x" for name, scale in CLASSES.items()),
    )


def profiled(directory: Path) -> dict[int, StepCost]:
    """Measure the laws by degree and leave them beside the model."""
    limit = PROMPT + ANSWER
    samples = asyncio.run(
        step_costs(configured(directory, "2x1"), limit, lambda what, done, total: None, Measurements())
    )
    laws = {degree: fit(found) for degree, found in samples.items()}
    profile = ModelProfile(
        model=directory.name,
        made="for this run",
        machine=machine(),
        costs={cost_key("cpu", degree): law for degree, law in laws.items()},
        quality=quality(),
    )
    (directory / profile_file.FILE).write_bytes(profile_file.indented(profile))
    return laws


def quality() -> QualityProfile:
    """Blocks that take so many steps, at no loss."""
    task = TaskProfile(laws=((law_for(STEPS * BLOCK / ANSWER),) * PARTS,), drop=(0.0,), mean_drop=(0.0,))
    return QualityProfile(tasks={ANY: task}, block_length=BLOCK, levels=(0.9,))


def lives(law: StepCost) -> list[float]:
    """Seconds of a request on an instance, by rows that share it."""
    forecast = Forecast(quality())
    ahead = forecast.ahead(ANY, 0, 0, ANSWER // BLOCK, BLOCK)
    found: list[float] = paced(law, Kind(PROMPT + ANSWER, ANSWER), ahead, ROWS, BLOCK, 0.0).life.tolist()
    return found


def arrivals(knee: float, seconds: float) -> Iterator[tuple[float, str]]:
    """From idle to twice the knee and back, in one swing."""
    rng = random.Random(0)
    for at in poisson(2 * knee, rng):
        if at >= seconds:
            return
        if rng.random() < share(at, seconds):
            yield at, rng.choice(list(CLASSES))


def share(at: float, seconds: float) -> float:
    """Of the highest rate."""
    return (1 - math.cos(2 * math.pi * at / seconds)) / 2


async def served(config: Config, work: Sequence[tuple[float, str]]) -> Served:
    rng = random.Random(1)
    prompts = [[rng.randrange(250) for _ in range(PROMPT)] for _ in work]
    plain = Options(max_tokens=ANSWER, num_denoising_steps=STEPS, ignore_eos=True)
    async with Engine(config) as engine:

        async def one(at: float, kind: str, prompt: list[int]) -> Fate:
            await asyncio.sleep(began + at - time.perf_counter())
            sent = time.perf_counter()
            options = Options(
                max_tokens=ANSWER,
                num_denoising_steps=STEPS,
                ignore_eos=True,
                slo_class=kind,
                on_miss="cancel_when_late",
            )
            try:
                answer = await engine.generate(prompt, options)
            except DilaserveError:
                return Fate(at, kind, None, False)
            return Fate(at, kind, time.perf_counter() - sent, bool(answer.usage.deadline_met))

        for _ in range(2):
            await engine.generate(prompts[0], plain)
        began, start = time.perf_counter(), engine.loop.time()
        fates = await asyncio.gather(*(one(*job, prompt) for job, prompt in zip(work, prompts, strict=True)))
        changes = [
            f"{change.at - start:5.1f} s: {spelled(change.before)} to {spelled(change.after)} ({change.reason})"
            for change in engine.history
            if change.at > start
        ]
    return Served(list(fates), changes)


def row(plan: str, run: Served, seconds: float) -> str:
    groups = [tuple(CLASSES), *((name,) for name in CLASSES)]
    met = [mean([100.0 * fate.met for fate in run.fates if fate.kind in kinds]) for kinds in groups]
    answered = [(share(fate.at, seconds) < 0.25, fate.latency) for fate in run.fates if fate.latency is not None]
    calm, busy = (mean([latency for was, latency in answered if was == wanted]) for wanted in (True, False))
    declined = mean([100.0 * (fate.latency is None) for fate in run.fates])
    shares = " | ".join(f"{one:.1f}" for one in met)
    return f"| {plan} | {shares} | {declined:.1f} | {calm:.2f} | {busy:.2f} | {len(run.changes)} |"


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80.0, help="of the swing")
    parser.add_argument("--plans", type=lambda text: text.split(","), default=["auto", "2x1", "1x2"])
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--layers", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "random"
        directory.mkdir()
        parameters = make(directory, args.width, args.layers)
        laws = profiled(directory)
        rows = lives(laws[1])
        knee = 2 * max(count / life for count, life in enumerate(rows, 1))
        alone = ", ".join(f"{lives(law)[0]:.2f} s on {degree}" for degree, law in laws.items())
        print(f"{parameters / 1e6:.0f} M parameters on {machine()}; {os.cpu_count()} cores; alone {alone}")
        errors = ", ".join(f"{100 * law.error:.1f} %" for law in laws.values())
        print(f"step costs off by {errors}; 1.0x = {knee:.2f} requests/s\n")
        work = list(arrivals(knee, args.seconds))
        print("| plan | met % | " + " | ".join(f"{name} ({scale}x)" for name, scale in CLASSES.items()), end="")
        print(" | declined % | latency below .5x load, s | above | changes |")
        print("|---" * 8 + "|")
        found = {plan: asyncio.run(served(configured(directory, plan), work)) for plan in args.plans}
        for plan, run in found.items():
            print(row(plan, run, args.seconds))
        print(f"\n{len(work)} requests each")
        for plan, run in found.items():
            for change in run.changes:
                print(f"{plan}: {change}")


if __name__ == "__main__":
    main()
