"""Steps on buffers that stay where they are, on the CPU, against steps that are laid out anew."""

import asyncio
import os
import signal
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from parity import expect, some_requests, wishes
from reference_loops import Llada
from runner_harness import TOKENS, Harness, shapes_of
from worker_waits import is_stopped, until

from dilaserve import Config, Engine, Options, models
from dilaserve.models import attention, blocks
from dilaserve.models.attention import attend, each_run, grouped
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import PackedSpan, Runs
from dilaserve.models.spec import Shard
from dilaserve.models.transformer import Model
from dilaserve.transport.devices import steps_for
from dilaserve.types import PAGE, Decoding
from dilaserve.worker import warm_up
from dilaserve.worker.graph_steps import ReuseSteps, buckets
from dilaserve.worker.step_arrays import columns_of
from dilaserve.worker.step_buffers import WIDTH
from dilaserve.worker.tp_group import Alone


@pytest.mark.parametrize("count", [1, 3, 5, 8, 17])
def test_padded_steps_do_what_steps_laid_out_anew_do(random_model, count):
    shapes, harnesses = shapes_of(count), [Harness(random_model, static) for static in (False, True)]
    for harness in harnesses:
        harness.fill(shapes)
        list(harness.runner.steps(harness.spans(shapes, refresh=True), 1))
    plain, static = harnesses
    for _ in range(6):
        reports = [list(harness.runner.steps(harness.spans(shapes, refresh=False), 4)) for harness in harnesses]
        assert sum(outcome.last for outcome in reports[1]) == 1
        for report in reports:
            assert report[-1].last
        done = min(map(len, reports))  # the static one may have begun a step before it heard that a row was done
        for one, other in zip(reports[0][:done], reports[1][:done], strict=True):
            for mine, theirs in zip(one.results, other.results, strict=True):
                assert msgspec.structs.astuple(mine)[:6] == msgspec.structs.astuple(theirs)[:6]
                assert mine.confidence == pytest.approx(theirs.confidence, rel=1e-4)
        for _ in range(len(reports[1]) - len(reports[0])):
            list(plain.runner.steps(plain.spans(shapes, refresh=False), 1))
        assert np.array_equal(plain.table.canvas, static.table.canvas)
        assert np.allclose(plain.table.confidence, static.table.confidence, rtol=1e-4)


def done(outcome):
    """What a step did to its rows, whatever launch it was of."""
    return [msgspec.structs.replace(result, generation=0, stage=0) for result in outcome.results]


def stages(outcome):
    """Which of its spans each row took; None: it rested."""
    return [None if result.rested else result.stage for result in outcome.results]


@pytest.mark.parametrize("static", [False, True])
def test_steps_that_reuse_follow_a_refresh_in_one_launch(random_model, static):
    shapes, harnesses = [(20, 32, 32), (33, 32, 40), (46, 32, 32)], [Harness(random_model, static) for _ in range(2)]
    for harness in harnesses:
        harness.fill(shapes)
    one, other = harnesses
    refresh, reuse = (one.spans(shapes, refresh=kind) for kind in (True, False))
    together = list(one.runner.steps(refresh, 4, [(span,) for span in reuse]))
    apart = [*other.runner.steps(refresh, 1), *other.runner.steps(reuse, len(together) - 1)]
    assert len(together) > 2
    assert [outcome.last for outcome in together] == [False] * (len(together) - 1) + [True]
    assert [stages(outcome) for outcome in together] == [[0] * 3] + [[1] * 3] * (len(together) - 1)
    assert [done(outcome) for outcome in together] == [done(outcome) for outcome in apart]
    assert np.array_equal(one.table.canvas, other.table.canvas)


@pytest.mark.parametrize("static", [False, True])
def test_no_step_begins_after_the_launch_is_stopped_early(random_model, static):
    harness, shapes = Harness(random_model, static), [(20, 32, 32)]
    harness.fill(shapes)
    harness.table.threshold[0] = 1.0
    list(harness.runner.steps(harness.spans(shapes, refresh=True), 1))
    looks = iter([False, False, True, True, True])
    outcomes = list(harness.runner.steps(harness.spans(shapes, refresh=False), 20, (), lambda: next(looks)))
    assert len(outcomes) == 3 + static  # the next was under way
    assert [outcome.last for outcome in outcomes] == [False] * (len(outcomes) - 1) + [True]


