"""Requests as arguments of the reference loops and of the engine, and their answers held beside each other."""

import asyncio
import random

import checkpoints
import torch
from reference_loops import decode

from dilaserve import Options

SETTINGS = [
    dict(cache=cache, **rule)
    for cache in ("none", "prefix", "dual")
    for rule in ({"threshold": 0.9}, {"threshold": 0.7}, {"threshold": 0.5}, {"steps": "half"}, {"factor": 1.0})
]


def asked(prompt, gen_length, block_length, cache, steps=None, threshold=None, factor=None):
    """The engine's options for the reference's arguments."""
    return prompt, Options(
        max_tokens=gen_length,
        block_length=block_length,
        cache=cache,
        num_denoising_steps=steps,
        confidence_threshold=threshold,
        factor=factor,
        ignore_eos=True,
    )


def some_requests(count: int, seed: int, longest: int = 256):
    """Requests of all lengths, caches, rules and block lengths, as arguments of `decode`."""
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        block_length = rng.choice((4, 8, 16, 32))
        gen_length = block_length * rng.randint(1, 64 // block_length)
        setting = dict(SETTINGS[i % len(SETTINGS)])
        if setting.get("steps"):
            setting["steps"] = max(gen_length // block_length, gen_length // 2)
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, min(90, longest - gen_length)))]
        requests.append(dict(prompt=prompt, gen_length=gen_length, block_length=block_length, **setting))
    return requests


def wishes(requests):
    return [asked(**request) for request in requests]


async def answers(engine, requests, stagger=False):
    async def one(i, request):
        for _ in range(i * 3 if stagger else 0):
            await asyncio.sleep(0)  # arrive a few loop turns later, at another step of the others
        return await engine.generate(*asked(**request))

    return await asyncio.gather(*(one(i, request) for i, request in enumerate(requests)))


def expect(model, requests, completions):
    for request, completion in zip(requests, completions, strict=True):
        tokens, forwards = decode(model, **request)
        assert list(completion.token_ids) == tokens, request
        assert completion.usage.steps == forwards, request


def teach_an_end(directory):
    """Give the end token a row of the head that often wins."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.transformer.ff_out.weight"]
    head[checkpoints.EOS] = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0)) * 9 * 32**-0.5
    save_file(tensors, directory / "model.safetensors")


def best_of(logits, mask_id, k=5):
    """(token, log probability) of the k best, the mask token left out; `logits` [vocab]."""
    values = logits.double().log_softmax(-1)
    order = [token for token in values.argsort(descending=True, stable=True).tolist() if token != mask_id]
    return [(token, float(values[token])) for token in order[:k]]


def same_tops(found, wanted):
    """Whether the lists of all positions name the same tokens, with the same values but for rounding."""
    tokens = [[one.token_id for one in top] for top in found] == [[token for token, _ in top] for top in wanted]
    values = torch.tensor([[one.logprob for one in top] for top in found])
    return tokens and torch.allclose(values, torch.tensor([[value for _, value in top] for top in wanted]), atol=2e-4)
