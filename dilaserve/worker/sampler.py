"""Which token each masked position would take, how sure the model is, and which positions are unmasked now.

Pure tensor functions. One sweep over the logits per row, never a softmax in float64 over the vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from dilaserve.transport.request_table import RULES
from dilaserve.worker.candidates import HOPELESS, Candidates
from dilaserve.worker.confidence import best, weighed
from dilaserve.worker.tp_group import TPGroup

BY_CONFIDENCE = RULES["dynamic"]  # the last of the rules under which the surest go first


class Sampling(NamedTuple):
    """Knobs of each mask's choice; a row's random stream depends on its seed, step and position alone."""

    temperature: torch.Tensor  # float32 [masks]
    top_p: torch.Tensor  # float32 [masks]
    top_k: torch.Tensor  # int32 [masks]; 0: no limit
    min_p: torch.Tensor  # float32 [masks]
    seed: torch.Tensor  # int64 [masks]
    step: torch.Tensor  # int64 [masks]
    position: torch.Tensor  # int64 [masks]
    never: torch.Tensor  # int64 [masks, ids]; tokens that are not chosen here, filled up with -1
    given: torch.Tensor  # int64 [masks]; the token that is chosen whatever the logits say, or -1

    def of(self, masks: torch.Tensor | slice) -> "Sampling":
        """The knobs of some of the masks."""
        return Sampling(*(knob[masks] for knob in self))

    @property
    def hot(self) -> torch.Tensor:
        """The masks whose token is drawn, [hot]."""
        return (self.temperature > 0).nonzero().squeeze(1)

    @property
    def narrow(self) -> torch.Tensor:
        """Which masks draw from a part of the vocabulary, bool [masks]."""
        return (self.temperature > 0) & ((self.top_p < 1) | (self.top_k > 0) | (self.min_p > 0))


def best_candidates(logits: torch.Tensor, mask_id: int, sampling: Sampling | None = None) -> Candidates:
    """The best (or sampled) token of each row of logits [masks, vocab]; the mask token is never chosen.

    The first of equal logits wins, as in torch.argmax. What is never chosen counts in the odds. `logits` is
    overwritten.
    """
    if sampling is None:
        return best(logits, mask_id)
    logits = logits.float()
    mask_logit = logits[:, mask_id].clone()
    logits[:, mask_id] = -torch.inf
    with without(logits, sampling.never):
        token = sample(logits, sampling)
    token = torch.where(sampling.given[:, None] >= 0, sampling.given[:, None], token)
    return weighed(logits, token, mask_logit)


@contextlib.contextmanager
def without(logits: torch.Tensor, never: torch.Tensor, first: int = 0) -> Iterator[None]:
    """Hides the tokens `never` [masks, ids] of the logits [masks, part], whose first column is the id `first`."""
    row, place = ((never >= first) & (never < first + logits.shape[1])).nonzero(as_tuple=True)
    column = never[row, place] - first
    hidden = logits[row, column]
    logits[row, column] = -torch.inf
    yield
    logits[row, column] = hidden


def part_candidates(
    logits: torch.Tensor, group: TPGroup, vocabulary: slice, vocab: int, mask_id: int, sampling: Sampling | None
) -> Candidates:
    """`best_candidates` where each rank has the logits of its part of the vocabulary, [masks, part].

    `logits` is overwritten.

    Five numbers a mask and rank are exchanged; the logits themselves only of rows that draw from a part of the
    vocabulary.
    """
    logits = logits.float()
    narrow = None if sampling is None else sampling.narrow.nonzero().squeeze(1)
    whole = None
    if sampling is not None and narrow is not None and len(narrow):
        whole = best_candidates(gathered(logits[narrow], group, vocab), mask_id, sampling.of(narrow))
    found = best_of_ranks(group.all_gather(judged(logits, vocabulary.start, mask_id - vocabulary.start, sampling)))
    if whole is not None:
        found.token[narrow], found.odds[narrow] = whole
    return found


def gathered(part: torch.Tensor, group: TPGroup, vocab: int) -> torch.Tensor:
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
    with without(logits, sampling.never, first) if sampling is not None else contextlib.nullcontext():
        token, score = scored(logits, first, sampling)
    if sampling is not None:
        token, score = of_given(token, score, sampling.given[:, None] - first, logits.shape[1])
    chosen = logits.gather(1, token)
    others = logits.sub_(chosen).exp_().scatter_(1, token, 0.0).sum(1, keepdim=True)
    others.masked_fill_(chosen == -torch.inf, 0.0)
    return torch.cat([score, token + first, chosen, others, mask_logit[:, None]], dim=1).T.contiguous()


def scored(logits: torch.Tensor, first: int, sampling: Sampling | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The column of a rank's candidate and its score in float64, [masks, 1] each."""
    token = logits.argmax(1, keepdim=True)
    score = logits.gather(1, token).double()
    if sampling is not None and len(hot := sampling.hot):
        noise = gumbel(sampling.seed[hot], sampling.step[hot], sampling.position[hot], logits.shape[1], first)
        scores = logits[hot].double() / sampling.temperature[hot, None] + noise  # no float32 for tiny temperatures
        token[hot] = scores.argmax(1, keepdim=True)
        score[hot] = scores.gather(1, token[hot])
    return token, score


