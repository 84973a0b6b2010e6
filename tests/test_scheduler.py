"""The state machine alone: events in, commands out, no clock and no device."""

import itertools
import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilaserve.config import Config
from dilaserve.profile.profile_file import guessed
from dilaserve.scheduler.invariants import violations
from dilaserve.scheduler.request_state import TRANSITIONS, Phase, RequestState, Transition
from dilaserve.scheduler.rules.accuracy_budget import Bank
from dilaserve.scheduler.scheduler import Scheduler
from dilaserve.types import (
    Adjust,
    Arrival,
    Cancel,
    Decline,
    Decoding,
    Emit,
    Fail,
    Finish,
    Instance,
    InstanceLost,
    InstanceReady,
    Kill,
    Launch,
    Paused,
    Plan,
    PlanReady,
    Release,
    Replan,
    Request,
    Reshaped,
    Reshard,
    RowResult,
    Slo,
    Solve,
    StepDone,
    StopEarly,
    WorkerLost,
    WorkerUp,
)
from dilaserve.worker.model_runner import answered
from dilaserve.worker.multi_step import Courses


def request(row, prompt=10, answer=64, at=0.0, slo=Slo(), **decoding):  # noqa: B008
    return Request(
        id=f"r{row}",
        row=row,
        generation=1,
        prompt_tokens=prompt,
        canvas_tokens=prompt + answer,
        max_tokens=answer,
        arrived_at=at,
        decoding=Decoding(**decoding),
        slo=slo,
    )


def scheduler(guess=False, plan=None, solves=False, repeats=1, **device):
    profile = guessed("a model", "cpu")
    law = msgspec.structs.replace(profile.costs["cpu x1"], guess=guess)
    return Scheduler(Config.of(**device), {1: law}, profile.quality, plan, (1, 2, 4), solves, repeats)


def feed(machine, event, now=0.0):
    """Commands of one event and the decision after it."""
    return [*machine.observe(event, now), *machine.decide(now)]


def result(span, masks_left=0, prefix=None, stop_at=-1, unmasked=4, stage=0, rested=False):
    end = span.block_end if prefix is None else prefix
    return RowResult(span.row, span.generation, unmasked, masks_left, end, stop_at, 0.9 * unmasked, stage, rested)


def done(batch, results, last=True):
    return StepDone(batch.instance, batch.id, tuple(results), 0.01, 0.009, last)


def test_a_request_goes_from_refresh_to_reuse_to_the_next_block_and_ends():
    machine = scheduler()
    assert feed(machine, Arrival(request(3))) == []
    (launch,) = feed(machine, InstanceReady(Instance(0, (0,), 4096)), 1.0)
    (span,) = launch.batch.spans
    assert (span.start, span.length, span.keys, span.block_start, span.block_end) == (0, 74, 74, 10, 42)
    emit, launch = feed(machine, done(launch.batch, [result(span, masks_left=28, prefix=12)]), 2.0)
    assert (emit.prefix, launch.batch.spans[0].start, launch.batch.spans[0].length) == (12, 10, 32)
    emit, launch = feed(machine, done(launch.batch, [result(launch.batch.spans[0])]), 3.0)
    (span,) = launch.batch.spans
    assert (emit.prefix, span.start, span.length, span.block_start, span.block_end) == (42, 0, 74, 42, 74)
    emit, finish, release = feed(machine, done(launch.batch, [result(span)]), 4.0)
    assert (emit.prefix, finish.reason, release.row) == (74, "length", 3)
    usage = finish.usage
    assert (usage.steps, usage.refreshes, usage.queued, usage.served) == (3, 2, 1.0, 3.0)


def test_a_batch_goes_on_while_nobody_waits_and_ends_soon_when_somebody_does():
    machine = scheduler(repeats=8, max_num_seqs=2)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0)))
    (first,), ((then, *_),) = launch.batch.spans, launch.batch.then
    assert launch.batch.steps == 8
    assert (first.start, first.length, then.start, then.length) == (0, 74, 10, 32)  # the refresh, and what reuses it
    (emit,) = feed(machine, done(launch.batch, [result(first, masks_left=28, prefix=12)], last=False))
    assert emit.prefix == 12
    assert feed(machine, Arrival(request(1, rule="steps", num_denoising_steps=64))) == [StopEarly(launch.batch)]
    assert feed(machine, done(launch.batch, [result(first, masks_left=24, prefix=13)], last=False))[1:] == []
    emit, launch = feed(machine, done(launch.batch, [result(first, masks_left=20, prefix=14)]))
    assert (len(launch.batch.spans), launch.batch.steps) == (2, 8)
    assert [[span.start for span in then] for then in launch.batch.then] == [[0, 42], [10, 0, 42]]
    assert feed(machine, Arrival(request(2))) == [StopEarly(launch.batch)]  # it waits for a place
    states = {span.row: result(span, masks_left=16, prefix=span.block_start + 3) for span in launch.batch.spans}
    *_, launch = feed(machine, done(launch.batch, [states[span.row] for span in launch.batch.spans]))
    assert (launch.batch.steps, launch.batch.then) == (1, ())


