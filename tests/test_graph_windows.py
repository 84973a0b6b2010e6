"""Steps on fixed buffers of rows whose queries are more than what they unmask, or whose logits are shifted."""

import block_checkpoints
import msgspec
import numpy as np
import pytest
from block_models import Masked
from block_parity import answers, expect, some_requests
from checkpoints import MASK
from cuda_harness import GPU, fresh_device_caches  # noqa: F401 - a fixture
from cuda_harness import Harness as CudaHarness
from fake_cuda import fake_gpus, steps_of_a_gpu
from runner_harness import Harness

from dilaserve import Config, Engine
from dilaserve.types import PAGE, Decoding, Span
from dilaserve.worker.step_arrays import columns_of
from dilaserve.worker.step_buffers import WIDTH

FAMILIES = list(block_checkpoints.FAMILIES)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    directory = block_checkpoints.make(tmp_path_factory.mktemp("models") / request.param, request.param)
    return request.param, directory


async def test_an_engine_with_the_steps_of_a_gpu_gives_the_reference_answers(family, monkeypatch):
    """In float32 on the CPU: launches of several steps, on fixed buffers wherever these take them."""
    for name, value in steps_of_a_gpu().items():
        monkeypatch.setenv(name, value)
    architecture, directory = family
    requests, small = some_requests(architecture, 24, seed=8), dict(max_num_seqs=5, steps_per_launch=4)
    async with Engine(Config.of(model=str(directory), devices="cpu", **small)) as engine:
        alone = [(await answers(engine, [request]))[0] for request in requests[:6]]
        together = await answers(engine, requests, stagger=True)
    reference = Masked(directory)
    expect(reference, requests[:6], alone)
    expect(reference, requests, together)


# prompt; of the open block: its length, and where the part that is unmasked begins and ends; the canvas
SHAPES = [(40, 32, 1, 32, 32), (64, 32, 8, 16, 32), (33, 16, 0, 16, 40), (70, 7, 6, 7, 7), (50, 24, 3, 10, 24)]
RULES = (
    dict(rule="threshold", confidence_threshold=0.5),
    dict(rule="steps"),
    dict(rule="factor", factor=1.0),
    dict(rule="dynamic", confidence_threshold=0.4),
)


def laid_out(harness, shift):
    """Rows whose masks lie in a part of their block; spans that compute all, and those that compute the block."""
    refresh, kv_start, rng = [], 0, np.random.default_rng(1)
    for row, (prompt, _, first, end, answer) in enumerate(SHAPES):
        canvas, ids = prompt + answer, rng.integers(0, 256, prompt).astype(np.int32)
        harness.table.fill(row, ids, canvas, harness.spec.mask_id, Decoding(**RULES[row % len(RULES)]))
        harness.table.canvas[row, prompt : prompt + first] = rng.integers(0, 256, first)
        where = dict(block_start=prompt + first, block_end=prompt + end, quota=2 * (row % 2), step=0)
        generation = int(harness.table.generation[row])
        refresh.append(Span(row, generation, kv_start, 0, canvas, canvas, shift=shift if first else 0, **where))
        kv_start += -(-canvas // PAGE) * PAGE
    lengths = [(prompt, length) for prompt, length, *_ in SHAPES]
    return refresh, [
        span._replace(start=start, length=length) for span, (start, length) in zip(refresh, lengths, strict=True)
    ]


def unmasked(harness, shift, most):
    """The canvases after a step over all and launches over the blocks, and all rows' results by step."""
    refresh, reuse = laid_out(harness, shift)
    outcomes = list(harness.runner.steps(refresh, 1))
    while any(one.masks_left for one in outcomes[-1].results):
        rows = [one.row for one in outcomes[-1].results if one.masks_left]
        outcomes += harness.runner.steps([reuse[row] for row in rows], most)
    return harness.table.canvas.copy(), outcomes


@pytest.mark.parametrize("shift", [0, 1])
def test_a_part_of_the_queries_is_unmasked_as_in_steps_laid_out_anew(family, shift):
    harnesses = [Harness(family[1], static) for static in (False, True)]
    columns, table = columns_of(laid_out(harnesses[1], shift)[1]), harnesses[1].table
    assert harnesses[1].reuse.takes(columns, table)
    (plain, steps), (fixed, same) = (unmasked(harness, shift, 1) for harness in harnesses)
    assert np.array_equal(plain, fixed)
    assert len(steps) == len(same) > 3
    for one, other in zip(steps, same, strict=True):
        for mine, theirs in zip(one.results, other.results, strict=True):
            assert msgspec.structs.astuple(mine)[2:6] == msgspec.structs.astuple(theirs)[2:6]
            assert mine.confidence == pytest.approx(theirs.confidence, rel=1e-4)
    masks = [(fixed[row, : prompt + answer] == MASK).sum() for row, (prompt, *_, answer) in enumerate(SHAPES)]
    assert masks == [answer - end for *_, end, answer in SHAPES]  # those beside the parts are still there


@pytest.mark.parametrize("shift", [0, 1])
def test_graphs_unmask_a_part_of_the_queries_as_plain_steps_do(family, shift):
    with fake_gpus():
        graphs, eager = (CudaHarness(family[1], GPU, way) for way in (False, True))
        (found, _), (expected, _) = (unmasked(harness, shift, 4) for harness in (graphs, eager))
    assert np.array_equal(found, expected)
    assert (len(graphs.reuse.graphs) > 1, len(eager.reuse.graphs)) == (True, 0)


def test_rows_are_taken_if_all_queries_see_alike_and_masks_lie_among_them(random_model):
    harness = Harness(random_model, static=True)
    harness.table.editing_threshold[0] = np.inf

    def takes(**changes):
        span = Span(0, 0, 0, start=64, length=WIDTH, keys=96, block_start=70, block_end=80, quota=0, step=0)
        return harness.reuse.takes(columns_of([span._replace(**changes)]), harness.table)

    assert takes()
    assert takes(shift=1)
    assert takes(block_start=64, block_end=64 + WIDTH)
    assert not takes(block_end=70)  # what unmasks nothing, as a part of a prompt does
    assert not takes(block_start=63)
    assert not takes(block_end=64 + WIDTH + 1)
    assert not takes(start=63, length=WIDTH + 1)
    assert not takes(grain=1, origin=96)


@pytest.mark.parametrize("static", [False, True])
def test_a_small_canvas_is_refreshed_once_in_a_launch_that_goes_on_with_its_block(random_model, static):
    """All its tokens fit the fixed buffers, but what follows computes fewer of them."""
    harness, shapes = Harness(random_model, static), [(9, 8, 20), (4, 16, 16)]
    harness.fill(shapes)
    harness.table.threshold[:2] = 1.0
    harness.table.rule[:2] = 0
    refresh, reuse = (harness.spans(shapes, refresh=kind) for kind in (True, False))
    outcomes = list(harness.runner.steps(refresh, 5, [(span,) for span in reuse]))
    assert [[result.stage for result in outcome.results] for outcome in outcomes] == [[0, 0]] + [[1, 1]] * 4
    assert [outcome.last for outcome in outcomes] == [False] * 4 + [True]
