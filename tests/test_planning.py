"""Which instances there should be: operating points, the linear program, layouts, and when to change."""

import itertools
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dilaserve.config import Config
from dilaserve.planner.operating_points import NEVER, RATES, Kind, points, reached, unloaded
from dilaserve.planner.packing import block, changed, groups, layout, quick_layout
from dilaserve.planner.planner import CLASSES, Planner, Setup, explained, few
from dilaserve.planner.process import PlannerProcess
from dilaserve.planner.program import (
    BLUR,
    DOUBT,
    KNOWN,
    LATE,
    MARGIN,
    NOTHING,
    OFTEN,
    SURGE,
    Ground,
    Offered,
    Proposal,
    believed,
    expected,
    gain,
    kept,
    least_gain,
    packable,
    propose,
    rise,
    risk,
    surges,
    surprise,
    switching,
    worth_switching,
)
from dilaserve.planner.track_record import FADING, FEW, TrackRecord
from dilaserve.profile.decode_speed import ANY, BINS, PARTS, Law, QualityProfile, TaskProfile
from dilaserve.profile.forecast import Forecast
from dilaserve.scheduler.arrivals import WINDOW, Seen, Traffic
from dilaserve.scheduler.rules.admission import HOPELESS
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


# layouts


def test_a_box_of_eight_has_26_aligned_layouts():
    assert len(full(every_layout(set(range(8)), DEGREES), range(8))) == 26