def test_a_batch_of_several_steps_ends_soon_when_a_row_in_it_leaves_or_the_instance_is_to_go():
    for event in (Cancel("r1", "cancelled"), Replan(Plan(((0, 1),)), "asked for")):
        machine = scheduler(repeats=8, plan=Plan(((0,),)))
        (reshard,) = feed(machine, WorkerUp(0, 4096))
        feed(machine, InstanceReady(reshard.moves.begins[0]))
        (launch,) = feed(machine, Arrival(request(0)))
        feed(machine, Arrival(request(1)))
        *_, launch = feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=28, prefix=12)]))
        assert (len(launch.batch.spans), launch.batch.steps) == (2, 8)
        list(machine.observe(WorkerUp(1, 4096), 0.0))
        assert StopEarly(launch.batch) in feed(machine, event)
        assert not any(isinstance(command, StopEarly) for command in machine.decide(1.0))


@pytest.mark.parametrize(
    ("how", "steps", "queries"),
    [
        (dict(rule="steps", num_denoising_steps=20), [2, 1], 32),  # quotas 4, 4, 3, 3, …
        (dict(refresh_interval=4), [1, 1], None),
        (dict(temperature=0.5), [1, 1], None),
        (dict(rule="factor"), [8, 8], 32),
        (dict(cache="prefix"), [8, 8], 64),
        (dict(cache="none"), [8, 8], 74),
    ],
)
def test_rows_that_count_or_draw_by_the_step_are_not_repeated_past_a_change(how, steps, queries):
    machine = scheduler(repeats=8)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0, **how)))
    *_, other = feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=28, prefix=12)]))
    assert [launch.batch.steps, other.batch.steps] == steps
    assert [then[0].length for then in launch.batch.then] == ([queries] if queries else [])


def test_a_launch_goes_on_into_the_next_blocks():
    machine = scheduler(repeats=8)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0, answer=96)))
    (first,), (then,) = launch.batch.spans, launch.batch.then
    reuse, refresh, again, *_ = then
    places = [(10, 32, 10), (0, 106, 42), (42, 32, 42), (0, 106, 74), (74, 32, 74)]
    assert [(span.start, span.length, span.block_start) for span in then] == places
    row, (replica,) = machine.requests["r0"], machine.placement.replicas.values()

    def step(span, last=False, **how):
        prefixes = [command.prefix for command in feed(machine, done(launch.batch, [result(span, **how)], last))[:1]]
        return prefixes, row.steps, row.refreshes, replica.features.tokens, replica.refreshing

    assert step(first, masks_left=28, prefix=12) == ([12], 1, 1, 106, True)
    assert step(reuse, stage=1) == ([42], 2, 1, 32, False)
    assert step(reuse, unmasked=0, stage=1, rested=True) == ([], 2, 1, 32, False)  # it had begun
    assert step(refresh, masks_left=30, prefix=43, stage=2) == ([43], 3, 2, 106, True)
    assert step(again, masks_left=29, prefix=44, stage=3) == ([44], 4, 2, 32, False)
    emit, launch = feed(machine, done(launch.batch, [result(again, stage=3)]))
    (span,) = launch.batch.spans
    assert (emit.prefix, span.start, span.block_start) == (74, 0, 74)


def test_what_a_step_was_is_what_the_worker_says_and_not_what_it_should_have_been():
    """A worker that cannot reuse its K/V refreshes again: counts and costs are those of what was run."""
    machine = scheduler(repeats=8)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0, answer=96)))
    (first,), (replica,), row = launch.batch.spans, machine.placement.replicas.values(), machine.requests["r0"]
    seen = []
    for left, stage in ((28, 0), (24, 0), (20, 1), (16, 0)):
        feed(machine, done(launch.batch, [result(first, left, 12, stage=stage)], last=False))
        seen.append((row.refreshes, row.since_refresh, replica.features.tokens, replica.refreshing))
    assert seen == [(1, 1, 106, True), (2, 1, 106, True), (2, 2, 32, False), (3, 1, 106, True)]


