"""The scheduler with families whose K/V are exact: memory that grows, prompts in chunks, shared beginnings."""

from collections import Counter

import msgspec
import pytest
from exact_world import ExactWorld
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_builders import done, feed, of, request, result, scheduler

from dilaserve.scheduler.placement import Placement
from dilaserve.types import (
    PAGE,
    Arrival,
    Cancel,
    FamilyTraits,
    Finish,
    Instance,
    InstanceReady,
    Launch,
    Slo,
    Span,
)

BLOCK = FamilyTraits(attention="block", grid="start")
HASHES = tuple(range(100, 120))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_each_step_reads_its_own_exact_keys_and_values_and_every_request_ends(seed):
    world = ExactWorld(seed)
    for _ in range(200):
        world.act()
    world.settle()
    world.check_that_all_ended()
    for replica in world.machine.placement.replicas.values():
        assert not replica.pages.runs
        assert replica.pages.unused == replica.pages.capacity


def exact(row, prompt=32, answer=64, at=0.0, hashes=(), slo=Slo(), length=32, traits=BLOCK):  # noqa: B008
    wanted = request(row, prompt, answer, at, slo, cache="exact", block_length=length, traits=traits)
    return msgspec.structs.replace(wanted, prefix_hashes=hashes)


class Run:
    """One instance whose steps unmask so many tokens; counts what its rows cost."""

    def __init__(self, pool, tokens=8, **settings):
        self.machine, self.tokens, self.launches = scheduler(**settings), tokens, []
        self.evicted, self.usage, self.masks, self.now = Counter(), {}, {}, 0.0
        self.commands = feed(self.machine, InstanceReady(Instance(0, (0,), pool)))

    def arrive(self, *wanted):
        for one in wanted:
            self.take(feed(self.machine, Arrival(one), self.now))

    def take(self, commands):
        self.launches += [launch.batch for launch in of(commands, Launch)]
        self.usage |= {finish.request.row: finish.usage for finish in of(commands, Finish)}

    def step(self):
        self.now += 0.01
        batch = self.launches[-1]
        self.take(feed(self.machine, done(batch, [self.result(span) for span in batch.spans]), self.now))

    def result(self, span: Span):
        key = span.row, span.block_start
        before = self.masks.get(key, span.block_end - span.block_start)
        left = max(0, before - self.tokens)
        if span.block_end > span.block_start:
            self.masks[key] = left
        return result(span, left, span.block_end - left, unmasked=before - left)

    def to_the_end(self, most):
        """Steps until no request is left, at most so many."""
        while self.machine.requests and most:
            self.step()
            most -= 1
        assert not self.machine.requests, "requests starve"


@pytest.fixture
def evictions(monkeypatch):
    """Counts the evictions of each row."""
    counts, evict = Counter(), Placement.evict

    def counted(self, state, replica):
        counts[state.request.row] += 1
        evict(self, state, replica)

    monkeypatch.setattr(Placement, "evict", counted)
    return counts


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("scheduling", ["fcfs", "least-slack", "composed"])
@pytest.mark.parametrize("seconds", [None, 5.0, 0.05])
@pytest.mark.parametrize("tenants", ["a", "ab"])
def test_rows_that_outgrow_the_pool_end_one_after_the_other(evictions, rows, scheduling, seconds, tenants):
    pool, answer = 24 * PAGE, 20 * PAGE
    run = Run(pool, scheduling=scheduling)
    for row in range(rows):
        slo = Slo(seconds=seconds, tenant=tenants[row % len(tenants)])
        run.arrive(exact(row, answer=answer, at=0.001 * row, slo=slo))
    run.to_the_end(rows * 2 * answer // run.tokens)
    assert max(evictions.values(), default=0) <= rows


def test_a_row_that_has_all_its_memory_needs_no_watermark():
    run = Run(pool=10 * PAGE)
    run.arrive(exact(0, answer=4 * PAGE), exact(1, answer=4 * PAGE))
    run.step()
    assert [span.row for span in run.launches[-1].spans] == [0, 1]


@pytest.mark.parametrize(("prompt", "evicted", "placed"), [(PAGE, {1: 1}, {0, 2}), (4 * PAGE, {}, {0, 1})])
def test_rows_of_another_tenant_are_evicted_only_if_that_makes_room(evictions, prompt, evicted, placed):
    """One row of the tenant stays, whatever that costs the other tenant, and no watermark is kept."""
    run = Run(pool=13 * PAGE, max_num_batched_tokens=4096)
    run.arrive(exact(0, answer=6 * PAGE), exact(1, answer=4 * PAGE, at=0.001))
    run.step()
    run.arrive(exact(2, prompt, answer=6 * PAGE, at=run.now, slo=Slo(tenant="b")))
    run.step()
    assert (evictions, run.machine.placement.replicas[0].residents.keys()) == (evicted, placed)
    run.to_the_end(200)


def test_usage_counts_the_prompt_that_another_request_has_computed_and_not_its_own_after_an_eviction(evictions):
    run = Run(pool=11 * PAGE)
    prompt = 3 * PAGE
    run.arrive(exact(0, prompt, answer=4 * PAGE, hashes=HASHES[:3]))
    run.step()
    run.arrive(exact(1, PAGE, answer=4 * PAGE, at=run.now, slo=Slo(seconds=100.0)))
    run.to_the_end(200)
    assert evictions == {0: 1}
    assert run.usage[0].cached_prompt_tokens == 0
    run.arrive(exact(2, prompt, answer=PAGE, at=run.now, hashes=HASHES[:3]))
    run.to_the_end(200)
    assert run.usage[2].cached_prompt_tokens == prompt


def test_a_cancelled_row_in_its_first_step_leaves_nothing_to_be_reused():
    run = Run(pool=16 * PAGE)
    run.arrive(exact(0, 3 * PAGE, hashes=HASHES[:3]))
    feed(run.machine, Cancel("r0", "cancelled"))
    run.step()
    run.arrive(exact(1, 3 * PAGE, at=run.now, hashes=HASHES[:3]))
    assert run.launches[-1].copies == ()
    assert run.launches[-1].spans[0].start == 0


def replica_of(run, row):
    (state,) = [state for state in run.machine.requests.values() if state.request.row == row]
    return state.replica


def test_an_instance_that_holds_the_prompts_beginning_is_preferred_while_it_has_few_rows_more():
    run = Run(4096)
    run.take(feed(run.machine, InstanceReady(Instance(1, (1,), 4096))))
    run.arrive(exact(0, prompt=100, hashes=HASHES[:3]))
    holder = replica_of(run, 0)
    run.step()
    placed = []
    for row in range(1, 6):
        run.arrive(exact(row, prompt=100, hashes=HASHES[:3]))
        placed.append(replica_of(run, row) is holder)
    assert placed == [True, True, False, True, False]  # 1, 2, 3 and 3, 4 rows there, 0 and 1 elsewhere
