"""How long steps and instances may take before they count as hung, and how everything else goes on when they do."""

import asyncio
import contextlib
import itertools
import logging
import os
import threading
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_scheduler import PAIRS, SINGLES, done, feed, formed, request, result, scheduler, up

from dilaserve import Config, Engine, Options
from dilaserve.calibrate.answers import Question
from dilaserve.calibrate.quality import quality
from dilaserve.executor.worker_handle import Ended, WorkerExit
from dilaserve.executor.worker_processes import MOST_PAUSE, RESPAWN_PAUSE, ProcessExecutor
from dilaserve.planner.planner import Planner, Setup
from dilaserve.planner.process import PlannerGone, PlannerProcess
from dilaserve.plans import parsed
from dilaserve.scheduler.rules.time_limits import MOST_DOUBLINGS, OVERDUE, UNKNOWN, forming_limit, step_limit
from dilaserve.sim.clock import VirtualLoop
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended
from dilaserve.system import backoff
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.transport.collectives_memory import Exchange
from dilaserve.types import (
    Arrival,
    Cancel,
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
    Reshard,
    WorkerLost,
    WorkerUp,
)
from dilaserve.worker.tp_group import Groups, file_of

LIVES = 100


def virtually(work):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


def of(commands, kind):
    return [command for command in commands if isinstance(command, kind)]


# patience


@pytest.mark.parametrize(
    ("predicted", "known", "kills", "seconds"),
    [
        (0.01, True, 0, 20.0),
        (3.0, True, 0, 60.0),
        (0.01, False, 0, 200.0),
        (0.01, False, 1, 400.0),
        (30.0, False, 0, 600.0),  # by the guess, which is multiplied once
        (0.01, True, 2, 80.0),
        (0.01, True, 10**6, 20.0 * 2**MOST_DOUBLINGS),
    ],
)
def test_a_step_gets_its_timeout_or_many_times_what_was_predicted(predicted, known, kills, seconds):
    assert step_limit(20.0, predicted, known, kills) == seconds


@given(st.floats(0.1, 1e3), st.floats(0.0, 1e3), st.integers(0, 100))
def test_patience_grows_with_ignorance_and_with_every_kill(timeout, predicted, kills):
    known, guessed = (step_limit(timeout, predicted, sure, kills) for sure in (True, False))
    assert max(timeout, OVERDUE * predicted) <= known <= guessed <= UNKNOWN * known
    assert known <= step_limit(timeout, predicted, True, kills + 1)
    assert guessed <= step_limit(timeout, predicted, False, kills + 1)
    assert timeout <= forming_limit(timeout, kills) <= forming_limit(timeout, kills + 1)


@given(st.integers(-3, 10**4), st.floats(0.01, 10.0), st.floats(10.0, 100.0))
def test_pauses_double_up_to_the_longest(failures, first, most):
    pauses = [backoff.pause(failures + more, first, most) for more in (0, 1)]
    assert pauses[0] == (0.0 if failures <= 0 else min(most, first * 2.0 ** min(failures - 1, 32)))
    assert pauses[0] <= pauses[1] <= most


# steps that seem to hang


def killed_at(machine, until=1000.0):
    """When the scheduler first gives up on an instance, deciding whenever it wants to."""
    while (now := machine.wake_at()) < until:
        if of(machine.decide(now), Kill):
            return now
    return None


def test_while_step_costs_are_a_guess_patience_is_ten_times_as_long_and_grows_with_each_kill():
    machine, now, waited = scheduler(guess=True, step_timeout=3.0), 0.0, []
    for life in range(3):
        feed(machine, InstanceReady(Instance(life, (0,), 4096)), now)
        if life != 1:
            feed(machine, Arrival(request(life, at=now)), now)  # fails when it was in flight at two kills
        waited.append(killed_at(machine) - now)
        now += waited[-1]
        feed(machine, InstanceLost(life, "hung"), now)
    assert waited == [30.0, 60.0, 120.0]


