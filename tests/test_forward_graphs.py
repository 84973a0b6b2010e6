"""Forward passes on fixed, padded buffers, on the CPU and as graphs on a fake GPU, against steps laid out anew."""

import numpy as np
import pytest
import torch
from cuda_harness import GPU, fresh_device_caches  # noqa: F401 - a fixture
from fake_cuda import fake_gpus
from runner_harness import CPU, Harness, shapes_of

from dilaserve.worker import warm_up
from dilaserve.worker.forward_graphs import SPANS, STRIDE, TOKENS, ForwardGraphs
from dilaserve.worker.step_arrays import columns_of


def runner_of(directory, device=CPU, dtype=torch.float32, *, forward=True, eager=False):
    harness = Harness(directory, False, device, dtype, rows=SPANS + 1)
    if forward:
        harness.runner.forward = ForwardGraphs(harness.spec, harness.model, harness.pool, TOKENS, eager)
    return harness


def denoised(harness, shapes, steps=5):
    """Canvases after steps in which every second row refreshes, the others reuse what the first step wrote."""
    harness.fill(shapes)
    refresh, reuse = harness.spans(shapes, refresh=True), harness.spans(shapes, refresh=False)
    list(harness.runner.steps(refresh, 1))
    for step in range(steps):
        mixed = [
            one if (row + step) % 2 else other for row, (one, other) in enumerate(zip(refresh, reuse, strict=True))
        ]
        list(harness.runner.steps(mixed, 1))
    return harness.table.canvas.copy()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_padded_forward_passes_give_the_tokens_of_steps_laid_out_anew(random_model, count):
    shapes = shapes_of(count)
    plain, padded = (denoised(runner_of(random_model, forward=way), shapes) for way in (False, True))
    assert np.array_equal(plain, padded)


def test_padding_tokens_write_to_the_spare_page_only(random_model):
    harness = runner_of(random_model)
    shapes = [(20, 16, 37)]
    for keys in (*harness.pool.keys, *harness.pool.values):
        keys.fill_(7.0)
    denoised(harness, shapes, steps=2)
    canvas = 20 + 37
    assert all(
        bool((keys[canvas : harness.pool.spare] == 7.0).all()) for keys in (*harness.pool.keys, *harness.pool.values)
    )


def test_graphs_give_the_tokens_of_the_same_function_without_graphs(random_model):
    shapes = shapes_of(5)
    with fake_gpus():
        graphs, eager = (runner_of(random_model, GPU, torch.bfloat16, eager=way) for way in (False, True))
        assert np.array_equal(denoised(graphs, shapes), denoised(eager, shapes))
        assert len(graphs.runner.forward.graphs) >= 2
        assert not eager.runner.forward.graphs


def test_only_small_steps_of_few_rows_are_replayed(random_model):
    harness = runner_of(random_model)
    forward = harness.runner.forward

    def takes(shapes):
        return forward.takes(columns_of(harness.spans(shapes, refresh=True)))

    assert takes([(TOKENS // 2 - 32, 32, 32)] * 2)
    assert not takes([(TOKENS // 2 - 32, 32, 32)] * 2 + [(1, 1, 1)])
    assert takes([(4, 4, 4)] * SPANS)
    assert not takes([(4, 4, 4)] * (SPANS + 1))


def test_spans_with_a_grain_are_replayed_while_their_runs_are_few(random_model):
    harness = runner_of(random_model)

    def takes(grain, origin):
        span = harness.spans([(origin, 8, 8)], refresh=True)[0]
        return harness.runner.forward.takes(columns_of([span._replace(grain=grain, origin=origin)]))

    assert takes(grain=4, origin=4 * (SPANS - 1))
    assert not takes(grain=4, origin=4 * SPANS)
    assert takes(grain=1, origin=SPANS - 1)


def test_a_server_whose_largest_step_is_small_has_graphs_up_to_that_size(random_model):
    harness = runner_of(random_model)
    assert ForwardGraphs(harness.spec, harness.model, harness.pool, 200).most == 200 // STRIDE * STRIDE
    assert ForwardGraphs(harness.spec, harness.model, harness.pool, 8).most == STRIDE


def test_the_largest_graph_is_rehearsed_so_that_its_memory_is_known(random_model, monkeypatch):
    seen = []
    monkeypatch.setattr(ForwardGraphs, "forward", lambda forward, size: seen.append(size))
    with fake_gpus():
        harness = Harness(random_model, False, GPU, torch.bfloat16)
        warm_up.rehearsed(harness.spec, harness.model, 2048, 8)
    assert seen == [TOKENS]
