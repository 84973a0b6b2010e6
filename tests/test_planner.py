"""The planner: which plan it proposes for a demand, and when it changes one that runs."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_examples import DEGREES, LAWS, PROFILE, SINGLE, demand

from dilaserve.config import Config
from dilaserve.planner.adoption import gain, rise, risk, surges, worth_switching
from dilaserve.planner.planner import Planner, Setup
from dilaserve.planner.program import NOTHING
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.types import Demand, Flow, Plan


@pytest.mark.parametrize("flows", [(), (Flow(canvas_tokens=456, answer_tokens=256, tightness=2.0, rate=3.0),)])
def test_a_plan_that_lost_a_device_keeps_its_other_instances(flows):
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


def needed(missed=0.0, unrest=0.0, toll=0.0):
    """The smallest gain for which a plan is changed, in shares on time."""
    return next(step / 1000 for step in range(10_000) if worth_switching(step / 1000, 1.0, missed, unrest, toll))


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 150.0), st.floats(0, 1))
def test_a_plan_change_is_worth_less_the_more_devices_it_changes_and_the_longer_they_pause(better, share, pause, more):
    now, wanted = NOTHING, NOTHING._replace(value=better)
    assert gain(wanted, now, 0.0, pause) == gain(wanted, now, share, 0.0) == better
    assert gain(wanted, now, min(1.0, share + more), pause) <= gain(wanted, now, share, pause) <= better
    assert gain(wanted, now, share, pause + 10 * more) <= gain(wanted, now, share, pause)
    assert not worth_switching(better, 0.0)
    assert better > 0.0 or not worth_switching(better, share)


@given(st.floats(0.01, 2.0), st.floats(0, 1), st.floats(0, 1), st.floats(0, 5), st.floats(0, 1))
def test_a_plan_change_must_gain_more_where_more_is_missed_or_soon_after_another(gained, share, missed, unrest, more):
    if worth_switching(gained, share, missed, unrest):
        assert share > 0.0
        assert worth_switching(gained, share, missed * more, unrest * more)
        assert worth_switching(gained + more, share, missed, unrest)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (dict(), dict(toll=0.2)),  # for latency: a plan that serves a surge worse must gain more
        (dict(toll=-0.2), dict(unrest=1.0, toll=-0.2)),  # and more soon after another change
        (dict(toll=-0.2), dict(missed=0.6, unrest=1.0, toll=0.2)),  # tight deadlines are missed, forecasts are poor
        (dict(missed=0.6, unrest=1.0, toll=-0.2), dict(missed=0.6, unrest=1.0, toll=0.2)),  # capacity is missing
        (dict(missed=0.6, unrest=1.0, toll=-0.2), dict(unrest=1.0, toll=0.2)),
    ],
)
def test_a_plan_change_for_latency_must_gain_more_than_one_for_missing_capacity(less, more):
    assert 0.0 < needed(**less) < needed(**more)


@given(st.floats(0, 1), st.floats(0, 5), st.floats(-1, 1), st.floats(0, 1))
def test_a_plan_that_serves_a_surge_worse_must_gain_more(missed, unrest, toll, more):
    assert 0.0 < needed(missed, unrest, toll) <= needed(missed, unrest, toll + more)


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
def test_a_surge_is_a_rise_from_far_below_the_peak(loads, expected):
    assert surges(loads) == expected


def test_the_risk_of_a_plan_grows_with_its_loss_in_a_surge_and_with_the_number_of_surges():
    calm, loads = [10.0] * 9, [*[10.0] * 9, 60.0]
    assert 0.0 < risk(loads, 0.1) < risk(loads, 0.2)
    assert risk([*calm, *loads], 0.2) < risk(loads, 0.2) < risk([60.0, *calm[1:], 60.0, 10.0, 60.0], 0.2)
    assert risk([10.0, 60.0, *calm], 0.2) > risk([10.0, *calm, 60.0], 0.2)  # there is less traffic now to gain from
    assert risk([10.0, 60.0, *calm], -0.1) == risk(calm, 0.2) == risk([], 0.2) == 0.0


@given(st.lists(st.floats(0, 100), max_size=8))
def test_a_load_is_taken_to_rise_on_but_never_far(loads):
    assert 1.0 <= rise(loads) <= 1.15
    assert rise([*loads, 10, 10, 12, 12]) == pytest.approx(1.1)
    assert rise([*loads, 20, 20, 10, 10]) == 1.0


def test_the_planner_follows_a_regime_shift_and_then_rests():
    planner = Planner(LAWS, PROFILE.quality)
    tight = planner.advise(demand({0.8: 6.0}, SINGLE))
    assert {len(group) for group in tight.plan.groups} <= {2, 4, 8}
    assert tight.gain > 0.0
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


def test_a_small_gain_must_be_seen_twice_before_the_plan_changes():
    planner = Planner(LAWS, PROFILE.quality)
    advices = [planner.advise(demand({1.0: 18.0}, SINGLE)) for _ in range(2)]
    assert 0.0 < advices[0].gain < 0.1
    assert [advice.plan is None for advice in advices] == [True, False]


def test_nothing_changes_for_latency_before_the_traffic_is_known():
    planner = Planner(LAWS, PROFILE.quality)
    for _ in range(3):
        planner.advise(demand({}, SINGLE))
    advices = [planner.advise(demand({3.0: 4.0}, SINGLE)) for _ in range(10)]
    assert all(0.0 < advice.gain < 0.1 for advice in advices)
    first = next(i for i, advice in enumerate(advices) if advice.plan)
    assert 2 <= first <= 6


def test_nothing_changes_for_latency_to_a_plan_that_a_surge_would_overrun():
    planner = Planner(LAWS, PROFILE.quality)
    advices = [planner.advise(demand({2.0: 28.0}, SINGLE)) for _ in range(8)]
    assert not any(advice.plan for advice in advices)
    assert advices[-1].expected.on_time > 0.95


@pytest.mark.parametrize("rate", [60.0, 90.0, 130.0])
@pytest.mark.parametrize("plan", [((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))])
def test_any_overload_gets_the_plan_of_largest_capacity_at_the_second_question(plan, rate):
    planner = Planner(LAWS, PROFILE.quality)
    planner.unrest = 1.0
    advices = [planner.advise(demand({2.0: rate}, plan, met=50, ended=100)) for _ in range(2)]
    assert Plan(SINGLE) in [advice.plan for advice in advices]


def test_the_planner_leaves_a_plan_that_meets_fewer_deadlines_than_the_one_before():
    planner = Planner(LAWS, PROFILE.quality)
    fours = ((0, 1, 2, 3), (4, 5, 6, 7))
    steady = {1.0: 18.0}
    for _ in range(8):
        planner.advise(demand(steady, fours, met=99, ended=100))
    found = [planner.advise(demand(steady, SINGLE, met=40, ended=100)) for _ in range(4)]
    assert Plan(fours) in [advice.plan for advice in found]


def test_repeated_bursts_prevent_plan_changes_for_latency():
    calm, burst = demand({1.5: 4.0, 3.0: 4.0}, SINGLE), demand({1.5: 30.0, 3.0: 30.0}, SINGLE)
    fresh, wary = Planner(LAWS, PROFILE.quality), Planner(LAWS, PROFILE.quality)
    for demanded in (calm, burst, calm, calm, burst, calm, calm, burst):
        wary.advise(demanded)
    assert any(fresh.advise(calm).plan for _ in range(8))
    assert not any(wary.advise(calm).plan for _ in range(5))


def test_a_few_requests_do_not_change_the_plan():
    assert Planner(LAWS, PROFILE.quality).advise(demand({3.0: 0.5}, SINGLE, seconds=2.0)).plan is None


def test_the_configuration_sets_the_planner_up():
    quality = PROFILE.quality
    assert Setup.of(Config(), quality) == Setup(levels=4)
    assert Setup.of(Config.of(threshold_control="fixed", accuracy_budget="off"), quality) == Setup(1 + 5, 1, None)
    assert Setup.of(Config.of(min_confidence_threshold=0.75, shed="off"), quality) == Setup(levels=2, sheds=False)
