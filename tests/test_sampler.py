"""The unmasking rules and row statistics against plain Python and float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loops import factor_count as reference_factor_count
from sampling_settings import sampling

from dilaserve.transport.request_table import RULES
from dilaserve.worker.candidates import Candidates
from dilaserve.worker.sampler import Rules, best_candidates, decided, factor_count, gumbel, narrowed

MASK = 7


def rules(rows, rule="threshold", threshold=0.9, factor=1.0, quota=1):
    return Rules(
        torch.full((rows,), RULES[rule]),
        torch.full((rows,), threshold, dtype=torch.float64),
        torch.full((rows,), factor, dtype=torch.float64),
        torch.full((rows,), quota),
    )


def guessed(confidences):
    p = torch.tensor(confidences, dtype=torch.float64)
    return Candidates(torch.zeros(len(confidences), dtype=torch.int64), ((1 - p) / p).float())


def accepted(found, masked, sampled):
    """Which masked positions are unmasked, of a guess that lists them row by row."""
    where = masked.flatten().nonzero().squeeze(1)
    return decided(found, where, masked.shape, sampled)[:, 0] >= 0


def test_statistics_agree_with_a_float64_softmax():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 6
    found = best_candidates(logits.clone(), MASK)
    probability = logits.double().softmax(-1)
    free = probability.clone()
    free[:, MASK] = -1
    assert torch.equal(found.token, free.argmax(1))
    assert torch.allclose(found.confidence, probability.gather(1, found.token[:, None]).squeeze(1), rtol=1e-5)


def test_the_first_of_equal_logits_wins_and_the_mask_token_never_does():
    logits = torch.zeros(1, 10)
    logits[0, [3, 5]] = 2.0
    logits[0, MASK] = 9.0
    assert best_candidates(logits, MASK).token.tolist() == [3]


def test_confidences_that_round_to_one_are_still_ordered():
    logits = torch.zeros(3, 10)
    logits[:, 0] = torch.tensor([40.0, 60.0, 50.0])
    found = best_candidates(logits, MASK)
    assert found.confidence.float().tolist() == [1.0, 1.0, 1.0]
    assert found.odds.argsort().tolist() == [1, 2, 0]


@pytest.mark.parametrize("top_p", [1.0, 0.5, 1e-30])
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-45])
def test_a_very_low_temperature_draws_the_best_token(temperature, top_p):
    logits = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)) * 6
    logits[10:] -= 100.0  # all below 0
    numbers = torch.arange(20)
    sampled = sampling(20, temperature=temperature, top_p=top_p, seed=numbers, position=numbers)
    assert torch.equal(
        best_candidates(logits.clone(), MASK, sampled).token, best_candidates(logits.clone(), MASK).token
    )


def test_logits_that_overflow_or_are_broken_still_unmask_one_real_position():
    logits = torch.zeros(4, 10)
    logits[:2, MASK] = 500.0
    logits[2:] = torch.nan
    masked = torch.tensor([[False, False, True, True], [False, True, False, True]])
    taken = accepted(best_candidates(logits, MASK), masked, rules(2))
    assert taken.sum(1).tolist() == [1, 1]
    assert (taken & ~masked).sum() == 0


def test_rows_are_unmasked_by_their_own_rules():
    masked = torch.tensor([[True, True, True, False], [True, False, True, True], [True, True, True, True]])
    found = guessed([0.95, 0.5, 0.92, 0.5, 0.6, 0.4, 0.1, 0.9, 0.8, 0.7])
    sampled = Rules(
        torch.tensor([RULES["threshold"], RULES["threshold"], RULES["steps"]]),
        torch.tensor([0.9, 0.9, 0.9], dtype=torch.float64),
        torch.ones(3, dtype=torch.float64),
        torch.tensor([0, 0, 3]),
    )
    assert accepted(found, masked, sampled).tolist() == [
        [True, False, True, False],
        [False, False, True, False],
        [False, True, True, True],
    ]


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.sampled_from([None, 0.2, 0.5, 0.7, 0.9, 0.9000001, 1.0]), min_size=6, max_size=6), min_size=1),
    st.sampled_from([0.0, 0.5, 0.7, 0.9, 1.0]),
)
def test_rows_that_all_go_by_the_threshold_need_not_say_so(confidences, threshold):
    """None stands for a position without a mask."""
    masked = torch.tensor([[one is not None for one in row] for row in confidences])
    found = guessed([one for row in confidences for one in row if one is not None])
    named = rules(len(confidences), threshold=threshold)
    assert torch.equal(accepted(found, masked, named._replace(rule=None)), accepted(found, masked, named))


def test_a_row_without_masks_gets_nothing():
    masked = torch.tensor([[False, False], [True, False]])
    assert accepted(guessed([0.3]), masked, rules(2)).tolist() == [[False, False], [True, False]]
    assert not accepted(guessed([0.3]), masked, rules(2)._replace(rule=None))[0].any()
    assert not accepted(guessed([]), torch.zeros(2, 2, dtype=torch.bool), rules(2)).any()


@settings(max_examples=200)
@given(
    st.lists(st.floats(0.001, 0.999), min_size=1, max_size=12), st.sampled_from(list(RULES)), st.floats(0, 1), st.data()
)
def test_at_least_one_and_always_the_most_confident(confidences, rule, threshold, data):
    pads = data.draw(st.integers(0, 4))
    masked = torch.tensor([[True] * len(confidences) + [False] * pads])
    found = guessed(confidences)
    taken = accepted(
        found, masked, rules(1, rule, threshold, factor=1 + threshold, quota=data.draw(st.integers(0, 20)))
    )
    taken = taken[0, : len(confidences)]
    assert taken.any()
    left = found.odds[~taken]
    assert not len(left) or found.odds[taken].max() <= left.min()
    if rule == "threshold":
        assert int(taken.sum()) == max(1, int((found.confidence >= threshold).sum()))


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=10), st.floats(0.1, 4.0))
def test_the_factor_rule_counts_like_the_published_loop(confidences, factor):
    ordered = sorted(confidences, reverse=True)
    padded = torch.tensor([[*ordered, 0.0, 0.0]], dtype=torch.float64)
    count = factor_count(padded, torch.tensor([len(ordered)]), torch.tensor([factor], dtype=torch.float64))
    assert count.item() == reference_factor_count(ordered, factor)


def test_noise_is_a_function_of_seed_step_and_position():
    one = torch.tensor([1]), torch.tensor([2]), torch.tensor([3])
    noise = gumbel(*one, 1000)
    assert torch.equal(noise, gumbel(*one, 1000))
    for changed in (0, 1, 2):
        other = [value + (i == changed) for i, value in enumerate(one)]
        assert abs(torch.corrcoef(torch.cat([noise, gumbel(*other, 1000)]))[0, 1]) < 0.15
    many = gumbel(torch.arange(400), torch.zeros(400, dtype=torch.int64), torch.zeros(400, dtype=torch.int64), 500)
    assert many.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert many.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)


def test_sampling_follows_the_temperature_and_leaves_cold_rows_alone():
    count = 4000
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(count, 1)
    heat = torch.full((count,), 2.0)
    heat[::2] = 0.0
    tokens = best_candidates(logits.clone(), 3, sampling(count, temperature=heat, seed=torch.arange(count))).token
    assert (tokens[::2] == 2).all()
    shares = torch.bincount(tokens[1::2], minlength=3) / (count / 2)
    assert torch.allclose(shares[:3], torch.tensor([0.0, 0.5, 1.0]).softmax(0), atol=0.04)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(3, 1)
    kept = narrowed(logits - logits[0, 0], sampling(3, top_p=torch.tensor([0.5, 0.6, 1.0]))) > -torch.inf
    assert kept.tolist() == [[True, False, False, False], [True, True, False, False], [True] * 4]


def kept_in_plain_python(logits, top_p, top_k, min_p):
    """Ids in the order in which vLLM narrows: `min_p`, `top_k`, `top_p` of what is left."""
    best = max(logits)
    weights = {i: math.exp(logit - best) for i, logit in enumerate(logits) if math.exp(logit - best) >= min_p}
    order = sorted(weights, key=lambda i: (-logits[i], i))[: top_k or None]
    total, before, kept = sum(weights[i] for i in order), 0.0, set()
    for i in order:
        if before < top_p:
            kept.add(i)
        before += weights[i] / total
    return kept


@settings(max_examples=150)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),  # eighths, so that no bound is met by rounding
    st.sampled_from([0.11, 0.37, 0.73, 0.97, 1.0]),
    st.integers(0, 13),
    st.sampled_from([0.0, 0.03, 0.21, 0.71, 1.0]),
)
def test_what_may_be_drawn_is_narrowed_as_plain_python_does(eighths, top_p, top_k, min_p):
    logits = [eighth / 8 for eighth in eighths]
    scaled = torch.tensor([logits]) - max(logits)
    found = narrowed(scaled.clone(), sampling(1, top_p=top_p, top_k=top_k, min_p=min_p))[0]
    kept = {i for i, logit in enumerate(found.tolist()) if logit > -math.inf}
    assert kept == kept_in_plain_python(logits, top_p, top_k, min_p)
    assert torch.equal(found[found > -torch.inf], scaled[0][found > -torch.inf])


def test_a_draw_depends_on_the_sampling_settings_of_its_own_row_only():
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(3)) * 2
    numbers = torch.arange(64)
    sampled = sampling(
        64,
        temperature=torch.where(numbers % 5 == 0, 0.0, 1.3),
        top_p=torch.where(numbers % 2 == 0, 1.0, 0.6),
        top_k=torch.where(numbers % 3 == 0, 0, 7),
        min_p=torch.where(numbers % 7 == 0, 0.2, 0.0),
        seed=numbers,
        position=numbers,
    )
    together = best_candidates(logits.clone(), MASK, sampled)
    for i in range(64):
        alone = best_candidates(logits[i : i + 1].clone(), MASK, sampled.of(numbers[i : i + 1]))
        assert (alone.token.item(), alone.odds.item()) == (together.token[i].item(), together.odds[i].item())


def test_sampling_settings_have_no_effect_at_temperature_0():
    logits = torch.randn(8, 40, generator=torch.Generator().manual_seed(4))
    cold = sampling(8, temperature=0.0, top_p=0.1, top_k=1, min_p=0.9)
    found, plain = best_candidates(logits.clone(), MASK, cold), best_candidates(logits.clone(), MASK)
    assert torch.equal(found.token, plain.token)
    assert torch.equal(found.odds, plain.odds)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_is_never_chosen_counts_in_the_odds(temperature):
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(5)) * 3
    best = best_candidates(logits.clone(), MASK).token
    never = torch.stack([best, torch.full_like(best, -1), best], dim=1)
    never[20:] = -1
    found = best_candidates(logits.clone(), MASK, sampling(40, never, temperature=temperature, seed=torch.arange(40)))
    assert (found.token[:20] != best[:20]).all()
    probability = logits.double().softmax(1).gather(1, found.token[:, None]).squeeze(1)
    assert torch.allclose(found.confidence, probability, rtol=1e-5)
    free = best_candidates(logits.clone(), MASK, sampling(40, temperature=temperature, seed=torch.arange(40)))
    assert torch.equal(found.token[20:], free.token[20:])
