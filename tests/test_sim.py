"""The real engine on virtual time."""

import asyncio
import collections
import contextlib
import functools
import gzip
import itertools
import math
import random

import msgspec
import pytest

from dilaserve.cli import main
from dilaserve.config import Config
from dilaserve.engine.engine import Engine, Options
from dilaserve.errors import ConfigError, DeadlineMissed, DilaserveError, Overloaded, RequestFailed
from dilaserve.planner.planner import Planner
from dilaserve.plans import parsed
from dilaserve.profile import profile_file
from dilaserve.profile.block_chain import chain
from dilaserve.profile.step_cost import Features, Learner
from dilaserve.scheduler.estimates import Estimates
from dilaserve.server import metrics
from dilaserve.sim import workload
from dilaserve.sim.clock import Stalled, VirtualLoop
from dilaserve.sim.h200 import STEPS, law_at, llada_8b_h200
from dilaserve.sim.report import report
from dilaserve.sim.run import ask, classes, pretended, simulate
from dilaserve.sim.timeline import moments
from dilaserve.sim.workload import Job
from dilaserve.types import PlanReady

SECONDS = 20.0


def run(rate=6.0, scale=2.0, devices=2, on_miss="best_effort", seed=0, mix=0.0, **settings):
    """`mix` of the requests have no deadline."""
    profile = llada_8b_h200()
    rng = random.Random(seed)
    times = zip(workload.poisson(rate, rng), itertools.repeat(200), itertools.repeat(128), strict=False)
    jobs = workload.jobs(times, SECONDS, 1024, (None,), ((scale, 1.0 - mix), (None, mix)), seed, on_miss)
    config = Config.of(slo_class=classes([scale]), max_queue=2048, **settings)
    return simulate(config, pretended(profile, devices, 1024, seed=seed), list(profile.quality.tasks), jobs)


known_run = functools.cache(run)  # for tests that only look at what a run has left


def test_time_jumps_and_nothing_waits_for_ever():
    async def sleepy():
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(sleepy()) == pytest.approx(3600)
        with pytest.raises(Stalled):
            runner.run(asyncio.Event().wait())


def test_the_same_seed_gives_the_same_run():
    first, second = run(), run()
    assert first.outcomes == second.outcomes
    assert first.outcomes != run(seed=1).outcomes


def test_every_request_ends_and_light_load_meets_its_deadlines():
    light = run(rate=2.0)
    assert report(light, SECONDS).attainment > 0.95
    for heavy in (run(rate=40.0), known_run(rate=40.0, on_miss="cancel_when_late")):
        assert not heavy.engine.scheduler.requests
        assert len(heavy.engine.free) == heavy.engine.table.rows
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
def test_a_request_that_has_waited_for_too_long_gets_a_row_where_deadlines_fill_all(limits):
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
            return len(engine.free) == engine.table.rows

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(busy())


def test_who_turns_all_away_by_a_wrong_law_finds_out():
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


def test_a_machine_that_slept_during_a_step_is_no_slower_for_it():
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
def test_a_step_that_hangs_is_noticed_after_a_crowd_as_well(scheduling, monkeypatch):
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
            assert len(engine.free) >= engine.table.rows - 2  # rows in flight stay taken until their step ends
            return late

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert max(runner.run(stopped())) <= 0.05


def test_each_request_of_a_random_crowd_has_one_fate():
    """Clients leave, read slowly, are declined, refused, and lose instances; all counters add up at every look."""

    async def crowd(seed):
        rng = random.Random(seed)
        config = Config.of(max_queue=7, max_num_seqs=2, plan="2x1")
        async with Engine(config, assemble=pretended(llada_8b_h200(), 2, 1024, seed=seed)) as engine:
            scheduler, told = engine.scheduler, collections.Counter()

            def look():
                totals, pages = scheduler.totals, metrics.text(engine).decode()
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
            assert len(engine.free) == engine.table.rows
            return totals.fates

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        fates = collections.Counter()
        for seed in range(3):
            fates.update(runner.run(crowd(seed)))
    assert all(fates.values())


async def latency(engine, **case):
    began = engine.loop.time()
    await engine.generate([0] * 32, Options(max_tokens=128, **case))
    return engine.loop.time() - began


