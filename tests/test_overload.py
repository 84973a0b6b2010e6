"""More work than devices can do in time: what is kept, what is late, and that deciding stays cheap."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilaserve.config import Config
from dilaserve.profile import forecast
from dilaserve.profile.decode_speed import ANY
from dilaserve.profile.profile_file import guessed
from dilaserve.scheduler.recent_minimum import RecentMinimum
from dilaserve.scheduler.request_state import Status
from dilaserve.scheduler.rules.best_effort import MOST_SAVED, after_step, may_lead
from dilaserve.scheduler.rules.composition import Candidate, within
from dilaserve.scheduler.scheduler import MOST_ENDS, Scheduler
from dilaserve.sim import workload
from dilaserve.sim.command import prepared
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.report import report
from dilaserve.sim.run import pretended, simulate
from dilaserve.types import (
    Arrival,
    Cancel,
    Decoding,
    Instance,
    InstanceLost,
    InstanceReady,
    Launch,
    Refuse,
    Request,
    RowResult,
    Slo,
    StepDone,
)

SECONDS = 20.0


def scheduler(**settings):
    profile = guessed("a model", "cpu")
    law = msgspec.structs.replace(profile.costs["cpu x1"], guess=False)
    return Scheduler(Config.of(**settings), {1: law}, profile.quality)


def request(row, seconds=None, prompt=10, answer=64, at=0.0, generation=1, **slo):
    return Request(
        id=f"r{row}.{generation}",
        row=row,
        generation=generation,
        prompt_tokens=prompt,
        canvas_tokens=prompt + answer,
        max_tokens=answer,
        arrived_at=at,
        decoding=Decoding(),
        slo=Slo(seconds=seconds, **slo),
    )


def feed(machine, event, now=0.0):
    return [*machine.observe(event, now), *machine.decide(now)]


def steps(machine, batch, at, left=28):
    """The batch is done: each row has so many masks left in its block, or as many as a dict says by row."""
    masks = {span.row: left[span.row] if isinstance(left, dict) else left for span in batch.spans}
    results = [
        RowResult(span.row, span.generation, 4, masks[span.row], span.block_end - masks[span.row], -1, 3.6)
        for span in batch.spans
    ]
    return feed(machine, StepDone(batch.instance, batch.id, tuple(results), 0.01, 0.01), at)


def launched(commands):
    return [command.batch for command in commands if isinstance(command, Launch)]


def unloaded(machine):
    """Seconds that one of these requests takes alone."""
    progress = machine.deadlines.arrived(request(0))
    return machine.estimates.unloaded(progress)


# best effort under overload


def overloaded(on_miss, load):
    config = prepared(Config.of(plan="2x1"), ((2.0, 1.0),))
    times = workload.arrivals("poisson", load * 5.5, random.Random(7))
    jobs = workload.jobs(((at, 300, 256) for at in times), SECONDS, 4096, (ANY,), ((2.0, 1.0),), 7, on_miss)
    run = simulate(config, pretended(llada_8b_h200(), 2, 4096, seed=7), [ANY], jobs)
    assert len(run.outcomes) == len(jobs)
    return run, report(run, SECONDS)


def test_requests_that_go_on_past_their_deadline_cost_others_no_deadlines():
    run, best_effort = overloaded("best_effort", 1.5)
    _, cancelled = overloaded("cancel_when_late", 1.5)
    assert best_effort.attainment >= cancelled.attainment - 0.05  # of 150 requests; bench/simulation.py has the figure
    late = [outcome for outcome in run.outcomes if outcome.latency is not None and not outcome.met]
    assert len(late) > 10  # they end all the same


@given(st.lists(st.tuples(st.floats(0.001, 0.2), st.floats(0.0, 0.3)), max_size=300))
def test_best_effort_rows_take_at_most_their_share_of_time_and_one_step(wanted):
    saved = spent = kept = 0.0
    longest = max((seconds for _, seconds in wanted), default=0.0)
    for deadlines, seconds in wanted:
        taken = seconds if may_lead(saved) else 0.0
        saved = after_step(saved, 0.1, deadlines, taken)
        spent, kept = spent + taken, kept + deadlines
        assert spent <= 0.1 * kept + longest + 1e-9
        assert saved <= MOST_SAVED


def test_a_best_effort_row_comes_first_in_some_steps_only():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (batch,) = launched(feed(machine, Arrival(request(0))))
    list(machine.observe(Arrival(request(1, seconds=1000.0)), 0.0))
    at, led = 0.0, 0
    for _ in range(400):
        at += 0.01
        (batch,) = launched(steps(machine, batch, at, left=16))
        led += any(span.row == 0 and span.start == 0 for span in batch.spans)
        refresh = machine.placement.replicas[0].residents.get(0)
        refresh.cached, refresh.ready = 0, None  # wants a refresh each time
    assert 1 <= led < 40


# placement


def test_a_deadline_goes_to_the_instance_that_can_hold_the_canvas():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 256)))
    feed(machine, InstanceReady(Instance(1, (1,), 8192)))
    (batch,) = launched(feed(machine, Arrival(request(0, seconds=1000.0, prompt=448))))
    assert batch.instance == 1


def test_a_deadline_goes_to_the_next_best_instance_where_the_best_has_no_room():
    machine = scheduler(guaranteed_rows=2)
    feed(machine, InstanceReady(Instance(0, (0,), 640)))
    feed(machine, InstanceReady(Instance(1, (1,), 8192)))
    for row in range(2):  # one on each, the first on the first
        feed(machine, Arrival(request(row, seconds=1000.0, prompt=448)))
    placed = machine.requests["r0.1"].replica.instance.id, machine.requests["r1.1"].replica.instance.id
    assert sorted(placed) == [0, 1]
    feed(machine, Arrival(request(2, seconds=1000.0, prompt=448)))
    assert machine.requests["r2.1"].replica.instance.id == 1


def test_no_row_is_evicted_for_a_request_that_would_not_fit_anyway():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 640)))
    (batch,) = launched(feed(machine, Arrival(request(0, seconds=1000.0, prompt=448))))
    list(machine.observe(Arrival(request(1, prompt=32, answer=32)), 0.0))
    (batch,) = launched(steps(machine, batch, 0.1))
    list(machine.observe(Arrival(request(2, seconds=1000.0, prompt=448)), 0.1))
    steps(machine, batch, 0.2)
    assert machine.requests["r1.1"].replica is not None
    assert machine.requests["r2.1"].status is Status.WAITING


# the step in flight


def test_what_is_left_of_the_step_in_flight_counts_when_a_deadline_is_tested():
    need = unloaded(scheduler())
    fates = []
    for flying in (False, True):
        machine = scheduler(max_num_seqs=64)
        machine.deadlines.sheds = False
        feed(machine, InstanceReady(Instance(0, (0,), 10**6)))
        if flying:
            for row in range(10, 40):
                list(machine.observe(Arrival(request(row, prompt=900)), 0.0))
            list(machine.decide(0.0))
        left = machine.placement.replicas[0].ends_at
        assert (left > 0.2) == flying
        progress = machine.deadlines.arrived(request(0, seconds=need + 0.2))
        progress.deadline, progress.has_deadline = need + 0.2, True
        fates.append(machine.placement.check.passes(progress, machine.placement.open, 0.0))
    assert fates == [True, False]


def test_steps_without_deadlines_are_short_while_tight_deadlines_come():
    lengths = []
    for tightest in (None, 0.5):
        machine = scheduler(max_num_seqs=64)
        feed(machine, InstanceReady(Instance(0, (0,), 10**6)))
        if tightest:
            feed(machine, Arrival(request(99, seconds=tightest)))
            feed(machine, Cancel("r99.1", "cancelled"))
            machine.placement.replicas[0].in_flight = None
            machine.placement.replicas[0].residents.clear()
        for row in range(10, 40):
            list(machine.observe(Arrival(request(row, prompt=900)), 0.1))
        (batch,) = launched(machine.decide(0.1))
        lengths.append(machine.placement.replicas[0].ends_at - 0.1)
        assert batch.spans
    assert lengths[1] < lengths[0] / 4


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 0.5)), min_size=1, max_size=20), st.floats(0, 1))
def test_a_bounded_step_has_the_first_row_and_others_up_to_its_seconds(rows, seconds):
    candidates = [Candidate(i, 32, one) for i, (_, one) in enumerate(rows)]
    chosen = within(candidates, seconds)
    assert chosen[0] == candidates[0]
    assert sum(one.seconds for one in chosen) <= max(seconds, candidates[0].seconds) + 1e-9
    assert [one.key for one in chosen] == sorted(one.key for one in chosen)


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.1, 9)), min_size=1, max_size=30), st.floats(0, 100))
def test_the_recent_minimum_covers_one_to_three_windows(came, later):
    window, recent, now, all_of_them = 10.0, RecentMinimum(10.0), 0.0, []
    for wait, value in came:
        now += wait
        recent.add(value, now)
        all_of_them.append((now, value))
    now += later
    least = recent.at(now)
    in_one = [value for at, value in all_of_them if at > now - window]
    in_three = [value for at, value in all_of_them if at >= now - 3 * window - 1e-9]
    assert min(in_three, default=float("inf")) <= least <= min(in_one, default=float("inf"))


def test_the_slack_order_follows_the_progress_of_rows():
    machine = scheduler(scheduling="least-slack")
    feed(machine, InstanceReady(Instance(0, (0,), 8192)))
    short, long = [machine.estimates.unloaded(machine.deadlines.arrived(request(0, answer=n))) for n in (64, 640)]
    (batch,) = launched(feed(machine, Arrival(request(0, seconds=100.0 + long - 0.4 * short, answer=640))))
    list(machine.observe(Arrival(request(1, seconds=100.0)), 0.0))
    orders = []
    for left in (30, 16, 8, 4):  # the second gets on, the first does not
        (batch,) = launched(steps(machine, batch, 0.001, {0: 28, 1: left}))
        with_deadline = machine.placement.replicas[0].with_deadline
        ranks = [machine.deadlines.rank(progress) for progress in with_deadline]
        assert ranks == sorted(ranks)
        orders.append([progress.request.row for progress in with_deadline])
    assert (orders[0], orders[-1]) == ([1, 0], [0, 1])


# the floor of the thresholds


def test_a_single_request_after_a_burst_runs_at_its_own_threshold():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 10**5)))
    for row in range(6):
        list(machine.observe(Arrival(request(row, seconds=1000.0)), 0.0))
    now = 0.0
    while not machine.deadlines.floor:
        now += 0.25
        list(machine.decide(now))
        assert now < 20.0
    for row in range(5):
        list(machine.observe(Cancel(f"r{row}.1", "cancelled"), now))
    (batch,) = [replica.batch for replica in machine.placement.replicas.values()]
    while machine.deadlines.floor:
        now += 0.25
        (batch,) = launched(steps(machine, batch, now, left=28))
        assert now < 40.0


# the work of a decision


def test_a_tick_tests_a_bounded_number_of_requests_and_all_in_turn(monkeypatch):
    tests = []
    machine = scheduler(guaranteed_rows=2, max_queue=4096)
    for id in range(4):
        feed(machine, InstanceReady(Instance(id, (id,), 10**6)))
    original = machine.placement.place_one
    monkeypatch.setattr(
        machine.placement, "place_one", lambda progress, *rest: tests.append(progress) or original(progress, *rest)
    )
    for row in range(1000):
        list(machine.observe(Arrival(request(row, seconds=10_000.0 + row)), 0.0))
    now = 0.0
    while machine.placement.queue.untested:
        tests.clear()
        list(machine.decide(now))
        assert 0 < len(tests) < 300
        assert machine.wake_at() <= now or not machine.placement.queue.untested
    seen = set()
    for _ in range(200):
        now += 0.25
        tests.clear()
        list(machine.decide(now))
        assert len(tests) < 300
        seen |= {progress.request.row for progress in tests}
    waiting = {progress.request.row for progress in machine.placement.queue}
    assert waiting <= seen


def test_tenants_with_deadlines_are_tested_in_turn():
    machine = scheduler(guaranteed_rows=4)
    for row in range(8):
        list(machine.observe(Arrival(request(row, seconds=1000.0, tenant="many")), 0.0))
    list(machine.observe(Arrival(request(8, seconds=2000.0, tenant="few")), 0.0))
    feed(machine, InstanceReady(Instance(0, (0,), 10**6)))
    assert machine.requests["r8.1"].replica is not None


def test_requests_are_shed_from_a_long_queue_once_their_deadline_is_infeasible():
    machine = scheduler(guaranteed_rows=1, max_queue=4096)
    feed(machine, InstanceReady(Instance(0, (0,), 10**6)))
    need = unloaded(machine)
    feed(machine, Arrival(request(2000, seconds=1e5)))
    for row in range(1000):
        list(machine.observe(Arrival(request(row, seconds=need + 1.0 + row)), 0.0))
    list(machine.decide(0.0))
    decisions = 1
    list(machine.decide(500.0))
    while machine.wake_at() <= 500.0:
        decisions += 1
        list(machine.decide(500.0))
    assert 500 / MOST_ENDS <= decisions < 40
    late = [progress.request.row for progress in machine.requests.values() if progress.late]
    assert set(range(490)) <= set(late)
    assert not set(range(502, 1000)) & set(late)


# the backlog


def test_best_effort_work_is_refused_when_there_is_more_than_will_be_done_while_deadlines_come():
    machine = scheduler(best_effort_backlog=5.0)
    feed(machine, InstanceReady(Instance(0, (0,), 10**6)))
    need = unloaded(machine)

    def refused(row, at, **slo):
        commands = list(machine.observe(Arrival(request(row, at=at, **slo)), at))
        return any(isinstance(command, Refuse) for command in commands)

    assert not any(
        refused(row, 0.0) for row in range(40 + int(5.0 / need))
    )  # no deadlines come: the queue's limit holds
    assert not refused(1000, 0.1, seconds=1000.0)
    assert refused(1001, 0.2)
    assert refused(1002, 0.2, seconds=need / 100)  # it would be best effort
    assert not refused(1003, 0.2, seconds=1000.0)
    assert not refused(1004, 100.0)  # no deadline has come for long
    assert machine.placement.backlog.requests == 41 + int(5.0 / need)


def test_best_effort_work_that_is_alone_is_never_too_much():
    machine = scheduler(best_effort_backlog=1e-6)
    feed(machine, InstanceReady(Instance(0, (0,), 10**6)))
    feed(machine, Arrival(request(0, at=0.0, seconds=1000.0)))
    feed(machine, Arrival(request(1, at=0.1)), 0.1)
    assert [state.request.row for state in machine.requests.values()] == [0, 1]
    (refused,) = [one for one in feed(machine, Arrival(request(2, at=0.2)), 0.2) if isinstance(one, Refuse)]
    assert (refused.request.row, refused.too_much) == (2, True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_the_backlog_is_what_is_unfinished(seed):
    rng, machine, now = random.Random(seed), scheduler(), 0.0
    for id in range(2):
        feed(machine, InstanceReady(Instance(id, (id,), 2048)))
    for row in range(60):
        now += rng.random()
        seconds = rng.choice([None, 0.01, 1.0, 5.0, 100.0])
        feed(
            machine, Arrival(request(row, seconds=seconds, at=now, on_miss=rng.choice(["best_effort", "reject"]))), now
        )
        if rng.random() < 0.3 and machine.requests:
            feed(machine, Cancel(rng.choice(sorted(machine.requests)), "cancelled"), now)
        if rng.random() < 0.05 and machine.placement.replicas:
            feed(machine, InstanceLost(max(machine.placement.replicas), "killed"), now)
        rows = list(machine.requests.values())
        assert machine.placement.backlog.timed == pytest.approx(sum(row.seconds for row in rows if row.has_deadline))
        assert machine.placement.backlog.best_effort == pytest.approx(
            sum(row.seconds for row in rows if not row.has_deadline)
        )
        assert machine.placement.backlog.requests == sum(not row.has_deadline for row in rows)


def test_an_arrival_of_thousands_of_short_blocks_is_no_more_work_than_one_of_few(monkeypatch):
    calls = []
    original = forecast.with_block
    monkeypatch.setattr(forecast, "with_block", lambda *args: calls.append(args) or original(*args))
    counts = []
    for block in (32, 1):
        machine = scheduler()
        feed(machine, InstanceReady(Instance(0, (0,), 10**6)))
        calls.clear()
        decoding = Decoding(block_length=block)
        feed(machine, Arrival(msgspec.structs.replace(request(0, seconds=1e4, answer=4000), decoding=decoding)))
        counts.append(len(calls))
    assert counts[0] == counts[1] < 100
