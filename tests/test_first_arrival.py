"""Deadlines and the order of service count from the arrival at the first server that had the request."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_builders import feed, of, request, rows_of, scheduler

from dilaserve import BadRequest
from dilaserve.server.first_arrival import HEADER, elapsed_ms
from dilaserve.types import Arrival, Decline, Finish, Instance, InstanceReady, Slo

NOW = 1000.0


def late(row, elapsed, resumed=0, **how):
    """A request that has come to another server so many seconds before."""
    wanted = request(row, at=NOW - elapsed, **how)
    return msgspec.structs.replace(wanted, elapsed=elapsed, resumed_tokens=resumed)


def machine(**settings):
    found = scheduler(**settings)
    feed(found, InstanceReady(Instance(0, (0,), 4096)), NOW)
    return found


def alone(found):
    return found.estimates.unloaded(found.deadlines.arrived(request(0)))


@given(st.floats(0, 500), st.integers(0, 63))
def test_a_multiple_is_one_of_the_whole_answer_from_the_first_arrival_on(elapsed, resumed):
    found = machine(scheduling="composed", shed="off")
    wanted = late(0, elapsed, resumed, slo=Slo(multiple=50.0))
    list(found.observe(Arrival(wanted), NOW))
    deadline = found.requests["r0"].deadline
    assert deadline == pytest.approx(NOW - elapsed + 50.0 * alone(found))
    assert found.requests["r0"].seconds == pytest.approx(found.estimates.unloaded(found.deadlines.arrived(wanted)))


def test_a_rest_takes_less_time_than_the_whole():
    found = machine()
    seconds = [found.estimates.unloaded(found.deadlines.arrived(late(0, 0.0, count))) for count in (0, 31, 32, 63)]
    assert seconds[0] == seconds[1] > seconds[2] == seconds[3]


def test_a_deadline_that_was_far_at_first_may_be_too_near_when_the_request_comes_here():
    found = machine(scheduling="composed")
    seconds = alone(found)
    far = late(0, 0.0, slo=Slo(seconds=10 * seconds, on_miss="reject"))
    near = late(1, 9.9 * seconds, slo=Slo(seconds=10 * seconds, on_miss="reject"))
    assert not of(feed(found, Arrival(far), NOW), Decline)
    (decline,) = of(feed(found, Arrival(near), NOW), Decline)
    assert decline.never_feasible
    assert decline.usage.queued == pytest.approx(9.9 * seconds)


@pytest.mark.parametrize("scheduling", ["fcfs", "composed"])
def test_a_request_that_came_elsewhere_before_others_goes_before_them(scheduling):
    found = machine(scheduling=scheduling, max_num_seqs=1)
    feed(found, Arrival(request(0, at=NOW)), NOW)
    for row, elapsed in ((1, 0.0), (2, 5.0), (3, 2.0)):
        feed(found, Arrival(late(row, elapsed)), NOW)
    order = [state.request.row for state in found.placement.waiting]
    assert order == [2, 3, 1]


def test_nothing_is_aged_by_what_it_waited_elsewhere():
    found = machine(max_num_seqs=1, best_effort_age=10.0)
    feed(found, Arrival(request(0, at=NOW)), NOW)
    feed(found, Arrival(late(1, 100.0)), NOW)
    (waiting,) = found.placement.waiting
    assert not found.placement.aged(waiting, NOW + 9.0)
    assert found.placement.aged(waiting, NOW + 11.0)


@pytest.mark.parametrize("ended", ["stop", "length"])
def test_an_answer_that_has_ended_takes_no_step(ended):
    found = machine()
    wanted = msgspec.structs.replace(late(0, 1.0, 64 if ended == "length" else 5), ended=ended)
    commands = feed(found, Arrival(wanted), NOW)
    (finish,) = of(commands, Finish)
    assert (finish.reason, finish.usage.steps, finish.usage.resumed_tokens) == (ended, 0, wanted.resumed_tokens)
    assert (rows_of(commands), found.requests) == (set(), {})


@given(st.floats(0, 2e9), st.floats(-100, 86_000))
def test_the_header_gives_the_milliseconds_since_then(now, ago):
    found = elapsed_ms({HEADER: repr(now - ago)}, now)
    assert found == pytest.approx(max(0.0, 1000 * ago), abs=1)
    assert elapsed_ms({}, now) is None


@given(st.text(max_size=9))
def test_a_header_that_is_no_time_of_the_last_day_is_refused(text):
    now = 2e9
    try:
        seconds = now - float(text)
    except ValueError:
        seconds = None
    if seconds is not None and seconds <= 86_400 and seconds != float("-inf"):
        assert elapsed_ms({HEADER: text}, now) == max(0.0, 1000 * seconds)
        return
    with pytest.raises(BadRequest) as caught:
        elapsed_ms({HEADER: text}, now)
    assert caught.value.param == HEADER
