"""DiffusionGemma served: the answers of transformers' generate with the same draws, whatever happens on the way."""

import asyncio
import json
import os
import random
import signal
from types import SimpleNamespace

import checkpoints
import numpy as np
import pytest
import torch
from gemma_passes import doubled, reference
from http_requests import client_of, post
from worker_faults import wait_for_plan

from dilaserve import Config, Engine, Options, Plan
from dilaserve.transport.request_table import RequestTable
from dilaserve.worker.noise_sampler import fresh
from dilaserve.worker.open_blocks import OpenBlocks
from dilaserve.worker.sampler import gumbel
from dilaserve.worker.tp_group import Alone

pytestmark = pytest.mark.asyncio(loop_scope="module")
BLOCK, STEPS = 16, 6
GENERATION = dict(
    max_denoising_steps=STEPS,
    sampler_config=dict(_cls_name="EntropyBoundSamplerConfig", entropy_bound=2.0),
    t_min=0.4,
    t_max=0.8,
    stability_threshold=1,
    confidence_threshold=2.0,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = doubled(tmp_path_factory.mktemp("gemma") / "doubled")
    checkpoints.write_tokenizer(directory)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    return directory


@pytest.fixture(scope="module")
def original():
    return reference()


class Draws:
    """torch's draws in transformers' order, replaced by those of our counters."""

    def __init__(self, seed, prompt):
        self.seed, self.end, self.step = seed, prompt, STEPS

    @property
    def positions(self):
        return torch.arange(self.end - BLOCK, self.end)

    def beginning(self, prepare):
        """`prepare` as transformers calls it before each block."""

        def prepared(*args, **kwargs):
            self.end, self.step = self.end + BLOCK, 0
            return prepare(*args, **kwargs)

        return prepared

    def randint(self, *_, **__):
        return fresh(self.seed, self.step, self.positions, 384)[None]

    def multinomial(self, chances, num_samples):
        self.step += 1
        alike = torch.full_like(self.positions, self.seed), torch.full_like(self.positions, self.step)
        return (chances.log() + gumbel(*alike, self.positions, 384)).argmax(1, keepdim=True)


def expected(original, prompt, seed, max_tokens, monkeypatch, steps=STEPS):
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as module

    draws = Draws(seed, len(prompt))
    settings = GENERATION | dict(
        max_denoising_steps=steps,
        sampler_config=module.EntropyBoundSamplerConfig(entropy_bound=2.0),
        max_new_tokens=-(-max_tokens // BLOCK) * BLOCK,
    )
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(torch, "randint", draws.randint)
        patch.setattr(torch, "multinomial", draws.multinomial)
        patch.setattr(original, "_prepare_denoiser_inputs", draws.beginning(original._prepare_denoiser_inputs))
        config = module.DiffusionGemmaGenerationConfig(**settings, disable_compile=True)
        out = original.generate(torch.tensor([prompt]), generation_config=config)
    return out.sequences[0, len(prompt) :].tolist()[:max_tokens]


def requests(count, seed):
    """Prompts of which many begin alike, and their options."""
    rng = random.Random(seed)
    stem = [rng.randrange(2, 256) for _ in range(70)]
    found = []
    for i in range(count):
        prompt = (stem if i % 2 else []) + [rng.randrange(2, 256) for _ in range(rng.randint(1, 30))]
        found.append((prompt, rng.randrange(2**40), rng.choice((5, 16, 33))))
    return found


@pytest.fixture(scope="module")
def asked(original):
    monkeypatch = pytest.MonkeyPatch()
    found = requests(6, seed=1)
    return [(one, expected(original, *one, monkeypatch)) for one in found]


def generate(engine, prompt, seed, max_tokens):
    return engine.generate(prompt, Options(max_tokens=max_tokens, seed=seed, ignore_eos=True))


async def check(engine, asked, done=None):
    found = await (done or asyncio.gather(*(generate(engine, *one) for one, _ in asked)))
    assert [list(one.token_ids) for one in found] == [answer for _, answer in asked]
    return found


async def test_answers_are_those_of_transformers_alone_and_in_a_crowd(directory, asked):
    settings = dict(model=str(directory), devices="cpu", max_num_batched_tokens=40)
    async with Engine(Config.of(**settings)) as engine:
        for one, answer in asked[:2]:
            assert list((await generate(engine, *one)).token_ids) == answer
        found = await check(engine, asked)
        assert any(one.usage.cached_prompt_tokens for one in found)


async def test_two_ranks_changes_of_plan_and_killed_workers_change_nothing(directory, asked):
    settings = dict(model=str(directory), devices="cpu,cpu", plan="1x2", max_num_batched_tokens=40)
    async with Engine(Config.of(**settings)) as engine:
        await check(engine, asked)
        load = asyncio.gather(*(generate(engine, *one) for one, _ in asked))
        await asyncio.sleep(0.05)
        await engine.replan(Plan(((0,), (1,))))
        await asyncio.sleep(0.05)
        os.kill(engine.executor.workers[0].process.pid, signal.SIGKILL)
        await check(engine, asked, load)
        await wait_for_plan(engine)


async def test_options_without_a_meaning_are_refused_with_the_reason_over_http_too(directory):
    async with client_of(directory) as client:
        body = {"model": directory.name, "prompt": "abc", "max_tokens": 20, "seed": 3}
        status, answer, _ = await post(client, "/v1/completions", body)
        assert (status, answer["usage"]["completion_tokens"] <= 20) == (200, True)
        for name, value, words in (
            ("temperature", 0.7, "temperatures of its own"),
            ("top_p", 0.9, "temperatures of its own"),
            ("confidence_threshold", 0.9, "an entropy bound takes its place"),
            ("decode", "steps", "it knows entropy-bound"),
            ("block_length", 8, "blocks of 16 tokens"),
            ("min_tokens", 3, "wherever it ends"),
            ("logprobs", 2, "logprobs has no meaning"),
            ("max_tokens", 2040, "whole blocks of 16"),
        ):
            status, answer, _ = await post(client, "/v1/completions", body | {name: value})
            assert (status, words in answer["error"]["message"]) == (400, True), (name, answer)


async def test_blocks_of_rows_that_have_left_do_not_pile_up():
    """Those of the rows that step stay, whichever came first."""
    spec = SimpleNamespace(noise=object(), vocab_size=50, hidden=4)
    model = SimpleNamespace(weights=SimpleNamespace(norm=torch.zeros(4)))
    blocks = OpenBlocks(spec, model, RequestTable(9, 64), Alone(), torch.device("cpu"), 3)
    for row in range(1, 9):
        both = np.array([0, row])
        columns = SimpleNamespace(row=both, generation=both, block_start=np.array([0, 0]), block_end=np.array([16, 16]))
        ids, told = blocks.begin(columns)
        assert (ids.shape, told.shape) == ((32,), (32, 4))
        assert {0, row} <= blocks.held.keys()
        assert len(blocks.held) <= 3