@pytest.mark.parametrize(
    ("rows", "how", "now", "blocks"),
    [
        (1, {}, 0.0, 6),
        (2, {}, 0.0, 4),
        (3, {}, 0.0, 2),
        (32, {}, 0.0, 1),
        (33, {}, 0.0, 0),
        (2, dict(rule="steps", num_denoising_steps=112), 0.0, 4),  # 2 each
        (2, dict(rule="steps", num_denoising_steps=140), 0.0, 0),  # 2 and then 1
        (1, dict(rule="steps", num_denoising_steps=111), 0.0, 5),  # the last one in 15 steps, of 3 and then 2
        (2, dict(slo=Slo(seconds=6.0)), 2.0, 4),
        (2, dict(slo=Slo(seconds=6.0)), 3.0, 0),  # each would take time that the other does not have
    ],
)
def test_a_launch_goes_into_as_many_blocks_as_all_its_rows_could_bear(rows, how, now, blocks):
    machine = scheduler(repeats=7, max_num_batched_tokens=16384)
    feed(machine, InstanceReady(Instance(0, (0,), 65536)))
    *_, launch = feed(machine, Arrival(request(0, answer=224, **how)))
    for row in range(1, rows):
        feed(machine, Arrival(request(row, answer=224, **how)))
    *_, launch = feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=28, prefix=12)]), now)
    assert len(launch.batch.spans) == rows
    for span, then in zip(launch.batch.spans, launch.batch.then, strict=True):
        assert len({span.block_start for span in then} - {span.block_start}) == blocks


def test_a_row_that_is_done_rests_until_the_batch_is():
    machine = scheduler(repeats=8)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0, answer=32)))
    assert feed(machine, Arrival(request(1))) == [StopEarly(launch.batch)]
    *_, launch = feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=28, prefix=12)]))
    both = [result(span, masks_left=20, prefix=15) for span in launch.batch.spans]
    *_, launch = feed(machine, done(launch.batch, both))
    assert launch.batch.steps == 8
    one, other = launch.batch.spans
    assert (one.row, other.row) == (0, 1)
    first = [result(one), result(other, masks_left=16, prefix=16)]
    after = feed(machine, done(launch.batch, first, last=False))
    assert [type(command) for command in after] == [Emit, Finish, Emit, StopEarly]
    finish = next(command for command in after if isinstance(command, Finish))
    rest = [result(one, unmasked=0, rested=True), result(other, masks_left=12, prefix=17)]
    after = feed(machine, done(launch.batch, rest))
    assert finish.usage.steps == 3
    assert Release(0) in after
    (launch,) = [command for command in after if isinstance(command, Launch)]
    assert [span.row for span in launch.batch.spans] == [1]


def test_an_end_token_counts_once_everything_before_it_is_there():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0)))
    (span,) = launch.batch.spans
    emit, launch = feed(machine, done(launch.batch, [result(span, masks_left=3, prefix=15, stop_at=20)]))
    assert isinstance(emit, Emit)
    assert isinstance(launch, Launch)
    emit, finish, release = feed(machine, done(launch.batch, [result(span, masks_left=1, prefix=25, stop_at=20)]))
    assert (emit.prefix, finish.reason, release) == (20, "stop", Release(0))


def test_max_tokens_cut_the_last_block():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    wanted = Request(
        id="a",
        row=0,
        generation=1,
        prompt_tokens=10,
        canvas_tokens=42,
        max_tokens=5,
        arrived_at=0.0,
        decoding=Decoding(),
    )
    (launch,) = feed(machine, Arrival(wanted))
    emit, finish, _ = feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=9, prefix=21)]))
    assert (emit.prefix, finish.reason) == (15, "length")


def test_a_cancelled_row_is_free_after_its_step_in_flight():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0)))
    (finish,) = feed(machine, Cancel("r0", "cancelled"))
    assert finish.reason == "cancelled"
    assert feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=1)])) == [Release(0)]
    assert feed(machine, Cancel("r0", "cancelled")) == []


def test_a_row_that_has_ended_in_a_batch_that_goes_on_wants_no_time_of_it():
    machine = scheduler(repeats=8)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0, answer=32, slo=Slo(seconds=1.0))))
    emit, finish, _ = feed(machine, done(launch.batch, [result(launch.batch.spans[0])], last=False))
    assert (emit.prefix, finish.reason) == (42, "length")
    (replica,) = machine.placement.replicas.values()
    assert (list(replica.residents), replica.with_deadline) == ([0], [])
    assert list(machine.decide(0.5)) == []  # a look at the whole house
    assert feed(machine, done(launch.batch, [result(launch.batch.spans[0])])) == [Release(0)]


def test_a_guess_turns_nobody_away_until_steps_have_been_seen():
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


