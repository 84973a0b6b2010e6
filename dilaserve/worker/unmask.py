"""Which token each masked position would take, how sure the model is, and which positions are unmasked now.

Pure tensor functions. One sweep over the logits per row, never a softmax in float64 over the vocabulary.
"""

from typing import NamedTuple

import torch

HOPELESS = torch.finfo(torch.float32).max  # odds of what overflows: behind all others, yet before a row's padding


class Guess(NamedTuple):
    """The candidate of each masked position, all [masks].

    `odds` is Σ_{other} exp(l_other - l_token) = (1 - p) / p: it orders confidences that have all rounded to 1.
    """

    token: torch.Tensor  # int64
    odds: torch.Tensor  # float32

    @property
    def confidence(self) -> torch.Tensor:
        """p of the token under the unmodified softmax, in float64."""
        return 1.0 / (1.0 + self.odds.double())


class Sampling(NamedTuple):
    """Per-mask knobs, all [masks]; a row's random stream depends on its seed, step and position alone."""

    temperature: torch.Tensor  # float32
    top_p: torch.Tensor  # float32
    seed: torch.Tensor  # int64
    step: torch.Tensor  # int64
    position: torch.Tensor  # int64


def guess(logits: torch.Tensor, mask_id: int, sampling: Sampling | None = None) -> Guess:
    """The best (or sampled) token of each row of logits [masks, vocab]; the mask token is never chosen.

    The first of equal logits wins, as in torch.argmax. `logits` is overwritten.
    """
    logits = logits.float()
    mask_logit = logits[:, mask_id].clone()
    logits[:, mask_id] = -torch.inf
    token = logits.argmax(1, keepdim=True) if sampling is None else sample(logits, sampling)
    chosen = logits.gather(1, token)
    weights = logits.sub_(chosen).exp_().scatter_(1, token, 0.0)
    odds = weights.sum(1) + (mask_logit - chosen.squeeze(1)).exp_()
    return Guess(token.squeeze(1), odds.nan_to_num_(nan=HOPELESS, posinf=HOPELESS))


def sample(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Gumbel-max over the nucleus for rows with a temperature, argmax for the others; [masks, 1]."""
    token = logits.argmax(1, keepdim=True)
    hot = (sampling.temperature > 0).nonzero().squeeze(1)
    if len(hot):
        scaled = (logits[hot] - logits[hot].amax(1, keepdim=True)) / sampling.temperature[hot, None]  # best at 0
        noise = gumbel(sampling.seed[hot], sampling.step[hot], sampling.position[hot], logits.shape[1])
        token[hot] = (nucleus(scaled, sampling.top_p[hot]) + noise).argmax(1, keepdim=True)
    return token


def nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Logits outside the smallest set of tokens whose probability reaches top_p become -inf."""
    if bool((top_p >= 1).all()):
        return logits
    ordered, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1) - ordered
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, before >= top_p[:, None])
    return logits.masked_fill(outside, -torch.inf)


def gumbel(seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor, vocab: int) -> torch.Tensor:
    """Gumbel noise [rows, vocab] from a counter, not from a state: the same on any device, in any batch."""
    stream = mixed(mixed(mixed(seed) ^ step) ^ position)
    bits = mixed(stream[:, None] ^ torch.arange(vocab, device=seed.device))
    uniform = ((bits & (2**24 - 1)).float() + 0.5) / 2**24
    return -(-uniform.log()).log()


def mixed(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function (Steele, Lea, Flood 2014) on int64, which wraps as uint64 would."""
    x = x - 0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))


class Rules(NamedTuple):
    """Per-row knobs of the transfer, all [rows]; `factor` is None when no row goes by it."""

    rule: torch.Tensor  # int, see table.RULES
    threshold: torch.Tensor  # float64
    factor: torch.Tensor | None  # float64
    quota: torch.Tensor  # int


def accepted(guessed: Guess, masked: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Which masked positions are unmasked in this step, bool [rows, width]; at least one where a row has any.

    `masked` is [rows, width]; `guessed` lists its true entries row by row. The most confident go first, the leftmost
    of equals before the others. (Fast-dLLM, arXiv 2505.22618, section 3.3)
    """
    odds = torch.full(masked.shape, torch.inf, dtype=guessed.odds.dtype, device=masked.device)
    odds[masked] = guessed.odds
    odds, order = odds.sort(dim=1, stable=True)
    confidence = 1.0 / (1.0 + odds.double())  # falls along the row, 0 past its masks
    masks = masked.sum(1)
    counts = [(confidence >= rules.threshold[:, None]).sum(1), rules.quota]  # in the order of table.RULES
    if rules.factor is not None:
        counts.append(factor_count(confidence, masks, rules.factor))
    count = torch.stack(counts).gather(0, rules.rule[None].long()).squeeze(0).clamp(min=1).minimum(masks)
    rank = torch.arange(masked.shape[1], device=masked.device)
    return torch.zeros_like(masked).scatter_(1, order, rank < count[:, None])


def factor_count(confidence: torch.Tensor, masks: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """How many Fast-dLLM's factor rule takes: the n-th needs 1 - factor / (n + 1), the first nothing.

    Like the published loop it takes all when only the last one fails.
    """
    n = torch.arange(1, confidence.shape[1] + 1, device=confidence.device)
    failed = confidence < 1 - factor[:, None] / (n + 1)
    failed[:, 0] = False
    failed |= n > masks[:, None]
    passed = torch.where(failed.any(1), failed.int().argmax(1), confidence.shape[1])
    return torch.where(passed == masks - 1, masks, passed).clamp(min=1)
