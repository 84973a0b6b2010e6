"""The most probable tokens of positions, by a step of its own and against a softmax in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import best_of
from runner_harness import Harness, shapes_of

from dilaserve.worker.alternatives import LEAST, likeliest
from dilaserve.worker.step_arrays import columns_of


@given(st.integers(1, 5), st.integers(0, 2**31))
def test_the_likeliest_tokens_are_those_of_a_softmax_in_float64(k, seed):
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(seed)) * 6
    tokens, values = likeliest(logits, 7, k)
    for row, ids, logs in zip(logits, tokens.tolist(), values.tolist(), strict=True):
        wanted = best_of(row, 7, k)
        assert ids == [token for token, _ in wanted]
        assert logs == pytest.approx([value for _, value in wanted], abs=1e-4)


def test_equal_logits_go_by_their_ids_and_broken_ones_still_give_numbers():
    tokens, _ = likeliest(torch.zeros(1, 6), 1, 3)
    assert tokens.tolist() == [[0, 2, 3]]
    broken = torch.full((2, 6), torch.nan)
    broken[1] = -torch.inf
    assert ((likeliest(broken, 1, 3)[1] >= LEAST) & (likeliest(broken, 1, 3)[1] <= 0)).all()


def test_a_row_that_asks_leaves_the_fixed_buffers_and_gets_the_same_tokens(random_model):
    harness = Harness(random_model, static=True)
    shapes = shapes_of(3)
    harness.fill(shapes)
    reuse = columns_of(harness.spans(shapes, refresh=False))
    assert harness.reuse.takes(reuse, harness.table)
    harness.table.top_logprobs[1] = 2
    assert not harness.reuse.takes(reuse, harness.table)
    (outcome,) = list(harness.runner.steps(harness.spans(shapes, refresh=True), 1))
    assert [bool(one.alternatives) for one in outcome.results] == [False, True, False]
    assert len(outcome.results[1].alternatives) == outcome.results[1].unmasked
    for place, ids, _ in outcome.results[1].alternatives:
        assert ids[0] == harness.table.canvas[1, place]
