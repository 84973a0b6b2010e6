"""Changes of plan in the scheduler: which instances end and begin, which rows move, and when a planner is asked."""

import pytest
from scheduler_builders import PAIRS, SINGLES, done, feed, formed, of, request, result, rows_of, scheduler, up

from dilaserve.types import (
    Arrival,
    InstanceLost,
    InstanceReady,
    Launch,
    Plan,
    PlanReady,
    Replan,
    Reshaped,
    Reshard,
    Slo,
    Solve,
    WorkerLost,
    WorkerUp,
)


def test_a_change_of_plan_touches_only_what_changes_and_keeps_what_was_committed():
    machine = scheduler(plan=SINGLES)
    up(machine, range(4))
    flying = {}
    for i in range(4):
        (launch,) = feed(machine, Arrival(request(i, at=float(i))), float(i))
        flying[machine.placement.replicas[launch.batch.instance].instance.ranks] = launch.batch
    assert feed(machine, Replan(Plan(((0, 1), (2,), (3,))), "asked"), 4.0) == []
    first, second = flying[(0,)], flying[(1,)]
    commands = feed(machine, done(first, [result(first.spans[0], 20, first.spans[0].block_start + 2)]), 5.0)
    assert [one.moves.ends for one in commands if isinstance(one, Reshard)] == [(first.instance,)]
    assert not any(isinstance(command, Launch) for command in commands)
    *_, reshard = feed(machine, done(second, [result(second.spans[0])]), 5.5)
    assert reshard.moves.ends == (second.instance,)
    (pair,) = reshard.moves.begins
    assert (pair.ranks, pair.kv_tokens) == ((0, 1), 2 * 4096)
    launch, reshaped = feed(machine, InstanceReady(pair), 6.0)
    assert {span.row for span in launch.batch.spans} == {span.row for span in (*first.spans, *second.spans)}
    assert all(span.length == span.keys for span in launch.batch.spans)  # a refresh each
    change = reshaped.change
    assert (change.at, change.before, change.after) == (4.0, SINGLES, Plan(((0, 1), (2,), (3,))))
    assert (change.reason, change.seconds, change.pause) == ("asked", 2.0, 1.0)
    third = flying[(2,)]
    assert isinstance(feed(machine, done(third, [result(third.spans[0])]), 7.0)[-1], Launch)


def test_a_plan_taken_back_in_time_costs_nothing():
    machine = scheduler(plan=SINGLES)
    up(machine, range(4))
    (launch,) = feed(machine, Arrival(request(0)))
    idle = [id for id in machine.placement.replicas if id != launch.batch.instance]
    (reshard,) = feed(machine, Replan(PAIRS, "asked"))
    assert set(reshard.moves.ends) == set(idle)
    (pair,) = reshard.moves.begins
    (reshard,) = feed(machine, Replan(SINGLES, "no"))
    assert {instance.ranks for instance in reshard.moves.begins} == {(1,)}
    list(machine.observe(InstanceReady(pair), 0.0))
    commands = formed(machine, [reshard], 0.0)
    (last,) = [command for command in commands if isinstance(command, Reshard)]
    *_, reshaped = formed(machine, [last], 0.0)
    assert (reshaped.change.after, reshaped.change.reason) == (SINGLES, "asked; no")
    assert launch.batch.instance in machine.placement.replicas


def test_the_plan_shrinks_to_what_is_alive_and_grows_back():
    machine = scheduler(plan=PAIRS)
    up(machine, range(4))
    (launch,) = feed(machine, Arrival(request(0)))
    ranks = machine.placement.replicas[launch.batch.instance].instance.ranks
    dead, survivor = ranks
    list(machine.observe(WorkerLost(dead, "killed by SIGKILL"), 1.0))
    (launch, *rest) = feed(machine, InstanceLost(launch.batch.instance, "killed by SIGKILL"), 1.0)
    assert isinstance(rest[-1], Reshard) or isinstance(launch, Reshard)
    (alone,) = next(one for one in (launch, *rest) if isinstance(one, Reshard)).moves.begins
    assert alone.ranks == (survivor,)
    commands = feed(machine, InstanceReady(alone), 1.1)
    (shrunk,) = [command.change for command in commands if isinstance(command, Reshaped)]
    assert "is gone (killed by SIGKILL)" in shrunk.reason
    commands = feed(machine, WorkerUp(dead, 4096), 2.0)
    (reshaped,) = [command for command in formed(machine, commands, 2.1) if isinstance(command, Reshaped)]
    assert (reshaped.change.after, reshaped.change.reason) == (PAIRS, f"worker {dead} is up")


