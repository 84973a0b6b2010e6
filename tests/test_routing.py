"""Routing: the rules, what a router remembers, and several engines on one virtual clock behind it."""

import asyncio
import functools
import itertools
import random
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from virtual_time import run_on_virtual_time

from dilaserve.cli import main
from dilaserve.command_flags import ROUTING_RULES
from dilaserve.config import Config
from dilaserve.engine.engine import Engine, Options
from dilaserve.errors import DeadlineMissed
from dilaserve.sim import workload
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.nodes import REPORT_EVERY, Node, node_seed, simulate_nodes
from dilaserve.sim.quote import alone, quote
from dilaserve.sim.router import NodeReport, Router, Sent, density, node_report
from dilaserve.sim.routing import RULES, Known, best_quote
from dilaserve.sim.run import classes, pretended, simulate
from dilaserve.types import Quote

SECONDS, LIMIT, ANSWER = 1.5, 1024, 64
PROFILE = llada_8b_h200()
TASKS = list(PROFILE.quality.tasks)


def known(devices, in_flight=None, backlog=None, demand=None):
    nothing = [0.0] * len(devices)
    return Known(
        *(np.array(one, dtype=float) for one in (devices, in_flight or nothing, backlog or nothing, demand or nothing))
    )


def jobs(rate, scale=2.0, on_miss="best_effort", seed=0, mix=0.0):
    times = zip(
        workload.poisson(rate, random.Random(seed)), itertools.repeat(200), itertools.repeat(ANSWER), strict=False
    )
    return workload.jobs(times, SECONDS, LIMIT, (None,), ((scale, 1.0 - mix), (None, mix)), seed, on_miss)


def nodes(devices, seed=0, **options):
    config = Config.of(slo_class=classes([2.0]), max_queue=512, **options)
    return [
        Node(config, pretended(PROFILE, count, LIMIT, seed=node_seed(seed, node)), count)
        for node, count in enumerate(devices)
    ]


@functools.cache
def routed(rule, devices=(1, 1, 1), rate=60.0, delay=0.003, seed=0):
    asked = jobs(rate, seed=seed, on_miss="cancel_when_late", mix=0.1)
    return simulate_nodes(nodes(devices, seed), rule, TASKS, asked, delay, seed)


# the rules


@pytest.mark.parametrize(
    ("rule", "state", "chosen"),
    [
        ("p2c", known([8, 8], in_flight=[3, 2]), (1,)),
        ("p2c", known([8, 2], in_flight=[3, 2]), (1,)),
        ("p2c-weighted", known([8, 2], in_flight=[3, 2]), (0,)),
        ("least-backlog", known([8, 8, 8], backlog=[3.0, 1.0, 2.0]), (1,)),
        ("least-backlog", known([8, 2], backlog=[3.0, 1.0]), (0,)),
        ("slack", known([8, 8, 8], demand=[3.0, 1.0, 2.0], in_flight=[0, 9, 9]), (1,)),
        ("slack", known([8, 2], demand=[3.0, 1.0]), (0,)),
        ("slack", known([8, 8], in_flight=[2, 1]), (1,)),
        ("quote", known([8]), (0,)),
    ],
)
def test_rules_choose_what_their_names_say(rule, state, chosen):
    assert RULES[rule](state, random.Random(0)) == chosen


def test_the_command_line_offers_every_rule():
    assert tuple(RULES) == ROUTING_RULES


@some.composite
def states(draw):
    count = draw(some.integers(1, 12))
    column = lambda least, most: draw(some.lists(some.floats(least, most), min_size=count, max_size=count))  # noqa: E731
    devices, in_flight = column(1, 8), draw(some.lists(some.integers(0, 40), min_size=count, max_size=count))
    return known([float(round(one)) for one in devices], in_flight, column(0, 100), column(0, 30))


@given(states(), some.integers(0, 99))
def test_two_choices_never_take_the_fuller_of_their_nodes(state, seed):
    crowds = {"p2c": state.in_flight, "p2c-weighted": state.in_flight / state.devices}
    for rule, crowd in crowds.items():
        (chosen,) = RULES[rule](state, random.Random(seed))
        drawn = RULES["quote"](state, random.Random(seed))
        assert chosen in drawn
        assert crowd[chosen] == min(crowd[node] for node in drawn)


@given(states())
def test_the_least_backlog_of_all_is_found(state):
    (chosen,) = RULES["least-backlog"](state, random.Random(0))
    assert all(state.backlog[chosen] / state.devices[chosen] <= state.backlog / state.devices)