@pytest.mark.parametrize("on_miss", ["reject", "cancel_when_late"])
def test_a_deadline_that_nobody_could_keep_is_told_from_one_that_company_spoils(on_miss):
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


def test_the_ledger_remembers_so_many_tenants_and_no_more(monkeypatch):
    monkeypatch.setattr("dilaserve.scheduler.accuracy_ledger.MAX_TENANTS", 3)
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    for i in range(6):
        (launch,) = feed(machine, Arrival(request(i, answer=8, slo=Slo(tenant=f"t{i % 5}"))), i)
        feed(machine, done(launch.batch, [result(launch.batch.spans[0])]), i)
    assert list(machine.deadlines.ledger.banks) == ["t3", "t4", "t0"]
    assert machine.deadlines.ledger.reserved == {}


def test_who_has_spent_its_credit_is_not_forgotten_for_those_who_have_not(monkeypatch):
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


def test_a_client_that_leaves_before_the_end_pays_for_what_it_was_given():
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
        assert flying.phase is Phase.GONE
    assert machine.deadlines.ledger.all.served == 16 / 64
    assert machine.deadlines.ledger.all.spent == drop > 0.0


def test_a_newcomer_alone_runs_at_its_own_threshold():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    for i in range(5):
        commands = feed(machine, Arrival(request(i, at=float(i), slo=Slo(seconds=60.0))), float(i))
        while launches := [command for command in commands if isinstance(command, Launch)]:
            assert not any(isinstance(command, Adjust) for command in commands)
            commands = feed(machine, done(launches[0].batch, [result(span) for span in launches[0].batch.spans]), i)
        assert machine.deadlines.floor == 0


def test_an_answer_is_charged_for_its_lowest_threshold_however_few_tokens_it_gave():
    state = RequestState(request(0), "any", (0.9, 0.8, 0.6), (0.0, 1.0, 9.0), (0.0, 0.5, 7.0), (9.0, 1.0, 0.1), 0)
    for level, unmasked in ((0, 20), (2, 1), (1, 11)):
        state.level = level
        state.advance(RowResult(0, 1, unmasked, 0 if level == 1 else 9, 10, -1, 0.9 * unmasked))
    assert (state.drop, state.usage(1.0).expected_accuracy_drop) == (9.0, 7.0)


def test_a_crowd_lowers_thresholds_before_anybody_is_late():
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
    assert {state.level for state in machine.requests.values()} == {1}


def test_a_lost_worker_costs_a_refresh_and_nothing_else():
    machine = scheduler()
    for i in range(2):
        feed(machine, InstanceReady(Instance(i, (i,), 4096)))
    (launch,) = feed(machine, Arrival(request(0)))
    _, launch = feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=8, prefix=30)]))
    (again,) = feed(machine, InstanceLost(launch.batch.instance, "killed"))
    (span,) = again.batch.spans
    assert again.batch.instance != launch.batch.instance
    assert (span.start, span.length, span.block_start) == (0, 74, 10)
    assert feed(machine, done(launch.batch, [result(span)])) == []  # the late report of the lost one


def test_a_row_in_flight_at_two_crashes_fails_alone():
    machine = scheduler(max_num_seqs=1)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    feed(machine, Arrival(request(0)))
    feed(machine, Arrival(request(1, at=1.0)))
    feed(machine, InstanceLost(0, "killed"))
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    fail, release = feed(machine, InstanceLost(0, "killed"))
    assert isinstance(fail, Fail)
    assert (fail.request.row, release) == (0, Release(0))
    (launch,) = feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    assert [span.row for span in launch.batch.spans] == [1]


def test_a_row_is_not_to_blame_for_workers_that_somebody_else_kills():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    for i in range(3):
        feed(machine, Arrival(request(i, at=float(i))))
    for life in range(1, 6):
        assert feed(machine, InstanceLost(life - 1, "killed by SIGKILL", outside=True)) == []
        (launch,) = feed(machine, InstanceReady(Instance(life, (0,), 4096)))
        assert {span.row for span in launch.batch.spans} == {0, 1, 2}  # none is taken alone


def test_the_mates_of_a_row_that_kills_workers_survive_it():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0)))
    for i in (1, 2):
        feed(machine, Arrival(request(i, at=float(i))))
    *_, launch = feed(machine, done(launch.batch, [result(launch.batch.spans[0], 20, 12)]))
    assert {span.row for span in launch.batch.spans} == {0, 1, 2}
    feed(machine, InstanceLost(0, "killed"))
    (launch,) = feed(machine, InstanceReady(Instance(1, (1,), 4096)))
    assert [span.row for span in launch.batch.spans] == [0]  # each suspect alone
    fail, _ = feed(machine, InstanceLost(1, "killed"))
    assert fail.request.row == 0
    (launch,) = feed(machine, InstanceReady(Instance(2, (0,), 4096)))
    seen = [{span.row for span in launch.batch.spans}]
    for _ in range(2):
        *_, launch = feed(machine, done(launch.batch, [result(span, 20, 12) for span in launch.batch.spans]))
        seen.append({span.row for span in launch.batch.spans})
    assert seen == [{1}, {2}, {1, 2}]


