"""How many instances of each tensor-parallel degree serve the traffic best: a small mixed-integer linear program.

It knows operating points and rates. It does not know single devices or the time; `adoption` says when to switch.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

LATENCY = 0.05  # on-time share that one unloaded latency more or less counts as; a larger value would trade deadlines
SLOWEST = 2.0  # times the unloaded latency; anything slower counts as this much
LOWERED = 0.02  # on-time share that each level of lowered threshold costs: latency alone never lowers one
MIXED = 0.03  # on-time share that each further degree in a plan costs: routing errs, and instances pool less
AMORTISED = 30.0  # seconds that a plan is expected to stay; spreads the cost of switching to it
GAP = 1e-3  # relative distance from the optimum at which the solver stops
PATIENCE = 2.0  # seconds after which the solver returns the best plan found so far

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
