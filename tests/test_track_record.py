"""What plans have achieved beside what was forecast for them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.planner.program import Proposal
from dilaserve.planner.track_record import TrackRecord, corrected_share, miss_ratio


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_forecast_error_reproduces_what_was_seen_up_to_a_bound(forecast, seen):
    factor = miss_ratio(forecast, seen)
    assert (factor >= 1.0) == (seen <= forecast) or factor == pytest.approx(1.0)
    if 0.5 < factor < 2.0:
        assert corrected_share(forecast, factor) == pytest.approx(seen)
    assert corrected_share(forecast, 1.0) == pytest.approx(forecast)


def forecast(on_time, counts=None):
    return Proposal(counts or {1: 8}, on_time - 0.05, on_time, 0.5, 0.0)


def test_a_forecast_is_used_until_results_differ():
    memory = TrackRecord()
    assert memory.corrected(forecast(0.9)).on_time == pytest.approx(0.9)
    memory.observe(forecast(0.9), met=0, ended=1)
    assert memory.corrected(forecast(0.9)).on_time == pytest.approx(0.9)
    for _ in range(20):
        memory.observe(forecast(0.9), met=80, ended=100)
    known = memory.corrected(forecast(0.9))
    assert known.on_time == pytest.approx(0.8, abs=0.01)
    assert known.value == pytest.approx(forecast(0.9).value - 0.9 + known.on_time)
    assert memory.corrected(forecast(0.9, {2: 4})).on_time == pytest.approx(0.8, abs=0.02)  # as the one that is known


def test_the_record_of_a_worse_plan_fades_and_counts_at_like_load_only():
    memory = TrackRecord()
    for _ in range(20):
        memory.observe(forecast(0.9, {2: 4}), met=80, ended=100)
    for _ in range(20):
        memory.observe(forecast(0.88), met=88, ended=100)
    gap = memory.corrected(forecast(0.88)).on_time - memory.corrected(forecast(0.9, {2: 4})).on_time
    assert gap > 0.04
    assert memory.corrected(forecast(0.99, {2: 4})).on_time > 0.97  # another load
    for _ in range(200):
        memory.observe(forecast(0.88), met=88, ended=100)
    assert memory.corrected(forecast(0.9, {2: 4})).on_time > 0.88


def test_two_bad_results_of_a_plan_outweigh_good_results_of_others():
    memory = TrackRecord()
    for _ in range(20):
        memory.observe(forecast(0.96, {2: 4}), met=96, ended=100)
    for _ in range(2):
        memory.observe(forecast(0.96), met=88, ended=100)
    assert memory.corrected(forecast(0.96)).on_time < 0.92
    assert memory.corrected(forecast(0.96, {2: 4})).on_time > 0.95


def test_a_result_at_the_present_load_replaces_results_at_other_loads():
    memory = TrackRecord()
    for _ in range(20):
        memory.observe(forecast(0.4), met=20, ended=100)
    memory.observe(forecast(0.98), met=98, ended=100)
    assert memory.corrected(forecast(0.98)).on_time == pytest.approx(0.98, abs=1e-3)


def test_the_track_record_keeps_a_few_plans():
    memory = TrackRecord()
    for count in range(1, 12):
        memory.observe(forecast(0.9, {1: count}), met=90, ended=100)
    assert memory.tried() == [{1: count} for count in range(6, 12)]
