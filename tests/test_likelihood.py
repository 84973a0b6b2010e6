"""Pseudo-likelihoods: beside a plain forward pass over each masked canvas, and over HTTP as lm-eval asks for them."""

import asyncio
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_loops import Llada

from dilaserve import BadRequest, Options
from dilaserve.engine.engine import KnownCanvas
from dilaserve.engine.likelihood import Sampling, check, estimate, partitions
from dilaserve.types import FamilyTraits

TEXT = [40, 7, 99, 181, 3, 3, 60, 250, 12, 77, 140]


def plain(model, tokens, group):
    """Log probability and best token of each position of the group, by one pass over the canvas that hides it."""
    logits = model.forward([model.mask_id if i in group else token for i, token in enumerate(tokens)])[0].double()
    values = logits.log_softmax(-1)
    logits[:, model.mask_id] = -torch.inf
    return {i: (float(values[i, tokens[i]]), int(logits[i].argmax())) for i in group}


@given(st.integers(2, 60), st.integers(1, 70), st.integers(1, 5), st.integers(0, 60), st.integers(-(2**63), 2**63 - 1))
def test_each_round_masks_each_scored_token_once(tokens, groups, rounds, start, seed):
    sampling = Sampling(groups=groups, rounds=rounds, start=min(start, tokens - 1), seed=seed)
    fitted = sampling.fitted(tokens)
    found = list(partitions(tokens, fitted))
    scored = list(range(max(1, sampling.start), tokens))
    assert len(found) == (1 if groups == 1 or groups >= len(scored) else rounds)
    for each in found:
        assert sorted(place for group in each for place in group.tolist()) == scored
        assert max(map(len, each)) - min(map(len, each)) <= 1
        assert len(each) == min(groups, len(scored))
    assert str(found) == str(list(partitions(tokens, fitted)))


@pytest.mark.asyncio(loop_scope="module")
async def test_tokens_that_are_masked_alone_have_the_probabilities_of_a_plain_pass(engine, random_model):
    model = Llada(random_model)
    wanted = {i: plain(model, TEXT, {i})[i] for i in range(1, len(TEXT))}
    found = await estimate(engine, TEXT, Sampling(groups=100), Options(), "exact")
    assert (found.logprobs[0], found.best[0], found.standard_error) == (None, None, 0.0)
    for i, (logprob, best) in wanted.items():
        assert (found.logprobs[i], found.best[i].token_id) == (pytest.approx(logprob, abs=1e-4), best)
    assert found.total == pytest.approx(sum(logprob for logprob, _ in wanted.values()), abs=1e-3)
    assert len(engine.consumer.free) == engine.table.rows


@pytest.mark.asyncio(loop_scope="module")
async def test_groups_and_rounds_give_the_mean_of_plain_passes_and_its_standard_error(engine, random_model):
    model, sampling = Llada(random_model), Sampling(groups=3, rounds=4, start=4, seed=5)
    rounds = [
        {place: value for group in each for place, (value, _) in plain(model, TEXT, set(group.tolist())).items()}
        for each in partitions(len(TEXT), sampling)
    ]
    totals = [sum(each.values()) for each in rounds]
    other = engine.generate([1, 2, 3], Options(max_tokens=24))  # shares steps with the canvases
    found, undisturbed = await asyncio.gather(estimate(engine, TEXT, sampling, Options(), "some"), other)
    assert undisturbed.token_ids == (await engine.generate([1, 2, 3], Options(max_tokens=24))).token_ids
    assert found.logprobs[:4] == (None,) * 4
    for i in range(4, len(TEXT)):
        assert found.logprobs[i] == pytest.approx(sum(each[i] for each in rounds) / 4, abs=1e-4)
    assert found.total == pytest.approx(sum(totals) / 4, abs=1e-3)
    assert found.standard_error == pytest.approx(np.std(totals, ddof=1) / math.sqrt(4), abs=1e-3)
    again = await estimate(engine, TEXT, sampling, Options(), "some")
    assert again.total == pytest.approx(found.total, abs=1e-3)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_canvas_of_known_tokens_gets_them_back_in_one_step(engine):
    canvas = KnownCanvas(np.array(TEXT, dtype=np.int32), np.array([2, 5, 9]))
    async with await engine._submit_known(canvas, Options(user="x", temperature=1.5, max_tokens=3)) as stream:
        (*chunks, last) = [chunk async for chunk in stream]
    assert [token for chunk in chunks for token in chunk.token_ids] == TEXT[2:]
    assert (last.usage.steps, last.finish_reason) == (1, "length")


@pytest.mark.parametrize(
    ("sampling", "tokens", "traits", "param"),
    [
        (Sampling(groups=0), 5, FamilyTraits(), "likelihood"),
        (Sampling(rounds=0), 5, FamilyTraits(), "likelihood"),
        (Sampling(groups=1024, rounds=2), 5, FamilyTraits(), "likelihood"),
        (Sampling(), 1, FamilyTraits(), "prompt"),
        (Sampling(start=5), 5, FamilyTraits(), "prompt"),
        (Sampling(), 65, FamilyTraits(), "prompt"),
        (Sampling(start=-1), 5, FamilyTraits(), "prompt"),
        (Sampling(), 5, FamilyTraits(attention="block"), "likelihood"),
    ],
)
def test_what_cannot_be_estimated_is_refused_with_the_reason(sampling, tokens, traits, param):
    with pytest.raises(BadRequest) as caught:
        check(sampling, tokens, traits, limit=64)
    assert caught.value.param == param
