"""What instances of each degree carry at each rate."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_examples import ALONE, DEGREES, FORECAST, LAWS

from dilaserve.planner.operating_points import RATES, points, reached, unloaded
from dilaserve.planner.step_pace import NEVER, Kind
from dilaserve.profile.decode_speed import ANY, BINS, PARTS, Law, QualityProfile, TaskProfile
from dilaserve.profile.forecast import Forecast
from dilaserve.scheduler.rules.admission import HOPELESS

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


def test_requests_with_a_certain_number_of_steps_have_operating_points():
    law = Law(((1.0,),) * len(BINS))  # every text ends in its first step
    task = TaskProfile(laws=((law,) * PARTS,), drop=(0.0,), mean_drop=(0.0,))
    sure = Forecast(QualityProfile(tasks={ANY: task}, levels=(0.9,), spread=0.0))
    kind = Kind(456, 32)
    alone = unloaded(LAWS[1], sure, kind)
    shares = [point.on_time for point in points(LAWS[1], sure, kind._replace(deadline=alone * HOPELESS), 4, 6)]
    assert shares
    assert all(0.0 <= share <= 1.0 + 1e-9 for share in shares)


def test_several_instances_together_meet_more_deadlines_than_one_alone():
    kind = Kind(456, 256, 2 * ALONE)
    pooled, lone = (
        {point.rate: point.on_time for point in points(LAWS[1], FORECAST, kind, instances, 6, levels=1)}
        for instances in (8, 1)
    )
    busy = max(pooled.keys() & lone.keys())
    assert pooled[busy] > lone[busy] + 0.05


def test_a_deadline_of_an_hour_is_as_good_as_none_below_capacity():
    hour, never = (points(LAWS[2], FORECAST, Kind(456, 256, limit), 4, 6, levels=1) for limit in (3600.0, NEVER))
    assert [point.on_time for point in hour[:6]] == pytest.approx([point.on_time for point in never[:6]], abs=0.02)


def test_higher_degrees_lower_latency_and_capacity():
    alone = [unloaded(LAWS[degree], FORECAST, Kind(456, 256)) for degree in DEGREES]
    assert alone == sorted(alone, reverse=True)
    peaks = [max(p.rate for p in points(LAWS[degree], FORECAST, Kind(456, 256), 1, 6)) / degree for degree in DEGREES]
    assert peaks == sorted(peaks, reverse=True)