def test_once_step_costs_are_known_patience_is_short_again():
    machine = scheduler(guess=True, step_timeout=3.0)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    commands = feed(machine, Arrival(request(0, answer=32)))
    assert killed_at(machine) == 30.0
    for row in range(1, 200):
        batch = of(commands, Launch)[-1].batch
        commands = feed(machine, done(batch, [result(span) for span in batch.spans]), 31.0)
        commands += feed(machine, Arrival(request(row, answer=32)), 31.0)
    assert machine.estimates.pace(1).sure
    assert killed_at(machine) == 34.0


def test_an_instance_that_does_not_go_when_it_is_killed_is_killed_again():
    machine = scheduler(step_timeout=3.0)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    feed(machine, Arrival(request(0)))
    assert [killed_at(machine), killed_at(machine)] == [3.0, 9.0]


def slow(seconds, text=None):
    """Parts whose steps take so long, which nobody knows."""
    profile = llada_8b_h200()
    law = profile.costs["cuda x1"]
    guess = msgspec.structs.replace(profile, costs={"cuda x1": msgspec.structs.replace(law, guess=True)})
    truth = msgspec.structs.replace(law, fixed=seconds)
    return pretended(guess, 1, 1024, truth={1: truth}, text=text)


@pytest.mark.parametrize(("seconds", "kills"), [(30.0, 0), (150.0, 0), (300.0, 1)])
def test_a_slow_machine_that_nobody_knows_is_learned_and_not_killed_again_and_again(seconds, kills):
    async def served():
        async with Engine(Config.of(), assemble=slow(seconds)) as engine:
            killed, kill = [], engine.executor.kill
            engine.executor.kill = lambda instance, reason: (killed.append(reason), kill(instance, reason))
            while not engine.scheduler.estimates.pace(1).sure:
                await engine.generate([0] * 32, Options(max_tokens=64, ignore_eos=True))
            return killed, engine.scheduler.estimates.pace(1).fixed

    killed, learned = virtually(served())
    assert len(killed) == kills
    assert learned == pytest.approx(seconds, rel=0.3)


def test_calibrate_measures_a_slow_machine(random_model):
    async def measured():
        async with Engine(Config.of(), assemble=slow(30.0, Text(random_model))) as engine:
            question = Question("a" * 20, task="prompts")
            return await quality(engine, {"prompts": [(question, None)]}, lambda what, done, total: None)

    assert virtually(measured()).tasks["prompts"].samples == 1


def test_a_worker_that_is_of_no_use_is_started_again_after_longer_and_longer_pauses():
    """One that has finished a step, or that somebody else ended, is started again at once."""
    crash, outside = WorkerExit(Ended.LOST, "hung"), WorkerExit(Ended.LOST, "killed", outside=True)
    deaths = [crash, crash, crash, outside, crash, crash, "useful", crash, *[crash] * 6]

    class Dying(ProcessExecutor):
        async def live(self, rank, job, life, ready):
            born.append(asyncio.get_running_loop().time())
            if life > len(deaths):
                await asyncio.sleep(1e6)
            death = deaths[life - 1]
            self.useful = {rank} if death == "useful" else set()
            return crash if death == "useful" else death

    async def lives():
        job = type("Job", (), {"device": "cpu", "shards": 1})
        dying, ready = Dying([job], None, None), asyncio.get_running_loop().create_future()
        ready.set_result(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1000.0):
                await dying.mind(0, job, ready)

    born = []
    virtually(lives())
    pauses = [round(later - earlier, 6) for earlier, later in itertools.pairwise(born)]
    assert pauses == [0.5, 1.0, 2.0, 0.0, 0.5, 1.0, 0.0, *[min(MOST_PAUSE, RESPAWN_PAUSE * 2**n) for n in range(7)]]


# instances that are formed


