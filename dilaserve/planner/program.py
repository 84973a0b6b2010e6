"""How many instances of each tensor-parallel degree the traffic wants: a small linear MILP, and when to act on it.

It knows operating points and rates; it does not know which devices there are, nor what time it is.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

LATENCY = 0.05  # what halving the latency is worth at most, in shares on time; more is punished by bursts
SLOWEST = 2.0  # times the unloaded latency; what is slower counts as this
LOWERED = 0.02  # what a level of the threshold costs, so that none is lowered for the latency alone
MIXED = 0.03  # what each further degree costs: a mix sends some requests to the wrong kind, and pools less
HEADROOM = 1.1  # times the rate that was seen
STEEPEST = 1.15  # times, that a rising load is taken to rise further until a plan stands
SETTLING = 0.9  # what is left of the unrest after a change at the next question
HORIZON = 10.0  # seconds in which a backlog is to be worked off
AMORTISED = 30.0  # seconds that a plan is expected to last
MARGIN = 0.01  # gain below which nothing changes, in shares on time
DOUBT = 0.1  # of what is missed: so much more must be gained where forecasts are poor, which is past the knee
SURE = 0.1  # gain beyond that at which nobody looks twice
LATE = 3.0  # questions to the planner until a change stands that comes too late
SURGE = 2.0  # times, that a load may rise before a plan which cannot carry it is left
OFTEN = 1 / 15  # surges a question that are feared where none were seen: one while a plan lasts
KNOWN = 4  # questions with traffic before which nothing changes for the latency alone
LOW, HIGH = 0.4, 0.6  # of the peak: a load that comes from below the one to above the other has surged
BLUR = 0.03  # share missed that is as good as none
MOST_SURPRISED = 2.0  # times
GAP, PATIENCE = 1e-3, 2.0  # relative, and seconds after which the best plan found so far is taken

Counts = Mapping[int, int]  # instances by degree


class Point(NamedTuple):
    """How a fleet fares when each instance gets `rate` requests a second at one level of the threshold.

    `on_time` is the share that meets the deadline, `drop` in points of accuracy, `latency` the mean of those on time.
    """

    level: int
    rate: float
    on_time: float
    drop: float
    latency: float


class Offered(NamedTuple):
    """One class of requests: requests a second, and how instances of each degree would fare with it.

    `name` is for words, `reference` its unloaded latency on one device, `weight` what one request is worth.
    """

    name: str
    rate: float
    reference: float
    points: Mapping[int, Sequence[Point]]
    weight: float = 1.0


class Ground(NamedTuple):
    """What may be formed and what is: aligned groups of devices by possible degree, each as if no other were taken,
    and the running instances by degree.
    """

    groups: Counts
    running: Counts


class Proposal(NamedTuple):
    """Instances by degree and what is expected of them.

    `value` is the weighted share on time less the tie-breakers and what mixing costs, `on_time` the plain share of what
    is offered, `latency` the mean of those on time, `drop` their mean drop in points.
    """

    counts: dict[int, int]
    value: float
    on_time: float
    latency: float
    drop: float


NOTHING = Proposal({}, 0.0, 0.0, 0.0, 0.0)


class Terms(NamedTuple):
    """The linear program: one column a point; then by degree instances, newly made ones, and whether there are any."""

    degrees: list[int]
    columns: list[tuple[int, Offered, Point]]
    served: np.ndarray  # requests a second on time, of one instance at each point
    offered: float


class Solution(NamedTuple):
    """A solution, None where there is none, and what it costs by the goal."""

    solution: np.ndarray | None
    cost: float


NOT_FOUND = Solution(None, np.inf)


class Constraint(NamedTuple):
    """A constraint: entries by column, and what they add up to at most or, `exact`, precisely."""

    entries: dict[int, float]
    limit: float
    exact: bool = False


def expected(rate: float, backlog: float, sheds: bool, rise: float = 1.0) -> float:
    """The rate to plan for; a backlog that is never shed says nothing about what is to come."""
    return HEADROOM * rise * rate + (backlog / HORIZON if sheds else 0.0)


def rise(loads: Sequence[float]) -> float:
    """How many times as high the load will soon be, if it rises half as fast as over the last four looks; 1 where it
    falls. Half, because chance alone makes loads rise.
    """
    if len(loads) < 4:
        return 1.0
    before, lately = sum(loads[-4:-2]), sum(loads[-2:])
    return min(STEEPEST, max(1.0, (1.0 + lately / max(1e-9, before)) / 2))


def switching(changed: float, pause: float) -> float:
    """What it costs to remake the share `changed` of all devices for `pause` seconds, in shares on time."""
    return changed * pause / AMORTISED


class PlanProgram:
    """What to do with this demand on this ground. `pause` are the seconds that a new instance costs.

    max Σ y r A w - latency - levels - switching(u) - MIXED Σ z over y ≥ 0 (instances at a point), integer n, binary z,
    u ≥ n - n(now), with Σ y = n ≤ most·z by degree, Σ y r ≤ λ by class, Σ y r A (D - budget) ≤ 0, and n such that
    aligned groups can be packed.
    Demand that cannot be met is served as far as it goes. What was solved once is remembered.
    """

    def __init__(self, offered: Sequence[Offered], ground: Ground, pause: float, budget: float | None = None) -> None:
        self.ground, self.pause = ground, pause
        self.terms = written(offered, ground)
        self.found: dict[tuple[tuple[int, int], ...], Solution] = {}
        if self.terms.columns:
            self.goal = objective(self.terms, pause, devices(ground))
            self.constraints = rows(self.terms, ground, budget)

    def proposal(self, held: Counts | None = None) -> Proposal:
        """The best counts, or what to expect of the counts that are `held`."""
        solution = None
        if self.terms.columns:
            solution = (self.best() if held is None else self.holding(held)).solution
        if solution is None:
            return NOTHING._replace(counts=kept(held or self.ground.running, self.ground))
        return read(self.terms, solution, self.pause, devices(self.ground))

    def best(self) -> Solution:
        """The optimum, the plans of one degree first where they leave no device over: each of them is a linear program,
        and so is a bound of what a mix can be worth. As that costs MIXED more, whole numbers must seldom be looked for.
        """
        pure = [{degree: count} for degree, count in self.ground.groups.items()]
        if not all(packable(counts, self.ground) for counts in pure):
            return self.mixed()
        known = min((self.holding(counts) for counts in pure), key=cost)
        if known.cost - self.bound() <= GAP * abs(known.cost):
            return known
        return min(known, self.mixed(), key=cost)

    def holding(self, counts: Counts) -> Solution:
        """With these counts."""
        key = tuple(sorted(counts.items()))
        if key not in self.found:
            self.found[key] = self.solved(self.goal, limits(self.terms, self.ground, counts), whole=False)
        return self.found[key]

    def mixed(self) -> Solution:
        return self.solved(self.goal, limits(self.terms, self.ground, None), whole=True)

    def bound(self) -> float:
        """What a plan of two degrees or more costs at least: with parts of instances, and mixing them for nothing."""
        goal = self.goal.copy()
        goal[-len(self.terms.degrees) :] = 0.0
        return self.solved(goal, limits(self.terms, self.ground, None), whole=False).cost + 2 * MIXED

    def solved(self, goal: np.ndarray, bounds: Bounds, whole: bool) -> Solution:
        """`whole`: instances are whole numbers."""
        integral = np.zeros(len(goal))
        if whole:
            integral[len(self.terms.columns) :] = np.repeat([1, 0, 1], len(self.terms.degrees))
        options = {"mip_rel_gap": GAP, "time_limit": PATIENCE}
        found = milp(goal, constraints=self.constraints, bounds=bounds, integrality=integral, options=options)
        return NOT_FOUND if found.x is None else Solution(found.x, float(found.fun))


def propose(
    offered: Sequence[Offered], ground: Ground, pause: float, budget: float | None = None, held: Counts | None = None
) -> Proposal:
    """The best counts for this demand, or what to expect of the counts that are `held`; see `PlanProgram`."""
    return PlanProgram(offered, ground, pause, budget).proposal(held)


def cost(found: Solution) -> float:
    return found.cost


def written(offered: Sequence[Offered], ground: Ground) -> Terms:
    degrees = sorted(ground.groups)
    columns = [
        (degree, one, point)
        for degree in degrees
        for one in offered
        for point in one.points.get(degree, ())
        if one.rate > 0.0 and point.rate > 0.0
    ]
    served = np.array([point.rate * point.on_time for _, _, point in columns])
    return Terms(degrees, columns, served, sum(one.rate for one in offered))


def devices(ground: Ground) -> int:
    """How many can be used: what is left over cannot hold the smallest instance."""
    smallest = min(ground.groups)
    return smallest * ground.groups[smallest]


def objective(terms: Terms, pause: float, devices: int) -> np.ndarray:
    """What milp minimises: [points | n by degree | u by degree | z by degree]."""
    worth = [worth_of(one, point) for _, one, point in terms.columns]
    remade = [switching(degree / devices, pause) for degree in terms.degrees]
    none, mixed = np.zeros(len(terms.degrees)), np.full(len(terms.degrees), MIXED)
    return np.concatenate([-terms.served * worth / terms.offered, none, remade, mixed])


def worth_of(one: Offered, point: Point) -> float:
    """Of a request that is on time."""
    slowness = min(SLOWEST, point.latency / one.reference)
    return one.weight - LATENCY * slowness - LOWERED * point.level


def limits(terms: Terms, ground: Ground, held: Counts | None) -> Bounds:
    columns, size = len(terms.columns), len(terms.degrees)
    low, high = np.zeros(columns + 3 * size), np.full(columns + 3 * size, np.inf)
    for i, degree in enumerate(terms.degrees):
        high[columns + i], high[columns + 2 * size + i] = ground.groups[degree], 1
        if held is not None:
            low[columns + i] = high[columns + i] = held.get(degree, 0)
            low[columns + 2 * size + i] = high[columns + 2 * size + i] = held.get(degree, 0) > 0
    return Bounds(low, high)


def rows(terms: Terms, ground: Ground, budget: float | None) -> LinearConstraint:
    """The devices that can be used are all used; every other row is at most its limit."""
    columns, size = len(terms.columns), len(terms.degrees)
    places = {degree: columns + i for i, degree in enumerate(terms.degrees)}
    classes: dict[int, Constraint] = {}  # by identity, as classes may be called alike
    busy: dict[int, dict[int, float]] = {degree: {} for degree in terms.degrees}
    for i, (degree, one, point) in enumerate(terms.columns):
        classes.setdefault(id(one), Constraint({}, one.rate)).entries[i] = point.rate
        busy[degree][i] = 1.0
    found = list(classes.values())
    for degree, place in places.items():
        packed = {places[other]: other / degree for other in terms.degrees if other >= degree}
        found.append(Constraint({**busy[degree], place: -1.0}, 0.0))
        found.append(Constraint({place: 1.0, place + size: -1.0}, ground.running.get(degree, 0)))
        found.append(Constraint(packed, ground.groups[degree], exact=degree == min(places)))
        found.append(Constraint({place: 1.0, place + 2 * size: -float(ground.groups[degree])}, 0.0))
    if budget is not None:
        dear = [point.drop - budget for _, _, point in terms.columns]
        found.append(Constraint(dict(enumerate(terms.served * dear)), 0.0))
    high = np.array([row.limit for row in found], dtype=float)
    low = np.where([row.exact for row in found], high, -np.inf)
    return LinearConstraint(matrix(found, columns + 3 * size), low, high)


def matrix(rows: Sequence[Constraint], width: int) -> csr_array:
    values = np.concatenate([np.fromiter(row.entries.values(), float) for row in rows])
    keys = np.concatenate([np.fromiter(row.entries, int) for row in rows])
    ends = np.cumsum([0, *(len(row.entries) for row in rows)])
    return csr_array((values, keys, ends), shape=(len(rows), width))


def read(terms: Terms, solution: np.ndarray, pause: float, devices: int) -> Proposal:
    columns, size = len(terms.columns), len(terms.degrees)
    served = terms.served * solution[:columns]
    total = max(1e-12, float(served.sum()))
    counts = {
        degree: round(count)
        for degree, count in zip(terms.degrees, solution[columns : columns + size], strict=True)
        if round(count)
    }
    value = sum(amount * worth_of(one, point) for amount, (_, one, point) in zip(served, terms.columns, strict=True))
    return Proposal(
        counts=counts,
        value=float(value) / terms.offered - MIXED * max(0, len(counts) - 1),
        on_time=min(1.0, total / terms.offered),
        latency=float(served @ [point.latency for _, _, point in terms.columns]) / total,
        drop=float(served @ [point.drop for _, _, point in terms.columns]) / total,
    )


def kept(running: Counts, ground: Ground) -> dict[int, int]:
    """The running instances as far as they may go on, and the smallest ones on all other devices."""
    smallest = min(ground.groups)
    counts = {degree: count for degree, count in running.items() if count and degree in ground.groups}
    free = devices(ground) - sum(degree * count for degree, count in counts.items())
    if free > 0:
        counts[smallest] = counts.get(smallest, 0) + free // smallest
    return counts


def packable(counts: Counts, ground: Ground) -> bool:
    """Whether aligned groups with these counts fit, and leave no device over that could be used."""
    nested = {
        degree: sum(other * count / degree for other, count in counts.items() if other >= degree)
        for degree in ground.groups
    }
    fits = all(nested[degree] <= most for degree, most in ground.groups.items())
    smallest = min(ground.groups)
    return counts.keys() <= ground.groups.keys() and fits and nested[smallest] == ground.groups[smallest]


def gain(wanted: Proposal, now: Proposal, changed: float, pause: float) -> float:
    """What a switch is worth after its cost, when the share `changed` of all devices is remade."""
    return wanted.value - now.value - switching(changed, pause)


def worth_switching(gain: float, changed: float, missed: float = 0.0, unrest: float = 0.0, toll: float = 0.0) -> bool:
    """Whether to adopt: the gain must be more than noise (hysteresis after SHEPHERD)."""
    return changed > 0.0 and gain > least_gain(missed, unrest, toll)


def least_gain(missed: float, unrest: float, toll: float) -> float:
    """What must be gained, in shares on time, where the share `missed` is expected under either plan, and the other one
    would lose the share `toll` more in a surge.

    It is what forecasts are off by, and more so after other changes (`unrest`). Two kinds of change are not weighed
    alike. Where nothing is missed, only latency is to be gained: the plan must stand a surge, for one is feared while
    it lasts. Where requests are missed and the other plan makes room, waiting for certainty costs deadlines, and
    being wrong hardly more than latency.
    """
    usual = (1.0 + unrest) * (MARGIN + DOUBT * missed)
    if missed <= BLUR:
        return usual + OFTEN * LATE * SURGE * max(0.0, toll)
    return MARGIN if toll < 0.0 else usual


def surges(loads: Sequence[float]) -> int:
    """How many times the load has risen to near its peak from far below."""
    low, high = LOW * max(loads, default=0.0), HIGH * max(loads, default=0.0)
    count, below = 0, False
    for load in loads:
        count += below and load >= high
        below = load < low or (below and load < high)
    return count


def risk(loads: Sequence[float], loss: float) -> float:
    """What a plan that loses the share `loss` at the peak of these `loads` costs, in shares of the last one's requests:
    so often do surges come, and for so long do they find the wrong plan.
    """
    if not loads or loss <= 0.0:
        return 0.0
    return surges(loads) / len(loads) * LATE * loss * max(loads) / max(1e-9, loads[-1])


def surprise(foretold: float, seen: float) -> float:
    """How many times as much was missed as the share on time that was foretold has it."""
    ratio = (1.0 - seen + BLUR) / (1.0 - foretold + BLUR)
    return min(MOST_SURPRISED, max(1.0 / MOST_SURPRISED, ratio))


def believed(foretold: float, surprise: float) -> float:
    """The share on time that is to be expected where so many times as much is missed as foretold."""
    return min(1.0, max(0.0, 1.0 - (1.0 - foretold + BLUR) * surprise + BLUR))