@pytest.mark.parametrize("case", [{}, {"deadline_ms": 60_000}])
@pytest.mark.parametrize("scheduling", ["fcfs", "edf", "least-slack", "composed"])
def test_one_tenant_with_a_thousand_requests_does_not_keep_another_waiting(scheduling, case):
    async def crowded():
        config = Config.of(plan="1x1", max_queue=1024, scheduling=scheduling)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 256)) as engine:
            alone = await latency(engine)
            greedy = [asyncio.create_task(latency(engine, user="greedy", **case)) for _ in range(1008)]
            await asyncio.sleep(1.0)
            other = await latency(engine, user="other", **case)
            assert sum(task.done() for task in greedy) < 500
            await asyncio.gather(*greedy)
            return alone, other

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        alone, other = runner.run(crowded())
    assert other < 20 * alone


def test_a_full_queue_makes_room_for_a_tenant_with_less_in_it():
    async def crowded():
        config = Config.of(plan="1x1", max_queue=16, max_num_seqs=4)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 256)) as engine:
            greedy = [asyncio.create_task(latency(engine, user="greedy")) for _ in range(16)]
            await asyncio.sleep(0.1)
            with pytest.raises(Overloaded) as caught:
                await latency(engine, user="greedy")
            assert caught.value.retry_after
            others = [asyncio.create_task(latency(engine, user="other")) for _ in range(20)]
            ends = [await asyncio.gather(*tasks, return_exceptions=True) for tasks in (greedy, others)]
            assert engine.scheduler.totals.fates["refused"] == 1 + 20
            return [sum(isinstance(end, float) for end in found) for found in ends]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(crowded()) == [8, 8]


def test_clients_that_come_back_when_they_are_told_to_are_served_soon():
    """Eight on two places, each with the four tries of OpenAI's client at most."""

    async def patient(engine):
        for _ in range(4):
            try:
                return await latency(engine)
            except Overloaded as error:
                await asyncio.sleep(math.ceil(error.retry_after))
        return None

    async def crowded():
        config = Config.of(plan="1x1", max_queue=2)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 4096)) as engine:
            return await asyncio.gather(*(patient(engine) for _ in range(8)))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert None not in runner.run(crowded())


def test_priority_counts_without_a_deadline_among_the_requests_of_a_tenant():
    async def crowded():
        config = Config.of(plan="1x1", max_num_seqs=1)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 256)) as engine:
            tasks = [asyncio.create_task(latency(engine, priority=priority)) for priority in (0, -1, 0, 1)]
            return await asyncio.gather(*tasks)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        _, low, middle, high = runner.run(crowded())
    assert high < middle < low


def test_a_change_of_plan_costs_its_delay_and_loses_nobody():
    async def changing():
        profile = llada_8b_h200()
        async with Engine(Config.of(), assemble=pretended(profile, 4, 1024, delay=0.5)) as engine:
            prompts = [[0] * 100 for _ in range(12)]
            load = [asyncio.create_task(engine.generate(prompt, Options(max_tokens=256))) for prompt in prompts]
            changes = []
            for plan in ("1x4", "2x2", "2x1+1x2"):
                await asyncio.sleep(0.1)
                changes.append(await engine.replan(plan))
            answers = await asyncio.gather(*load)
        return changes, answers

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        changes, answers = runner.run(changing())
    assert [answer.finish_reason for answer in answers] == ["length"] * 12
    for change in changes:
        assert 0.5 - 1e-9 <= change.pause < 0.6  # sums of floats
        assert change.pause <= change.seconds
    assert changes[-1].after.groups[-1] == (3,)


def test_a_planner_is_asked_at_its_times_and_obeyed():
    asked = []

    class PlannerPort(Planner):
        def __call__(self, demand):
            asked.append(demand)
            return (
                PlanReady(parsed("1x4", 4, demand.degrees), "a low load") if demand.flows else PlanReady(None, "idle")
            )

    profile = llada_8b_h200()
    planner = PlannerPort({}, profile.quality)

    async def planned():
        async with Engine(Config.of(), assemble=pretended(profile, 4, 1024), planner=planner) as engine:
            await asyncio.sleep(5.0)
            assert len(engine.plan.groups) == 4
            await engine.generate([0] * 100, Options(max_tokens=256))
            await asyncio.sleep(5.0)
            return engine.history[-1]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        change = runner.run(planned())
    assert (change.after.groups, change.reason) == (((0, 1, 2, 3),), "a low load")
    assert len(asked) in (7, 8)


