"""Keep a real engine under load while its plan changes or its workers are killed, and check every answer.

    python bench/soak.py plans --seconds 60          # another plan every second
    python bench/soak.py kills --seconds 60          # kill -9 of a random worker every two seconds

32 clients ask again and again; every answer must be the one that the request gets alone (cache none, temperature 0).
Afterwards no process, no named shared memory, no temporary file and no open file may be left. Exit code 1 if anything
is wrong.
"""

import argparse
import asyncio
import gc
import glob
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable

from dilaserve import Config, Engine, Options

PLANS = {2: ("2x1", "1x2"), 4: ("4x1", "2x2", "1x4", "1x2+2x1")}
PROMPTS = 16
Answers = list[tuple[int, ...]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=STRIKES)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=None, help="seconds (default: 1 for plans, 2 for kills)")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, choices=PLANS)
    parser.add_argument("--model", default="dilaserve-tiny")
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    before = left_behind()
    wrong = asyncio.run(soak(args))
    gc.collect()
    if (after := left_behind()) != before:
        print(f"left behind: {sorted(after - before)}")
        wrong = True
    print("failed" if wrong else "all answers right, nothing left behind")
    return int(wrong)


async def soak(args: argparse.Namespace) -> bool:
    """True if anything was wrong."""
    config = Config.of(model=args.model, devices=",".join(["cpu"] * args.workers), plan=PLANS[args.workers][-1])
    options = Options(max_tokens=args.tokens, cache="none", confidence_threshold=0.8, ignore_eos=True)
    rng, served, errors = random.Random(0), 0, 0
    async with Engine(config) as engine:
        prompts = [[rng.randrange(200) for _ in range(rng.randint(4, 40))] for _ in range(PROMPTS)]
        alone: Answers = [(await engine.generate(prompt, options)).token_ids for prompt in prompts]
        end = time.monotonic() + args.seconds

        async def client(number: int) -> None:
            nonlocal served, errors
            mine = random.Random(number)
            while time.monotonic() < end:
                which = mine.randrange(PROMPTS)
                try:
                    answer = await engine.generate(prompts[which], options)
                    served, errors = served + 1, errors + (answer.token_ids != alone[which])
                except Exception as error:
                    errors += 1
                    print(f"client {number}: {type(error).__name__}: {error}")

        clients = [asyncio.create_task(client(number)) for number in range(args.clients)]
        strikes = await STRIKES[args.what](engine, end, args)
        await asyncio.gather(*clients)
        pauses = [1000 * change.pause for change in engine.history if change.pause is not None]
        step = 1000 * engine.profile.seconds / max(1, engine.profile.steps)
    print(f"{strikes} {args.what}, {served} answers, {errors} wrong or failed; mean step {step:.1f} ms")
    if pauses:
        ordered = sorted(pauses)
        p95 = ordered[int(0.95 * (len(ordered) - 1))]
        middle, most = statistics.median(pauses), ordered[-1]
        print(f"pauses of {len(pauses)} changes: median {middle:.1f} ms, p95 {p95:.1f}, most {most:.1f}")
    return errors > 0 or served == 0


async def plans(engine: Engine, end: float, args: argparse.Namespace) -> int:
    count, every = 0, args.every or 1.0
    while time.monotonic() < end:
        await asyncio.sleep(every)
        await engine.replan(PLANS[args.workers][count % len(PLANS[args.workers])], "soak")
        count += 1
    return count


async def kills(engine: Engine, end: float, args: argparse.Namespace) -> int:
    count, every, rng = 0, args.every or 2.0, random.Random(1)
    while time.monotonic() < end:
        await asyncio.sleep(every)
        workers = list(engine.executor.workers.values())  # type: ignore[attr-defined]
        if workers:
            os.kill(rng.choice(workers).process.pid, signal.SIGKILL)
            count += 1
    return count


def left_behind() -> set[str]:
    """Child processes, named shared memory, temporary directories and open files."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "dilaserve worker"], capture_output=True, text=True)
    children = {f"process {pid}" for pid in found.stdout.split()}
    temporary = set(glob.glob(f"{tempfile.gettempdir()}/dilaserve-{os.getpid()}-*"))
    files = {os.readlink(file) for file in glob.glob("/proc/self/fd/*") if os.path.islink(file)}
    counts = {f"{sum(kind in name for name in files)} open of kind {kind}" for kind in ("socket", "eventfd", "shm")}
    return children | set(glob.glob(f"/dev/shm/*{os.getpid()}*")) | temporary | counts


STRIKES: dict[str, Callable[[Engine, float, argparse.Namespace], Awaitable[int]]] = {"plans": plans, "kills": kills}

if __name__ == "__main__":
    sys.exit(main())