@pytest.mark.parametrize("static", [False, True])
def test_steps_end_with_the_answer(random_model, static):
    harness, shapes = Harness(random_model, static), [(20, 32, 32)]
    harness.fill(shapes)
    harness.table.threshold[0] = 1.0
    harness.runner.stop_ids = np.arange(harness.spec.vocab_size)  # the first token ends the answer
    list(harness.runner.steps(harness.spans(shapes, refresh=True), 1))
    outcomes = list(harness.runner.steps(harness.spans(shapes, refresh=False), 40))
    ended = [results[0].stop_at < results[0].prefix for results, *_ in outcomes]
    assert ended == [False] * (len(outcomes) - 1 - static) + [True] * (1 + static)  # the next was under way
    assert outcomes[-1].results[0].masks_left
    harness.table.ignore_eos[0] = True
    *_, outcome = harness.runner.steps(harness.spans(shapes, refresh=False), 40)
    assert (outcome.results[0].masks_left, outcome.results[0].stop_at) == (0, -1)


def test_a_block_before_the_least_number_of_tokens_is_sampled_without_end_tokens(random_model):
    harness, shapes = Harness(random_model, static=True), [(20, 32, 64)]
    harness.fill(shapes)
    harness.table.threshold[0] = 0.0
    harness.table.stop_ids[0, :2] = 5, 6
    list(harness.runner.steps(harness.spans(shapes, refresh=True), 1))
    columns = columns_of(harness.spans(shapes, refresh=False))
    for may_end_at, taken in ((20, True), (21, False), (52, False)):
        harness.table.may_end_at[0] = may_end_at
        assert harness.reuse.takes(columns, harness.table) == taken
    harness.table.canvas[0, 20:] = harness.spec.mask_id
    head = harness.model.head
    head.data[[5, 6]] = head.data[7] * 1.5  # at least one of the three beats all others where 7 did
    list(harness.runner.steps(harness.spans(shapes, refresh=False), 1))
    assert not set(harness.table.canvas[0, 20:52].tolist()) & {5, 6, harness.spec.mask_id}


def test_a_step_follows_when_the_one_before_left_masks(random_model):
    """Of 7 masks, 3 a step, 1 is left where 3 might have gone: the next step waits for the result, and comes."""
    harness, shapes = Harness(random_model, static=True), shapes_of(2)
    harness.fill(shapes)
    (span,) = harness.spans(shapes, refresh=False)[1:]
    outcomes = list(harness.runner.steps([span], 8))
    assert [outcome.results[0].masks_left for outcome in outcomes] == [4, 1, 0]
    assert [outcome.last for outcome in outcomes] == [False, False, True]


def test_padding_rows_write_to_the_spare_page_only(random_model):
    harness = Harness(random_model, static=True)
    shapes = shapes_of(3)
    harness.fill(shapes)
    harness.pool.keys[0].fill_(7.0)
    list(harness.runner.steps(harness.spans(shapes, refresh=False), 1))
    touched = (harness.pool.keys[0] != 7.0).flatten(1).any(1)
    mine = {span.kv_start + p for span in harness.spans(shapes, False) for p in range(span.block_start, span.block_end)}
    assert harness.reuse.bucket == 4
    assert set(touched.nonzero().flatten().tolist()) == mine | set(range(TOKENS, TOKENS + PAGE))


def test_only_greedy_reuse_rows_with_blocks_of_a_page_are_taken(random_model):
    harness, shapes = Harness(random_model, static=True), shapes_of(2)
    harness.fill(shapes)

    def takes(spans):
        return harness.reuse.takes(columns_of(spans), harness.table)

    reuse, refresh = harness.spans(shapes, refresh=False), harness.spans(shapes, refresh=True)
    assert takes(reuse)
    assert not takes([*reuse[:1], *refresh[1:]])
    assert not takes(harness.spans([(20, WIDTH + 1, WIDTH + 1)], refresh=False))
    harness.table.temperature[1] = 0.5
    assert not takes(reuse)
    assert takes(reuse[:1])
    for column in (harness.table.known, harness.table.resumed):
        column[0] = True
        assert not takes(reuse[:1])
        column[0] = False
    assert takes(reuse[:1])