def test_a_quiet_house_is_planned_for_latency_and_a_busy_one_for_throughput():
    """The planner of the house: with few requests devices run together, with many each for itself."""

    async def load(rate, seconds):
        async with Engine(Config.of(slo_class="far=3x"), assemble=pretended(llada_8b_h200(), 4, 1024)) as engine:
            async with asyncio.TaskGroup() as group:
                for _ in range(int(rate * seconds)):
                    group.create_task(engine.generate([0] * 100, Options(max_tokens=256, slo_class="far")))
                    await asyncio.sleep(1 / rate)
            return [len(group) for group in engine.plan.groups]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        quiet, busy = runner.run(load(1.0, 12.0)), runner.run(load(18.0, 12.0))
    assert (quiet, busy) == ([4], [1, 1, 1, 1])


def test_a_rush_after_a_quiet_time_is_met_by_each_device_for_itself():
    """However great it is: a plan that was taken for latency is left within a few looks."""

    async def rushed():
        async with Engine(Config.of(slo_class="x2=2x"), assemble=pretended(llada_8b_h200(), 4, 1024)) as engine:
            seen = []
            async with asyncio.TaskGroup() as group:
                for rate, seconds in ((1.0, 12.0), (65.0, 7.0)):
                    for _ in range(int(rate * seconds)):
                        group.create_task(ask(engine, Job(0.0, 200, 256, None, 2.0, "cancel_when_late"), ()))
                        await asyncio.sleep(1 / rate)
                    seen.append([len(devices) for devices in engine.plan.groups])
            return seen

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(rushed()) == [[4], [1, 1, 1, 1]]


@pytest.mark.parametrize("scheduling", ["composed", "edf"])
def test_who_believes_that_all_is_hopeless_tries_and_learns(scheduling):
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


def test_larger_degrees_cost_less_and_never_in_proportion():
    laws = [law_at(degree) for degree in (1, 2, 4, 8)]
    for point in (Features(32, 32 * 256, 256, 32, 1), Features(1024, 4 * 256 * 256, 1024, 128, 4)):
        seconds = [law.seconds(point) for law in laws]
        assert seconds == sorted(seconds, reverse=True)
        assert all(a < 2 * b for a, b in itertools.pairwise(seconds))


def test_the_built_in_profile_has_the_published_steps():
    laws = llada_8b_h200().quality.tasks["any"].laws
    assert [8 * chain([law[0]], 32).steps[32] for law in laws] == pytest.approx(list(STEPS), rel=0.01)


@pytest.mark.parametrize("kind", workload.ARRIVALS)
def test_arrivals_come_at_their_rate(kind):
    times = list(itertools.islice(workload.arrivals(kind, 10.0, random.Random(0)), 20_000))
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(10.0, rel=0.1)


def test_a_trace_is_read_and_stretched(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,10,20\n1.5,30,40\n3.0,50,60\n")
    rows = workload.trace(file)
    assert rows == [(0.0, 10, 20), (1.5, 30, 40), (3.0, 50, 60)]
    jobs = workload.jobs(workload.scaled(rows, 10.0), 5.0, 64, (None,), ((None, 1.0),), 0)
    assert len(jobs) == pytest.approx(50, abs=25)
    assert all(job.prompt_tokens + job.max_tokens <= 64 for job in jobs)
    file.write_text("a,b\n")
    with pytest.raises(ConfigError, match="not a CSV"):
        workload.trace(file)
    with pytest.raises(ConfigError, match="cannot read"):
        workload.trace(tmp_path / "none.csv")


def test_the_command_prints_and_saves(tmp_path, capsys):
    flags = ["--rate", "4", "--seconds", "10", "--sim-devices", "2", "--deadline", "1.5:1,8:1", "--out", str(tmp_path)]
    assert main(["simulate", *flags]) == 0
    assert "of deadlines met" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"outcomes.json", "report.json", "timeline.png"}