def test_the_time_to_form_an_instance_does_not_begin_again_whatever_else_happens():
    machine, now = scheduler(plan=PAIRS, step_timeout=3.0), 0.0
    for rank in range(4):
        list(machine.observe(WorkerUp(rank, 4096), now))
    (reshard,) = machine.decide(now)
    hangs, other = reshard.moves.begins
    kills = []
    feed(machine, InstanceReady(other), now)
    while now < 10.0:
        now += 0.5
        kills += of(feed(machine, WorkerLost(3, "killed") if now % 1.0 else WorkerUp(3, 4096), now), Kill)
        if now % 1.0 and now < 1.0:
            feed(machine, InstanceLost(other.id, "killed"), now)
    assert [kill.instance for kill in kills].count(hangs.id) == 2  # at 3 s, and as it does not go again at 9
    commands = feed(machine, InstanceLost(hangs.id, "hung"), now)
    (again,) = [one for moves in of(commands, Reshard) for one in moves.moves.begins if one.ranks == hangs.ranks]
    assert machine.plan_state.limits[again.id] == now + 12.0  # longer after two that did not come up
    feed(machine, InstanceReady(again), now)
    assert len(hangs.ranks) not in machine.plan_state.hung


def test_a_pause_gives_an_instance_that_is_being_formed_the_time_again():
    machine = scheduler(plan=SINGLES, step_timeout=3.0)
    list(machine.observe(WorkerUp(0, 4096), 0.0))
    list(machine.decide(0.0))
    list(machine.observe(Paused(50.0), 50.0))
    assert machine.wake_at() == 53.0


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


def rows_of(commands):
    return {span.row for launch in of(commands, Launch) for span in launch.batch.spans}


