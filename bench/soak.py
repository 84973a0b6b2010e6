"""Keep a server under hard use, check every answer, and print figures beside their goals.

    python bench/soak.py plans [--seconds 60] [--every 1]         # another plan every second
    python bench/soak.py kills [--seconds 60] [--every 1] [--busy 2] [--cache mixed]   # kill -9 of a random worker
    python bench/soak.py fuzz  [--requests 10000] [--seed 0] [--only 12,99]            # odd requests over all routes
    python bench/soak.py mixed [--minutes 10]                     # all of it at once, with tenants and deadlines

`plans` drives an engine in this program, the others a server process over HTTP. Exit code 1 if a goal is missed.

plans  Every answer must be the one that the request gets alone (cache none, temperature 0); no process, shared memory,
       temporary file or open file may be left.
kills  No request may be lost. With `cache: none`, and with `dual` and a refresh in every step, an answer must be the
       undisturbed one. With `dual` as it is by default, a killed worker's rows begin again with a refresh, which is one
       more approximation: an answer that had more refreshes than undisturbed may differ and is counted apart; one
       that had as many must be the undisturbed one.
fuzz   A case depends on seed and number only; `--only` repeats cases. Each answer must have a request id, each error
       OpenAI's shape, and no 5xx may be undocumented. A probe of its own process measures how long /health waits.
mixed  Checks answers, growth of resident memory after a warm-up of a fifth of the time, and the counters of /metrics
       against what the clients saw.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable

from soaking import fuzz, kills, mixed, plans
from soaking.figures import Figure, told

COMMANDS: dict[str, Callable[[argparse.Namespace], Awaitable[list[Figure]]]] = {
    "plans": plans.plans,
    "kills": kills.kills,
    "fuzz": fuzz.fuzz,
    "mixed": mixed.mixed,
}
EVERY = 1.0  # seconds between two plan changes, or two kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--model", default="dilaserve-tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="plans, kills: how long")
    parser.add_argument("--every", type=float, default=EVERY, help="plans, kills: seconds between two of them")
    parser.add_argument("--workers", type=int, default=2, choices=plans.PLANS, help="plans, kills")
    parser.add_argument("--tokens", type=int, default=32, help="plans, kills: tokens of an answer")
    parser.add_argument("--busy", type=int, default=0, help="kills, mixed: cores that other processes keep busy")
    parser.add_argument("--cache", choices=["mixed", *kills.CACHES], default="mixed", help="kills")
    parser.add_argument("--requests", type=int, default=10_000, help="fuzz")
    parser.add_argument("--seed", type=int, default=0, help="fuzz, mixed")
    parser.add_argument("--only", default="", help="fuzz: numbers of the cases to send, separated by commas")
    parser.add_argument("--minutes", type=float, default=10.0, help="mixed: how long")
    args = parser.parse_args()
    reached = told(asyncio.run(COMMANDS[args.what](args)))
    print("\nall goals reached" if reached else "\nfailed")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