def test_batches_are_padded_by_a_row_at_most():
    assert buckets(1) == [1]
    assert buckets(9) == [1, 2, 4, 6, 8, 10]
    for rows in range(1, 100):
        sizes = buckets(rows)
        assert sizes[-1] - rows in (0, 1)
        assert all(next(size for size in sizes if size >= count) - count < 2 for count in range(1, rows + 1))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_runs_attend_as_groups_of_spans_do(heads):
    pool = SimpleNamespace(keys=[torch.randn(200, heads[1], 8)], values=[torch.randn(200, heads[1], 8)])
    spans = [PackedSpan(0, 5, 10, 40), PackedSpan(5, 5, 60, 33), PackedSpan(10, 9, 100, 77)]
    q = torch.randn(19, heads[0], 8)
    runs = Runs(
        torch.tensor([0, 5, 10, 19], dtype=torch.int32),
        torch.tensor([10, 60, 100, 0], dtype=torch.int32),
        torch.tensor([40, 33, 77], dtype=torch.int32),
        9,
        100,
    )
    expected = attend(q, pool, 0, grouped(spans, torch.device("cpu")))
    assert torch.allclose(each_run(q, pool.keys[0], pool.values[0], runs), expected, atol=1e-6)
    assert torch.allclose(attend(q, pool, 0, runs), expected, atol=1e-6)


def test_the_largest_step_can_be_rehearsed(random_model):
    harness = Harness(random_model, static=False)
    with torch.inference_mode():
        pool = warm_up.small_pool(harness.spec, harness.model)
        warm_up.refreshed(harness.spec, harness.model, pool, 700, 8)
        ReuseSteps(harness.spec, harness.model, pool, 8).rehearse(8)
    assert pool.tokens == harness.spec.max_length + PAGE
    assert blocks.kernels_for(torch.device("cpu")) is blocks.PLAIN


def test_a_step_on_fixed_buffers_never_looks_at_what_is_in_them(random_model, monkeypatch):
    """On the meta device a tensor has no values, so whatever would make the host wait for a GPU raises."""
    meta, checkpoint = torch.device("meta"), Checkpoint(random_model)
    spec = models.describe(checkpoint)
    weights = models.load(spec, checkpoint.tensors(), meta, torch.float32, lambda nbytes: None, Shard())
    pool = KVPool(spec, Shard(), torch.zeros((TOKENS + PAGE) * spec.kv_elements, device=meta))
    steps = ReuseSteps(spec, Model(spec, weights), pool, 8)
    with pytest.raises(Exception, match="meta"):
        steps.step(4)
    monkeypatch.setattr(attention, "varlen_for", lambda *where: lambda q, keys, values, runs: torch.empty_like(q))
    steps.step(4)


def test_a_gpu_takes_several_steps_a_launch_and_a_cpu_one():
    assert steps_for(["cuda:0", "cuda:1"], Config().device) == 8
    assert steps_for(["cpu"], Config().device) == 1
    assert steps_for(["cpu"], Config.of(steps_per_launch=3).device) == 3


@pytest.mark.parametrize("most", [2, 8])
async def test_steps_in_a_row_change_no_token_and_no_count(random_model, most):
    requests = some_requests(40, seed=12)
    async with Engine(Config.of(model=str(random_model), devices="cpu", steps_per_launch=most)) as engine:
        alone = [await engine.generate(*wish) for wish in wishes(requests[:10])]
        batches = engine.scheduler.batcher.batches
        together = await asyncio.gather(*(engine.generate(*wish) for wish in wishes(requests)))
    expect(Llada(random_model), requests[:10], alone)
    expect(Llada(random_model), requests, together)
    assert batches < sum(answer.usage.steps for answer in alone)


@pytest.mark.parametrize("static", [False, True])
def test_a_launch_goes_on_into_the_next_block(random_model, static):
    one, other = harnesses = [Harness(random_model, static) for _ in range(2)]
    shapes = [(20, 32, 64), (45, 24, 96)]

    def fill(harness):
        harness.fill(shapes)
        harness.table.threshold[:2] = 0.0  # all masks in a step
        harness.table.rule[:2] = 0

    def launch(harness):
        (*first,) = harness.spans(shapes, refresh=True)
        then = [[span._replace(start=span.block_start, length=span.block_end - span.block_start)] for span in first]
        for course, span in zip(then, first, strict=True):
            length = span.block_end - span.block_start
            later = span._replace(block_start=span.block_end, block_end=span.block_end + length)
            course += [later, later._replace(start=later.block_start, length=length)]
        return first, then

    for harness in harnesses:
        fill(harness)
    first, then = launch(one)
    together = list(one.runner.steps(first, 8, then))
    assert [[result.masks_left for result in outcome.results] for outcome in together] == [[0, 0], [0, 0]]
    assert [stages(outcome) for outcome in together] == [[0, 0], [2, 2]]  # no step was left to reuse the first block
    apart = [list(other.runner.steps(spans, 1)) for spans in (first, [course[1] for course in then])]
    assert [done(outcome) for outcome in together] == [done(outcome) for (outcome,) in apart]
    assert np.array_equal(one.table.canvas, other.table.canvas)
    fill(one)
    one.runner.max_tokens = sum(span.length for span in first) - 1
    first, then = launch(one)
    (outcome,) = one.runner.steps(first, 8, then)
    assert (done(outcome), outcome.last) == (done(together[0]), True)