@pytest.mark.parametrize(("rows", "at_once"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_rows_that_move_go_on_with_the_first_instance_that_stands_however_long_others_take(rows, at_once):
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


def test_rows_that_move_are_spread_over_instances_that_stand_one_after_the_other():
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


# instances that are lost


def test_a_lost_instance_whose_ranks_have_not_all_left_keeps_its_rows_and_gets_no_work():
    """Also when the rank that died is back before the other has left."""
    machine = scheduler(plan=Plan(((0, 1),)))
    up(machine, range(2))
    (launch,) = feed(machine, Arrival(request(0)))
    feed(machine, Cancel("r0", "cancelled"))
    assert of(feed(machine, WorkerLost(0, "killed"), 1.0), Release) == []
    assert feed(machine, WorkerUp(0, 4096), 2.0) == []
    assert feed(machine, Arrival(request(1, at=3.0)), 3.0) == []
    commands = feed(machine, InstanceLost(launch.batch.instance, "killed", outside=True), 4.0)
    assert Release(0) in commands
    (reshard,) = of(commands, Reshard)
    assert reshard.moves.begins[0].ranks == (0, 1)
    assert rows_of(feed(machine, InstanceReady(reshard.moves.begins[0]), 4.0)) == {1}


def test_an_idle_instance_whose_rank_is_gone_gets_no_work_although_the_rank_is_back():
    machine = scheduler(plan=Plan(((0, 1),)))
    up(machine, range(2))
    (old,) = machine.placement.replicas
    for event in (WorkerLost(0, "killed"), WorkerUp(0, 4096)):  # both are seen at once
        list(machine.observe(event, 1.0))
    commands = feed(machine, Arrival(request(0, at=1.0)), 1.0)
    assert of(commands, Launch) == []
    (reshard,) = of(commands, Reshard)
    assert reshard.moves.ends == (old,)


def test_the_row_that_has_been_free_for_longest_is_given_next():
    async def rows():
        async with Engine(Config.of(max_queue=3), assemble=pretended(llada_8b_h200(), 1, 1024)) as engine:
            given = []
            for _ in range(7):
                stream = await engine.submit([0] * 32, Options(max_tokens=32))
                given.append(stream.request.row)
                async for _ in stream:
                    pass
                await engine.idle.wait()
            return given

    assert virtually(rows()) == [0, 1, 2, 0, 1, 2, 0]


# process groups


class Peers:
    """A process group that knows whether it was ended."""

    def __init__(self):
        self.aborted = False

    def abort(self):
        self.aborted = True


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_the_process_groups_of_lives_that_are_over_are_given_up(backend, monkeypatch):
    made = []
    monkeypatch.setattr("dilaserve.worker.tp_group.made", lambda *args: made.append(Peers()) or made[-1])
    exchange = Exchange(3)
    groups = Groups(backend, exchange, 0, "")
    for life in range(1, LIVES + 1):
        groups.join(4 * life, (0, 2), (1, 1))
        groups.join(4 * life + 1, (0, 1), (1, life))
        groups.join(4 * life + 2, (0, 1, 2), (1, life, 1))
        assert len(groups.known) == 3
        if life % 2:  # the engine says that a peer is gone
            exchange.abandon(0, 4 * life + 2)
            assert groups.leave(4 * life + 2)
            assert not groups.leave(4 * life + 2)
            assert len(groups.known) == 2
    groups.close()
    assert len(made) == 2 * LIVES + 1
    assert backend == "gloo" or all(group.aborted for group in made)
    assert groups.known == {}
    assert threading.active_count() < 20


def test_gloo_leaves_no_connections_no_threads_and_no_files_of_lives_that_are_over(tmp_path):
    store, exchange = str(tmp_path / "store"), Exchange(2)
    ranks = [Groups("gloo", exchange, rank, store) for rank in range(2)]

    def counts():
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), len(os.listdir(tmp_path))

    def meet(instance, lives):
        threads = [threading.Thread(target=groups.join, args=(instance, (0, 1), lives)) for groups in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def grown(now, before):
        return any(one > other for one, other in zip(now, before, strict=True))

    for life in range(1, 9):
        meet(life, (1, life))
        assert os.path.exists(file_of(store, ((0, 1), (1, life))))
        if life == 2:
            known = counts()
    tries = iter(range(1000))
    while grown(counts(), known) and next(tries, None) is not None:
        time.sleep(0.01)  # a thread that was joined is seen a moment longer
    assert not grown(counts(), known)  # those of other tests may go meanwhile
    for groups in ranks:
        groups.close()


# the planner


class Moody(Planner):
    """Fails at some of its questions."""

    def __init__(self, fails):
        super().__init__({}, llada_8b_h200().quality)
        self.fails, self.asked = fails, []

    def __call__(self, demand):
        self.asked.append(asyncio.get_running_loop().time())
        if len(self.asked) in self.fails:
            raise ValueError("a matrix is singular")
        return PlanReady(parsed("1x2", 2, demand.degrees), "well")


def test_a_planner_that_fails_is_asked_again_and_that_is_logged(caplog):
    async def planned():
        async with Engine(Config.of(), assemble=pretended(llada_8b_h200(), 2, 1024), planner=planner) as engine:
            await asyncio.sleep(20.0)
            return len(engine.plan.groups)

    planner = Moody({1, 2, 4})
    with caplog.at_level(logging.ERROR):
        assert virtually(planned()) == 1
    gaps = [round(later - earlier, 3) for earlier, later in itertools.pairwise(planner.asked)]
    assert gaps[:4] == [2.0, 4.0, 2.0, 2.0]
    again = "the planner has failed; the plan stays as it is, and it is asked again in {} s"
    assert caplog.messages == [again.format(seconds) for seconds in (2, 4, 2)]


def test_a_planner_whose_process_dies_counts_as_one_that_fails():
    profile = llada_8b_h200()
    planner_process = PlannerProcess({1: profile.costs["cuda x1"]}, profile.quality, Setup())
    planner_process.advise = lambda demand: None
    with pytest.raises(PlannerGone, match="has died or does not answer"):
        planner_process(None)
