"""Launches of several steps: which rows and blocks they go on with, and when they end."""

import pytest
from scheduler_builders import done, feed, request, result, scheduler

from dilaserve.types import (
    Arrival,
    Cancel,
    Emit,
    Finish,
    Instance,
    InstanceReady,
    Launch,
    Plan,
    Release,
    Replan,
    Slo,
    StopEarly,
    WorkerUp,
)


def test_a_launch_goes_on_while_no_request_waits_and_stops_early_when_one_arrives():
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


def test_a_launch_stops_early_when_one_of_its_rows_is_cancelled_or_its_instance_is_to_end():
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


def test_a_step_counts_as_the_kind_that_the_worker_reports():
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
def test_a_launch_goes_into_as_many_blocks_as_the_slack_of_all_its_rows_allows(rows, how, now, blocks):
    machine = scheduler(repeats=7, max_num_batched_tokens=16384)
    feed(machine, InstanceReady(Instance(0, (0,), 65536)))
    *_, launch = feed(machine, Arrival(request(0, answer=224, **how)))
    for row in range(1, rows):
        feed(machine, Arrival(request(row, answer=224, **how)))
    *_, launch = feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=28, prefix=12)]), now)
    assert len(launch.batch.spans) == rows
    for span, then in zip(launch.batch.spans, launch.batch.then, strict=True):
        assert len({span.block_start for span in then} - {span.block_start}) == blocks


def test_a_finished_row_idles_until_its_launch_ends():
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


def test_a_finished_row_in_a_running_launch_has_no_deadline_any_more():
    machine = scheduler(repeats=8)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0, answer=32, slo=Slo(seconds=1.0))))
    emit, finish, _ = feed(machine, done(launch.batch, [result(launch.batch.spans[0])], last=False))
    assert (emit.prefix, finish.reason) == (42, "length")
    (replica,) = machine.placement.replicas.values()
    assert (list(replica.residents), replica.with_deadline) == ([0], [])
    assert list(machine.decide(0.5)) == []  # a full decision
    assert feed(machine, done(launch.batch, [result(launch.batch.spans[0])])) == [Release(0)]