@pytest.mark.parametrize(
    ("counts", "alive", "running", "expected"),
    [
        ({8: 1}, range(8), [], ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ({2: 2, 4: 1}, range(8), [(0, 1), (2, 3)], ((0, 1), (2, 3), (4, 5, 6, 7))),
        ({2: 2, 4: 1}, range(8), [], ((0, 1, 2, 3), (4, 5), (6, 7))),
        ({1: 4, 2: 2}, range(8), [(2, 3), (4, 5)], ((0,), (1,), (2, 3), (4, 5), (6,), (7,))),
        ({2: 3}, range(6), [], ((0, 1), (2, 3), (4, 5))),
        ({1: 3, 2: 2}, [0, 1, 3, 4, 5, 6, 7], [(4, 5)], ((0, 1), (3,), (4, 5), (6,), (7,))),
        ({}, range(8), [], ()),
    ],
)
def test_a_layout_keeps_what_runs(counts, alive, running, expected):
    assert layout(counts, alive, running) == expected


def test_counts_that_do_not_fit_are_an_error():
    for counts, alive in (({4: 1}, [0, 1, 2, 4, 5]), ({2: 1, 1: 8}, range(8)), ({3: 1}, [1, 2, 3])):
        with pytest.raises(ValueError, match="do not fit"):
            layout(counts, alive)


def valid(plan, counts):
    """Whether the groups are aligned and disjoint, and as many as wanted."""
    ranks = list(itertools.chain(*plan))
    aligned = all(group == block(group[0], len(group)) and group[0] % len(group) == 0 for group in plan)
    return aligned and len(ranks) == len(set(ranks)) and Counter(map(len, plan)) == counts


@pytest.mark.parametrize("devices", [256, 4096])
def test_plans_of_thousands_of_devices_keep_what_they_can(devices):
    alive = set(range(devices)) - {5, 77}
    twos = tuple(block(start, 2) for start in range(0, devices // 2, 2) if alive.issuperset(block(start, 2)))
    counts = {8: devices // 64, 4: devices // 32, 2: len(twos)}
    counts[1] = len(alive) - sum(degree * count for degree, count in counts.items())
    found = layout(counts, alive, twos)
    assert valid(found, counts)
    assert set(twos) <= set(found)
    with pytest.raises(ValueError, match="do not fit"):
        layout({8: devices // 8}, alive)


ALIVE = st.sets(st.integers(0, 7), min_size=1)


@settings(deadline=None)
@given(ALIVE, ALIVE, st.randoms(use_true_random=False))
def test_layouts_are_aligned_disjoint_and_keep_as_much_as_any_other(alive, before, chance):
    old = chance.choice(full(every_layout(before, DEGREES), before))
    new = chance.choice(full(every_layout(alive, DEGREES), alive))
    found = layout(counts_of(new), alive, old)
    assert sorted(itertools.chain(*found)) == sorted(alive)
    assert valid(found, counts_of(new))
    assert valid(quick_layout(counts_of(new), alive, old), counts_of(new))
    rivals = [plan for plan in every_layout(alive, DEGREES) if counts_of(plan) == counts_of(new)]
    score = lambda plan: (len(set(plan) & set(old)), sum(map(len, set(plan) & set(old))))  # noqa: E731
    assert score(found) == max(map(score, rivals))
    assert changed(old, found) == pytest.approx(sum(len(group) for group in found if group not in old) / len(alive))


@given(ALIVE, st.sets(st.sampled_from(DEGREES), min_size=1))
def test_counts_can_be_packed_exactly_when_the_nested_sums_say_so(alive, degrees):
    most = groups(alive, degrees)
    packable = {tuple(sorted(counts_of(plan).items())) for plan in every_layout(alive, degrees)}
    for picked in itertools.product(*(range(most[degree] + 1) for degree in most)):
        counts = {degree: count for degree, count in zip(most, picked, strict=True) if count}
        nested = all(
            sum(count * other / degree for other, count in counts.items() if other >= degree) <= most[degree]
            for degree in most
        )
        assert nested == (tuple(sorted(counts.items())) in packable)


# operating points


KINDS = st.builds(
    Kind, st.sampled_from([128, 456, 1500]), st.sampled_from([32, 256]), st.sampled_from([0.3, 0.8, 2.0, NEVER])
)


@settings(deadline=None, max_examples=8)
@given(KINDS, st.sampled_from(DEGREES), st.integers(1, 12))
def test_more_load_never_helps_nor_does_more_time_hurt_below_the_knee(kind, degree, instances):
    table = points(LAWS[degree], FORECAST, kind, instances, 6)
    for level in {point.level for point in table}:
        own = [point for point in table if point.level == level]
        assert all(0.0 < point.on_time <= 1.0 + 1e-9 and point.latency > 0.0 for point in own)
        for less, more in itertools.pairwise(own):
            assert less.rate < more.rate
            assert more.on_time <= less.on_time + 0.01
    relaxed = points(LAWS[degree], FORECAST, kind._replace(deadline=2 * kind.deadline), instances, 6)
    peak = max(point.rate for point in points(LAWS[degree], FORECAST, kind._replace(deadline=NEVER), 1, 6, levels=1))
    calm = [point for point in table if point.level == 0 and point.rate < 0.8 * peak / RATES[-1]]
    assert all(reached(relaxed, point.rate) >= 0.99 * point.rate * point.on_time for point in calm)


def test_requests_whose_steps_are_known_to_the_last_one_have_points_too():
    law = Law(((1.0,),) * len(BINS))  # every text ends in its first step
    task = TaskProfile(laws=((law,) * PARTS,), drop=(0.0,), mean_drop=(0.0,))
    sure = Forecast(QualityProfile(tasks={ANY: task}, levels=(0.9,), spread=0.0))
    kind = Kind(456, 32)
    alone = unloaded(LAWS[1], sure, kind)
    shares = [point.on_time for point in points(LAWS[1], sure, kind._replace(deadline=alone * HOPELESS), 4, 6)]
    assert shares
    assert all(0.0 <= share <= 1.0 + 1e-9 for share in shares)


def test_a_pool_meets_more_deadlines_than_a_lone_instance():
    kind = Kind(456, 256, 2 * ALONE)
    pooled, lone = (
        {point.rate: point.on_time for point in points(LAWS[1], FORECAST, kind, instances, 6, levels=1)}
        for instances in (8, 1)
    )
    busy = max(pooled.keys() & lone.keys())
    assert pooled[busy] > lone[busy] + 0.05


def test_an_hour_is_as_good_as_no_deadline_until_the_fleet_is_full():
    hour, never = (points(LAWS[2], FORECAST, Kind(456, 256, limit), 4, 6, levels=1) for limit in (3600.0, NEVER))
    assert [point.on_time for point in hour[:6]] == pytest.approx([point.on_time for point in never[:6]], abs=0.02)


def test_degrees_make_a_lone_request_faster_and_the_box_slower():
    alone = [unloaded(LAWS[degree], FORECAST, Kind(456, 256)) for degree in DEGREES]
    assert alone == sorted(alone, reverse=True)
    peaks = [max(p.rate for p in points(LAWS[degree], FORECAST, Kind(456, 256), 1, 6)) / degree for degree in DEGREES]
    assert peaks == sorted(peaks, reverse=True)


# the linear program


def offered(rate, tightness, name="x", devices=8):
    kind = Kind(456, 256, tightness * ALONE)
    tables = {degree: points(LAWS[degree], FORECAST, kind, max(1, devices // degree), 6) for degree in DEGREES}
    return Offered(name, rate, ALONE, tables)


TABLES = {(rate, tightness): offered(rate, tightness) for rate in (1.0, 8.0, 24.0, 80.0) for tightness in (0.8, 1.2, 3)}
RUNNING = [{1: 8}, {2: 4}, {8: 1}, {1: 4, 4: 1}]
LOADS = st.lists(st.sampled_from(sorted(TABLES)), max_size=3, unique=True)


def traffic_of(loads):
    return [TABLES[load]._replace(name=str(load)) for load in loads]


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([(8.0, 0.8)], {4: 2}),
        ([(24.0, 1.2)], {2: 4}),
        ([(80.0, 3)], {1: 8}),
        ([(1.0, 3)], {8: 1}),
    ],
)
def test_tight_deadlines_and_little_load_want_tensor_parallelism(loads, expected):
    assert propose(traffic_of(loads), Ground(groups(range(8), DEGREES), {1: 8}), 0.0, 0.9).counts == expected


@settings(deadline=None, max_examples=25)
@given(LOADS, st.sampled_from(RUNNING), st.sampled_from([0.0, 0.2, 150.0]), st.sampled_from([None, 0.9]))
def test_no_other_counts_would_be_better(loads, running, pause, budget):
    ground, traffic = Ground(groups(range(8), DEGREES), running), traffic_of(loads)
    found = propose(traffic, ground, pause, budget)
    assert sum(degree * count for degree, count in found.counts.items()) == 8
    assert 0.0 <= found.on_time <= 1.0
    assert budget is None or found.drop <= budget + 1e-6

    def net(proposal):
        new = sum(degree * max(0, count - running.get(degree, 0)) for degree, count in proposal.counts.items())
        return proposal.value - switching(new / 8, pause)

    every = {tuple(sorted(counts_of(plan).items())) for plan in full(every_layout(set(range(8)), DEGREES), range(8))}
    for counts in every:
        assert net(propose(traffic, ground, pause, budget, held=dict(counts))) <= net(found) + 2e-3


@settings(deadline=None, max_examples=15)
@given(LOADS.filter(bool), ALIVE, st.sets(st.sampled_from(DEGREES), min_size=1))
def test_whatever_is_alive_is_used_as_far_as_it_can_be(loads, alive, degrees):
    ground = Ground(groups(alive, degrees), {})
    assume(ground.groups)
    counts = propose(traffic_of(loads), ground, 0.2, 0.9).counts
    used = sum(map(len, layout(counts, alive)))
    assert used == max(sum(map(len, plan)) for plan in every_layout(alive, degrees))


def test_demand_beyond_all_capacity_is_served_as_far_as_it_goes():
    found = propose([offered(1e5, 0.8)], Ground(groups(range(8), DEGREES), {1: 8}), 0.2, 0.9)
    assert 0.0 < found.on_time < 0.01


def test_a_deadline_that_nothing_can_meet_and_no_traffic_change_nothing():
    ground = Ground(groups(range(8), DEGREES), {2: 4})
    assert propose([offered(5.0, 0.01)], ground, 0.2, 0.9).counts == {2: 4}
    assert propose([], ground, 0.2, 0.9).counts == {2: 4}
    assert kept({2: 3}, ground) == {1: 2, 2: 3}
    assert kept({16: 1}, ground) == {1: 8}


@pytest.mark.parametrize("flows", [(), (Flow(canvas_tokens=456, answer_tokens=256, tightness=2.0, rate=3.0),)])
def test_a_plan_that_lost_a_device_stays_as_far_as_it_goes(flows):
    profile = llada_8b_h200()
    laws = {degree: profile.costs[f"cuda x{degree}"] for degree in DEGREES}
    for running, alive, counts in (
        (((0, 1), (2, 3), (4, 5), (6, 7)), range(7), {2: 3, 1: 1}),
        (((0, 1, 2, 3), (4, 5), (6, 7)), range(1, 8), {2: 2, 1: 3}),
        (((0, 1),), range(1, 2), {1: 1}),
    ):
        asked = Demand(seconds=5.0, flows=flows, backlog=0, plan=Plan(running), ranks=tuple(alive), degrees=DEGREES)
        plan = Planner(laws, profile.quality).advise(asked).plan
        assert plan is not None
        assert Counter(map(len, plan.groups)) == counts
    asked = Demand(seconds=5.0, flows=(), backlog=0, plan=Plan(((0,), (1,))), ranks=(0,), degrees=DEGREES)
    assert Planner(laws, profile.quality).advise(asked).plan is None


@given(st.floats(-1, 1), st.floats(0, 1), st.sampled_from([0.1, 150.0]))
def test_a_switch_must_pay_for_itself(better, share, pause):
    now = NOTHING
    wanted = now._replace(value=better)
    worth = gain(wanted, now, share, pause)
    assert worth == pytest.approx(better - share * pause / 30)
    assert worth_switching(worth, share) == (share > 0 and worth > MARGIN)


@given(st.floats(0.01, 0.5), st.floats(0, 1), st.floats(0, 1), st.floats(0, 5))
def test_where_more_is_missed_or_much_has_changed_more_must_be_gained(better, share, missed, unrest):
    least = (1 + unrest) * (MARGIN + DOUBT * missed)
    assert worth_switching(better, share, missed, unrest) == (share > 0 and better > least)


@pytest.mark.parametrize(
    ("missed", "unrest", "toll", "least"),
    [
        (0.0, 0.0, 0.0, MARGIN),  # for latency, with a plan that stands a surge as well
        (0.0, 0.0, 0.2, MARGIN + OFTEN * LATE * SURGE * 0.2),  # and with one that does not
        (0.0, 1.0, -0.2, 2 * MARGIN),
        (0.6, 1.0, 0.2, 2 * (MARGIN + 0.6 * DOUBT)),  # for deadlines that are tight
        (0.6, 1.0, -0.2, MARGIN),  # for room that is missing
    ],
)
def test_to_leave_for_latency_needs_more_than_to_come_back_for_room(missed, unrest, toll, least):
    assert least_gain(missed, unrest, toll) == pytest.approx(least)


@given(st.floats(0, 1), st.floats(0, 5), st.floats(-1, 1), st.floats(0, 1))
def test_the_less_a_plan_stands_in_a_surge_the_more_it_must_gain(missed, unrest, toll, more):
    assert MARGIN <= least_gain(missed, unrest, toll) <= least_gain(missed, unrest, toll + more)


def test_classes_of_one_name_are_all_served():
    ground, light = Ground(groups(range(8), DEGREES), {1: 8}), TABLES[8.0, 3]
    both = propose([light, light._replace(weight=1.0)], ground, 0.0, 0.9)
    assert both.on_time > 0.99


@given(st.dictionaries(st.sampled_from(DEGREES), st.integers(1, 8)), ALIVE.filter(lambda alive: len(alive) > 3))
def test_packable_counts_are_those_that_a_layout_takes_and_that_use_everything(counts, alive):
    ground = Ground(groups(alive, DEGREES), {})
    whole = {tuple(sorted(counts_of(plan).items())) for plan in full(every_layout(alive, DEGREES), alive)}
    assert packable(counts, ground) == (tuple(sorted(counts.items())) in whole)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_surprise_tells_what_was_seen_unless_it_was_too_great(foretold, seen):
    factor = surprise(foretold, seen)
    assert (factor >= 1.0) == (seen <= foretold) or factor == pytest.approx(1.0)
    if 0.5 < factor < 2.0:
        assert believed(foretold, factor) == pytest.approx(seen)
    assert believed(foretold, 1.0) == pytest.approx(foretold)


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([], 0),
        ([5, 5, 5], 0),
        ([1, 9, 10, 9, 1], 1),
        ([10, 9, 1, 8, 1, 5, 7, 1], 2),
        ([10, 5, 10, 5, 10], 0),
    ],
)
def test_surges_come_from_far_below_the_peak(loads, expected):
    assert surges(loads) == expected


def test_surges_that_cost_more_than_calm_gains_are_a_risk():
    calm = [10.0] * 9
    assert risk([*calm, 60.0], 0.2) == pytest.approx(0.1 * 3 * 0.2)
    assert risk([10.0, 60.0, *calm[1:]], 0.2) == pytest.approx(0.1 * 3 * 0.2 * 6)
    assert risk([10.0, 60.0, *calm], -0.1) == risk(calm, 0.2) == risk([], 0.2) == 0.0


@given(st.lists(st.floats(0, 100), max_size=8))
def test_a_load_is_taken_to_rise_on_but_never_far(loads):
    assert 1.0 <= rise(loads) <= 1.15
    assert rise([*loads, 10, 10, 12, 12]) == pytest.approx(1.1)
    assert rise([*loads, 20, 20, 10, 10]) == 1.0


def test_a_backlog_counts_only_where_it_is_shed():
    assert expected(10.0, 50, sheds=True) > expected(10.0, 0, sheds=True) == expected(10.0, 50, sheds=False)


def test_the_reason_tells_load_plan_and_prospects():
    ground = Ground(groups(range(8), DEGREES), {1: 8})
    traffic = [offered(8.0, 0.8, "interactive")]
    wanted, now = propose(traffic, ground, 0.2, 0.9), propose(traffic, ground, 0.2, 0.9, held={1: 8})
    text = explained(traffic, wanted, now, True)
    assert text.startswith("8/s interactive: 2x4 (9")
    assert "instead of 8x1 (" in text
    assert "stays" in explained(traffic, wanted, now, False)
    assert "best" in explained(traffic, now, now, False)
    assert explained([], now, now, False).startswith("no load")


# hindsight


def foretold(on_time, counts=None):
    return Proposal(counts or {1: 8}, on_time - 0.05, on_time, 0.5, 0.0)


def test_what_was_foretold_is_believed_until_it_turns_out_otherwise():
    memory = TrackRecord()
    assert memory.judged(foretold(0.9)).on_time == pytest.approx(0.9)
    memory.happened(foretold(0.9), met=0, ended=FEW - 1)
    assert memory.judged(foretold(0.9)).on_time == pytest.approx(0.9)
    for _ in range(20):
        memory.happened(foretold(0.9), met=80, ended=100)
    known = memory.judged(foretold(0.9))
    assert known.on_time == pytest.approx(0.8, abs=0.01)
    assert known.value == pytest.approx(foretold(0.9).value - 0.9 + known.on_time)
    assert memory.judged(foretold(0.9, {2: 4})).on_time == pytest.approx(0.8, abs=0.02)  # as the one that is known


def test_a_plan_that_was_worse_is_remembered_for_a_while_and_in_such_situations():
    memory = TrackRecord()
    for _ in range(20):
        memory.happened(foretold(0.9, {2: 4}), met=80, ended=100)
    for _ in range(20):
        memory.happened(foretold(0.88), met=88, ended=100)
    gap = memory.judged(foretold(0.88)).on_time - memory.judged(foretold(0.9, {2: 4})).on_time
    assert gap > 0.04
    assert memory.judged(foretold(0.99, {2: 4})).on_time > 0.97  # another load
    for _ in range(round(3 / (1 - FADING))):
        memory.happened(foretold(0.88), met=88, ended=100)
    assert memory.judged(foretold(0.9, {2: 4})).on_time > 0.88


def test_two_looks_at_a_plan_that_disappoints_tell_more_than_what_is_known_of_others():
    memory = TrackRecord()
    for _ in range(20):
        memory.happened(foretold(0.96, {2: 4}), met=96, ended=100)
    for _ in range(2):
        memory.happened(foretold(0.96), met=88, ended=100)
    assert memory.judged(foretold(0.96)).on_time < 0.92
    assert memory.judged(foretold(0.96, {2: 4})).on_time > 0.95


def test_what_a_plan_was_like_in_another_situation_is_forgotten_as_soon_as_it_is_seen_in_this_one():
    memory = TrackRecord()
    for _ in range(20):
        memory.happened(foretold(0.4), met=20, ended=100)
    memory.happened(foretold(0.98), met=98, ended=100)
    assert memory.judged(foretold(0.98)).on_time == pytest.approx(0.98, abs=1e-3)


def test_only_a_few_plans_are_remembered():
    memory = TrackRecord()
    for count in range(1, 12):
        memory.happened(foretold(0.9, {1: count}), met=90, ended=100)
    assert memory.tried() == [{1: count} for count in range(6, 12)]


def test_outcomes_count_for_the_plan_under_which_the_request_came_and_ended():
    traffic = Traffic()
    traffic.changed(10.0)
    traffic.ended(arrived_at=9.0, met=True, now=11.0)
    traffic.ended(arrived_at=11.0, met=True, now=12.0)
    assert traffic.outcome(12.0) == (0, 0)
    traffic.ended(arrived_at=12.0, met=False, now=14.0)
    assert traffic.outcome(10.0 + WINDOW) == (1, 2)
    assert traffic.outcome(18.0) == (0, 1)


def test_flows_are_the_means_of_alike_arrivals():
    traffic = Traffic()
    for canvas, answer, tightness in ((456, 200, 2.0), (460, 240, 2.1), (456, 200, None), (900, 200, 2.0)):
        traffic.arrived(Seen(0.0, canvas, answer, tightness))
    found = [(flow.canvas_tokens, flow.answer_tokens, flow.tightness, flow.rate) for flow in traffic.flows(1.0)]
    assert found == [(456, 200, None, 1.0), (458, 220, pytest.approx(2.05), 2.0), (900, 200, 2.0, 1.0)]


# all together


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


def test_the_planner_follows_a_regime_shift_and_then_rests():
    planner = Planner(LAWS, PROFILE.quality)
    tight = planner.advise(demand({0.8: 6.0}, SINGLE))
    assert {len(group) for group in tight.plan.groups} <= {2, 4, 8}
    assert tight.gain > MARGIN
    again = planner.advise(demand({0.8: 6.3}, tight.plan.groups))
    assert again.plan is None
    busy = [planner.advise(demand({3.0: 40.0}, tight.plan.groups)) for _ in range(3)]
    assert Plan(SINGLE) in [advice.plan for advice in busy]
    assert any("instead of" in advice.reason for advice in busy)
    restarting = Planner(LAWS, PROFILE.quality, Setup(pause=150.0))
    assert restarting.advise(demand({3.0: 40.0}, tight.plan.groups)).plan is None


def test_lost_and_found_devices_change_the_plan_even_without_traffic():
    planner = Planner(LAWS, PROFILE.quality)
    shrunk = planner.advise(demand({}, ((0, 1, 2, 3),), (0, 1, 2, 3, 5, 6, 7)))
    assert shrunk.plan == Plan(((0, 1, 2, 3), (5,), (6,), (7,)))
    grown = planner.advise(demand({}, shrunk.plan.groups))
    assert grown.plan == Plan(((0, 1, 2, 3), (4,), (5,), (6,), (7,)))
    assert planner.advise(demand({}, (), ())).plan is None


def test_only_degrees_that_the_model_allows_and_the_profile_knows_are_formed():
    laws = {degree: LAWS[degree] for degree in (2, 4, 8)}
    plan = Planner(laws, PROFILE.quality).advise(demand({3.0: 60.0}, (), degrees=(1, 2, 4))).plan
    assert plan == Plan(((0, 1), (2, 3), (4, 5), (6, 7)))


def test_a_small_gain_is_looked_at_twice():
    planner = Planner(LAWS, PROFILE.quality)
    advices = [planner.advise(demand({1.0: 18.0}, SINGLE)) for _ in range(2)]
    assert 0.0 < advices[0].gain < 0.1
    assert [advice.plan is None for advice in advices] == [True, False]


def test_nothing_changes_for_latency_before_the_traffic_is_known():
    planner = Planner(LAWS, PROFILE.quality)
    for _ in range(3):
        planner.advise(demand({}, SINGLE))
    advices = [planner.advise(demand({3.0: 4.0}, SINGLE)) for _ in range(KNOWN + 1)]
    assert all(MARGIN < advice.gain < 0.1 for advice in advices)
    assert [advice.plan is None for advice in advices] == [True] * KNOWN + [False]


def test_nothing_changes_for_latency_to_a_plan_that_a_surge_would_overrun():
    planner = Planner(LAWS, PROFILE.quality)
    advices = [planner.advise(demand({2.0: 28.0}, SINGLE)) for _ in range(KNOWN + 2)]
    assert not any(advice.plan for advice in advices)
    assert advices[-1].expected.on_time > 1.0 - BLUR


@pytest.mark.parametrize("rate", [60.0, 90.0, 130.0])
@pytest.mark.parametrize("plan", [((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))])
def test_however_great_the_overload_room_is_made_at_the_second_look(plan, rate):
    planner = Planner(LAWS, PROFILE.quality)
    planner.unrest = 1.0
    advices = [planner.advise(demand({2.0: rate}, plan, met=50, ended=100)) for _ in range(2)]
    assert Plan(SINGLE) in [advice.plan for advice in advices]


def test_a_plan_that_proves_worse_than_the_one_before_is_left_again():
    planner = Planner(LAWS, PROFILE.quality)
    fours = ((0, 1, 2, 3), (4, 5, 6, 7))
    steady = {1.0: 18.0}
    for _ in range(8):
        planner.advise(demand(steady, fours, met=99, ended=100))
    found = [planner.advise(demand(steady, SINGLE, met=40, ended=100)) for _ in range(4)]
    assert Plan(fours) in [advice.plan for advice in found]


def test_where_bursts_come_again_and_again_nothing_changes_for_latency_between_them():
    calm, burst = demand({1.5: 4.0, 3.0: 4.0}, SINGLE), demand({1.5: 30.0, 3.0: 30.0}, SINGLE)
    fresh, wary = Planner(LAWS, PROFILE.quality), Planner(LAWS, PROFILE.quality)
    for demanded in (calm, burst, calm, calm, burst, calm, calm, burst):
        wary.advise(demanded)
    assert any(fresh.advise(calm).plan for _ in range(KNOWN + 1))
    assert not any(wary.advise(calm).plan for _ in range(5))


def test_a_few_requests_are_no_reason_to_change():
    assert Planner(LAWS, PROFILE.quality).advise(demand({3.0: 0.5}, SINGLE, seconds=2.0)).plan is None


def test_the_planner_in_its_own_process_answers_alike_and_outlives_its_process():
    setup = Setup()
    with PlannerProcess(LAWS, PROFILE.quality, setup) as planner_process:
        wanted = demand({0.8: 6.0}, SINGLE)
        inline = Planner(LAWS, PROFILE.quality, setup).advise(wanted)
        assert planner_process.advise(wanted) == inline
        planner_process.learned({1: LAWS[1]}, PROFILE.quality)
        assert planner_process.advise(wanted).plan is None
        dead = planner_process.process
        dead.kill()
        dead.wait()
        assert planner_process.advise(wanted) is None
        assert "8x1" in planner_process.advise(wanted).reason
    assert planner_process.process is None


def test_the_configuration_sets_the_planner_up():
    quality = PROFILE.quality
    assert Setup.of(Config(), quality) == Setup(levels=4)
    assert Setup.of(Config.of(threshold_control="fixed", accuracy_budget="off"), quality) == Setup(1 + 5, 1, None)
    assert Setup.of(Config.of(min_confidence_threshold=0.75, shed="off"), quality) == Setup(levels=2, sheds=False)


FLOWS = st.builds(
    Flow,
    canvas_tokens=st.integers(64, 4000),
    answer_tokens=st.integers(1, 64),
    tightness=st.sampled_from([None, 0.5, 1.0, 3.0]),
    rate=st.floats(0.0, 20.0),
)


@given(st.lists(FLOWS, max_size=12))
def test_classes_are_few_and_carry_all_the_traffic(flows):
    found = few(flows)
    assert len(found) <= CLASSES
    assert sum(flow.rate for flow in found) == pytest.approx(sum(flow.rate for flow in flows))
