"""From the traffic and the running plan to the plan that is wanted, with its reason. It decides; it changes nothing."""

from collections.abc import Mapping
from typing import NamedTuple

from dilaserve.cost import StepCost
from dilaserve.fleet import NEVER, Kind, Point, points, unloaded
from dilaserve.policy import moves, planning
from dilaserve.policy.planning import Ground, Offered, Proposal
from dilaserve.quality import Forecast, QualityProfile
from dilaserve.traffic import Stream

UNHURRIED_ROWS = 16  # rows on an instance that are looked at where nobody has a deadline
TRUSTED = 4.0  # requests seen at which half of a gain is believed
MOST_TABLES = 512  # that are kept


class Demand(NamedTuple):
    """What the planner is asked: the traffic, the ranks that are alive, the running groups, and whether a change of
    plan is under way.
    """

    streams: tuple[Stream, ...]
    alive: tuple[int, ...]
    running: tuple[moves.Group, ...]
    pending: bool = False


class Advice(NamedTuple):
    """The groups to run from now on (those that run, if nothing should change) and why.

    `expected` is what this plan should achieve, `gain` what it is better than the running one, in shares on time.
    """

    plan: tuple[moves.Group, ...]
    adopted: bool
    reason: str
    expected: Proposal
    gain: float


class Setup(NamedTuple):
    """What does not change while serving.

    `degrees` may be formed; `rows` with promises may be on an instance; `levels` of the threshold may be used, within
    `budget` points (None: off); `pause` are the seconds that a new instance costs, `overhead` those of a step outside
    the worker; `sheds`: hopeless work is given up.
    """

    degrees: tuple[int, ...] = (1, 2, 4, 8)
    rows: int = 6
    levels: int = 4
    budget: float | None = 0.9
    pause: float = 0.1
    sheds: bool = True
    overhead: float = 0.0


class Planner:
    """Keeps the tables of operating points that were needed; `learned` renews the laws behind them."""

    def __init__(self, laws: Mapping[int, StepCost], quality: QualityProfile, setup: Setup | None = None) -> None:
        self.setup = setup or Setup()
        self.learned(laws, quality)

    def learned(self, laws: Mapping[int, StepCost], quality: QualityProfile) -> None:
        """`laws` by degree; degrees without one are never formed."""
        self.laws, self.forecast = dict(laws), Forecast(quality)
        self.tables: dict[tuple[Kind, int, int], list[Point]] = {}

    def advise(self, demand: Demand) -> Advice:
        """Pure but for the tables; takes some tens of milliseconds, so not on the loop."""
        possible = [degree for degree in self.setup.degrees if degree in self.laws]
        ground = Ground(moves.groups(demand.alive, possible), shapes(demand.running))
        offered = [self.offered(stream, ground) for stream in demand.streams]
        running = demand.running
        if not ground.groups:
            nothing = Proposal({}, 0.0, 0.0, 0.0, 0.0)
            return Advice((), bool(running), "no device is left that could hold an instance", nothing, 0.0)
        pause, budget, held = self.setup.pause, self.setup.budget, planning.kept(ground.running, ground)
        now = planning.propose(offered, ground, pause, budget, held)
        wanted = planning.propose(offered, ground, pause, budget)
        plan = moves.layout(wanted.counts, demand.alive, running)
        share = moves.changed(running, plan)
        seen = sum(stream.seen for stream in demand.streams)
        gain = planning.gain(wanted, now, share, pause) * seen / (seen + TRUSTED)
        if planning.worth_switching(gain, share, demand.pending):
            return Advice(plan, True, planning.explained(offered, wanted, now, True), wanted, gain)
        reason = planning.explained(offered, wanted, now, False)
        if held == dict(ground.running) or demand.pending:
            return Advice(running, False, reason, now, gain)
        return Advice(moves.layout(held, demand.alive, running), True, f"devices came or went; {reason}", now, gain)

    def offered(self, stream: Stream, ground: Ground) -> Offered:
        rate = planning.expected(stream.rate, stream.backlog, self.setup.sheds)
        kind = stream.kind
        devices = planning.devices(ground)
        tables = {degree: self.table(kind, degree, max(1, devices // degree)) for degree in ground.groups}
        reference = unloaded(self.laws[min(self.laws)], self.forecast, kind, self.setup.overhead)
        return Offered(stream.name, rate, reference, tables, kind.weight)

    def table(self, kind: Kind, degree: int, instances: int) -> list[Point]:
        key = kind._replace(weight=1.0), degree, instances
        if key not in self.tables:
            if len(self.tables) >= MOST_TABLES:
                self.tables.clear()
            rows = UNHURRIED_ROWS if kind.deadline == NEVER else self.setup.rows
            setup = self.setup
            self.tables[key] = points(
                self.laws[degree], self.forecast, kind, instances, rows, setup.levels, setup.overhead
            )
        return self.tables[key]


def shapes(groups: tuple[moves.Group, ...]) -> dict[int, int]:
    """Instances by degree."""
    found: dict[int, int] = {}
    for group in groups:
        found[len(group)] = found.get(len(group), 0) + 1
    return found
