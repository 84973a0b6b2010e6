"""Deadlines in the scheduler: admission, shedding, and requests without a deadline beside them."""

import pytest
from scheduler_builders import done, feed, request, result, scheduler

from dilaserve.types import Arrival, Decline, Instance, InstanceReady, Launch, Release, Slo


def test_no_request_is_declined_while_step_costs_are_a_guess():
    machine = scheduler(guess=True)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    hurried = Slo(seconds=0.045, on_miss="reject")  # too little by the guess, enough for steps of 10 ms
    commands, row, now = feed(machine, Arrival(request(0, slo=hurried))), 0, 0.0
    while machine.estimates.pace(1).learner.law.guess:
        now += 0.01
        launches = [command for command in commands if isinstance(command, Launch)]
        commands = feed(machine, done(launches[-1].batch, [result(span) for span in launches[-1].batch.spans]), now)
        if any(isinstance(command, Release) for command in commands):
            row += 1
            commands += feed(machine, Arrival(request(row, at=now, slo=hurried)), now)
        if machine.estimates.pace(1).learner.law.guess:
            assert not any(isinstance(command, Decline) for command in commands)
    assert row > 50
    late = feed(machine, Arrival(request(999, at=now, slo=Slo(seconds=0.001, on_miss="reject"))), now)
    assert isinstance(late[0], Decline)


def test_of_requests_that_come_together_those_that_find_no_place_are_rejected_at_once():
    """Each one alone would be in time, and all of them together are not."""
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    slo = Slo(seconds=0.7, on_miss="reject")
    for row in range(30):
        assert not list(machine.observe(Arrival(request(row, slo=slo)), 0.0))
    declined = {one.request.row for one in machine.decide(0.0) if isinstance(one, Decline)}
    seated = {row.request.row for row in machine.placement.replicas[0].with_deadline}
    assert seated
    assert declined == set(range(30)) - seated
    assert not machine.placement.queue


@pytest.mark.parametrize("on_miss", ["reject", "cancel_when_late"])
def test_a_declined_request_says_whether_its_deadline_was_feasible_on_an_idle_instance(on_miss):
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    feed(machine, Arrival(request(0, slo=Slo(seconds=0.4))))
    declined = {}
    for row, seconds in ((100, 0.0001), (101, 0.7)):
        late = feed(machine, Arrival(request(row, slo=Slo(seconds=seconds, on_miss=on_miss))))
        late += list(machine.decide(float(row)))
        declined |= {one.request.row: one for one in late if isinstance(one, Decline)}
    assert {row: (one.never_feasible, one.retry_after is not None) for row, one in declined.items()} == {
        100: (True, True),
        101: (False, True),
    }


def test_a_row_whose_deadline_is_given_up_waits_in_order_of_arrival():
    machine = scheduler(max_num_seqs=1)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    feed(machine, Arrival(request(0, slo=Slo(seconds=1000.0))))
    feed(machine, Arrival(request(1, at=1.0, slo=Slo(seconds=5.0))), 1.0)
    feed(machine, Arrival(request(2, at=2.0)), 2.0)
    list(machine.decide(7.0))
    assert [progress.request.row for progress in machine.placement.waiting] == [1, 2]


@pytest.mark.parametrize("scheduling", ["edf", "least-slack", "composed"])
def test_a_starved_request_gets_the_next_free_row_and_the_next_step(scheduling):
    """Also while what steps cost is a guess, and nobody is tested."""
    machine = scheduler(guess=True, scheduling=scheduling, max_num_seqs=1, best_effort_age=5.0)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0, answer=32, slo=Slo(seconds=100.0))))
    feed(machine, Arrival(request(1)))
    for row, now in ((2, 1.0), (3, 6.0)):
        feed(machine, Arrival(request(row, answer=32, at=now, slo=Slo(seconds=100.0))), now)
        *_, launch = feed(machine, done(launch.batch, [result(span) for span in launch.batch.spans]), now)
        assert [span.row for span in launch.batch.spans] == [2 if now < 5.0 else 1]


def test_a_request_is_declined_when_its_deadline_has_passed_even_if_step_costs_are_a_guess():
    machine = scheduler(guess=True, max_num_seqs=1)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    for row in range(2):
        feed(machine, Arrival(request(row, slo=Slo(seconds=0.3, on_miss="cancel_when_late"))))
    assert machine.wake_at() <= 0.3
    flying, waiting, release = machine.decide(0.3)
    assert [(one.request.row, one.retry_after is None) for one in (flying, waiting)] == [(0, False), (1, False)]
    assert release == Release(1)  # the other row is in flight
    batch = machine.placement.replicas[0].batch
    assert feed(machine, done(batch, [result(span, 9, 20) for span in batch.spans]), 0.32) == [Release(0)]
