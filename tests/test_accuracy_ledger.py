"""Thresholds below a request's own: when the scheduler lowers them, and who is charged for it."""

import pytest
from scheduler_builders import done, feed, request, result, scheduler

from dilaserve.scheduler.request_state import RequestState, Status
from dilaserve.scheduler.rules.accuracy_budget import Bank
from dilaserve.types import Adjust, Arrival, Cancel, Instance, InstanceReady, Launch, RowResult, Slo


def test_the_ledger_remembers_so_many_tenants_and_no_more(monkeypatch):
    monkeypatch.setattr("dilaserve.scheduler.accuracy_ledger.MAX_TENANTS", 3)
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    for i in range(6):
        (launch,) = feed(machine, Arrival(request(i, answer=8, slo=Slo(tenant=f"t{i % 5}"))), i)
        feed(machine, done(launch.batch, [result(launch.batch.spans[0])]), i)
    assert list(machine.deadlines.ledger.banks) == ["t3", "t4", "t0"]
    assert machine.deadlines.ledger.reserved == {}


def test_a_tenant_that_overspent_stays_in_the_ledger(monkeypatch):
    monkeypatch.setattr("dilaserve.scheduler.accuracy_ledger.MAX_TENANTS", 3)
    deadlines = scheduler().deadlines
    deadlines.ledger.banks["greedy"] = Bank(spent=40.0, served=2)
    for i in range(9):
        deadlines.ledger.charge(deadlines.arrived(request(i, slo=Slo(tenant=f"t{i}"))))
    assert list(deadlines.ledger.banks) == ["greedy", "t7", "t8"]


@pytest.mark.parametrize(
    ("decoding", "slo", "counts"),
    [
        ({}, Slo(), 1),
        ({}, Slo(fixed=True), 0),
        ({"rule": "steps", "num_denoising_steps": 4}, Slo(), 0),
        ({"rule": "factor"}, Slo(), 0),
    ],
)
def test_only_answers_whose_threshold_may_be_lowered_add_room_for_lower_ones(decoding, slo, counts):
    deadlines = scheduler().deadlines
    deadlines.ledger.charge(deadlines.arrived(request(0, slo=slo, **decoding)))
    assert deadlines.ledger.all.served == counts


def test_a_cancelled_request_is_charged_for_the_tokens_that_it_got():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    for row, prefix in enumerate((10, 26)):
        (launch,) = feed(machine, Arrival(request(row)))
        feed(machine, done(launch.batch, [result(launch.batch.spans[0], 20, prefix)]))
        machine.requests[f"r{row}"].deepest = 1
        drop = machine.requests[f"r{row}"].drop
        feed(machine, Cancel(f"r{row}", "cancelled"))
        (flying,) = machine.placement.replicas[0].residents.values()
        feed(
            machine,
            done(
                machine.placement.replicas[0].batch,
                [result(span) for span in machine.placement.replicas[0].batch.spans],
            ),
        )
        assert flying.status is Status.GONE
    assert machine.deadlines.ledger.all.served == 16 / 64
    assert machine.deadlines.ledger.all.spent == drop > 0.0


def test_a_request_alone_runs_at_its_own_threshold():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    for i in range(5):
        commands = feed(machine, Arrival(request(i, at=float(i), slo=Slo(seconds=60.0))), float(i))
        while launches := [command for command in commands if isinstance(command, Launch)]:
            assert not any(isinstance(command, Adjust) for command in commands)
            commands = feed(machine, done(launches[0].batch, [result(span) for span in launches[0].batch.spans]), i)
        assert machine.deadlines.floor == 0


def test_an_answer_is_charged_for_its_lowest_threshold():
    progress = RequestState(request(0), "any", (0.9, 0.8, 0.6), (0.0, 1.0, 9.0), (0.0, 0.5, 7.0), (9.0, 1.0, 0.1), 0)
    for level, unmasked in ((0, 20), (2, 1), (1, 11)):
        progress.level = level
        progress.advance(RowResult(0, 1, unmasked, 0 if level == 1 else 9, 10, -1, 0.9 * unmasked))
    assert (progress.drop, progress.usage(1.0).expected_accuracy_drop) == (9.0, 7.0)


def test_many_requests_lower_thresholds_before_a_deadline_is_missed():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 8192)))
    (launch,) = feed(machine, Arrival(request(0, slo=Slo(seconds=600.0))))
    for i in range(1, 5):
        feed(machine, Arrival(request(i, slo=Slo(seconds=600.0))), 0.0)
    for tick in range(1, 8):
        results = [result(span, masks_left=9, prefix=10) for span in launch.batch.spans]
        commands = feed(machine, done(launch.batch, results), tick * 0.25)
        (launch,) = [command for command in commands if isinstance(command, Launch)]
    assert machine.deadlines.floor == 1
    assert {progress.level for progress in machine.requests.values()} == {1}
