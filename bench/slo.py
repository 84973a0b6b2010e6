"""Deadlines met under load: this server and the usual ways, over real HTTP, same arrivals, one run side by side.

    python bench/slo.py [--loads .4,.6,.8,.85,1,1.3,2] [--scales 1.5,3,5,1.5+8] [--seeds 3] [--seconds 12] [--out DIR]
    python bench/slo.py --systems dilaserve --some-loads "" --loads .4 --seconds 75 [--rate RATE]

Every system is a configuration of the same server on the same devices, and all are up all the time. 1.0x is the load
at which first come, first served at threshold .9 saturates: what it finishes when everything waits at once, which takes
seconds and is nearer the truth than looking for the rate at which waiting begins to grow. A request's deadline is a
multiple of the unloaded latency of its class at .9 (its task and the number of operations in it), measured first: twice
it at every load, and `--scales` at `--some-loads` with one seed, and there also one deadline for a whole task. Whatever
was not answered in time counts as missed, declined requests too. The requests are of tasks that take several steps, as
those of large models do (`--tasks`); at `--some-loads` there is also one table of all tasks, most of which are done in
a step or two, where nobody can decide much.

Accuracy is paired: every problem that was asked is also asked alone at .9, and the drop is the difference on the same
problems. Each run is a tenant of its own, so that no run lives on the accuracy budget of another. The clients run in
this process, so they and the servers share the machine.
"""

import argparse
import asyncio
import os
from pathlib import Path

from attainment.plot import drawn
from attainment.runner import measure
from attainment.systems import SYSTEMS
from attainment.tables import printed

from dilaserve.sim.workload import ARRIVALS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [float(part) for part in text.split(",") if part]  # noqa: E731
    systems = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument("--model", default="dilaserve-tiny")
    parser.add_argument("--devices", default=",".join(["cpu"] * (os.cpu_count() or 1)))
    parser.add_argument("--loads", type=numbers, default=[0.4, 0.6, 0.8, 0.85, 1.0, 1.3, 2.0], help="with deadlines 2x")
    parser.add_argument("--scales", type=lambda text: text.split(","), default=["1.5", "3", "5", "1.5+8"])
    parser.add_argument("--some-loads", type=numbers, default=[0.8, 1.0], help="with the other deadlines")
    parser.add_argument("--systems", type=systems, default=tuple(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--tasks", type=lambda text: tuple(text.split(",")), default=("chain", "word"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--unloaded", type=int, default=15, help="requests a task for the unloaded latency")
    parser.add_argument("--flood", type=int, default=500, help="requests at once that 1.0x is measured with")
    parser.add_argument("--rate", type=float, help="requests a second at 1.0x, instead of looking for it")
    parser.add_argument("--arrivals", choices=ARRIVALS, default="poisson")
    parser.add_argument("--trace", type=Path, help="CSV of arrival_s,prompt_tokens,output_tokens; only times are used")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    if unknown := set(args.systems) - set(SYSTEMS):
        parser.error(f"--systems: {', '.join(sorted(unknown))} is none of {', '.join(SYSTEMS)}")
    if not args.loads:
        parser.error("--loads: at least one")
    found = asyncio.run(measure(args))
    text = printed(found, args)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "slo.md").write_text(text)
    drawn(found, args)


if __name__ == "__main__":
    main()
