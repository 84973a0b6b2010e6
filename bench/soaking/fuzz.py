"""Fuzzed requests over all routes against a server process; see `bench/soak.py`."""

import argparse
import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from soaking.cases import case
from soaking.figures import Figure, none_of, table
from soaking.probe import STALL, Waits, probing
from soaking.processes import ADMIN_KEY, Server, serving
from soaking.wire import Case, Outcome, exchange, pattern

EXAMPLES = 3  # case numbers told for each fault
WARM_UP = 300  # requests before resident memory is first read
FLAGS = ("--admin-key", ADMIN_KEY, "--devices", "cpu,cpu")


class Tally:
    """What became of the cases: statuses and faults by kind, and the numbers of the first cases with each fault."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.faults: Counter[str] = Counter()
        self.faulty: Counter[str] = Counter()
        self.examples: defaultdict[str, list[int]] = defaultdict(list)

    def take(self, number: int, done: Case, outcome: Outcome) -> None:
        self.sent[done.kind] += 1
        self.statuses[done.kind].update(str(answer.status) for answer in outcome.answers)
        self.statuses[done.kind]["none"] += not outcome.answers
        self.faulty[done.kind] += bool(outcome.faults)
        for fault in map(pattern, outcome.faults):
            self.faults[fault] += 1
            if len(self.examples[fault]) < EXAMPLES:
                self.examples[fault].append(number)

    def told(self) -> None:
        shown = lambda counts: ", ".join(f"{status}: {counts[status]}" for status in sorted(counts) if counts[status])  # noqa: E731
        rows = [[kind, self.sent[kind], shown(self.statuses[kind]), self.faulty[kind]] for kind in sorted(self.sent)]
        print(table(["kind", "cases", "answers by status", "with faults"], rows), "\n")
        for fault, count in self.faults.most_common():
            print(f"- {count} times, for example --only {','.join(map(str, self.examples[fault]))}: {fault}")


async def fuzz(args: argparse.Namespace) -> list[Figure]:
    tally, ends, flights = Tally(), list[str](), Flights()
    numbers = [int(number) for number in args.only.split(",")] if args.only else range(args.requests)
    async with serving(("--model", args.model, *FLAGS), ends) as server:
        warm = min(WARM_UP, len(numbers) // 3)
        began = time.perf_counter()
        await send_all(server, args, numbers[:warm], tally, flights)
        first = server.resident()
        async with probing(server.host, server.port, server.pid) as waits:
            await send_all(server, args, numbers[warm:], tally, flights)
        seconds, last, traces = time.perf_counter() - began, server.resident(), server.tracebacks()
    tally.told()
    told_stalls(waits[0], flights)
    for line in [*traces, *ends]:
        print(f"- {line}")
    undocumented = sum(count for fault, count in tally.faults.items() if fault.startswith("undocumented"))
    return [
        Figure("cases", f"{sum(tally.sent.values()):,} in {seconds:.0f} s, seed {args.seed}"),
        none_of("undocumented 5xx", undocumented),
        none_of("other faults of answers", tally.faults.total() - undocumented),
        none_of(f"loop stalls over {1000 * STALL:g} ms (waits for a core taken off)", len(waits[0].own)),
        Figure("waits for /health above that as seen", f"{len(waits[0].stalls)} of {waits[0].asked:,}"),
        Figure("longest wait for /health as seen", f"{1000 * waits[0].most:.0f} ms"),
        Figure("resident memory of the server", f"{first / 2**20:.0f} MiB, then {last / 2**20:.0f} MiB"),
        none_of("tracebacks in the log", len(traces)),
        none_of("faults of the server's end", len(ends)),
    ]


async def send_all(
    server: Server, args: argparse.Namespace, numbers: Iterable[int], tally: Tally, flights: "Flights"
) -> None:
    """So many clients share the cases."""
    left = iter(numbers)
    await asyncio.gather(*(client(server, args.seed, left, tally, flights) for _ in range(args.clients)))


async def client(server: Server, seed: int, numbers: Iterator[int], tally: Tally, flights: "Flights") -> None:
    for number in numbers:
        mine = case(seed, number)
        began = time.time()
        outcome = await exchange(server.host, server.port, mine)
        flights.append((began, time.time(), number, mine.kind))
        tally.take(number, mine, outcome)
        if not server.up:
            return


class Flights(list[tuple[float, float, int, str]]):
    """When each case was under way."""

    def during(self, begin: float, end: float) -> list[tuple[int, str]]:
        return [(number, kind) for began, ended, number, kind in self if began < end and ended > begin]


def told_stalls(waits: Waits, flights: Flights, most: int = 8) -> None:
    """The longest stalls, with the cases that were under way."""
    for wait in sorted(waits.own, key=lambda wait: -wait.own)[:most]:
        beside = flights.during(wait.at, wait.at + wait.seen)
        suspects = ", ".join(f"{number} ({kind})" for number, kind in beside)
        print(f"- {1000 * wait.seen:.0f} ms ({1000 * wait.own:.0f} without waits for a core) beside {suspects}")