@given(states())
def test_no_node_has_more_slack_than_the_one_with_most(state):
    (chosen,) = RULES["slack"](state, random.Random(0))
    assert all(state.demand[chosen] / state.devices[chosen] <= state.demand / state.devices + 1e-6)


@given(states(), some.integers(0, 99))
def test_as_many_different_nodes_are_asked_as_there_are_up_to_two(state, seed):
    asked = RULES["quote"](state, random.Random(seed))
    assert len(set(asked)) == len(asked) == min(2, len(state.devices))
    assert set(asked) <= set(range(len(state.devices)))


def said(met, threshold=0.0, slack=0.0):
    return Quote(admitted=True, met=met, threshold=threshold, slack=slack)


@pytest.mark.parametrize(
    ("quotes", "chosen"),
    [
        ([said(True, 0.9, 0.2), said(True, 0.9, 0.3)], 1),
        ([said(True, 0.9, 0.2), said(True, 0.8, 0.9)], 0),
        ([said(False), said(True, 0.6, 0.0)], 1),
        ([said(False), said(False)], 1),  # the second has fewer requests per device
        ([None, None], 1),
        ([None, said(False)], 1),
    ],
)
def test_quotes_are_compared_by_deadline_then_threshold_then_slack(quotes, chosen):
    state = known([4, 8], in_flight=[3, 4])
    assert best_quote(state, (0, 1), quotes) == chosen
    assert best_quote(state, (1, 0), quotes[::-1]) == chosen


any_quote = some.one_of(some.none(), some.builds(said, some.booleans(), some.floats(0.5, 0.9), some.floats(0, 1)))


@given(states(), some.data())
def test_a_node_that_meets_the_deadline_is_preferred_to_one_that_does_not(state, data):
    count = len(state.devices)
    quotes = data.draw(some.lists(any_quote, min_size=count, max_size=count))
    chosen = quotes[best_quote(state, range(count), quotes)]
    meeting = [one for one in quotes if one and one.met]
    if meeting:
        assert chosen in meeting
        assert chosen.threshold == max(one.threshold for one in meeting)


# what the router remembers


def test_a_report_counts_but_for_what_was_under_way_when_it_was_made():
    router = Router([8, 8], "least-backlog")
    router.sent(0, Sent(1.003, 2.0, 0.5))
    router.sent(0, Sent(1.103, 3.0, 0.25))
    assert router.choose() == (1,)
    router.reported(0, NodeReport(1.05, 1.5, 0.4))
    assert (router.known.backlog[0], router.known.demand[0]) == (4.5, 0.65)
    router.reported(0, NodeReport(1.2, 0.5, 0.0))
    assert (router.known.backlog[0], router.known.demand[0], router.known.in_flight[0]) == (0.5, 0.0, 2)
    router.ended(0)
    assert router.known.in_flight.tolist() == [1, 0]


@given(some.lists(some.tuples(some.integers(0, 2), some.sampled_from(["sent", "report", "end"])), max_size=60))
def test_the_book_holds_the_last_report_and_all_that_came_after_it(events):
    router, sent, ended, last = Router([1, 2, 4], "p2c"), [], Counter(), {}
    for at, (node, what) in enumerate(events):
        if what == "sent":
            sent.append((node, at + 2.5))
            router.sent(node, Sent(at + 2.5, 1.0, 0.5))
        elif what == "report":
            last[node] = at
            router.reported(node, NodeReport(at, 10.0, 3.0))
        elif sum(to == node for to, _ in sent) > ended[node]:
            ended[node] += 1
            router.ended(node)
    for node in range(3):
        reported, at = (10.0, last[node]) if node in last else (0.0, -1.0)
        after = sum(to == node and arrives > at for to, arrives in sent)
        assert router.known.backlog[node] == reported + after
        assert router.known.demand[node] == (3.0 if node in last else 0.0) + 0.5 * after
        assert router.known.in_flight[node] == sum(to == node for to, _ in sent) - ended[node]


@given(some.floats(0.0, 100.0), some.floats(-100.0, 100.0))
def test_a_request_needs_between_none_and_all_of_a_device(seconds, left):
    assert 0.0 <= density(seconds, left) <= 1.0
    assert density(seconds, left) == 1.0 or seconds < left


