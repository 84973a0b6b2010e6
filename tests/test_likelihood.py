"""Likelihoods: beside a plain forward pass over each masked canvas, and over HTTP as lm-eval asks for them."""

import asyncio
import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from gemma_passes import FIXTURE
from hypothesis import given
from hypothesis import strategies as st
from reference_loops import Llada
from safetensors.torch import save_file

from dilaserve import BadRequest, Options, models
from dilaserve.engine.engine import KnownCanvas
from dilaserve.engine.likelihood import MonteCarlo, Pseudo, check, estimate, partitions, samples
from dilaserve.models.checkpoint import Checkpoint
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
    sampling = Pseudo(groups=groups, rounds=rounds, start=min(start, tokens - 1), seed=seed)
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
    found = await estimate(engine, TEXT, Pseudo(groups=100), Options(), "exact")
    assert (found.logprobs[0], found.best[0], found.standard_error) == (None, None, 0.0)
    for i, (logprob, best) in wanted.items():
        assert (found.logprobs[i], found.best[i].token_id) == (pytest.approx(logprob, abs=1e-4), best)
    assert found.total == pytest.approx(sum(logprob for logprob, _ in wanted.values()), abs=1e-3)
    assert len(engine.consumer.free) == engine.table.rows


@pytest.mark.asyncio(loop_scope="module")
async def test_groups_and_rounds_give_the_mean_of_plain_passes_and_its_standard_error(engine, random_model):
    model, sampling = Llada(random_model), Pseudo(groups=3, rounds=4, start=4, seed=5)
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
async def test_samples_give_the_weighted_sums_of_plain_passes_and_their_standard_error(engine, random_model):
    model, sampling = Llada(random_model), MonteCarlo(samples=6, start=4, seed=5)
    scorable = len(TEXT) - 4
    masked = [set(places.tolist()) for (places,) in samples(len(TEXT), sampling)]
    assert all(1 <= len(each) <= scorable and min(each) >= 4 for each in masked)
    passes = [plain(model, TEXT, each) for each in masked]
    values = [scorable / len(each) * sum(value for value, _ in each.values()) for each in passes]
    found = await estimate(engine, TEXT, sampling, Options(), "bound")
    assert found.total == pytest.approx(np.mean(values), abs=1e-3)
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(6), abs=1e-3)
    assert found.logprobs[:4] == (None,) * 4
    parts = [sum(scorable / len(each) * each[i][0] for each in passes if i in each) / 6 for i in range(4, len(TEXT))]
    assert found.logprobs[4:] == pytest.approx(parts, abs=1e-3)
    again = await estimate(engine, TEXT, sampling, Options(), "bound again")
    assert again.total == pytest.approx(found.total, abs=1e-3)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_mean_of_many_samples_is_the_bound_worked_out_over_all_masks(engine, random_model):
    text, scorable = TEXT[:4], 3
    model = Llada(random_model)
    by_count = [
        [sum(value for value, _ in plain(model, text, set(each)).values()) for each in combinations((1, 2, 3), count)]
        for count in (1, 2, 3)
    ]
    whole = np.mean([scorable / count * np.mean(sums) for count, sums in enumerate(by_count, 1)])
    found = await estimate(engine, text, MonteCarlo(samples=200, seed=1), Options(), "many")
    assert abs(found.total - whole) < 3 * found.standard_error
    assert 0 < found.standard_error < 0.1 * abs(whole)


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
        (Pseudo(groups=0), 5, FamilyTraits(), "likelihood"),
        (Pseudo(rounds=0), 5, FamilyTraits(), "likelihood"),
        (Pseudo(groups=1024, rounds=2), 5, FamilyTraits(), "likelihood"),
        (Pseudo(), 1, FamilyTraits(), "prompt"),
        (Pseudo(start=5), 5, FamilyTraits(), "prompt"),
        (Pseudo(), 65, FamilyTraits(), "prompt"),
        (Pseudo(start=-1), 5, FamilyTraits(), "prompt"),
        (MonteCarlo(samples=1), 5, FamilyTraits(), "likelihood"),
        (MonteCarlo(samples=1025), 5, FamilyTraits(), "likelihood"),
        (MonteCarlo(start=5), 5, FamilyTraits(), "prompt"),
    ],
)
def test_what_cannot_be_estimated_is_refused_with_the_reason(sampling, tokens, traits, param):
    with pytest.raises(BadRequest) as caught:
        check(sampling, tokens, traits, limit=64)
    assert caught.value.param == param


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "mask_token_id": 299,
    "eos_token_id": 298,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_shared_experts": 1}
BLOCKWISE = {  # the fields by which each describes itself
    "SDARForCausalLM": SIZES,
    "SDARMoeForCausalLM": SIZES | EXPERTS,
    "NemotronLabsDiffusionModel": SIZES,
    "Fast_dLLM_QwenForCausalLM": SIZES,
    "LLaDA2MoeModelLM": SIZES | EXPERTS | GROUPS | {"routed_scaling_factor": 1.0, "score_function": "sigmoid"},
    "DiffusionGemmaForBlockDiffusion": json.loads((FIXTURE / "config.json").read_text()),
}


@pytest.mark.parametrize("architecture", BLOCKWISE)
def test_families_that_see_no_later_blocks_are_refused_with_the_reason(architecture, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BLOCKWISE[architecture] | {"architectures": [architecture]}))
    save_file({"any": torch.zeros(1)}, tmp_path / "model.safetensors")
    traits = models.FAMILIES[architecture].describe(Checkpoint(tmp_path)).traits
    for sampling in (Pseudo(), MonteCarlo()):
        with pytest.raises(BadRequest, match="does not see what follows a block") as caught:
            check(sampling, 5, traits, limit=64)
        assert caught.value.param == "likelihood"


def test_all_families_with_exact_kv_are_among_those():
    exact = {name for name, family in models.FAMILIES.items() if family.caches == ("exact",)}
    assert exact == BLOCKWISE.keys()
    a2d = [family.blockwise for family in models.FAMILIES.values() if family.blockwise]
    assert a2d
    assert all(traits.exact for traits in a2d)
