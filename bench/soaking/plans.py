"""An engine of this program under load while its plan changes; see `bench/soak.py`."""

import argparse
import asyncio
import gc
import glob
import os
import random
import statistics
import subprocess
import tempfile
import time

from dilaserve import Config, Engine, Options
from soaking.figures import Figure, none_of

PLANS = {2: ("2x1", "1x2"), 4: ("4x1", "2x2", "1x4", "1x2+2x1")}
PROMPTS = 16


async def plans(args: argparse.Namespace) -> list[Figure]:
    before = left_behind()
    figures = await soak(args)
    gc.collect()
    left = left_behind() - before
    for what in sorted(left):
        print(f"- left behind: {what}")
    return [*figures, none_of("left behind", len(left))]


async def soak(args: argparse.Namespace) -> list[Figure]:
    config = Config.of(model=args.model, devices=",".join(["cpu"] * args.workers), plan=PLANS[args.workers][-1])
    options = Options(max_tokens=args.tokens, cache="none", confidence_threshold=0.8, ignore_eos=True)
    rng, served, wrong, lost = random.Random(0), 0, 0, 0
    async with Engine(config) as engine:
        prompts = [[rng.randrange(200) for _ in range(rng.randint(4, 40))] for _ in range(PROMPTS)]
        alone = [(await engine.generate(prompt, options)).token_ids for prompt in prompts]
        end = time.monotonic() + args.seconds

        async def client(number: int) -> None:
            nonlocal served, wrong, lost
            mine = random.Random(number)
            while time.monotonic() < end:
                which = mine.randrange(PROMPTS)
                try:
                    answer = await engine.generate(prompts[which], options)
                    served, wrong = served + 1, wrong + (answer.token_ids != alone[which])
                except Exception as error:
                    lost += 1
                    print(f"- client {number}: {type(error).__name__}: {error}")

        clients = [asyncio.create_task(client(number)) for number in range(args.clients)]
        changes = await change(engine, end, args)
        await asyncio.gather(*clients)
        pauses = sorted(1000 * change.pause for change in engine.history if change.pause is not None)
        step = 1000 * engine.profile.seconds / max(1, engine.profile.steps)
    return [
        Figure("plan changes", f"{changes}"),
        Figure("answers", f"{served:,}", "above 0", served > 0),
        none_of("wrong answers", wrong),
        none_of("lost requests", lost),
        Figure("mean step", f"{step:.1f} ms"),
        Figure("pause of a change: median, p95, most", spread(pauses)),
    ]


def spread(ordered: list[float]) -> str:
    if not ordered:
        return "none"
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    return f"{statistics.median(ordered):.1f}, {p95:.1f}, {ordered[-1]:.1f} ms"


async def change(engine: Engine, end: float, args: argparse.Namespace) -> int:
    count = 0
    while time.monotonic() < end:
        await asyncio.sleep(args.every)
        await engine.replan(PLANS[args.workers][count % len(PLANS[args.workers])], "soak")
        count += 1
    return count


def left_behind() -> set[str]:
    """Child processes, named shared memory, temporary directories and open files."""
    pattern = "dilaserve (worker|fork server)"
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", pattern], capture_output=True, text=True)
    children = {f"process {pid}" for pid in found.stdout.split()}
    temporary = set(glob.glob(f"{tempfile.gettempdir()}/dilaserve-{os.getpid()}-*"))
    files = {os.readlink(file) for file in glob.glob("/proc/self/fd/*") if os.path.islink(file)}
    counted = {
        f"open {kind} number {number + 1}"
        for kind in ("socket", "eventfd", "shm")
        for number in range(sum(kind in name for name in files))
    }
    return children | set(glob.glob(f"/dev/shm/*{os.getpid()}*")) | temporary | counted