def test_where_nothing_arrives_nothing_is_said_of_it(capsys):
    assert main(["simulate", "--rate", ".0001", "--seconds", "5", "--sim-devices", "1"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "nothing arrived after the warm-up of 0.5 s; raise --rate or --seconds"
    assert not any("%" in line or "latency" in line for line in rest)


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--rate", "0"], "--rate: '0' is no number above 0"),
        (["--prompt", "x"], "--prompt: 'x' is no whole number from 1 to 1000000"),
        (["--rate", "nan"], "--rate"),
        (["--rate", "inf"], "--rate"),
        (["--seconds", "inf"], "--seconds"),
        (["--rate", "1e9", "--seconds", "1e9"], "--rate times --seconds"),
        (["--deadline", "x"], "--deadline 'x'"),
        (["--deadline", "nan"], "--deadline 'nan'"),
        (["--deadline", "1e-9"], "--deadline '1e-9'"),
        (["--deadline", "2:1,3:-0.5"], "--deadline '2:1,3:-0.5'"),
        (["--costs", "nope"], "cannot read the profile nope"),
        (["--arrivals", "x"], "unknown arrivals 'x'"),
        (["--task", "x"], "--task 'x'"),
        (["--sim-devices", "0"], "--sim-devices"),
        (["--sim-devices", "4097"], "--sim-devices: 4097 devices are too many to plan for; at most 4096"),
        (["--out", __file__], "cannot write to"),
        (["--trace", "/"], "cannot read the trace /"),
        (["--prompt", "1000000"], "--prompt 1000000 and --answer 256 exceed the canvas of 4096 tokens"),
    ],
)
def test_impossible_flags_are_one_sentence(words, pattern, capsys):
    try:
        code = main(["simulate", *words])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert pattern in captured.err
    assert len(captured.err.splitlines()) == 1


def test_damaged_traces_are_named(tmp_path):
    whole = gzip.compress(b"0,10,20\n" * 1000)
    for name, data in (("cut.csv.gz", whole[:20]), ("odd.csv.gz", whole[:15] + b"x" * 9 + whole[15:]), ("no.gz", b"x")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match="the trace"):
            workload.trace(tmp_path / name)
    for text in ("nan,1,1\n", "0,inf,1\n", "0,1\n", "0,1,1\x00,\n" + "0," + "9" * 200_000, "", "\xff,1,1"):
        (tmp_path / "trace.csv").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match="the trace"):
            workload.trace(tmp_path / "trace.csv")


@pytest.mark.parametrize("line", ["1,1000000000,5", "1,5,-1", "1,5,0", "1,0,5", "1,5", "1,x,5", "nan,5,5", "1,1e999,5"])
def test_what_no_request_can_be_is_named_by_its_line(tmp_path, line):
    file = tmp_path / "trace.csv"
    file.write_text(f"arrival_s,prompt_tokens,output_tokens\n0,10,20\n{line}\n2,10,20\n")
    with pytest.raises(ConfigError, match=f"the trace {file} is not a CSV of .*: line 3: "):
        workload.trace(file)


def test_requests_that_are_cut_to_the_canvas_are_counted(tmp_path, capsys):
    file = tmp_path / "trace.csv"
    file.write_text("0,100,20\n1,5000,20\n2,100,5000\n3,100,20\n")
    words = ["simulate", "--trace", str(file), "--rate", "1", "--seconds", "3", "--sim-devices", "1"]
    assert main(words) == 0
    assert "\n2 of 3 requests were cut to the 4096 tokens that the model holds" in capsys.readouterr().out
    file.write_text("0,100,20\n")
    assert main(words) == 0
    assert "cut" not in capsys.readouterr().out


def test_a_trace_of_one_moment_and_a_tiny_canvas_still_give_jobs_that_can_be_asked():
    jobs = workload.jobs(workload.scaled([(5.0, 10, 20)] * 4, 2.0), 10.0, 2, (None,), ((None, 1.0),), 0)
    assert len(jobs) == 20
    assert {(job.prompt_tokens, job.max_tokens) for job in jobs} == {(1, 1)}


def test_a_profile_with_missing_entries_is_damaged(tmp_path):
    known = llada_8b_h200()
    task = known.quality.tasks["any"]
    (key, law), *_ = known.costs.items()
    nothing = msgspec.structs.replace(law, fixed=0.0, token=0.0)
    endless = [msgspec.structs.replace(law, **wrong) for wrong in ({"fixed": 1e300}, {"fixed": 86401.0}, {"key": 1e4})]
    short = msgspec.structs.replace(known.quality, tasks={"any": msgspec.structs.replace(task, drop=(0.0,))})
    wrong_costs = [{"costs": {key: wrong}} for wrong in (nothing, *endless)]
    for changed in ({"costs": {}}, *wrong_costs, {"quality": short}):
        (tmp_path / "profile.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(known, **changed)))
        with pytest.raises(ConfigError, match="damaged"):
            profile_file.read(tmp_path / "profile.json")
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(known))
    assert profile_file.read(tmp_path / "profile.json") == known
