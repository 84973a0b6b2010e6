"""The engine under simulated load: deadlines, the accuracy budget, and requests that wait."""

import asyncio
import collections
import contextlib
import random

import msgspec
import pytest
from simulated_runs import SECONDS, known_run, run

from dilaserve.config import Config
from dilaserve.engine.engine import Engine, Options
from dilaserve.errors import DeadlineMissed, DilaserveError, Overloaded, RequestFailed
from dilaserve.profile.step_cost import Features, Learner
from dilaserve.scheduler.estimates import Estimates
from dilaserve.server.telemetry import Telemetry
from dilaserve.sim.clock import VirtualLoop
from dilaserve.sim.h200 import law_at, llada_8b_h200
from dilaserve.sim.report import report
from dilaserve.sim.run import pretended
from dilaserve.sim.timeline import moments


def test_every_request_ends_and_light_load_meets_its_deadlines():
    light = run(rate=2.0)
    assert report(light, SECONDS).attainment > 0.95
    for heavy in (run(rate=40.0), known_run(rate=40.0, on_miss="cancel_when_late")):
        assert not heavy.engine.scheduler.requests
        assert len(heavy.engine.consumer.free) == heavy.engine.table.rows
    assert moments(light, SECONDS)


def test_nothing_without_a_deadline_starves_behind_those_that_have_one():
    heavy = run(rate=30.0, on_miss="cancel_when_late", mix=0.1, best_effort_age=5.0)
    rest = [outcome for outcome in heavy.outcomes if outcome.scale is None]
    assert len(rest) > 30
    assert all(outcome.latency is not None for outcome in rest)
    early = [outcome.latency for outcome in rest if outcome.at < SECONDS / 4]
    assert min(early) < SECONDS  # some were served while requests with deadlines kept coming


def test_deadlines_are_met_where_first_come_first_served_misses_them():
    ours = report(known_run(rate=40.0, on_miss="cancel_when_late"), SECONDS)
    plain = report(run(rate=40.0, scheduling="fcfs", shed="off", threshold_control="fixed"), SECONDS)
    assert ours.attainment > plain.attainment + 0.2
    assert ours.wasted < plain.wasted
    assert ours.mean_threshold < plain.mean_threshold == pytest.approx(0.9)


def test_the_accuracy_budget_is_kept():
    tight = run(rate=40.0, on_miss="cancel_when_late", accuracy_budget=0.1, min_confidence_threshold=0.7)
    bank = tight.engine.scheduler.deadlines.ledger.banks[""]
    assert bank.spent <= 0.1 * (bank.served + 50)


def test_tenants_together_keep_the_budget_however_many_there_are():
    async def crowded():
        async with Engine(Config.of(), assemble=pretended(llada_8b_h200(), 1, 1024)) as engine:
            rng, tasks = random.Random(0), []
            for i in range(320):
                options = Options(max_tokens=256, deadline_ms=500, user=f"tenant {i}")
                tasks.append(asyncio.create_task(engine.generate([0] * 32, options)))
                await asyncio.sleep(rng.expovariate(5.0))
            await asyncio.gather(*tasks)
            return engine.scheduler.deadlines.ledger

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        ledger = runner.run(crowded())
    assert len(ledger.banks) == ledger.all.served == 320
    assert 30.0 < ledger.all.spent <= 0.9 * (320 + 50)
    assert ledger.pending == 0.0


@pytest.mark.parametrize("limits", [{"kv_cache_tokens": 1024}, {"max_num_seqs": 6}])
def test_a_starved_request_gets_a_row_although_requests_with_deadlines_fill_the_instance(limits):
    async def busy():
        config = Config.of(plan="1x1", best_effort_age=10.0, **limits)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 1024)) as engine:
            rng, prompt = random.Random(0), [0] * 32
            patient, hurried = [], []
            while len(hurried) < 100 or not all(task.done() for task in patient):
                hurried.append(asyncio.create_task(engine.generate(prompt, Options(max_tokens=224, deadline_ms=2000))))
                await asyncio.sleep(rng.expovariate(10.0))
                if len(hurried) in (50, 51, 52):
                    patient.append(asyncio.create_task(engine.generate(prompt, Options(max_tokens=224))))
                assert engine.loop.time() < 300.0
            await asyncio.gather(*patient, *hurried)
            return len(engine.consumer.free) == engine.table.rows

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(busy())


