"""Families beside LLaDA: each against transformers' layers and against the reference loops, token for token."""

import asyncio
import json
import math
import random
import re
from pathlib import Path

import family_checkpoints
import pytest
import torch
from family_checkpoints import LlamaLike
from http_requests import CHAT, EIGHT, client_of, post
from parity import answers, expect, some_requests
from safetensors.torch import load_file, save_file

import dilaserve
from dilaserve import Config, ConfigError, Engine, Options, Plan, models
from dilaserve.errors import CheckpointError
from dilaserve.models.checkpoint import Checkpoint

ARCHITECTURES = list(family_checkpoints.FAMILIES)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request, tmp_path_factory):
    return request.param, family_checkpoints.make(tmp_path_factory.mktemp("family") / request.param, request.param)


def by_rules_of(architecture, requests):
    """The requests that LLaDA's and Fast-dLLM's loops answer for this family: A2D's schedule of steps is another."""
    return [one for one in requests if not (architecture.startswith("A2D") and one.get("steps"))]


def test_the_reference_model_has_the_logits_of_transformers(family):
    architecture, directory = family
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = family_checkpoints.backbone_logits(directory, architecture, ids)
    torch.testing.assert_close(LlamaLike(directory).forward(ids)[0], expected, rtol=1e-4, atol=1e-4)


async def test_mixed_requests_get_the_reference_answers_alone_and_together(family):
    architecture, directory = family
    requests = by_rules_of(architecture, some_requests(15, seed=1))
    async with Engine(Config.of(model=str(directory), devices="cpu")) as engine:
        alone = await answers(engine, requests[:6])
        together = await answers(engine, requests, stagger=True)
    reference = LlamaLike(directory)
    expect(reference, requests[:6], alone)
    expect(reference, requests, together)


async def test_two_devices_as_one_instance_give_the_reference_answers_after_a_change_of_plan_too(family):
    architecture, directory = family
    requests = by_rules_of(architecture, some_requests(15, seed=2))
    async with Engine(Config.of(model=str(directory), devices="cpu,cpu", plan="1x2")) as engine:
        sharded = await answers(engine, requests)
        await engine.replan(Plan(((0,), (1,))))
        apart = await answers(engine, requests)
    reference = LlamaLike(directory)
    expect(reference, requests, sharded)
    expect(reference, requests, apart)


async def test_each_family_answers_over_http(family):
    async with client_of(family[1]) as client:
        status, answer, _ = await post(client, CHAT, EIGHT)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 8)


def mdlm_sampler(model, prompt, gen_length, block_length, steps):
    """dllm's MDLM sampler written plainly: the whole canvas at each step, the share of a linear schedule unmasked."""
    x, total = list(prompt) + [model.mask_id] * gen_length, len(prompt) + gen_length
    each = math.ceil(steps / math.ceil(gen_length / block_length))
    for start in range(len(prompt), total, block_length):
        block = range(start, min(start + block_length, total))
        for j in range(each):
            left = [p for p in block if x[p] == model.mask_id]
            t, s = (torch.tensor((each - j - k) / each, dtype=torch.float32) for k in (0, 1))
            ratio = ((1 - (1 - s)) / (1 - (1 - t))).item()
            count = min(len(left), int(torch.round(torch.tensor(len(left) * (1 - ratio), dtype=torch.float64))))
            if not count:
                continue
            logits, _ = model.forward(x)
            chances = logits.softmax(-1)
            best = sorted(left, key=lambda p: (-float(chances[p].max()), p))[:count]
            for p in best:
                x[p] = int(logits[p].argmax())
    return x[len(prompt) :]


