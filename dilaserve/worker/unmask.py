"""Which token each masked position would take, how sure the model is, and which positions are unmasked now.

Pure tensor functions. One sweep over the logits per row, never a softmax in float64 over the vocabulary.
"""

from typing import NamedTuple

import torch

from dilaserve.worker.groups import Group
from dilaserve.worker.statistics import HOPELESS, Guess, best, weighed


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
    if sampling is None:
        return best(logits, mask_id)
    logits = logits.float()
    mask_logit = logits[:, mask_id].clone()
    logits[:, mask_id] = -torch.inf
    return weighed(logits, sample(logits, sampling), mask_logit)


def guess_part(
    logits: torch.Tensor, group: Group, vocabulary: slice, vocab: int, mask_id: int, sampling: Sampling | None
) -> Guess:
    """`guess` where each rank has the logits of its part of the vocabulary, [masks, part]; `logits` is overwritten.

    Five numbers a mask and rank are exchanged; the logits themselves only of rows that sample from a nucleus.
    """
    logits = logits.float()
    narrow = None if sampling is None else ((sampling.temperature > 0) & (sampling.top_p < 1)).nonzero().squeeze(1)
    whole = None
    if sampling is not None and narrow is not None and len(narrow):
        whole = guess(gathered(logits[narrow], group, vocab), mask_id, Sampling(*(knob[narrow] for knob in sampling)))
    found = joined(group.all_gather(judged(logits, vocabulary.start, mask_id - vocabulary.start, sampling)))
    if whole is not None:
        found.token[narrow], found.odds[narrow] = whole
    return found


def gathered(part: torch.Tensor, group: Group, vocab: int) -> torch.Tensor:
    """The logits of the whole vocabulary, [rows, vocab]."""
    widths = [(rank + 1) * vocab // group.size - rank * vocab // group.size for rank in range(group.size)]
    padded = torch.nn.functional.pad(part, (0, max(widths) - part.shape[1]))
    parts = group.all_gather(padded)
    return torch.cat([one[:, :width] for one, width in zip(parts, widths, strict=True)], dim=1)


def judged(logits: torch.Tensor, first: int, mask: int, sampling: Sampling | None) -> torch.Tensor:
    """A rank's candidates, [5, masks] in float64: score, token id, logit, Σ_{other} exp(l - logit), the mask's logit.

    `first` is the id of the first column, `mask` the mask token's column, if it is one of these.
    """
    mask_logit = torch.full_like(logits[:, 0], -torch.inf)
    if 0 <= mask < logits.shape[1]:
        mask_logit = logits[:, mask].clone()
        logits[:, mask] = -torch.inf
    token = logits.argmax(1, keepdim=True)
    score = logits.gather(1, token).double()
    hot = (sampling.temperature > 0).nonzero().squeeze(1) if sampling is not None else token[:0, 0]
    if sampling is not None and len(hot):
        noise = gumbel(sampling.seed[hot], sampling.step[hot], sampling.position[hot], logits.shape[1], first)
        scores = logits[hot].double() / sampling.temperature[hot, None] + noise  # no float32 for tiny temperatures
        token[hot] = scores.argmax(1, keepdim=True)
        score[hot] = scores.gather(1, token[hot])
    chosen = logits.gather(1, token)
    others = logits.sub_(chosen).exp_().scatter_(1, token, 0.0).sum(1, keepdim=True)
    others.masked_fill_(chosen == -torch.inf, 0.0)
    return torch.cat([score, token + first, chosen, others, mask_logit[:, None]], dim=1).T.contiguous()


def joined(parts: torch.Tensor) -> Guess:
    """The best of the ranks' candidates, [ranks, 5, masks]; the lower rank, so the lower id, wins among equals."""
    scores, tokens, logits, others, masks = parts.unbind(1)
    winner = scores.argmax(0, keepdim=True)
    chosen = logits.gather(0, winner)
    mine = torch.zeros_like(scores).scatter_(0, winner, 1.0)
    weights = (others + 1.0 - mine) * torch.exp(logits - chosen) + torch.exp(masks - chosen)
    odds = weights.sum(0).float()
    return Guess(tokens.gather(0, winner).squeeze(0).long(), odds.nan_to_num_(nan=HOPELESS, posinf=HOPELESS))


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


def gumbel(seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor, vocab: int, first: int = 0) -> torch.Tensor:
    """Gumbel noise of ids [first, first + vocab), [rows, vocab], from a counter, not from a state: the same on any
    device, in any batch, in any part of the vocabulary.
    """
    stream = mixed(mixed(mixed(seed) ^ step) ^ position)
    bits = mixed(stream[:, None] ^ torch.arange(first, first + vocab, device=seed.device))
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


def decided(guessed: Guess, where: torch.Tensor, shape: tuple[int, int], rules: Rules) -> torch.Tensor:
    """What each row's rule takes of a guess, as `told` says it; its entries are of the places `where`, [masks], of
    `shape` [rows, width], and all others have no mask. No value is looked at, so that no host waits.
    """
    places = shape[0] * shape[1]
    odds = torch.full((places,), torch.inf, dtype=guessed.odds.dtype, device=where.device)
    odds = odds.index_copy_(0, where, guessed.odds).view(shape)
    token = torch.zeros_like(odds, dtype=torch.int64).view(-1).index_copy_(0, where, guessed.token).view(shape)
    return told(taken(odds, odds < torch.inf, rules), token, odds)


def told(chosen: torch.Tensor, token: torch.Tensor, odds: torch.Tensor) -> torch.Tensor:
    """For the host, int32 [rows, 2, width]: the token that is chosen, or -1, and its confidence's bits in float32."""
    confidence = (1.0 / (1.0 + odds.double())).float().view(torch.int32)
    return torch.stack((torch.where(chosen, token, -1).int(), confidence), dim=1)


def taken(odds: torch.Tensor, masked: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Which masked positions are unmasked in this step, bool [rows, width]; at least one where a row has any.

    `odds` [rows, width] are inf where nothing is masked. The most confident go first, the leftmost of equals before the
    others. (Fast-dLLM, arXiv 2505.22618, section 3.3)
    """
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
    failed[:, 0].fill_(False)
    failed |= n > masks[:, None]
    passed = torch.where(failed.any(1), failed.int().argmax(1), confidence.shape[1])
    return torch.where(passed == masks - 1, masks, passed).clamp(min=1)