def test_a_wrong_step_cost_that_declines_all_requests_is_corrected():
    """Nothing would be learned if whatever seems hopeless were refused: now and then one is tried."""

    async def refusing(factor):
        profile = llada_8b_h200()
        engine = Engine(Config.of(plan="1x1"), assemble=pretended(profile, 1, 1024))
        async with engine:
            pace = engine.scheduler.estimates.pace(1)
            pace.learner = Learner(pace.learner.law.scaled(factor))
            met = 0
            for _ in range(200):
                with contextlib.suppress(DeadlineMissed):
                    await engine.generate([0] * 32, Options(max_tokens=64, deadline_ms=1000, on_miss="reject"))
                    met += 1
                await asyncio.sleep(1.0)
            return met

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(refusing(1.0)) == 200
        assert runner.run(refusing(20.0)) > 100


def test_a_suspended_machine_does_not_raise_the_learned_step_cost():
    estimates = Estimates({1: law_at(1)}, llada_8b_h200().quality)
    for _ in range(100):
        estimates.stepped(Features(32, 32 * 256, 256, 32, 1), False, 0.005, 0.006, 1)
    before = estimates.pace(1).overhead
    estimates.stepped(Features(32, 32 * 256, 256, 32, 1), False, 0.005, 3600.0, 1)
    assert estimates.pace(1).overhead < 1.2 * before


@pytest.mark.parametrize("scheduling", ["edf", "least-slack", "composed"])
def test_the_accuracy_budget_is_kept_by_rows_that_ask_for_it_at_once(scheduling):
    async def crowded():
        config = Config.of(scheduling=scheduling)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 1024)) as engine:
            await asyncio.gather(*(engine.generate([0] * 32, Options(deadline_ms=1000)) for _ in range(60)))
            return engine.scheduler.deadlines.ledger.banks[""]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        bank = runner.run(crowded())
    assert bank.served == 60
    assert bank.spent <= 0.9 * (bank.served + 50)


@pytest.mark.parametrize("scheduling", ["fcfs", "edf", "least-slack", "composed"])
def test_a_hung_step_is_killed_after_a_burst_as_well(scheduling, monkeypatch):
    async def hanging():
        config = Config.of(scheduling=scheduling, max_num_seqs=8)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 1024)) as engine:
            await asyncio.gather(
                *(engine.generate([0] * 32, Options(max_tokens=64, deadline_ms=300)) for _ in range(60))
            )
            await asyncio.sleep(100.0)
            killed = asyncio.get_running_loop().create_future()
            monkeypatch.setattr(engine.executor, "launch", lambda batch: None)
            monkeypatch.setattr(engine.executor, "kill", lambda instance, reason: killed.set_result(instance))
            last = asyncio.create_task(engine.generate([0] * 32, Options(max_tokens=64, deadline_ms=30000)))
            began = asyncio.get_running_loop().time()
            await killed
            last.cancel()
            return asyncio.get_running_loop().time() - began

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert 20.0 <= runner.run(hanging()) < 25.0


@pytest.mark.parametrize("scheduling", ["fcfs", "edf", "least-slack", "composed"])
@pytest.mark.parametrize("on_miss", ["reject", "cancel_when_late"])
def test_a_deadline_is_answered_when_it_passes_whatever_the_workers_do(scheduling, on_miss, monkeypatch):
    """No step ever ends: rows in flight, rows with a place, and rows that wait are all told in time."""

    async def asked(engine, seconds):
        began = engine.loop.time()
        with pytest.raises(DeadlineMissed):
            await engine.generate([0] * 32, Options(max_tokens=64, deadline_ms=1000 * seconds, on_miss=on_miss))
        return engine.loop.time() - began - seconds

    async def stopped():
        config = Config.of(scheduling=scheduling, max_num_seqs=2, plan="1x1")
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 1024)) as engine:
            monkeypatch.setattr(engine.executor, "launch", lambda batch: None)
            late = await asyncio.gather(*(asked(engine, 0.31 + 0.37 * i) for i in range(12)))
            assert sum(engine.scheduler.totals.fates.values()) == engine.scheduler.totals.fates["declined"] == 12
            assert len(engine.consumer.free) >= engine.table.rows - 2  # rows in flight stay taken until their step ends
            return late

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert max(runner.run(stopped())) <= 0.05


