"""A2D models with block-causal attention (bd3lm), against dllm's sampler written plainly over independent layers."""

import asyncio
import math
import random

import checkpoints
import family_checkpoints
import pytest
import torch
from block_models import Masked

from dilaserve import Config, ConfigError, Engine, Options

ARCHITECTURES = ["A2DQwen3LMHeadModel", "A2DQwen2LMHeadModel"]


def counted_back(length, begin, block):
    """Blocks are counted from the prompt's end to both sides, as left padding to whole blocks does."""
    number = (torch.arange(length) + -begin % block) // block
    return number[:, None] >= number[None, :]


def bd3lm(model, prompt, gen_length, block_length, steps=None, threshold=None):
    """The sampler with its linear schedule; or with a threshold in its place, as other block-causal samplers have."""
    x, begin = list(prompt), len(prompt)
    blocks = math.ceil(gen_length / block_length)
    each = math.ceil(steps / blocks) if steps else block_length
    for _ in range(blocks):
        start = len(x)
        x += [model.mask_id] * block_length
        visible = counted_back(len(x), begin, block_length)
        for j in range(each):
            left = [p for p in range(start, len(x)) if x[p] == model.mask_id]
            t, s = (torch.tensor((each - j - k) / each, dtype=torch.float32) for k in (0, 1))
            share = len(left) * (1 - ((1 - (1 - s)) / (1 - (1 - t))).item())
            count = min(len(left), int(torch.round(torch.tensor(share, dtype=torch.float64))))
            if not left or not (count or threshold):
                continue
            logits = model.logits(x, visible)
            order = sorted(left, key=lambda p: (-float(logits[p].softmax(-1).max()), p))
            if threshold:
                count = max(1, sum(float(logits[p].softmax(-1).max()) >= threshold for p in left))
            for p in order[:count]:
                x[p] = int(logits[p].argmax())
    return x[begin : begin + gen_length]


def some_requests(count, seed):
    rng, found = random.Random(seed), []
    for i in range(count):
        block = rng.choice((4, 8, 32))
        prompt = [rng.randrange(256) for _ in range(rng.choice((1, block - 1, block, block + 1, rng.randint(1, 100))))]
        blocks = rng.randint(1, 64 // block)
        rule = dict(steps=blocks * rng.choice((1, 3, block))) if i % 2 else dict(threshold=rng.choice((0.5, 0.9)))
        found.append(dict(prompt=prompt, gen_length=blocks * block, block_length=block, **rule))
    return found


async def answers(engine, requests):
    def options(asked):
        return Options(
            max_tokens=asked["gen_length"],
            block_length=asked["block_length"],
            num_denoising_steps=asked.get("steps"),
            confidence_threshold=asked.get("threshold"),
            ignore_eos=True,
        )

    return await asyncio.gather(*(engine.generate(asked["prompt"], options(asked)) for asked in requests))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_bd3lm_models_follow_their_own_sampler(architecture, tmp_path):
    directory = family_checkpoints.make(tmp_path / "qwen-bd3lm", architecture)
    model, requests = Masked(directory), some_requests(14, seed=3)
    model.mask_id = checkpoints.MASK
    expected = [bd3lm(model, **asked) for asked in requests]
    async with Engine(Config.of(model=str(directory), devices="cpu,cpu", plan="1x2")) as engine:
        together = [list(found.token_ids) for found in await answers(engine, requests)]
        alone = [list((await answers(engine, [asked]))[0].token_ids) for asked in requests[:4]]
    assert together == expected
    assert alone == expected[:4]


async def test_the_attention_of_a2d_can_be_stated(tmp_path):
    """The name decides where nothing is stated; other families have one kind."""
    directory = family_checkpoints.make(tmp_path / "qwen-mdlm", ARCHITECTURES[0])
    for attention, exact in (("auto", False), ("full", False), ("block", True)):
        async with Engine(Config.of(model=str(directory), devices="cpu", attention=attention)) as engine:
            assert engine.model.traits.exact == exact
    other = family_checkpoints.make(tmp_path / "a-bd3lm", "ILLaDAForCausalLM")
    with pytest.raises(ConfigError, match="all models of iLLaDA have attention of the kind 'full'"):
        async with Engine(Config.of(model=str(other), devices="cpu", attention="block")):
            pass


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(cache="dual", attention="block"), "--cache dual: this model has no cache 'dual'; it knows 'exact' alone"),
        (dict(cache="exact"), "--cache exact: this model has no cache 'exact'; it knows 'none', 'prefix' and 'dual'"),
        (dict(editing_threshold=0.5), "--editing-threshold 0.5: this model's family does not replace tokens"),
    ],
)
async def test_defaults_under_which_no_request_could_run_end_the_start(settings, words, tmp_path):
    directory = family_checkpoints.make(tmp_path / "qwen", ARCHITECTURES[0])
    with pytest.raises(ConfigError, match=words):
        async with Engine(Config.of(model=str(directory), devices="cpu", **settings)):
            pass
