"""An error that one request causes ends that request, and nothing else."""

import asyncio
import logging
import random

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_builders import done, feed, request, result, scheduler
from scheduler_world import World

from dilaserve import BadRequest, Config, Engine, Options, RequestFailed, Unavailable
from dilaserve.engine.stream import Stream
from dilaserve.errors import OURS
from dilaserve.scheduler.accuracy_ledger import AccuracyLedger
from dilaserve.scheduler.batching import Batcher
from dilaserve.scheduler.containment import Guard, StateBroken
from dilaserve.scheduler.deadlines import Deadlines
from dilaserve.scheduler.endings import Endings
from dilaserve.scheduler.estimates import Estimates
from dilaserve.scheduler.invariants import violations
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.row_selection import RowSelection
from dilaserve.scheduler.scheduler import Scheduler
from dilaserve.scheduler.waiting_queue import WaitingQueue
from dilaserve.sim.clock import VirtualLoop
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended
from dilaserve.types import Arrival, Cancel, Fail, Instance, InstanceReady, Launch, Release, Request

HANDLERS = [
    *((Scheduler, name) for name in ("arrival", "returned", "seen")),
    *((Endings, name) for name in ("end", "gone", "release", "account")),
    (RowSelection, "apply_threshold"),
    *(
        (Placement, name)
        for name in ("enter", "leave", "assign", "unassign", "aged", "replica_for", "make_room", "evict")
    ),
    *((Deadlines, name) for name in ("arrived", "rank", "threshold_query", "is_hopeless")),
    *((AccuracyLedger, name) for name in ("deepest", "reserve", "charge")),
    *((Estimates, name) for name in ("loads", "unloaded", "watched", "step_seconds", "kind")),
    *((RequestState, name) for name in ("did", "advance", "span", "next_work", "launched", "usage", "left")),
    *((WaitingQueue, name) for name in ("add", "remove")),
    *((Batcher, "ready"), (Batcher, "reported")),
]


class Fault(Exception):
    """Raised on purpose."""


def about(value, name):
    """Whether an argument is of the request with this name."""
    if isinstance(value, Arrival | RequestState | Stream):
        value = value.request
    return isinstance(value, Request) and value.id == name


class Faults:
    """Makes one method raise for one request, after so many calls."""

    def __init__(self, patch, owner, method, name, after=0):
        self.raised, self.left, original = 0, after, getattr(owner, method)

        def faulty(*args, **kwargs):
            culprit = next((value for value in (*args, *kwargs.values()) if about(value, name)), None)
            if culprit is not None:
                culprit = getattr(culprit, "request", culprit)  # as a variable of a handler is
                self.left -= 1
                if self.left < 0:
                    self.raised += 1
                    raise Fault(f"{method} of {name}")
            return original(*args, **kwargs)

        patch.setattr(owner, method, faulty)


def test_a_row_that_steps_and_unmasks_nothing_ends_instead_of_stepping_for_ever():
    """As one would whose place in the table was given to another request."""
    machine = scheduler()
    guard = Guard(machine)
    feed(guard, InstanceReady(Instance(0, (0,), 4096)))
    (launch,), _ = (feed(guard, Arrival(request(i))) for i in range(2))
    (span,) = launch.batch.spans
    commands = feed(guard, done(launch.batch, [result(span, masks_left=32, unmasked=0)]))
    (fail,) = [command for command in commands if isinstance(command, Fail)]
    assert (fail.request.id, fail.for_client, "unmasked nothing" in fail.reason) == ("r0", OURS, True)
    assert Release(0) in commands
    assert isinstance(commands[-1], Launch)  # the other request
    assert violations(machine) == []


class GuardedWorld(World):
    """The random world with a guard around its scheduler."""

    def __init__(self, seed):
        super().__init__(seed)
        self.driver = Guard(self.machine)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(HANDLERS), st.integers(0, 12), st.integers(0, 3))
def test_an_error_of_one_request_leaves_the_state_consistent_and_all_requests_end_once(seed, handler, marked, after):
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, *handler, f"r{marked}", after)
        world = GuardedWorld(seed)
        for _ in range(60):
            world.act()
        world.settle()
    assert world.ended == {f"r{i}" for i in range(world.rows)}
    assert not world.alive
    assert violations(world.machine) == []
    assert world.told[Fail] <= faults.raised + world.machine.totals.fates["failed"]


