"""The engine and its runner against runs of the authors' own decoders of Dream, SDAR and Nemotron."""

import asyncio
import itertools
import json

import block_checkpoints
import numpy as np
import pytest
import torch
from block_models import Masked
from block_parity import FIXTURES, arguments, cases, expected, options, served
from runner_harness import CPU, Harness, weights_on

from dilaserve import Config, Engine
from dilaserve.models.attention import grouped
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import Packed, PackedSpan
from dilaserve.models.spec import Shard
from dilaserve.models.transformer import Model
from dilaserve.types import PAGE, Decoding, Span


def answer_of(engine, case):
    loop, asked = arguments(case)
    return engine.generate(case["prompt"], options(loop, **asked))


@pytest.mark.parametrize("folder", ["dream", "sdar", "nemotron"])
async def test_the_authors_cases_one_by_one_and_all_at_once(folder, tmp_path):
    asked = [case for case in cases(folder) if "rope_override" not in case]
    async with Engine(Config.of(model=str(served(folder, tmp_path / folder)), devices="cpu")) as engine:
        alone = [await answer_of(engine, case) for case in asked]
        together = await asyncio.gather(*(answer_of(engine, case) for case in asked))
    assert [list(answer.token_ids) for answer in alone] == [case["expected"] for case in asked]
    assert [list(answer.token_ids) for answer in together] == [case["expected"] for case in asked]
    counted = [(answer.usage.steps, case["nfe"]) for answer, case in zip(alone, asked, strict=True) if "nfe" in case]
    assert all(steps == nfe for steps, nfe in counted)


async def test_the_authors_cases_with_other_rotations(tmp_path):
    turned = [case for case in cases("nemotron") if "rope_override" in case]
    groups = itertools.groupby(turned, key=lambda case: json.dumps(case["rope_override"]))

    async def check(override, asked, directory):
        model = served("nemotron", directory, json.loads(override))
        async with Engine(Config.of(model=str(model), devices="cpu")) as engine:
            for case in asked:
                assert list((await answer_of(engine, case)).token_ids) == case["expected"]

    await asyncio.gather(*(check(key, list(group), tmp_path / str(i)) for i, (key, group) in enumerate(groups)))


def logits_of(directory, ids, grain):
    """Logits of all tokens in one pass; with a grain of 1 each sees those before it, with 0 all."""
    spec, weights = weights_on(CPU, directory, torch.float32)
    pool = KVPool(spec, Shard(), torch.zeros(len(ids) * spec.kv_elements))
    at, groups = torch.arange(len(ids)), grouped([PackedSpan(0, len(ids), 0, len(ids), grain)], CPU)
    model = Model(spec, weights)
    return model.logits(model.hidden(Packed(torch.tensor(ids), at, at, groups, None, groups), pool))


RECORDED = [
    case
    for case in json.loads((FIXTURES / "nemotron" / "cases.json").read_text())
    if case["decoder"] == "nemotron_logits"
]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["attention"])
def test_the_authors_logits(case, tmp_path):
    directory = served("nemotron", tmp_path / "model", case.get("rope_override"))
    logits = logits_of(directory, case["prompt"], grain=0 if case["attention"] == "bidirectional" else 1)
    assert logits.argmax(-1).tolist() == case["argmax"]
    found = logits[case["rows"]][:, case["ids"]]
    torch.testing.assert_close(found, torch.tensor(case["logits"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_a_step_on_fixed_buffers_unmasks_what_the_reference_does(tmp_path, static):
    """As a GPU runs it: a block of SDAR by the dynamic rule, in a first step with the prompt and in others without."""
    directory, length = block_checkpoints.make(tmp_path, "SDARForCausalLM"), 16
    harness, prompts = Harness(directory, static), [[3] * 16, [4, 5] * 24, [6, 7, 8, 9] * 8]
    asked = dict(block_length=length, strategy="low_confidence_dynamic", denoising_steps=8, threshold=0.6)
    spans, kv_start = [], 0
    for row, prompt in enumerate(prompts):
        start, end = len(prompt), len(prompt) + length
        how = Decoding(rule="dynamic", confidence_threshold=0.6, traits=harness.spec.traits)
        harness.table.fill(row, np.array(prompt, dtype=np.int32), end, harness.spec.mask_id, how)
        generation = int(harness.table.generation[row])
        spans.append(Span(row, generation, kv_start, 0, end, end, start, end, 2, 0, length, start))
        kv_start += -(-end // PAGE) * PAGE
    list(harness.runner.steps(spans, 1))
    open_blocks = [span._replace(start=span.block_start, length=length, grain=0, origin=0) for span in spans]
    for _ in range(length // 2):
        list(harness.runner.steps(open_blocks, 1))
    reference = Masked(directory)
    for row, prompt in enumerate(prompts):
        tokens, _ = expected(reference, "sdar", prompt=prompt, gen_length=length, **asked)
        assert harness.table.canvas[row, len(prompt) : len(prompt) + length].tolist() == tokens
