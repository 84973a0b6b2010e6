"""Everything that only a GPU can tell: builds a LLaDA-8B-shaped model of random weights, checks, measures, reports.

    python -m bench.gpu [--minutes 8.5] [--only kernels,reuse,…] [--directory DIR] [--out FILE]
    python -m bench.gpu --shape tiny --device cpu        # the same run in half a minute, where there is no GPU
    python tests/fake_cuda 1 -m bench.gpu --shape tiny    # and on a fake one, with streams and graphs

Needs nothing but the packages of the project and no network. Floors are counted: a reuse step reads all weights once at
the bandwidth that a copy reaches, a refresh step does its operations at the rate that a large product reaches. What
others publish runs in the same process on the same weights. Weights that were never trained reach no threshold, so the
schedule is forced (`--steps` for a block of 32), the same for everybody. Writes bench/results/GPU-NAME.md and the
measured profile beside it, which `dilaserve simulate --costs` takes. A section that fails says why and the others go
on; one for which no time is left is skipped and says so.
"""

import argparse
import contextlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from card.checks import kernels, numerics
from card.parts import parts
from card.rig import SHAPES, Bench, Goal, build, name_of
from card.serving import law, pair, throughput
from card.steps import refresh, reuse, roofs

from dilaserve.models import attention, blocks
from dilaserve.profile import profile_file


def machine(bench: Bench) -> Iterator[str]:
    varlen = attention.varlen_for(bench.device, bench.dtype, bench.shape.width // bench.shape.heads)
    yield f"- {name_of(bench.device)}, torch {torch.__version__}, CUDA {torch.version.cuda}, commit {commit()}"
    yield f"- attention: {varlen.__qualname__ if varlen else 'SDPA by groups'}; Triton: {triton_version(bench)}"
    if bench.cuda:
        free, total = torch.cuda.mem_get_info(bench.device)
        yield f"- memory: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def commit() -> str:
    if not shutil.which("git"):
        return "unknown"
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def triton_version(bench: Bench) -> str:
    if not blocks.has_kernels(bench.device):
        return "not used"
    import triton

    return str(triton.__version__)


PATIENCE = 2.5  # times what a section needs after which its engines count as hung

SECTIONS: dict[str, tuple[str, Callable[[Bench], Iterator[str]], float]] = {  # title, section, seconds it needs
    "machine": ("Machine", machine, 0.0),
    "roofs": ("Roofs", roofs, 5.0),
    "kernels": ("Kernels against their twins", kernels, 20.0),
    "reuse": ("Reuse steps", reuse, 15.0),
    "refresh": ("Refresh steps", refresh, 10.0),
    "throughput": ("Tokens per second", throughput, 80.0),
    "law": ("Step-cost law", law, 60.0),
    "pair": ("Two workers on one card", pair, 60.0),
    "numerics": ("Numerics", numerics, 25.0),
    "parts": ("Parts of a reuse step", parts, 60.0),
}


def run(bench: Bench, out: Path, built: str) -> None:
    """All sections in order, and the file after each, so that what was found stays whatever comes."""
    parts: list[str] = ["- " + built]
    for key, (title, section, needs) in SECTIONS.items():
        if key not in ("machine", "roofs") and key not in bench.args.only:
            continue
        began = time.monotonic()
        lines = [f"## {title}", ""]
        if bench.left() < needs:
            lines.append(f"Skipped: {bench.left():.0f} s were left of {bench.args.minutes:g} minutes.")
        else:
            bench.patience = min(bench.left(), PATIENCE * needs)
            failed = True
            try:
                lines += section(bench)
                failed = False
            except Exception:
                lines += ["", "Failed:", "", "```", traceback.format_exc().strip(), "```"]
                bench.goals.append(Goal(title, "failed", "to run", False))
            if failed:
                bench.free()  # here, as the traceback holds what the section had
        lines += ["", f"({time.monotonic() - began:.1f} s)"]
        print("\n".join(lines), flush=True)
        parts += ["", *lines]
        write(bench, out, parts)
    print("\n".join(table(bench.goals, bench.cuda)))
    print(f"written to {out}")


def write(bench: Bench, out: Path, parts: list[str]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    head = [f"# {name_of(bench.device)}", "", f"`python -m bench.gpu --shape {bench.args.shape}`", ""]
    out.write_text("\n".join([*head, *table(bench.goals, bench.cuda), "", *parts, ""]))
    if bench.profile:
        out.with_suffix(".json").write_bytes(profile_file.indented(bench.profile))


def table(goals: Sequence[Goal], cuda: bool) -> list[str]:
    """On a CPU figures of time only show that they can be measured."""
    lines = ["| what | found | wanted | |", "|---|---|---|---|"]
    verdict = {True: "met", False: "**missed**" if cuda else "no GPU"}
    return lines + [f"| {goal.what} | {goal.found} | {goal.wanted} | {verdict[goal.met]} |" for goal in goals]


def room(directory: Path | None, need: float) -> contextlib.AbstractContextManager[str]:
    """Where the checkpoint is built: the directory that was given, shared memory if it is large, else the disk."""
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
        return contextlib.nullcontext(str(directory))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without clearing the room
    shared = Path("/dev/shm")
    place = shared if shared.is_dir() and shutil.disk_usage(shared).free > 2 * need else None
    return tempfile.TemporaryDirectory(prefix="dilaserve-bench-", dir=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llada-8b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--minutes", type=float, default=8.5, help="sections that would end later are skipped")
    parser.add_argument("--steps", type=int, default=10, help="forced steps of a block of 32 (default 10)")
    parser.add_argument("--requests", type=int, default=32, help="requests at 32 at once")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the inputs of losses (default: the time)"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--directory", type=Path, help="keep the random checkpoint here, and take it if it is there")
    parser.add_argument("--out", type=Path, help="default: bench/results/GPU-NAME.md")
    args = parser.parse_args()
    device, shape = torch.device(args.device), SHAPES[args.shape]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)
    name = re.sub(r"[^A-Za-z0-9]+", "-", name_of(device)).strip("-")
    weights = shape.layers * (4 * shape.width + 3 * shape.mlp) * shape.width + 2 * shape.vocab * shape.width
    with room(args.directory, weights * dtype.itemsize) as place:
        bench = Bench(args, Path(place))
        began = time.monotonic()
        there = (Path(place) / "config.json").exists()
        total = 0.0 if there else build(Path(place), shape, device, dtype)
        took = time.monotonic() - began
        built = "weights were there" if there else f"{total / 1e9:.2f} GB of random weights written in {took:.1f} s"
        run(bench, args.out or Path("bench/results") / f"{name}.md", built)


if __name__ == "__main__":
    main()