def test_an_error_without_a_request_is_raised():
    machine = scheduler()
    guard = Guard(machine)
    feed(guard, InstanceReady(Instance(0, (0,), 4096)))
    feed(guard, Arrival(request(0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Placement, "place", lambda self, now, everywhere: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(guard.decide(1.0))


def test_an_error_that_leaves_the_state_inconsistent_ends_the_engine(monkeypatch):
    machine = scheduler()
    guard = Guard(machine)
    feed(guard, InstanceReady(Instance(0, (0,), 4096)))
    feed(guard, Arrival(request(0)))
    Faults(monkeypatch, Placement, "enter", "r1")
    machine.totals.received += 1
    with pytest.raises(StateBroken, match="inconsistent after an error: the requests that came"):
        feed(guard, Arrival(request(1)))


def test_a_row_in_flight_is_free_after_its_step(monkeypatch):
    guard = Guard(scheduler())
    feed(guard, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(guard, Arrival(request(0)))
    assert isinstance(launch, Launch)
    Faults(monkeypatch, Placement, "leave", "r0")
    (fail,) = feed(guard, Cancel("r0", "cancelled"))
    assert (type(fail), type(fail.error), fail.request.id) == (Fail, Fault, "r0")
    assert [replica.in_flight is not None for replica in guard.scheduler.placement.replicas.values()] == [True]
    assert violations(guard.scheduler) == []


def test_each_invariant_is_looked_at():
    """A check that cannot fail is none."""

    def broken(spoil):
        machine = scheduler(max_num_seqs=1)
        feed(machine, InstanceReady(Instance(0, (0,), 4096)))
        for row in range(2):
            feed(machine, Arrival(request(row)))
        assert violations(machine) == []
        (replica,) = machine.placement.replicas.values()
        spoil(machine, machine.requests["r0"], machine.requests["r1"], replica)
        return violations(machine)

    spoils = [
        lambda machine, runs, waits, replica: machine.requests.pop("r0"),
        lambda machine, runs, waits, replica: machine.requests.pop("r1"),
        lambda machine, runs, waits, replica: machine.placement.waiting.remove(waits),
        lambda machine, runs, waits, replica: machine.placement.moving.append(waits),
        lambda machine, runs, waits, replica: setattr(waits, "has_deadline", True),
        lambda machine, runs, waits, replica: setattr(runs, "has_deadline", True),
        lambda machine, runs, waits, replica: setattr(waits, "replica", replica),
        lambda machine, runs, waits, replica: setattr(runs, "replica", None),
        lambda machine, runs, waits, replica: replica.residents.clear(),
        lambda machine, runs, waits, replica: setattr(replica, "in_flight", None),
        lambda machine, runs, waits, replica: replica.in_flight.append(waits),
        lambda machine, runs, waits, replica: replica.pages.take(64),
        lambda machine, runs, waits, replica: replica.pages.free.clear(),
        lambda machine, runs, waits, replica: machine.placement.held.clear(),
        lambda machine, runs, waits, replica: machine.deadlines.ledger.reserved.update({"": 1.0}),
        lambda machine, runs, waits, replica: setattr(machine.totals, "received", 7),
        lambda machine, runs, waits, replica: machine.placement.replicas.clear(),
    ]
    assert [bool(broken(spoil)) for spoil in spoils] == [True] * len(spoils)


# with real workers

WISH = Options(max_tokens=32, block_length=16, confidence_threshold=0.8)
PROMPTS = [[random.Random(i).randrange(256) for _ in range(5 + i)] for i in range(4)]
FAULTS = [
    *((Scheduler, name) for name in ("arrival", "returned")),
    *((Endings, name) for name in ("end", "release")),
    *((Placement, "assign"), (Placement, "unassign"), (Deadlines, "arrived"), (Estimates, "loads"), (Batcher, "ready")),
    *((RequestState, "advance"), (RequestState, "usage"), (Stream, "push"), (Stream, "finish")),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(random_model):
    async with Engine(Config.of(model=str(random_model), devices="cpu", max_queue=8)) as engine:
        yield engine


async def ended(engine, prompt, id):
    """The tokens of an answer, or the error that ended it."""
    try:
        async with await engine.submit(prompt, WISH, id=id) as stream:
            return [token for chunk in [chunk async for chunk in stream] for token in chunk.token_ids]
    except (RequestFailed, Unavailable) as error:
        return error


async def all_ended(engine):
    return await asyncio.gather(*(ended(engine, prompt, f"r{i}") for i, prompt in enumerate(PROMPTS)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(engine):
    """The answers where nothing raises."""
    answers = await all_ended(engine)
    assert all(isinstance(tokens, list) for tokens in answers)
    return answers


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("owner", "method"), FAULTS)
async def test_an_error_in_a_handler_fails_one_request_only(engine, alone, owner, method, caplog):
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, owner, method, "r2")
        found = await all_ended(engine)
    assert faults.raised
    assert found[:2] + found[3:] == alone[:2] + alone[3:]
    assert isinstance(found[2], RequestFailed)
    assert "others are not affected" in found[2].message
    (record,) = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert "request r2 failed" in record.getMessage()
    assert record.exc_info[0] is Fault
    assert engine.alive
    await asyncio.wait_for(engine.idle.wait(), 60)
    assert engine.scheduler.requests == {}
    assert violations(engine.scheduler) == []
    assert sorted(engine.consumer.free) == list(range(8))


@pytest.mark.asyncio(loop_scope="module")
async def test_invalid_requests_never_reach_the_scheduler(engine):
    before = engine.scheduler.totals.received
    for wish in (dict(cache="foo"), dict(cache=["none"]), dict(user=["a"]), dict(task=["x"]), dict(on_miss="foo")):
        with pytest.raises(BadRequest):
            await engine.submit([1], Options(**wish))
    for id in (3, ["a"], b"x"):
        with pytest.raises(BadRequest, match="id must be a string"):
            await engine.submit([1], WISH, id=id)
    for plan in (3, None, [["a"]], {"a": 1}, [3]):
        with pytest.raises(BadRequest, match="plan"):
            await engine.replan(plan)
    for ids in (None, "text", [1.5], [-1], [10**9]):
        with pytest.raises(BadRequest, match="ids"):
            engine.detokenize(ids)
    with pytest.raises(BadRequest, match="reason must be a string"):
        await engine.replan("1x1", 3)
    with pytest.raises(Unavailable, match="another event loop"):
        await asyncio.to_thread(asyncio.run, engine.tokenize("hello"))
    assert engine.scheduler.totals.received == before
    assert isinstance(await ended(engine, [1], "r0"), list)


# on virtual time


def on_virtual_time(play):
    async def played():
        async with Engine(Config.of(plan="1x1"), assemble=pretended(llada_8b_h200(), 1, 256)) as engine:
            await play(engine)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(played())


def test_an_error_without_a_request_ends_the_engine_and_fails_all_requests():
    async def play(engine):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Placement, "place", lambda self, now, everywhere: 1 / 0)
            assert [type(one) for one in await all_ended(engine)] == [Unavailable] * len(PROMPTS)
        await engine.ended()
        assert isinstance(engine.failure, ZeroDivisionError)
        with pytest.raises(Unavailable):
            await engine.submit(PROMPTS[0], WISH)

    on_virtual_time(play)


def test_a_state_that_is_broken_ends_the_engine_with_a_clear_error():
    async def play(engine):
        engine.scheduler.totals.received += 1
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, Placement, "enter", "r2")
            found = await all_ended(engine)
        assert isinstance(found[2], RequestFailed)
        assert {type(one) for one in found[:2] + found[3:]} == {Unavailable}
        await engine.ended()
        assert isinstance(engine.failure, StateBroken)

    on_virtual_time(play)


def test_an_error_during_placement_fails_the_request_being_placed():
    async def play(engine):
        engine.consumer.free.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Placement, "gives_way", lambda self, tenant: 1 / 0)
            assert isinstance(await ended(engine, PROMPTS[0], "r0"), RequestFailed)
        engine.consumer.free.append(0)
        assert isinstance(await ended(engine, PROMPTS[0], "r0"), list)

    on_virtual_time(play)