def of_given(
    token: torch.Tensor, score: torch.Tensor, column: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's candidates [masks, 1], with given tokens in their place. `column`: where the given token is among the
    rank's `width`, if it is there. The rank that has it beats all others.
    """
    mine = (column >= 0) & (column < width)
    return torch.where(mine, column, token), score.masked_fill(mine, torch.inf)


def best_of_ranks(parts: torch.Tensor) -> Candidates:
    """The best of the ranks' candidates, [ranks, 5, masks]; the lower rank, so the lower id, wins among equals."""
    scores, tokens, logits, others, masks = parts.unbind(1)
    winner = scores.argmax(0, keepdim=True)
    chosen = logits.gather(0, winner)
    mine = torch.zeros_like(scores).scatter_(0, winner, 1.0)
    weights = (others + 1.0 - mine) * torch.exp(logits - chosen) + torch.exp(masks - chosen)
    odds = weights.sum(0).float()
    return Candidates(tokens.gather(0, winner).squeeze(0).long(), odds.nan_to_num_(nan=HOPELESS, posinf=HOPELESS))


def sample(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Gumbel-max over what the knobs leave for rows with a temperature, argmax for the others; [masks, 1]."""
    token = logits.argmax(1, keepdim=True)
    if len(hot := sampling.hot):
        knobs = sampling.of(hot)
        scaled = (logits[hot] - logits[hot].amax(1, keepdim=True)) / knobs.temperature[:, None]  # best at 0
        if len(narrow := knobs.narrow.nonzero().squeeze(1)):  # the others are left alone, whoever is beside them
            scaled[narrow] = narrowed(scaled[narrow], knobs.of(narrow))
        noise = gumbel(knobs.seed, knobs.step, knobs.position, logits.shape[1])
        token[hot] = (scaled + noise).argmax(1, keepdim=True)
    return token


def narrowed(logits: torch.Tensor, knobs: Sampling) -> torch.Tensor:
    """Logits whose best is 0, [rows, vocab], with -inf for tokens that are not to be drawn. In this order, as in vLLM:

    1. `min_p`: less probable than this share of the best token's probability.
    2. `top_k`: not among so many most probable ones, the first of equals before the others.
    3. `top_p`: outside the smallest set of those left whose probability reaches it among them.
    """
    logits = logits.masked_fill(logits < knobs.min_p.log()[:, None], -torch.inf)
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    most = torch.where(knobs.top_k > 0, knobs.top_k, logits.shape[1])
    ordered = ordered.masked_fill(rank >= most[:, None], -torch.inf)
    probability = ordered.softmax(1)
    before = probability.cumsum(1) - probability
    outside = (before >= knobs.top_p[:, None]) & (knobs.top_p < 1)[:, None]
    return torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(outside, -torch.inf))


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

    rule: torch.Tensor | None  # int, see table.RULES; None when all go by the threshold
    threshold: torch.Tensor  # float64
    factor: torch.Tensor | None  # float64
    quota: torch.Tensor  # int


def scores(logits: torch.Tensor, rule: torch.Tensor) -> torch.Tensor:
    """By what masks whose `rule` is not by confidence are ordered, [masks], the largest first: the negative entropy, or
    the lead of the best token's probability over the second's (Dream's generation_utils).
    """
    probabilities = logits.float().softmax(1)
    best = probabilities.topk(2, dim=1).values
    entropy = (probabilities * torch.log(probabilities + 1e-10)).sum(1)
    return torch.where(rule == RULES["margin"], best[:, 0] - best[:, 1], entropy)


class Edits(NamedTuple):
    """What replaces tokens that are no masks any more (LLaDA2.1, arXiv 2602.08676)."""

    masked: torch.Tensor  # bool [rows, width]; candidates elsewhere are of tokens
    current: torch.Tensor  # int64 [rows, width]
    threshold: torch.Tensor  # float64 [rows]; infinite where nothing is replaced


def decided(
    found: Candidates,
    where: torch.Tensor,
    shape: tuple[int, int],
    rules: Rules,
    score: torch.Tensor | None = None,
    edits: Edits | None = None,
) -> torch.Tensor:
    """What each row's rule takes of the candidates, as `encoded` says it.

    The candidates, and their `score` where a rule needs one, are of the places `where`, [masks], of `shape`
    [rows, width]; all others have no mask. No value is looked at, so that no host waits.
    """
    places = shape[0] * shape[1]
    odds = torch.full((places,), torch.inf, dtype=found.odds.dtype, device=where.device)
    odds = odds.index_copy_(0, where, found.odds).view(shape)
    token = torch.zeros_like(odds, dtype=torch.int64).view(-1).index_copy_(0, where, found.token).view(shape)
    if score is not None:
        score = torch.zeros_like(odds).view(-1).index_copy_(0, where, score).view(shape)
    if edits is None:
        return encoded(taken(odds, odds < torch.inf, rules, score), token, odds)
    chosen = taken(odds.masked_fill(~edits.masked, torch.inf), edits.masked, rules, score)
    sure = 1.0 / (1.0 + odds.double()) >= edits.threshold[:, None]
    return encoded(chosen | (sure & ~edits.masked & (odds < torch.inf) & (token != edits.current)), token, odds)


def encoded(chosen: torch.Tensor, token: torch.Tensor, odds: torch.Tensor) -> torch.Tensor:
    """For the host, int32 [rows, 2, width]: the token that is chosen, or -1, and its confidence's bits in float32."""
    confidence = (1.0 / (1.0 + odds.double())).float().view(torch.int32)
    return torch.stack((torch.where(chosen, token, -1).int(), confidence), dim=1)


def taken(odds: torch.Tensor, masked: torch.Tensor, rules: Rules, score: torch.Tensor | None = None) -> torch.Tensor:
    """Which masked positions are unmasked in this step, bool [rows, width]; at least one where a row has any.

    `odds` [rows, width] are inf where nothing is masked. The most confident go first, the leftmost of equals before the
    others (Fast-dLLM, arXiv 2505.22618, section 3.3). With `score` [rows, width] rows may have a rule that orders
    otherwise.
    """
    if rules.rule is None:
        return reaching(odds, masked, rules.threshold)
    key = odds if score is None else sort_key(odds, masked, rules.rule, score)
    order = key.argsort(dim=1, stable=True)
    confidence = 1.0 / (1.0 + odds.gather(1, order).double())  # falls along most rows, 0 past the masks
    masks = masked.sum(1)
    above = (confidence >= rules.threshold[:, None]).sum(1)
    factor = rules.quota if rules.factor is None else factor_count(confidence, masks, rules.factor)
    counts = [above, rules.quota, factor, above.maximum(rules.quota), *[rules.quota] * (len(RULES) - 4)]
    count = torch.stack(counts).gather(0, rules.rule[None].long()).squeeze(0).clamp(min=1).minimum(masks)
    rank = torch.arange(masked.shape[1], device=masked.device)
    return torch.zeros_like(masked).scatter_(1, order, rank < count[:, None])


def reaching(odds: torch.Tensor, masked: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """`taken` where all rows go by the threshold, without sorting: what reaches it, and the first of the best."""
    enough = 1.0 / (1.0 + odds.double()) >= threshold[:, None]
    return enough.scatter_(1, odds.argmin(1, keepdim=True), True).logical_and_(masked)


def sort_key(odds: torch.Tensor, masked: torch.Tensor, rule: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """What orders the masks of each row, the smallest first; [rows, width]."""
    column = torch.arange(odds.shape[1], device=odds.device, dtype=odds.dtype)
    rule = rule[:, None]
    key = torch.where(rule > RULES["sequential"], -score, odds)
    return torch.where(rule == RULES["sequential"], column, key).masked_fill(~masked, torch.inf)


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