def test_a_row_whose_block_is_done_idles_in_steps_that_had_begun_and_is_reported_idle(random_model):
    harness, shapes = Harness(random_model, True), [(20, 32, 64), (45, 24, 96)]
    harness.fill(shapes)
    list(harness.runner.steps(harness.spans(shapes, refresh=True), 1))
    harness.table.canvas[0, 21:52] = 7  # one mask is left, and many of the other row
    outcomes = list(harness.runner.steps(harness.spans(shapes, refresh=False), 8))
    rests = [[result.rested for result in outcome.results] for outcome in outcomes]
    assert rests == [[False, False], [True, False]]
    assert [outcome.results[0].unmasked for outcome in outcomes] == [1, 0]


@pytest.mark.parametrize("static", [False, True])
def test_a_block_that_was_done_before_the_launch_is_a_step_with_nothing_to_unmask(random_model, static):
    """As a worker leaves it that dies between its write and its report. The row must not rest: it would for ever."""
    harness, shapes = Harness(random_model, static), [(20, 32, 64), (45, 24, 96)]
    harness.fill(shapes)
    list(harness.runner.steps(harness.spans(shapes, refresh=True), 1))
    harness.table.canvas[0, 20:52] = 7
    for most in (1, 8):
        outcome, *_ = harness.runner.steps(harness.spans(shapes, refresh=False), most)
        done, _ = outcome.results
        assert (done.rested, done.unmasked, done.masks_left, done.prefix) == (False, 0, 0, 52)


class Held(Alone):
    """A rank that is held between its last collective and its write: `meanwhile` is called there."""

    def __init__(self, meanwhile):
        self.meanwhile = meanwhile

    def check(self):
        self.meanwhile()


@pytest.mark.parametrize("static", [False, True])
def test_a_late_step_writes_nothing_to_a_row_that_was_reused(random_model, static):
    harness, shapes = Harness(random_model, static), [(20, 32, 32), (33, 32, 40)]
    harness.fill(shapes)
    list(harness.runner.steps(harness.spans(shapes, refresh=True), 1))
    spans, kept = harness.spans(shapes, refresh=False), harness.table.canvas[1].copy()
    table, prompt = harness.table, np.full(30, 9, dtype=np.int32)

    def given_away():
        table.fill(0, prompt, 100, harness.spec.mask_id, Decoding())

    if static:
        read = harness.reuse.read
        harness.reuse.read = lambda: (given_away(), read())[1]
    else:
        harness.runner.group = Held(given_away)
    list(harness.runner.steps(spans, 1))
    assert table.canvas[0, :100].tolist() == [9] * 30 + [harness.spec.mask_id] * 70
    assert not table.confidence[0, :100].any()
    assert (table.canvas[1] != kept).any()  # the other row is still its request's


async def test_an_arriving_request_does_not_wait_for_all_steps_of_a_launch(random_model, monkeypatch):
    config = Config.of(model=str(random_model), devices="cpu", steps_per_launch=64)
    long = Options(max_tokens=250, block_length=250, confidence_threshold=1.0, ignore_eos=True)
    async with Engine(config) as engine, await engine.submit([5, 6, 7], long) as stream:
        (worker,), seen = engine.executor.workers.values(), {}
        launch, stop_early = engine.executor.launch, engine.executor.stop_early

        def note(what, call):
            def noted(batch):
                seen[what, len(batch.spans)] = engine.scheduler.requests[stream.request.id].steps
                call(batch)

            return noted

        monkeypatch.setattr(engine.executor, "launch", note("launch", launch))
        monkeypatch.setattr(engine.executor, "stop_early", note("hurry", stop_early))
        await anext(stream)
        os.kill(worker.process.pid, signal.SIGSTOP)
        await until(lambda: is_stopped(worker.process.pid))
        for _ in range(100):
            await asyncio.sleep(0)  # all that it has said is read
        other = asyncio.create_task(engine.generate([8, 9], Options(max_tokens=1, ignore_eos=True)))
        while ("hurry", 1) not in seen:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        os.kill(worker.process.pid, signal.SIGCONT)
        await other
    assert seen["launch", 2] - seen["hurry", 1] <= 2
