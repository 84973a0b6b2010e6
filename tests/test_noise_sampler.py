"""Denoising of blocks that begin as noise: the fixture's recorded runs of transformers, and draws by counter."""

import math
from itertools import pairwise

import msgspec
import pytest
import torch
from gemma_passes import Passes, cases, doubled

from dilaserve.models.spec import NoiseSchedule
from dilaserve.worker.noise_sampler import (
    OpenBlock,
    advanced,
    begun,
    finished,
    fresh,
    judged,
    kept,
    renoised,
    summary,
    temperature,
)


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    return Passes(doubled(tmp_path_factory.mktemp("gemma") / "doubled"))


def schedule_of(case):
    return NoiseSchedule(
        steps=case["max_denoising_steps"],
        coldest=case["t_min"],
        hottest=case["t_max"],
        entropy_bound=case["entropy_bound"],
        stable_steps=case["stability_threshold"],
        mean_entropy=case["confidence_threshold"],
    )


def judge(logits, ranks=1, seed=0, step=1):
    positions = torch.arange(len(logits))
    cuts = [logits.shape[1] * rank // ranks for rank in range(ranks + 1)]
    parts = [summary(logits[:, first:end], first, seed, step, positions) for first, end in pairwise(cuts)]
    return judged(torch.stack(parts))


@pytest.mark.parametrize("case", cases("dg_accept"))
def test_what_stays_and_what_becomes_noise_is_what_transformers_kept(passes, case):
    logits = passes.denoise(case["prompt"], 0, case["canvas"])
    left = case["step"] / case["max_steps"]
    found = judge(logits / (case["t_min"] + (case["t_max"] - case["t_min"]) * left), ranks=2)
    found = found._replace(drawn=torch.tensor(case["denoiser_sample"]))
    assert kept(found.entropy, case["entropy_bound"]).int().tolist() == case["accepted"]
    assert renoised(found, torch.tensor(case["fresh"]), case["entropy_bound"]).tolist() == case["next_canvas"]


def answer(passes, case):
    """The case's answer with its recorded draws, and the passes that it took."""
    draws, schedule = iter(case["draws"]), schedule_of(case)
    tokens, forwards, cached = list(case["prompt"]), 0, 0
    for _ in range(math.ceil(case["max_new_tokens"] / 16)):
        block = OpenBlock(1, torch.tensor(next(draws)["values"]), None)
        while True:
            logits = passes.denoise(tokens, cached, block.ids.tolist(), block.expected)
            logits = logits / temperature(schedule, block.step, schedule.steps)
            forwards, cached = forwards + 1, len(tokens)
            found = judge(logits)._replace(drawn=torch.tensor(next(draws)["values"]))
            noise = torch.tensor(next(draws)["values"])
            if finished(block, found, schedule, schedule.steps):
                break
            block = advanced(block, found, noise, passes.expected(logits), schedule)
        tokens += found.best.tolist()
        ends = [place for place, id in enumerate(found.best.tolist()) if id in case["eos_token_ids"]]
        if ends:
            tokens = tokens[: len(tokens) - 16 + ends[0] + 1] + [case["pad_token_id"]] * (15 - ends[0])
            break
    return tokens[len(case["prompt"]) :], forwards


@pytest.mark.parametrize("case", cases("dg_generate"))
def test_whole_answers_are_those_of_transformers_with_the_same_draws(passes, case):
    assert answer(passes, case) == (case["expected"], case["forwards"])


def test_ranks_find_together_what_one_finds_alone():
    logits = torch.randn(16, 100, generator=torch.Generator().manual_seed(3)) * 4
    alone, chances = judge(logits), logits.double().softmax(-1)
    entropy = -(chances * chances.log()).sum(1)
    assert alone.best.tolist() == logits.argmax(1).tolist()
    torch.testing.assert_close(alone.entropy, entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone.probability, chances.max(1).values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.normaliser, logits.double().logsumexp(1), rtol=1e-6, atol=1e-5)
    for ranks in (2, 4, 7):
        for one, other in zip(alone, judge(logits, ranks), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_draws_follow_the_distribution_and_depend_on_seed_step_and_position_alone():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(20_000, 1)
    found = judge(logits, seed=7, step=3)
    shares = found.drawn.bincount(minlength=3) / len(logits)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.02)
    some = torch.tensor([5, 900])
    again = judged(summary(logits[some], 0, 7, 3, some)[None])
    assert again.drawn.tolist() == found.drawn[some].tolist()
    assert judge(logits, seed=8, step=3).drawn.tolist() != found.drawn.tolist()


def test_noise_is_even_over_the_vocabulary_and_differs_by_seed_and_step():
    positions = torch.arange(40_000)
    ids = fresh(1, 0, positions, 10)
    assert (ids.bincount(minlength=10) / len(ids) - 0.1).abs().max() < 0.01
    assert begun(1, positions, 10).ids.tolist() == ids.tolist()
    for other in (fresh(2, 0, positions, 10), fresh(1, 1, positions, 10)):
        assert float((other == ids).float().mean()) < 0.12


def test_a_block_ends_with_its_last_step_however_unsure_it_is():
    schedule = msgspec.structs.replace(schedule_of(cases("dg_generate")[0]), mean_entropy=0.0)
    found = judge(torch.zeros(4, 10))
    assert not finished(OpenBlock(2, found.best, None, (found.best,)), found, schedule, 3)
    assert finished(OpenBlock(3, found.best, None), found, schedule, 3)
