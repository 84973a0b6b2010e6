"""The pseudo-likelihood of a text: how probable each of its tokens is while others are visible on both sides.

A diffusion model has no left-to-right likelihood. Its pseudo-log-likelihood (Salazar et al. 2020, arXiv 1910.14659) is
the sum of the log probabilities of the tokens, each masked while the rest is visible. Here:

1. The scored tokens are divided into `groups` of equal size, at random.
2. For each group one canvas with the group masked is denoised in one step, which puts the known tokens back and
   reports how probable they were.
3. That is repeated `rounds` times with other groups. The estimate is the mean of the rounds, and its standard error
   that of a mean of so many.

With as many groups as tokens each token is masked alone, and one round is exact. With fewer, tokens of a group do not
see each other, so that the estimate is as a rule below the exact value; the standard error does not cover that.
"""

import asyncio
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dilaserve.engine.engine import Engine, KnownCanvas, first
from dilaserve.engine.stream import TopLogprob, collect
from dilaserve.engine.submit import Options
from dilaserve.errors import BadRequest
from dilaserve.types import FamilyTraits

Places = np.ndarray[Any, np.dtype[np.int64]]  # canvas positions, [positions]
MAX_CANVASES = 1024  # of one text
AT_ONCE = 8  # canvases of one text that are in the engine together
LEAST = 1e-45  # probability of what float32 rounds to nothing


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the estimate is made. Tokens before `start`, and the first one, are never masked and have no estimate."""

    groups: int = 8
    rounds: int = 4
    start: int = 1
    seed: int = 0

    def fitted(self, tokens: int) -> "Sampling":
        """The same for a text of so many tokens: no more groups than tokens, and one round where all would be alike."""
        scored = tokens - max(1, self.start)
        alike = self.groups == 1 or self.groups >= scored
        return msgspec.structs.replace(self, groups=min(self.groups, scored), rounds=1) if alike else self


class Likelihood(NamedTuple):
    """The estimate of one text.

    `logprobs` [tokens]: the mean of each token's rounds, None where it has none; `best`: the token that was most
    probable in its place, most of the time, with the mean log probability of these times. `total`: the sum of
    `logprobs`; `standard_error` of it, 0 where it is exact, None after a single round that is not.
    """

    logprobs: tuple[float | None, ...]
    best: tuple[TopLogprob | None, ...]
    total: float
    standard_error: float | None


class Found(NamedTuple):
    """What one canvas has shown of a position."""

    place: int
    logprob: float
    best: TopLogprob | None


def check(sampling: Sampling, tokens: int, traits: FamilyTraits, limit: int) -> None:
    """Raise `BadRequest` for what cannot be estimated of a text of so many tokens, `limit` at most."""
    if tokens > limit:
        raise BadRequest(
            f"this model's maximum context length is {limit} tokens, and the text has {tokens}; shorten it",
            param="prompt",
            code="context_length_exceeded",
        )
    if traits.exact:
        raise BadRequest(
            "this model's family does not see what follows a block, so that its tokens have no pseudo-likelihood",
            param="likelihood",
        )
    if sampling.groups < 1 or sampling.rounds < 1 or sampling.groups * sampling.rounds > MAX_CANVASES:
        raise BadRequest(
            f"likelihood needs groups and rounds of at least 1, whose product is at most {MAX_CANVASES}",
            param="likelihood",
        )
    if not 0 <= sampling.start < tokens or tokens < 2:
        raise BadRequest(
            f"a text of {tokens} tokens has none to be scored from {sampling.start} on; send a longer one",
            param="prompt",
        )


async def estimate(engine: Engine, ids: Sequence[int], sampling: Sampling, options: Options, id: str) -> Likelihood:
    """Score the token `ids` of one text. `options` says whose request it is and what it is worth; each canvas is a
    request of the engine, whose id is `id` with a number behind it. Raises what `Engine.submit` raises.
    """
    check(sampling, len(ids), engine.model.traits, engine.model.max_model_len)
    sampling = sampling.fitted(len(ids))
    rounds = list(partitions(len(ids), sampling))
    canvas, gate = np.array(ids, dtype=np.int32), asyncio.Semaphore(AT_ONCE)

    async def one(number: int, group: Places) -> list[Found]:
        async with gate:
            return await scored(engine, canvas, group, options, f"{id}-{number}")

    try:
        async with asyncio.TaskGroup() as tasks:
            running = [
                [tasks.create_task(one(r * sampling.groups + g, group)) for g, group in enumerate(groups)]
                for r, groups in enumerate(rounds)
            ]
    except BaseExceptionGroup as broken:
        raise first(broken) from broken
    found = combined(len(ids), [[one for task in tasks for one in task.result()] for tasks in running])
    exact = sampling.groups == len(ids) - max(1, sampling.start)
    return found._replace(standard_error=0.0) if exact else found


def partitions(tokens: int, sampling: Sampling) -> Iterator[list[Places]]:
    """The groups of each round, for a sampling that is `fitted`."""
    rng = np.random.default_rng(sampling.seed % 2**64)
    places = np.arange(max(1, sampling.start), tokens)
    for _ in range(sampling.rounds):
        yield np.array_split(rng.permutation(places), sampling.groups)


async def scored(engine: Engine, canvas: np.ndarray[Any, Any], group: Places, options: Options, id: str) -> list[Found]:
    """What one step tells of the tokens of a group, which it does not see."""
    stream = await engine._submit_known(KnownCanvas(canvas, np.sort(group)), options, id=id)
    async with stream:
        answer = await collect(stream)
    places = group.tolist()
    of = [place - stream.prompt_tokens for place in places]
    return [
        Found(place, math.log(max(answer.confidences[i], LEAST)), next(iter(answer.top_logprobs[i]), None))
        for place, i in zip(places, of, strict=True)
    ]


def combined(tokens: int, rounds: Sequence[Sequence[Found]]) -> Likelihood:
    """The estimate of a text from what the rounds have found."""
    by_place: defaultdict[int, list[Found]] = defaultdict(list)
    for found in (one for each in rounds for one in each):
        by_place[found.place].append(found)
    logprobs = [mean([one.logprob for one in by_place[i]]) if i in by_place else None for i in range(tokens)]
    totals = [sum(one.logprob for one in each) for each in rounds]
    error = statistics.stdev(totals) / math.sqrt(len(totals)) if len(totals) > 1 else None
    best = [most_probable([one.best for one in by_place[i] if one.best]) for i in range(tokens)]
    return Likelihood(tuple(logprobs), tuple(best), math.fsum(filter(None, logprobs)), error)


def most_probable(found: Sequence[TopLogprob]) -> TopLogprob | None:
    """The token that was most probable most of the time, and its mean log probability then."""
    if not found:
        return None
    values: defaultdict[int, list[float]] = defaultdict(list)
    for one in found:
        values[one.token_id].append(one.logprob)
    token = max(values, key=lambda id: (len(values[id]), -id))
    return TopLogprob(token, mean(values[token]))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