async def test_the_steps_rule_of_a2d_follows_its_own_sampler(tmp_path):
    directory = family_checkpoints.make(tmp_path, "A2DQwen3LMHeadModel")
    reference, rng = LlamaLike(directory), random.Random(5)
    cases = [
        dict(gen_length=32, block_length=32, steps=5),
        dict(gen_length=64, block_length=32, steps=24),
        dict(gen_length=48, block_length=16, steps=10),
        dict(gen_length=16, block_length=16, steps=40),
        dict(gen_length=24, block_length=8, steps=10),
        dict(gen_length=24, block_length=24, steps=24),
    ]
    cases = [case | dict(prompt=[rng.randrange(256) for _ in range(rng.randint(1, 60))]) for case in cases]

    def options(case):
        return Options(
            max_tokens=case["gen_length"],
            block_length=case["block_length"],
            num_denoising_steps=case["steps"],
            cache="none",
            ignore_eos=True,
        )

    async with Engine(Config.of(model=str(directory), devices="cpu")) as engine:
        alone = [await engine.generate(case["prompt"], options(case)) for case in cases]
        together = await asyncio.gather(*(engine.generate(case["prompt"], options(case)) for case in cases))
    expected = [mdlm_sampler(reference, **case) for case in cases]
    assert [list(answer.token_ids) for answer in alone] == expected
    assert [list(answer.token_ids) for answer in together] == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_missing_and_misshapen_tensors_are_named(architecture, tmp_path):
    directory = family_checkpoints.make(tmp_path, architecture)
    file = directory / "model.safetensors"
    whole = load_file(file)
    for kind in (("bias", "q_norm.weight", "o_proj.weight"), ("mlp.gate.weight",), ("experts.7.down_proj.weight",)):
        for name in [name for name in sorted(whole) if name.endswith(kind)][:1]:
            save_file({one: tensor for one, tensor in whole.items() if one != name}, file)
            with pytest.raises(CheckpointError, match=f"lacks the tensor {re.escape(name)}"):
                models.describe(Checkpoint(directory))
            save_file(whole | {name: whole[name][:-1].clone()}, file)
            with pytest.raises(CheckpointError, match=f"holds the tensor {re.escape(name)} of shape"):
                models.describe(Checkpoint(directory))


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("ILLaDAForCausalLM", {"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05 is not supported"),
        ("ILLaDAForCausalLM", {"attention_bias": True}, "attention_bias True is not supported"),
        ("ILLaDAForCausalLM", {"mlp_bias": True}, "mlp_bias True is not supported"),
        ("ILLaDAForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .* is not supported"),
        ("A2DQwen3LMHeadModel", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("A2DQwen2LMHeadModel", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ("A2DQwen3LMHeadModel", {"head_dim": 7}, "head_dim 7 do not go together"),
        ("A2DLlamaLMHeadModel", {"mask_token_id": 272}, "the mask token 272 does not lie between 0 and 271"),
        ("A2DLlamaLMHeadModel", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("LLaDAMoEModelLM", {"num_experts": 0}, "num_experts 0 does not lie between 1 and 1024"),
        ("LLaDAMoEModelLM", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 does not lie between 1 and 8"),
        ("LLaDAMoEModelLM", {"moe_layer_freq": [1]}, "moe_layer_freq must be a list of a 0 or 1 for each layer"),
        ("LLaDAMoEModelLM", {"moe_layer_freq": [2, 1]}, "moe_layer_freq must be a list of a 0 or 1 for each layer"),
        ("LLaDAMoEModelLM", {"moe_router_score_function": "sigmoid"}, "'sigmoid' is not supported, only 'softmax'"),
        ("LLaDAMoEModelLM", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported, only None"),
        ("LLaDAMoEModelLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ("LLaDAMoEModelLM", {"expert_intermediate_size": 0}, "expert_intermediate_size 0 does not lie"),
    ],
)
def test_a_configuration_that_would_change_the_arithmetic_is_named(architecture, fields, words, tmp_path):
    directory = family_checkpoints.make(tmp_path, architecture)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ConfigError, match=words):
        models.describe(Checkpoint(directory))


def test_a_tokenizer_without_the_mask_token_is_named(tmp_path):
    directory = family_checkpoints.make(tmp_path, "A2DQwen3LMHeadModel")
    file = directory / "tokenizer.json"
    file.write_text(file.read_text().replace("<|mask|>", "<|other|>"))
    with pytest.raises(CheckpointError, match=r"no token <\|mask\|> was added to the tokenizer"):
        models.describe(Checkpoint(directory))


HELP = ("command_flags.py", "help_text.py", "config.py")  # help texts, which name models as examples


def test_nothing_outside_the_models_knows_a_family():
    """But for help texts and the simulator's profiles, which name models that people can download."""
    root, named = (
        Path(dilaserve.__file__).parent,
        re.compile(r"\b(llada2?|illada|a2d|qwen|olmoe|sdar)\b|models\.(llada|llada_moe|llada2|illada|a2d|sdar)", re.I),
    )
    for file in sorted(root.rglob("*.py")):
        if file.parent.name in ("models", "sim") or "problems" in file.parts or file.name in HELP:
            continue
        code = re.sub(r'""".*?"""|#.*', "", file.read_text(), flags=re.DOTALL)
        assert not named.search(code), file
