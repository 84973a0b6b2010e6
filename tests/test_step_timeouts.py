"""How long a step or the forming of an instance may take before it counts as hung."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_builders import PAIRS, SINGLES, done, feed, killed_at, of, request, result, scheduler
from virtual_time import run_on_virtual_time

from dilaserve import Config, Engine, Options
from dilaserve.calibrate.answers import Question
from dilaserve.calibrate.kept import Measurements
from dilaserve.calibrate.quality import quality
from dilaserve.scheduler.rules.time_limits import forming_limit, step_limit
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.types import (
    Arrival,
    Instance,
    InstanceLost,
    InstanceReady,
    Kill,
    Launch,
    Paused,
    Reshard,
    WorkerLost,
    WorkerUp,
)


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
def test_a_pause_of_the_engine_extends_the_time_limit_of_a_running_step(pauses):
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


@pytest.mark.parametrize(
    ("predicted", "known", "kills", "seconds"),
    [
        (0.01, True, 0, 20.0),
        (3.0, True, 0, 60.0),
        (0.01, False, 0, 200.0),
        (0.01, False, 1, 400.0),
        (30.0, False, 0, 600.0),  # by the guess, which is multiplied once
        (0.01, True, 2, 80.0),
        (0.01, True, 10**6, 20_480.0),
    ],
)
def test_a_step_gets_its_timeout_or_many_times_what_was_predicted(predicted, known, kills, seconds):
    assert step_limit(20.0, predicted, known, kills) == seconds


@given(st.floats(0.1, 1e3), st.floats(0.0, 1e3), st.integers(0, 100))
def test_time_limits_are_longer_for_guessed_costs_and_grow_with_each_kill(timeout, predicted, kills):
    known, guessed = (step_limit(timeout, predicted, sure, kills) for sure in (True, False))
    assert max(timeout, predicted) <= known <= guessed
    assert known <= step_limit(timeout, predicted, True, kills + 1)
    assert guessed <= step_limit(timeout, predicted, False, kills + 1)
    assert timeout <= forming_limit(timeout, kills) <= forming_limit(timeout, kills + 1)


def test_the_step_timeout_is_ten_times_as_long_for_guessed_costs_and_doubles_with_each_kill():
    machine, now, waited = scheduler(guess=True, step_timeout=3.0), 0.0, []
    for life in range(3):
        feed(machine, InstanceReady(Instance(life, (0,), 4096)), now)
        if life != 1:
            feed(machine, Arrival(request(life, at=now)), now)  # fails when it was in flight at two kills
        waited.append(killed_at(machine) - now)
        now += waited[-1]
        feed(machine, InstanceLost(life, "hung"), now)
    assert waited == [30.0, 60.0, 120.0]


def test_the_step_timeout_is_short_once_step_costs_are_known():
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


def test_an_instance_that_survives_a_kill_is_killed_again():
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
def test_an_unknown_slow_machine_is_killed_at_most_once_before_its_step_cost_is_learned(seconds, kills):
    async def served():
        async with Engine(Config.of(), assemble=slow(seconds)) as engine:
            killed, kill = [], engine.executor.kill
            engine.executor.kill = lambda instance, reason: (killed.append(reason), kill(instance, reason))
            while not engine.scheduler.estimates.pace(1).sure:
                await engine.generate([0] * 32, Options(max_tokens=64, ignore_eos=True))
            return killed, engine.scheduler.estimates.pace(1).fixed

    killed, learned = run_on_virtual_time(served())
    assert len(killed) == kills
    assert learned == pytest.approx(seconds, rel=0.3)


def test_calibrate_measures_a_slow_machine(random_model):
    async def measured():
        async with Engine(Config.of(), assemble=slow(30.0, Text(random_model))) as engine:
            question = Question("a" * 20, task="prompts")
            return await quality(engine, {"prompts": [(question, None)]}, lambda *seen: None, Measurements())

    assert run_on_virtual_time(measured()).tasks["prompts"].samples == 1


def test_the_time_limit_for_forming_an_instance_does_not_restart_on_other_events():
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


def test_a_pause_of_the_engine_extends_the_time_limit_for_forming_an_instance():
    machine = scheduler(plan=SINGLES, step_timeout=3.0)
    list(machine.observe(WorkerUp(0, 4096), 0.0))
    list(machine.decide(0.0))
    list(machine.observe(Paused(50.0), 50.0))
    assert machine.wake_at() == 53.0