def test_a_node_reports_what_its_requests_still_take():
    async def asked():
        async with Engine(nodes([1])[0].config, assemble=nodes([1])[0].assemble) as engine:
            report = lambda: node_report(engine.scheduler.requests.values(), engine.loop.time())  # noqa: E731
            before = report()
            each = alone(engine, 100, Options(max_tokens=ANSWER))
            options = (Options(max_tokens=ANSWER, slo_class="x2"), Options(max_tokens=ANSWER))
            tasks = [asyncio.create_task(engine.generate([0] * 100, one)) for one in options]
            await asyncio.sleep(0.001)
            come = report()
            await asyncio.sleep(each)
            going = report()
            await asyncio.gather(*tasks)
            return each, before, come, going, report()

    each, before, come, going, after = run_on_virtual_time(asked())
    assert (before.backlog, before.demand) == (after.backlog, after.demand) == (0.0, 0.0)
    assert come.backlog == pytest.approx(2 * each)
    assert come.demand == pytest.approx(0.5, rel=0.01)  # half of its deadline; the other request has none
    assert 0.0 < going.backlog < come.backlog


# quotes


def test_a_quote_says_what_the_arrival_test_then_does():
    async def asked():
        counts, rng = Counter(), random.Random(0)
        node = nodes([2], plan="2x1")[0]
        async with Engine(node.config, assemble=node.assemble) as engine:
            running = set()
            for _ in range(150):
                options = Options(max_tokens=ANSWER, deadline_ms=rng.uniform(60, 300), on_miss="reject")
                told = quote(engine, 100, options)
                try:
                    stream = await engine.submit([0] * 100, options)
                except DeadlineMissed:
                    counts[told.met, False] += 1
                else:
                    counts[told.met, True] += 1
                    running.add(asyncio.create_task(stream.whole()))
                await asyncio.sleep(rng.expovariate(100.0))
            await asyncio.gather(*running, return_exceptions=True)
        return counts

    counts = run_on_virtual_time(asked())
    assert min(counts[True, True], counts[False, False]) > 20
    assert counts[True, False] == counts[False, True] == 0


def test_asking_for_quotes_changes_nothing():
    async def served(asks):
        node, done = nodes([2])[0], []
        async with Engine(node.config, assemble=node.assemble) as engine:

            async def one(at, length):
                await asyncio.sleep(at)
                answer = await engine.generate([0] * length, Options(max_tokens=ANSWER, slo_class="x2"))
                done.append((engine.loop.time(), answer.usage))

            async with asyncio.TaskGroup() as group:
                for number in range(120):
                    group.create_task(one(number / 40.0, 50 + number))
                if asks:
                    for tick in range(250):
                        await asyncio.sleep(0.0123)
                        wish = Options(max_tokens=96, deadline_ms=800, block_length=(8, 16, 32)[tick % 3])
                        assert quote(engine, 40 + tick, wish) is not None
        return done

    assert run_on_virtual_time(served(False)) == run_on_virtual_time(served(True))


def test_without_a_deadline_or_an_arrival_test_there_is_no_quote():
    async def asked(options, **policy):
        node = nodes([1], **policy)[0]
        async with Engine(node.config, assemble=node.assemble) as engine:
            return quote(engine, 100, options)

    timed = Options(max_tokens=ANSWER, slo_class="x2")
    assert run_on_virtual_time(asked(Options(max_tokens=ANSWER))) is None
    assert run_on_virtual_time(asked(timed, scheduling="fcfs")) is None
    assert run_on_virtual_time(asked(timed)).met


# several engines


@pytest.mark.parametrize("rule", RULES)
def test_one_node_without_delay_is_the_same_as_no_nodes(rule):
    asked, (node,) = jobs(40.0), nodes([2])
    plain = simulate(node.config, node.assemble, TASKS, asked)
    assert simulate_nodes([node], rule, TASKS, asked, delay=0.0).run.outcomes == plain.outcomes


@pytest.mark.parametrize("rule", RULES)
def test_every_request_ends_on_one_node_and_none_is_lost(rule):
    found = routed(rule)
    outcomes, engines = found.run.outcomes, found.run.engines
    assert [outcome.at for outcome in outcomes] == [job.at for job in jobs(60.0, mix=0.1)]
    counts = Counter(outcome.node for outcome in outcomes)
    assert [engine.scheduler.totals.received for engine in engines] == [counts[node] for node in range(3)]
    assert min(counts.values()) > len(outcomes) / 6
    assert all(not engine.scheduler.requests for engine in engines)
    assert sum(engine.scheduler.totals.fates["answered"] for engine in engines) == sum(
        outcome.latency is not None for outcome in outcomes
    )
    assert found.costs.decisions == len(outcomes)
    assert found.costs.quotes == (2 * len(outcomes) if rule == "quote" else 0)


