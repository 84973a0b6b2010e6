"""How probable the model finds a text, as far as a diffusion model can say: two estimates of it.

A diffusion model has no left-to-right likelihood. Both estimates take canvases with some of the text's tokens masked.
Each is denoised in one step, which puts the known tokens back and reports how probable they were.

`Pseudo`: the pseudo-log-likelihood (Salazar et al. 2020, arXiv 1910.14659), the sum of the log probabilities of the
tokens, each masked while the rest is visible.

1. The scored tokens are divided into `groups` of equal size, at random; each is masked in a canvas of its own.
2. That is repeated `rounds` times with other groups. The estimate is the mean of the rounds, and its standard error
   that of a mean of so many.

With as many groups as tokens each token is masked alone, and one round is exact. With fewer, tokens of a group do not
see each other, so that the estimate is as a rule below the exact value; the standard error does not cover that.

`MonteCarlo`: the lower bound of the log likelihood that masked diffusion is trained with (LLaDA, arXiv 2502.09992,
equation 6 and algorithm 3). Of L scored tokens, each sample

1. draws how many are masked, l, evenly from 1 to L, and which, without replacement;
2. has the value L / l times the sum of the log probabilities of those.

The estimate is the mean of the samples, its standard error that of a mean of so many.
"""

import asyncio
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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


class Pseudo(msgspec.Struct, frozen=True, kw_only=True):
    """How the estimate is made. Tokens before `start`, and the first one, are never masked and have no estimate."""

    groups: int = 8
    rounds: int = 4
    start: int = 1
    seed: int = 0

    def fitted(self, tokens: int) -> "Pseudo":
        """The same for a text of so many tokens: no more groups than tokens, and one round where all would be alike."""
        scored = tokens - max(1, self.start)
        alike = self.groups == 1 or self.groups >= scored
        return msgspec.structs.replace(self, groups=min(self.groups, scored), rounds=1) if alike else self


class MonteCarlo(msgspec.Struct, frozen=True, kw_only=True):
    """`samples` canvases are taken. The others are conditioned on the tokens before `start`, and on the first one."""

    samples: int = 128
    start: int = 1
    seed: int = 0

    def fitted(self, tokens: int) -> "MonteCarlo":
        """The same: the length of a text changes nothing."""
        return self


Sampling = Pseudo | MonteCarlo


class Likelihood(NamedTuple):
    """The estimate of one text.

    `logprobs` [tokens]: the mean of each token's rounds, or its part of the bound; None where it has none. `best`: the
    token that was most probable in its place, most of the time, with the mean log probability of these times. `total`:
    the sum of `logprobs`; `standard_error` of it, 0 where it is exact, None after a single round that is not.
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
            "this model's family does not see what follows a block, so that its tokens have no pseudo-likelihood, and "
            "the bound of a model that is trained on whole canvases is not its own",
            param="likelihood",
        )
    check_size(sampling)
    if not 0 <= sampling.start < tokens or tokens < 2:
        raise BadRequest(
            f"a text of {tokens} tokens has none to be scored from {sampling.start} on; send a longer one",
            param="prompt",
        )


def check_size(sampling: Sampling) -> None:
    """Raise `BadRequest` for too many canvases, or too few."""
    if isinstance(sampling, MonteCarlo):
        if not 2 <= sampling.samples <= MAX_CANVASES:
            raise BadRequest(f"likelihood needs samples between 2 and {MAX_CANVASES}", param="likelihood")
    elif sampling.groups < 1 or sampling.rounds < 1 or sampling.groups * sampling.rounds > MAX_CANVASES:
        raise BadRequest(
            f"likelihood needs groups and rounds of at least 1, whose product is at most {MAX_CANVASES}",
            param="likelihood",
        )


async def estimate(engine: Engine, ids: Sequence[int], sampling: Sampling, options: Options, id: str) -> Likelihood:
    """Score the token `ids` of one text. `options` says whose request it is and what it is worth; each canvas is a
    request of the engine, whose id is `id` with a number behind it. Raises what `Engine.submit` raises.
    """
    check(sampling, len(ids), engine.model.traits, engine.model.max_model_len)
    sampling = sampling.fitted(len(ids))
    canvas, gate = np.array(ids, dtype=np.int32), asyncio.Semaphore(AT_ONCE)

    async def one(number: int, group: Places) -> list[Found]:
        async with gate:
            return await scored(engine, canvas, group, options, f"{id}-{number}")

    numbers = itertools.count()
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [
                [tasks.create_task(one(next(numbers), group)) for group in groups]
                for groups in rounds_of(len(ids), sampling)
            ]
    except BaseExceptionGroup as broken:
        raise first(broken) from broken
    rounds = [[one for task in tasks for one in task.result()] for tasks in running]
    scorable = len(ids) - max(1, sampling.start)
    if isinstance(sampling, MonteCarlo):
        return bound(len(ids), scorable, rounds)
    found = combined(len(ids), rounds)
    return found._replace(standard_error=0.0) if sampling.groups == scorable else found


def rounds_of(tokens: int, sampling: Sampling) -> Iterator[list[Places]]:
    """The masked positions of each canvas, by round."""
    return samples(tokens, sampling) if isinstance(sampling, MonteCarlo) else partitions(tokens, sampling)


def samples(tokens: int, sampling: MonteCarlo) -> Iterator[list[Places]]:
    """One canvas a round: an even number of masks from 1 to all, in places without replacement."""
    rng = np.random.default_rng(sampling.seed % 2**64)
    places = np.arange(max(1, sampling.start), tokens)
    for _ in range(sampling.samples):
        yield [rng.permutation(places)[: rng.integers(1, len(places), endpoint=True)]]


def partitions(tokens: int, sampling: Pseudo) -> Iterator[list[Places]]:
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
    """The pseudo-likelihood of a text from what the rounds have found."""
    by_place = placed(rounds)
    logprobs = [mean([one.logprob for one in by_place[i]]) if i in by_place else None for i in range(tokens)]
    return likelihood(logprobs, by_place, [sum(one.logprob for one in each) for each in rounds])


def bound(tokens: int, scorable: int, rounds: Sequence[Sequence[Found]]) -> Likelihood:
    """The bound from what the samples have found; a scored token that no sample has masked adds nothing to it."""
    weights = [scorable / len(each) for each in rounds]
    parts = [0.0] * scorable
    for weight, each in zip(weights, rounds, strict=True):
        for one in each:
            parts[one.place - (tokens - scorable)] += weight * one.logprob / len(rounds)
    values = [weight * sum(one.logprob for one in each) for weight, each in zip(weights, rounds, strict=True)]
    return likelihood([*[None] * (tokens - scorable), *parts], placed(rounds), values)


def placed(rounds: Sequence[Sequence[Found]]) -> dict[int, list[Found]]:
    """What was found, by canvas position."""
    by_place: defaultdict[int, list[Found]] = defaultdict(list)
    for one in (one for each in rounds for one in each):
        by_place[one.place].append(one)
    return by_place


def likelihood(
    logprobs: Sequence[float | None], by_place: Mapping[int, Sequence[Found]], values: Sequence[float]
) -> Likelihood:
    """The estimate with these parts, and with the standard error of a mean of these values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    best = [most_probable([one.best for one in by_place.get(i, ()) if one.best]) for i in range(len(logprobs))]
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