def test_each_of_many_random_requests_has_one_fate():
    """Clients leave, read slowly, are declined, refused, and lose instances; all counters add up at every look."""

    async def crowd(seed):
        rng = random.Random(seed)
        config = Config.of(max_queue=7, max_num_seqs=2, plan="2x1")
        async with Engine(config, assemble=pretended(llada_8b_h200(), 2, 1024, seed=seed)) as engine:
            scheduler, told, telemetry = engine.scheduler, collections.Counter(), Telemetry(engine, config)

            def look():
                totals, pages = scheduler.totals, telemetry.text().decode()
                lines = [line.rsplit(" ", 1) for line in pages.splitlines() if not line.startswith("#")]
                found = {name: float(value) for name, value in lines}
                inside = found["dilaserve_requests_running"], found["dilaserve_requests_waiting"]
                assert min(inside) >= 0
                assert sum(inside) + sum(totals.fates.values()) == found["dilaserve_requests_received_total"]
                return found

            async def one():
                on_miss = rng.choice(("best_effort", "reject", "cancel_when_late"))
                deadline = rng.choice((None, 10, 500, 1000, 3000))
                options = Options(max_tokens=64, deadline_ms=deadline, on_miss=on_miss, user=rng.choice("abc"))
                kind = "timed" if deadline else "free"
                try:
                    async with asyncio.timeout(rng.choice((0.053, 0.517, 60.0))):
                        answer = await engine.generate([0] * 32, options)
                        told[kind, "answered", answer.usage.deadline_met] += 1
                except TimeoutError:
                    told[kind, "cancelled", None] += 1
                except DilaserveError as error:
                    fate = {DeadlineMissed: "declined", Overloaded: "refused", RequestFailed: "failed"}[type(error)]
                    told[kind, fate, None] += 1

            async def lose_all():
                """Twice in a row, so that rows that were in flight fail."""
                for _ in range(3):
                    for instance in list(engine.executor.instances):
                        engine.executor.kill(instance, "killed")
                    await asyncio.sleep(0.025)
                    look()

            async with asyncio.TaskGroup() as group:
                for _ in range(400):
                    group.create_task(one())
                    await asyncio.sleep(rng.expovariate(25.0))
                    if rng.random() < 0.03:
                        group.create_task(lose_all())
                    look()
            await engine.drain(60.0)
            found, totals = look(), scheduler.totals
            assert totals.received == 400
            for fate, count in totals.fates.items():
                assert count == sum(number for (_, what, _), number in told.items() if what == fate)
                assert count == found[f'dilaserve_requests_total{{fate="{fate}"}}']
            for fate, count in totals.deadlines.items():
                met = {"met": True, "missed": False}.get(fate)
                assert count == told["timed", fate if met is None else "answered", met]
                assert count == found[f'dilaserve_deadlines_total{{fate="{fate}"}}']
            assert len(engine.consumer.free) == engine.table.rows
            return totals.fates

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        fates = collections.Counter()
        for seed in range(3):
            fates.update(runner.run(crowd(seed)))
    assert all(fates.values())


@pytest.mark.parametrize("scheduling", ["composed", "edf"])
def test_overestimated_step_costs_are_corrected_although_all_deadlines_seem_infeasible(scheduling):
    """Costs are believed eight times too high, so that every deadline seems lost; shedding all would teach nothing."""
    known = llada_8b_h200()
    truth = {1: known.costs["cuda x1"]}
    feared = msgspec.structs.replace(known, costs={"cuda x1": truth[1].scaled(8.0)})

    async def asked():
        settings = Config.of(scheduling=scheduling)
        met = []
        async with Engine(settings, assemble=pretended(feared, 1, 1024, truth=truth)) as engine:
            for _ in range(40):
                try:
                    options = Options(max_tokens=256, deadline_ms=1000, on_miss="cancel_when_late")
                    answer = await engine.generate([0] * 100, options)
                    met.append(answer.usage.deadline_met)
                except DeadlineMissed:
                    met.append(False)
        return met

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        met = runner.run(asked())
    assert sum(met[20:]) >= 18
