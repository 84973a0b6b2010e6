"""The linear program: how many instances of each degree serve a load best."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planner_examples import ALIVE, DEGREES, counts_of, every_layout, full, offered

from dilaserve.planner.adoption import planned_rate
from dilaserve.planner.packing import groups, layout
from dilaserve.planner.planner import explained
from dilaserve.planner.program import Ground, PlanProgram, kept, packable, switching

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
    assert (
        PlanProgram(traffic_of(loads), Ground(groups(range(8), DEGREES), {1: 8}), 0.0, 0.9).proposal().counts
        == expected
    )


@settings(deadline=None, max_examples=25)
@given(LOADS, st.sampled_from(RUNNING), st.sampled_from([0.0, 0.2, 150.0]), st.sampled_from([None, 0.9]))
def test_no_other_counts_would_be_better(loads, running, pause, budget):
    ground, traffic = Ground(groups(range(8), DEGREES), running), traffic_of(loads)
    found = PlanProgram(traffic, ground, pause, budget).proposal()
    assert sum(degree * count for degree, count in found.counts.items()) == 8
    assert 0.0 <= found.on_time <= 1.0
    assert budget is None or found.drop <= budget + 1e-6

    def net(proposal):
        new = sum(degree * max(0, count - running.get(degree, 0)) for degree, count in proposal.counts.items())
        return proposal.value - switching(new / 8, pause)

    every = {tuple(sorted(counts_of(plan).items())) for plan in full(every_layout(set(range(8)), DEGREES), range(8))}
    for counts in every:
        assert net(PlanProgram(traffic, ground, pause, budget).proposal(dict(counts))) <= net(found) + 2e-3


@settings(deadline=None, max_examples=15)
@given(LOADS.filter(bool), ALIVE, st.sets(st.sampled_from(DEGREES), min_size=1))
def test_every_alive_device_is_used_where_the_degrees_allow_it(loads, alive, degrees):
    ground = Ground(groups(alive, degrees), {})
    assume(ground.groups)
    counts = PlanProgram(traffic_of(loads), ground, 0.2, 0.9).proposal().counts
    used = sum(map(len, layout(counts, alive)))
    assert used == max(sum(map(len, plan)) for plan in every_layout(alive, degrees))


def test_demand_beyond_all_capacity_is_served_as_far_as_it_goes():
    found = PlanProgram([offered(1e5, 0.8)], Ground(groups(range(8), DEGREES), {1: 8}), 0.2, 0.9).proposal()
    assert 0.0 < found.on_time < 0.01


def test_a_deadline_that_nothing_can_meet_and_no_traffic_change_nothing():
    ground = Ground(groups(range(8), DEGREES), {2: 4})
    assert PlanProgram([offered(5.0, 0.01)], ground, 0.2, 0.9).proposal().counts == {2: 4}
    assert PlanProgram([], ground, 0.2, 0.9).proposal().counts == {2: 4}
    assert kept({2: 3}, ground) == {1: 2, 2: 3}
    assert kept({16: 1}, ground) == {1: 8}


def test_classes_of_one_name_are_all_served():
    ground, light = Ground(groups(range(8), DEGREES), {1: 8}), TABLES[8.0, 3]
    both = PlanProgram([light, light._replace(weight=1.0)], ground, 0.0, 0.9).proposal()
    assert both.on_time > 0.99


@given(st.dictionaries(st.sampled_from(DEGREES), st.integers(1, 8)), ALIVE.filter(lambda alive: len(alive) > 3))
def test_packable_counts_are_those_that_a_layout_takes_and_that_use_everything(counts, alive):
    ground = Ground(groups(alive, DEGREES), {})
    whole = {tuple(sorted(counts_of(plan).items())) for plan in full(every_layout(alive, DEGREES), alive)}
    assert packable(counts, ground) == (tuple(sorted(counts.items())) in whole)


def test_a_backlog_counts_only_where_it_is_shed():
    alone = planned_rate(10.0, 0, sheds=True)
    assert planned_rate(10.0, 50, sheds=True) > alone == planned_rate(10.0, 50, sheds=False)


def test_the_reason_tells_load_plan_and_prospects():
    ground = Ground(groups(range(8), DEGREES), {1: 8})
    traffic = [offered(8.0, 0.8, "interactive")]
    wanted, now = (
        PlanProgram(traffic, ground, 0.2, 0.9).proposal(),
        PlanProgram(traffic, ground, 0.2, 0.9).proposal({1: 8}),
    )
    text = explained(traffic, wanted, now, True)
    assert text.startswith("8/s interactive: 2x4 (9")
    assert "instead of 8x1 (" in text
    assert "stays" in explained(traffic, wanted, now, False)
    assert "best" in explained(traffic, now, now, False)
    assert explained([], now, now, False).startswith("no load")