def up(machine, ranks, pool=4096, now=0.0):
    """Commands after workers of these ranks have come up and their instances have been formed."""
    for rank in ranks:
        list(machine.observe(WorkerUp(rank, pool), now))
    return formed(machine, list(machine.decide(now)), now)


def formed(machine, commands, now):
    """What follows when all instances of a `Reshard` are ready."""
    (moves,) = [command.moves for command in commands if isinstance(command, Reshard)]
    for instance in moves.begins:
        list(machine.observe(InstanceReady(instance), now))
    return list(machine.decide(now))


PAIRS, SINGLES = Plan(((0, 1), (2, 3))), Plan(((0,), (1,), (2,), (3,)))


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


def test_a_step_that_hangs_is_killed_once_and_only_after_its_time():
    machine = scheduler(step_timeout=3.0)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    feed(machine, Arrival(request(0)))
    assert machine.wake_at() == 3.0
    assert list(machine.decide(2.9)) == []
    (kill,) = machine.decide(3.0)
    assert isinstance(kill, Kill)
    assert kill.instance == 0
    assert list(machine.decide(4.0)) == []


@given(st.lists(st.floats(0.1, 100.0), max_size=5))
def test_a_step_under_way_gets_the_time_again_that_the_engine_did_not_live_through(pauses):
    machine, lost = scheduler(step_timeout=3.0), 0.0
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0)))
    known = machine.estimates.known()
    for seconds in pauses:
        lost += seconds
        assert feed(machine, Paused(seconds), 2.9 + lost) == []
    assert machine.wake_at() == pytest.approx(3.0 + lost)
    if pauses:
        list(machine.observe(done(launch.batch, [result(launch.batch.spans[0], 20, 12)]), 2.9 + lost))
        assert machine.estimates.known() == known  # how long it took tells nothing


def test_the_planner_is_asked_with_what_arrived_and_its_plan_is_taken():
    machine = scheduler(plan=SINGLES, solves=True)
    up(machine, range(4))
    for i in range(3):
        feed(machine, Arrival(request(i, at=2.0, slo=Slo(seconds=0.001))), 2.0)
    assert machine.planning.waiting
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
    assert (machine.plan_state.wanted, machine.planning.active) == (
        SINGLES,
        False,
    )  # a plan asked for by hand stays
    feed(machine, Replan(None, "auto"), 6.0)
    assert (machine.plan_state.wanted, machine.planning.active) == (SINGLES, True)


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


def test_an_instance_that_does_not_come_up_is_killed():
    machine = scheduler(plan=PAIRS, step_timeout=3.0)
    for rank in range(4):
        list(machine.observe(WorkerUp(rank, 4096), 1.0))
    (reshard,) = machine.decide(1.0)
    first, second = reshard.moves.begins
    assert feed(machine, InstanceReady(first), 2.0) == []
    assert machine.wake_at() == 4.0
    (kill,) = machine.decide(4.0)
    assert kill.instance == second.id


def test_the_steps_rule_hands_out_its_quotas():
    machine, taken = scheduler(), []
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    commands = feed(machine, Arrival(request(0, answer=64, rule="steps", num_denoising_steps=5)))
    while isinstance(commands[-1], Launch):
        (span,) = commands[-1].batch.spans
        taken.append((span.block_start, span.quota))
        left = 32 - sum(quota for start, quota in taken if start == span.block_start)
        prefix = span.block_end - left
        commands = feed(machine, done(commands[-1].batch, [result(span, left, prefix, unmasked=span.quota)]))
    assert taken == [(10, 11), (10, 11), (10, 10), (42, 16), (42, 16)]


def test_a_row_whose_deadline_is_given_up_waits_in_order_of_arrival():
    machine = scheduler(max_num_seqs=1)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    feed(machine, Arrival(request(0, slo=Slo(seconds=1000.0))))
    feed(machine, Arrival(request(1, at=1.0, slo=Slo(seconds=5.0))), 1.0)
    feed(machine, Arrival(request(2, at=2.0)), 2.0)
    list(machine.decide(7.0))
    assert [state.request.row for state in machine.placement.waiting] == [1, 2]