def test_the_planner_is_asked_with_what_arrived_and_its_plan_is_taken():
    machine = scheduler(plan=SINGLES, solves=True)
    up(machine, range(4))
    for i in range(3):
        feed(machine, Arrival(request(i, at=2.0, slo=Slo(seconds=0.001))), 2.0)
    assert machine.questions.solving
    list(machine.observe(PlanReady(None, "well as it is"), 2.5))
    (solve,) = [command for command in machine.decide(4.0) if isinstance(command, Solve)]
    (flow,) = solve.demand.flows
    assert (flow.canvas_tokens, flow.answer_tokens, flow.rate) == (74, 64, 1.5)
    assert 0 < flow.tightness < 0.7
    assert (solve.demand.plan, solve.demand.ranks) == (SINGLES, (0, 1, 2, 3))
    feed(machine, PlanReady(PAIRS, "tight deadlines"), 4.0)
    assert machine.plan_state.wanted == PAIRS
    feed(machine, Replan(SINGLES, "asked"), 4.5)
    feed(machine, PlanReady(PAIRS, "tight deadlines"), 5.0)
    assert (machine.plan_state.wanted, machine.questions.solves) == (
        SINGLES,
        False,
    )  # a plan asked for by hand stays
    feed(machine, Replan(None, "auto"), 6.0)
    assert (machine.plan_state.wanted, machine.questions.solves) == (SINGLES, True)


def test_the_planner_is_asked_more_often_while_the_first_traffic_begins():
    machine = scheduler(plan=SINGLES, solves=True)
    up(machine, range(4))
    asked = []
    for tick in range(60):
        now = tick / 4
        commands = list(machine.decide(now))
        if now in (3.0, 12.0):  # the second one is not the first traffic
            commands += feed(machine, Arrival(request(len(asked), at=now)), now)
        if any(isinstance(command, Solve) for command in commands):
            asked.append(now)
            list(machine.observe(PlanReady(None, "well as it is"), now))
    assert asked == [0.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 14.0]


def moving(rows):
    """Four singles with so many rows that are to become pairs; both pairs are being formed."""
    machine = scheduler(plan=SINGLES, step_timeout=30.0)
    up(machine, range(4))
    batches = [of(feed(machine, Arrival(request(row))), Launch)[0].batch for row in range(rows)]
    commands = feed(machine, Replan(PAIRS, "asked"), 1.0)
    for batch in batches:
        commands += feed(machine, done(batch, [result(span, 20, 12) for span in batch.spans]), 1.0)
    begins = [instance for reshard in of(commands, Reshard) for instance in reshard.moves.begins]
    assert [instance.ranks for instance in sorted(begins, key=lambda one: one.ranks)] == list(PAIRS.groups)
    assert len(machine.placement.moving) == rows
    return machine, begins


@pytest.mark.parametrize(("rows", "at_once"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_moving_rows_go_on_with_the_first_instance_that_is_ready(rows, at_once):
    machine, (first, _) = moving(rows)
    assert len(rows_of(feed(machine, InstanceReady(first), 1.1))) == at_once  # its part of them
    seen = set()
    if rows > at_once:
        assert machine.wake_at() == 2.0
        (replica,) = machine.placement.replicas.values()
        list(machine.decide(2.0))
        seen = rows_of(feed(machine, done(replica.batch, [result(span, 16, 13) for span in replica.batch.spans]), 2.0))
        assert seen == set(range(rows))
    assert not machine.placement.moving


def test_moving_rows_are_spread_over_instances_that_become_ready_one_after_the_other():
    machine, begins = moving(4)
    found = [rows_of(feed(machine, InstanceReady(instance), 1.1)) for instance in begins]
    assert [len(rows) for rows in found] == [2, 2]
    assert found[0] | found[1] == set(range(4))


def test_a_row_that_the_first_instance_cannot_hold_waits_for_one_that_can():
    machine = scheduler(plan=Plan(((0,), (1,))))
    list(machine.observe(WorkerUp(0, 64), 0.0))
    formed(machine, feed(machine, WorkerUp(1, 4096)), 0.0)
    (launch,) = feed(machine, Arrival(request(0, answer=300)))
    list(machine.observe(WorkerUp(2, 64), 1.0))
    list(machine.observe(WorkerUp(3, 4096), 1.0))
    feed(machine, Replan(Plan(((2,), (3,))), "asked"), 1.0)
    small, large = sorted(machine.plan_state.forming.values(), key=lambda instance: instance.kv_tokens)
    feed(machine, done(launch.batch, [result(span, 20, 12) for span in launch.batch.spans]), 1.0)
    assert rows_of(feed(machine, InstanceReady(small), 1.1)) == set()
    assert rows_of(feed(machine, InstanceReady(large), 1.2)) == {0}