@pytest.mark.parametrize("rule", RULES)
def test_the_same_seed_routes_the_same_way(rule):
    asked = jobs(60.0, seed=0, on_miss="cancel_when_late", mix=0.1)
    again = simulate_nodes(nodes((1, 1, 1), 0), rule, TASKS, asked, 0.003, 0)
    assert again.run.outcomes == routed(rule).run.outcomes
    assert again.run.outcomes != routed(rule, seed=1).run.outcomes


@pytest.mark.parametrize("rule", ["p2c-weighted", "least-backlog", "slack", "quote"])
def test_larger_nodes_get_more(rule):
    counts = Counter(outcome.node for outcome in routed(rule, devices=(4, 1)).run.outcomes)
    assert counts[0] > 2 * counts[1]


def test_the_way_to_a_node_counts_against_the_deadline():
    """On one idle node: the same steps, ended later by the delay, before the same instant."""
    steady = nodes([1], threshold_control="fixed")
    near, far = (simulate_nodes(steady, "p2c", TASKS, jobs(3.0), delay=delay).run.outcomes for delay in (0.0, 0.05))
    assert near[0].latency < 0.1 < near[1].at - near[0].at
    assert far[0].latency == pytest.approx(near[0].latency + 0.05)
    assert [one.deadline for one in far] == pytest.approx([one.deadline for one in near])
    assert [one.usage.deadline for one in far] == [one.deadline for one in far]  # from the first arrival
    late = simulate_nodes(nodes([1]), "p2c", TASKS, jobs(3.0), delay=0.3).run.outcomes
    assert not any(outcome.met for outcome in late)


def test_a_quote_costs_a_round_trip():
    latency = {
        rule: simulate_nodes(nodes([1, 1]), rule, TASKS, jobs(3.0), delay=0.1).run.outcomes[0].latency
        for rule in ("least-backlog", "quote")
    }
    assert latency["quote"] == pytest.approx(latency["least-backlog"] + 0.2, abs=0.05)


def test_a_router_that_counts_its_sends_spreads_a_burst_that_no_report_has_seen():
    burst = [job._replace(at=0.001 * place) for place, job in enumerate(jobs(20.0)[:40])]
    assert burst[-1].at < REPORT_EVERY
    for rule in ("p2c", "least-backlog", "slack"):
        counts = Counter(outcome.node for outcome in simulate_nodes(nodes([1] * 4), rule, TASKS, burst).run.outcomes)
        assert max(counts.values()) <= 12


# the command


def test_the_command_routes_among_nodes_and_saves_the_node_of_each_request(tmp_path, capsys):
    words = ["--nodes", "3", "--node-devices", "2,1", "--routing", "quote", "--rate", "20", "--seconds", "4"]
    assert main(["simulate", *words, "--answer", "64", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "3 nodes by quote, 3 ms away" in told
    assert "decisions a second" in told
    assert "quotes: " in told
    assert "\n5 devices, 4 s simulated" in told
    outcomes = msgspec.json.decode((tmp_path / "outcomes.json").read_bytes())
    assert {outcome["node"] for outcome in outcomes} == {0, 1, 2}
    routing = msgspec.json.decode((tmp_path / "report.json").read_bytes())["routing"]
    assert [node["devices"] for node in routing["nodes"]] == [2, 1, 2]
    assert [node["requests"] for node in routing["nodes"]] == [
        sum(outcome["node"] == node and outcome["at"] >= 0.4 for outcome in outcomes) for node in range(3)
    ]


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--routing", "slack"], "--routing is about several nodes; say how many by --nodes"),
        (["--node-devices", "8"], "--node-devices is about several nodes"),
        (["--routing-delay-ms", "0"], "--routing-delay-ms is about several nodes"),
        (["--nodes", "0"], "--nodes: '0' is no whole number from 1 to 1024"),
        (["--nodes", "1025"], "--nodes: '1025' is no whole number from 1 to 1024"),
        (["--nodes", "2", "--routing", "best"], "choose from 'p2c'"),
        (["--nodes", "2", "--node-devices", "8,4,2"], "names 3 nodes and --nodes is 2; raise --nodes or name fewer"),
        (["--nodes", "2", "--node-devices", "8,"], "--node-devices: '' is no whole number"),
        (["--nodes", "2", "--routing-delay-ms", "nan"], "'nan' is no number of milliseconds from 0 to 10000"),
        (["--nodes", "2", "--node-devices", "8,4", "--plan", "8x1"], "--plan 8x1: plan '8x1' is not"),
    ],
)
def test_impossible_nodes_give_one_sentence(words, pattern, capsys):
    try:
        code = main(["simulate", "--seconds", "1", *words])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert pattern in captured.err
    assert len(captured.err.splitlines()) == 1