@pytest.mark.parametrize("scheduling", ["edf", "least-slack", "composed"])
def test_who_has_waited_for_too_long_gets_the_next_room_and_the_next_step(scheduling):
    """Also while what steps cost is a guess, and nobody is tested."""
    machine = scheduler(guess=True, scheduling=scheduling, max_num_seqs=1, best_effort_age=5.0)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0, answer=32, slo=Slo(seconds=100.0))))
    feed(machine, Arrival(request(1)))
    for row, now in ((2, 1.0), (3, 6.0)):
        feed(machine, Arrival(request(row, answer=32, at=now, slo=Slo(seconds=100.0))), now)
        *_, launch = feed(machine, done(launch.batch, [result(span) for span in launch.batch.spans]), now)
        assert [span.row for span in launch.batch.spans] == [2 if now < 5.0 else 1]


def test_a_deadline_that_has_passed_is_no_guess():
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


def test_a_row_that_fits_nowhere_any_more_holds_nobody_up_and_ends_when_all_workers_are_back():
    machine = scheduler(plan=Plan(((0,), (1,))), best_effort_age=5.0)
    up(machine, range(2))
    feed(machine, Arrival(request(0, answer=2048)))
    for replica in sorted(machine.placement.replicas.values(), key=lambda replica: len(replica.residents)):
        (rank,) = replica.instance.ranks
        list(machine.observe(WorkerLost(rank, "killed"), 1.0))
        feed(machine, InstanceLost(replica.instance.id, "killed"), 1.0)
    formed(machine, feed(machine, WorkerUp(0, 1024), 2.0), 2.0)
    (launch,) = feed(machine, Arrival(request(1, at=3.0)), 3.0)
    assert [span.row for span in launch.batch.spans] == [1]
    (launch,) = feed(machine, done(launch.batch, [result(span, 9, 20) for span in launch.batch.spans]), 9.0)[1:]
    assert "r0" in machine.requests  # the other may come back with what it had
    commands = formed(machine, feed(machine, WorkerUp(1, 512), 10.0), 10.0)
    (fail,) = [command for command in commands if isinstance(command, Fail)]
    assert fail.request.row == 0
    assert "lower max_tokens" in fail.for_client
    assert Release(0) in commands


def test_requests_wait_in_order_for_rows_and_for_room_in_the_pool():
    machine = scheduler(max_num_seqs=8)
    feed(machine, InstanceReady(Instance(0, (0,), 200)))
    (launch,) = feed(machine, Arrival(request(0)))
    assert feed(machine, Arrival(request(1, at=1.0))) == []
    assert feed(machine, Arrival(request(2, at=2.0, answer=8))) == []
    commands = feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=1, prefix=10)]))
    assert {span.row for span in commands[-1].batch.spans} == {0, 1}


def test_what_the_tables_do_not_list_is_a_bug():
    assert (Phase.GONE, Transition.RETURNED) not in TRANSITIONS
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    feed(machine, Arrival(request(0)))
    with pytest.raises(KeyError):
        machine.requests["r0"].did(Transition.PLACED)


PLANS = (SINGLES, PAIRS, Plan(((0, 1), (2,), (3,))), Plan(((0, 1, 2, 3),)))


