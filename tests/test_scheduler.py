"""The life cycle of a request in the scheduler: events in, commands out, no clock and no device."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_builders import SINGLES, done, feed, request, result, scheduler
from scheduler_world import World

from dilaserve.scheduler.request_state import TRANSITIONS, Status, Transition
from dilaserve.types import (
    Arrival,
    Cancel,
    Decoding,
    Emit,
    Instance,
    InstanceReady,
    Launch,
    Release,
    Request,
)


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


def test_requests_wait_in_order_for_rows_and_for_room_in_the_pool():
    machine = scheduler(max_num_seqs=8)
    feed(machine, InstanceReady(Instance(0, (0,), 200)))
    (launch,) = feed(machine, Arrival(request(0)))
    assert feed(machine, Arrival(request(1, at=1.0))) == []
    assert feed(machine, Arrival(request(2, at=2.0, answer=8))) == []
    commands = feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=1, prefix=10)]))
    assert {span.row for span in commands[-1].batch.spans} == {0, 1}


def test_a_transition_that_the_table_does_not_list_raises():
    assert (Status.GONE, Transition.RETURNED) not in TRANSITIONS
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    feed(machine, Arrival(request(0)))
    with pytest.raises(KeyError):
        machine.requests["r0"].did(Transition.PLACED)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_every_request_ends_once_and_every_row_is_freed_after_random_events(seed):
    world = World(seed)
    for _ in range(150):
        world.act()
    world.settle()
    world.check_that_all_ended()
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
