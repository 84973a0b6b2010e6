"""A box of eight H200s for tests of the planner: step costs, every aligned plan, and demands."""

from hypothesis import strategies as st

from dilaserve.planner.operating_points import points, unloaded
from dilaserve.planner.packing import block
from dilaserve.planner.program import Offered
from dilaserve.planner.step_pace import Kind
from dilaserve.profile.forecast import Forecast
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import by_degree
from dilaserve.types import Demand, Flow, Plan

PROFILE = llada_8b_h200()
LAWS = by_degree(PROFILE.costs)
FORECAST = Forecast(PROFILE.quality)
ALONE = unloaded(LAWS[1], FORECAST, Kind(456, 256))
DEGREES = (1, 2, 4, 8)


def every_layout(alive, degrees, start=0, size=8):
    """All aligned layouts of one block that leave no device over where degree 1 is possible; the slow way."""
    found = set()
    if size in degrees and all(rank in alive for rank in range(start, start + size)):
        found.add((block(start, size),))
    if size == 1:
        return found | {()}
    half = size // 2
    for left in every_layout(alive, degrees, start, half):
        for right in every_layout(alive, degrees, start + half, half):
            found.add(left + right)
    return found


def counts_of(plan):
    return {degree: sum(len(group) == degree for group in plan) for degree in {len(group) for group in plan}}


def full(plans, alive):
    return [plan for plan in plans if sum(map(len, plan)) == len(alive)]


ALIVE = st.sets(st.integers(0, 7), min_size=1)


def offered(rate, tightness, name="x", devices=8):
    kind = Kind(456, 256, tightness * ALONE)
    tables = {degree: points(LAWS[degree], FORECAST, kind, max(1, devices // degree), 6) for degree in DEGREES}
    return Offered(name, rate, ALONE, tables)


def demand(mix, plan, ranks=range(8), seconds=4.0, degrees=DEGREES, backlog=0, met=0, ended=0):
    """`mix`: requests a second by tightness."""
    flows = [Flow(canvas_tokens=456, answer_tokens=256, tightness=scale, rate=rate) for scale, rate in mix.items()]
    return Demand(
        seconds=seconds,
        flows=tuple(flows),
        backlog=backlog,
        plan=Plan(plan),
        ranks=tuple(ranks),
        degrees=degrees,
        met=met,
        ended=ended,
    )


SINGLE = tuple((rank,) for rank in range(8))