class World:
    """Plays engine and workers at random, and watches that nothing is lost, doubled or overlapped."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.settings = {
            "max_num_seqs": self.rng.randint(1, 5),
            "max_num_batched_tokens": self.rng.randint(1, 400),
            "scheduling": self.rng.choice(("fcfs", "edf", "least-slack", "composed", "composed", "composed")),
            "shed": self.rng.choice(("on", "off")),
            "threshold_control": self.rng.choice(("fixed", "slack", "slack+floor")),
            "accuracy_budget": self.rng.choice(("off", 0.9)),
            "guaranteed_rows": self.rng.randint(1, 4),
        }
        self.settings["repeats"] = self.rng.choice((1, 8))
        self.machine = scheduler(plan=SINGLES, **self.settings)
        self.driver = self.machine  # what observes and decides
        self.steps, self.courses = {}, {}  # by instance: taken by its batch, and what its rows do now and next
        self.stopped_early, self.begun = set(), set()  # instances told to hurry; those a step ahead of what they know
        self.in_flight, self.up, self.now, self.rows = {}, set(), 0.0, 0  # `up`: ranks
        self.instances, self.forming = {}, {}
        self.dying = {}  # instances of which a rank is gone: the ranks that have not left them yet, by id
        self.pools = self.rng.choice(((400,), (400, 224), (400, 200, 96)))  # tokens that workers come up with
        self.alive, self.ended, self.masks, self.log = set(), set(), {}, []
        self.told, self.timed = Counter(), 0  # last words to clients by kind; those about a deadline
        self.taken, self.refreshed = Counter(), Counter()  # steps and refreshes by row, as usage has them

    def feed(self, event):
        self.now += self.rng.random()
        self.perform([*self.observe(event), *self.decide()])
        self.count()

    def observe(self, event):
        self.log.append(("observe", event, self.now))
        return list(self.driver.observe(event, self.now))

    def decide(self):
        self.log.append(("decide", self.now))
        return list(self.driver.decide(self.now))

    def count(self):
        """Every request is in the house or has one fate, and the state is consistent."""
        machine = self.machine
        assert violations(machine) == []
        assert 0 <= machine.placement.running <= len(machine.requests)
        assert sum(machine.totals.fates.values()) == len(self.ended) == self.rows - len(machine.requests)

    def perform(self, commands):
        for command in commands:
            match command:
                case Launch(batch):
                    self.launched(batch)
                case StopEarly(batch):
                    assert self.in_flight[batch.instance] == batch
                    assert batch.instance not in self.stopped_early
                    self.stopped_early.add(batch.instance)
                case Finish(wanted) | Fail(wanted) | Decline(wanted):
                    self.told[type(command)] += 1
                    self.timed += wanted.slo.seconds is not None
                    assert wanted.id not in self.ended
                    self.ended.add(wanted.id)
                    if isinstance(command, Finish):
                        counts = command.usage.steps, command.usage.refreshes
                        assert counts == (self.taken[wanted.row], self.refreshed[wanted.row])
                case Release(row):
                    self.alive.remove(row)
                case Reshard(moves):
                    for id in moves.ends:
                        assert id not in self.in_flight
                        del self.instances[id]
                        self.dying.pop(id, None)
                    for instance in moves.begins:
                        others = [*self.instances.values(), *self.forming.values()]
                        assert not {rank for other in others for rank in other.ranks} & set(instance.ranks)
                        assert set(instance.ranks) <= self.up
                        self.forming[instance.id] = instance

    def launched(self, batch):
        assert batch.instance in self.instances
        assert batch.instance not in self.dying
        assert batch.instance not in self.in_flight
        rows = [span.row for span in batch.spans]
        busy = [span.row for other in self.in_flight.values() for span in other.spans]
        assert len(set(rows)) == len(rows)
        assert not set(rows) & set(busy)
        assert set(rows) <= self.alive
        places = sorted((span.kv_start, span.kv_start + span.keys) for span in batch.spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
        self.in_flight[batch.instance] = batch
        self.courses[batch.instance] = Courses(batch.spans, batch.then)
        self.refreshed.update(span.row for span in batch.spans if span.length == span.keys)
        self.steps[batch.instance] = 0
        self.stopped_early.discard(batch.instance)
        self.begun.discard(batch.instance)

    def act(self):
        choice = self.rng.random()
        if choice < 0.3:
            prompt, answer = self.rng.randint(1, 60), self.rng.randint(1, 100)
            cache = self.rng.choice(("none", "prefix", "dual"))
            length = self.rng.choice((8, 32))
            wanted = request(self.rows, prompt, answer, self.now, self.slo(), cache=cache, block_length=length)
            self.alive.add(self.rows)
            self.rows += 1
            self.feed(Arrival(wanted))
        elif choice < 0.35 and self.rows:
            self.feed(Cancel(f"r{self.rng.randrange(self.rows)}", "cancelled"))
        elif choice < 0.40:
            self.toggle(self.rng.randrange(4))
        elif choice < 0.43:
            self.feed(Replan(self.rng.choice(PLANS), "asked"))
        elif choice < 0.45:
            self.feed(Paused(self.rng.choice((0.1, 5.0, 100.0))))
        elif choice < 0.48 and self.dying:
            self.lose(self.rng.choice(sorted(self.dying)))
        elif choice < 0.58 and (ready := sorted(self.forming.keys() - self.dying.keys())):
            self.form(self.rng.choice(ready))
        elif self.in_flight:
            self.finish(self.rng.choice(sorted(self.in_flight)))

    def slo(self):
        seconds = self.rng.choice((None, None, 0.001, 1.0, 5.0, 100.0))
        on_miss = self.rng.choice(("best_effort", "best_effort", "reject", "cancel_when_late"))
        return Slo(seconds=seconds, on_miss=on_miss, weight=self.rng.choice((1.0, 4.0)), tenant=self.rng.choice("ab"))

    def toggle(self, rank):
        if rank not in self.up:
            self.up.add(rank)
            self.feed(WorkerUp(rank, self.rng.choice(self.pools)))
            return
        self.up.remove(rank)
        self.observe(WorkerLost(rank, "killed"))
        for id, instance in [*self.instances.items(), *self.forming.items()]:
            if rank in instance.ranks and (id in self.instances or id in self.forming):
                staying = self.dying.setdefault(id, set(instance.ranks))
                staying.discard(rank)
                if not staying or self.rng.random() < 0.5:
                    self.lose(id)
        self.perform(self.decide())

    def lose(self, id):
        """All ranks that live on have left the instance. What its last step wrote stays, reported or not."""
        if id in self.in_flight and self.rng.random() < 0.5:
            for span in self.courses[id].spans:
                before = self.masks.get(key := (span.row, span.block_start), span.block_end - span.block_start)
                self.masks[key] = max(0, before - self.rng.choice((1, 8, 32)))
        for there in (self.instances, self.forming, self.in_flight, self.dying):
            there.pop(id, None)
        self.feed(InstanceLost(id, "killed", outside=self.rng.random() < 0.5))

    def form(self, id):
        self.instances[id] = self.forming.pop(id)
        self.feed(InstanceReady(self.instances[id]))

    def finish(self, instance):
        """One step; where all rows reuse, another may have begun before this one's result was known."""
        batch, courses, results = self.in_flight[instance], self.courses[instance], []
        spans, replica = (
            courses.spans,
            self.machine.placement.replicas.get(instance) or self.machine.placement.closing[instance],
        )
        there = [state.phase is not Phase.LEAVING for state in replica.in_flight]
        for span, stage, here in zip(spans, courses.stages, there, strict=True):
            key = (span.row, span.block_start)
            before = self.masks.get(key, span.block_end - span.block_start)
            left = self.masks[key] = max(0, before - self.rng.randint(1, 8))
            stop_at = self.rng.randrange(span.block_start, span.block_end) if self.rng.random() < 0.1 else -1
            rested = not before and instance in self.begun
            results.append(result(span, left, span.block_end - left, stop_at, before - left, stage, rested))
            if here and not rested:
                self.taken[span.row] += 1
                self.refreshed[span.row] += self.steps[instance] > 0 and span.length == span.keys
        self.steps[instance] += 1
        last = self.steps[instance] == batch.steps
        over = answered(results) or instance in self.stopped_early
        ends = over or not all(one.masks_left for one in results)
        begins = not last and instance not in self.begun and all(span.start for span in spans)
        if ends and begins and self.rng.random() < 0.5:
            self.begun.add(instance)
            self.feed(done(batch, results, last=False))
            return
        self.begun.discard(instance)
        last = last or over or not courses.follow(results)
        tokens = sum(span.length for span in courses.spans)
        last = last or (tokens > self.machine.batcher.max_tokens and len(spans) > 1)
        if last:
            del self.in_flight[instance]
        self.feed(done(batch, results, last))
        if replica.batch is batch:  # the scheduler knows what its rows have done
            assert [known[3:8] for known in replica.spans] == [span[3:8] for span in spans]

    def settle(self):
        """Bring up every instance and let everything end."""
        while self.dying:
            self.lose(min(self.dying))
        for rank in {0, 1, 2, 3} - self.up:
            self.toggle(rank)
        while self.in_flight or self.machine.requests or self.forming:
            if self.forming:
                self.form(min(self.forming))
            elif self.in_flight:
                self.finish(min(self.in_flight))
            else:
                self.now = max(self.now, self.machine.wake_at())
                self.perform(self.decide())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_happens_every_request_ends_once_and_every_row_comes_back(seed):
    world = World(seed)
    for _ in range(150):
        world.act()
    world.settle()
    assert world.ended == {f"r{i}" for i in range(world.rows)}
    assert not world.alive
    assert not world.machine.requests
    fates = world.machine.totals.fates
    assert (fates["declined"], fates["failed"]) == (world.told[Decline], world.told[Fail])
    assert sum(world.machine.totals.deadlines.values()) == world.timed
    assert not world.machine.placement.waiting
    assert not world.machine.placement.queue
    assert all(abs(held) < 1e-6 for held in world.machine.deadlines.ledger.reserved.values())
    for replica in world.machine.placement.replicas.values():
        assert replica.pages.free == [(0, replica.pages.capacity)]
    assert world.machine.plan == world.machine.plan_state.wanted
    assert not world.machine.placement.closing


def test_the_same_events_give_the_same_commands():
    world = World(1)
    for _ in range(300):
        world.act()
    first, second = (scheduler(plan=SINGLES, **world.settings) for _ in range(2))
    once = [list(getattr(first, call)(*given)) for call, *given in world.log]
    assert once == [list(getattr(second, call)(*given)) for call, *given in world.log]
    assert once
    assert any(isinstance(command, Launch) for commands in once for command in commands)
