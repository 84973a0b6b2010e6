"""What a step costs in seconds: a piecewise-linear law of what it computes, fitted to measured steps.

A batch of diffusion steps is flat up to a knee in packed tokens and linear behind it; a straight line through both is
off by 10 %.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from scipy.optimize import nnls

from dilaserve.errors import ConfigError

KNOTS = (128, 256, 512, 1024, 2048, 3072)
FORGET = 0.999  # a step's weight after one more step
FOLDS = 5
KEPT = 4  # steps as which the first law always counts, for kinds that are never seen
RELEARN = 200  # steps between two fits while serving
FIRST_FITS = (16, 32, 64, 128)  # steps after which a guess is fitted anew; the last makes it knowledge
SLOWER = 1.25  # times as long as by the law from which on the device counts as another, of which old steps tell less
QUANTILE_RATE = 0.02
LEAST = 1e-6  # seconds that any step takes, so that what was fitted never says of one that it takes none
ALIKE = 0.05  # relative difference of laws that makes no difference


Count = TypeVar("Count", float, np.ndarray[Any, np.dtype[np.float64]])


class Features(NamedTuple):
    """What one step, or one row's part of it, computes."""

    tokens: int  # packed queries
    attention: int  # Σ queries x keys
    keys: int  # whose K/V is read
    projected: int  # rows projected to the vocabulary
    rows: int


class ExpertCounts(NamedTuple):
    """The experts of a mixture-of-experts layer; none where all layers are dense."""

    of_layer: int = 0
    of_token: int = 0

    def touched(self, tokens: Count) -> Count:
        """Experts of a layer whose weights a step of so many tokens reads, if tokens chose at random and evenly."""
        missed: Count = (1.0 - self.of_token / self.of_layer) ** tokens
        return self.of_layer * (1.0 - missed)


DENSE = ExpertCounts()


class Sample(NamedTuple):
    """A measured step."""

    features: Features
    seconds: float


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """t = fixed + expert·E(T) + token·T + Σ_k bend_k·max(0, T - knot_k) + attention·A + key·K + projection·V + row·n;
    nothing is negative, and knots ascend.

    E are the experts whose weights are read: most of them for the first row already, so that rows share them. What the
    experts compute is part of the time of a token.

    `error` is the mean absolute relative error on samples that were not fitted, `samples` how many were. A `guess` says
    nothing about the device at hand; nobody is turned away because of it.
    """

    fixed: float
    token: float
    bends: tuple[float, ...]
    attention: float
    key: float = 0.0
    projection: float
    row: float
    expert: float = 0.0
    experts: ExpertCounts = DENSE
    knots: tuple[int, ...] = KNOTS
    error: float = 0.0
    samples: int = 0
    guess: bool = False

    def seconds(self, features: Features) -> float:
        return self.fixed + self.expert_seconds(features.tokens) + self.marginal(*features)

    def expert_seconds(self, tokens: float) -> float:
        """The time to read the experts that a step of so many tokens touches."""
        return self.expert * self.experts.touched(tokens) if self.expert else 0.0

    def marginal(self, tokens: int, attention: int, keys: int, projected: int, rows: int) -> float:
        """The part that grows with the batch, without the experts, which its rows share."""
        total = self.token * tokens + self.attention * attention + self.key * keys
        total += self.projection * projected + self.row * rows
        if tokens > self.knots[0]:
            bent = 0.0
            for knot, bend in zip(self.knots, self.bends, strict=True):
                if tokens <= knot:
                    break
                bent += bend * (tokens - knot)
            total += bent
        return total

    def scaled(self, factor: float) -> "StepCost":
        """The same law on a device that takes `factor` times as long."""
        fields = ("fixed", "token", "attention", "key", "projection", "row", "expert")
        changed = {name: getattr(self, name) * factor for name in fields}
        return msgspec.structs.replace(self, bends=tuple(bend * factor for bend in self.bends), **changed)


def alike(one: Mapping[int, StepCost], other: Mapping[int, StepCost]) -> bool:
    """Whether the laws, by degree, say the same of a small and of a large step, to within `ALIKE`."""
    if one.keys() != other.keys():
        return False
    points = (Features(32, 32 * 256, 256, 32, 1), Features(512, 512 * 256, 512, 64, 2))
    return all(
        abs(math.log(one[degree].seconds(point) / other[degree].seconds(point))) < ALIKE
        for degree in one
        for point in points
    )


def derived(law: StepCost, degree: int) -> StepCost:
    """A guess of the law on `degree` times as many devices: they share what grows with the batch evenly, and nothing of
    what every step pays, because reading a part of the weights and meeting at every layer takes about as long.
    """
    shared = law.scaled(1.0 / degree)
    return msgspec.structs.replace(shared, fixed=law.fixed, row=law.row, samples=0, guess=True)


def from_weights(
    weights: Sequence[float],
    knots: Sequence[int],
    experts: ExpertCounts = DENSE,
    error: float = 0.0,
    samples: int = 0,
) -> StepCost:
    bends = len(knots)
    fixed, token, *rest = (float(weight) for weight in weights)
    attention, key, projection, row, *expert = rest[bends:]
    return StepCost(
        fixed=max(fixed, LEAST),
        token=token,
        bends=tuple(rest[:bends]),
        attention=attention,
        key=key,
        projection=projection,
        row=row,
        expert=sum(expert),
        experts=experts,
        knots=tuple(knots),
        error=error,
        samples=samples,
    )


def weights_of(law: StepCost) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What `from_weights` makes the law of. [coefficients]"""
    expert = [law.expert] if law.experts.of_layer else []
    return np.array([law.fixed, law.token, *law.bends, law.attention, law.key, law.projection, law.row, *expert])


def fit(samples: Sequence[Sample], knots: Sequence[int] = KNOTS, experts: ExpertCounts = DENSE) -> StepCost:
    """Least squares on relative errors with coefficients of at least 0 (scipy.optimize.nnls).

    For `error` a fifth of the samples is held out at a time, each once; the law itself is then fitted to all. Raises
    `ConfigError` for fewer samples than coefficients.
    """
    if len(samples) < len(knots) + 6 + (experts != DENSE):
        raise ConfigError(f"a step cost cannot be fitted to {len(samples)} samples")
    errors = []
    for fold in range(FOLDS):
        trial = solved([sample for i, sample in enumerate(samples) if i % FOLDS != fold], knots, experts)
        errors += [abs(trial.seconds(features) / seconds - 1) for features, seconds in samples[fold::FOLDS]]
    law = solved(samples, knots, experts)
    return msgspec.structs.replace(law, error=float(np.mean(errors)), samples=len(samples))


def solved(samples: Sequence[Sample], knots: Sequence[int], experts: ExpertCounts) -> StepCost:
    rows = weighed(numbers(samples), knots, experts)
    scale = rows.max(0)
    scale[scale == 0] = 1.0
    weights, _ = nnls(rows / scale, np.ones(len(rows)))
    return from_weights(weights / scale, knots, experts)


def numbers(samples: Sequence[Sample]) -> "array[float]":
    """Features and seconds, one sample after the other."""
    return array("d", [number for features, seconds in samples for number in (*features, seconds)])


def weighed(
    samples: "array[float]", knots: Sequence[int], experts: ExpertCounts = DENSE
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What each coefficient is multiplied by, over the seconds: residuals are relative. [samples, coefficients]"""
    tokens, *rest, seconds = np.array(samples).reshape(-1, len(Features._fields) + 1).T
    bends = [np.maximum(0.0, tokens - knot) for knot in knots]
    touched = [experts.touched(tokens)] if experts.of_layer else []
    columns = [np.ones_like(tokens), tokens, *bends, *rest, *touched]
    rows: np.ndarray[Any, np.dtype[np.float64]] = np.stack(columns, axis=1)
    rows /= seconds[:, None]
    return rows


class Learner:
    """A cost law that follows the device while it serves.

    Decayed normal equations, solved anew every 200 steps; between two solutions a slow correction by kind of step; and
    the 90 % quantile of the remaining error, for guards. A guess weighs little and is fitted sooner. Of kinds of steps
    that are not seen the first law tells, times what those that are seen take longer than by it: without, traffic of
    one kind would in time say anything of the others.
    """

    def __init__(self, law: StepCost, prior: int | None = None) -> None:
        prior = prior or (4 if law.guess else 400)
        self.law = law
        self.corrections = {True: 0.0, False: 0.0}  # log of actual over predicted, by whether the step refreshes
        self.factors = {True: 1.0, False: 1.0}  # the same, not as a logarithm
        self.errors = 0.0  # sum of |log(seconds / predicted)| over all steps
        self.tail = 0.1  # the 90 % quantile of |log residual|
        self.steps = 0
        self.news = array("d")  # numbers of the steps that are not in the normal equations yet
        self.anchor(prior)

    def anchor(self, weight: int) -> None:
        """Start as if `weight` steps had been seen that follow the law exactly."""
        points = [
            Features(tokens, tokens * canvas, canvas * rows, min(tokens, 32 * rows), rows)
            for tokens in (32, 64, 128, 256, 512, 1024, 2048, 4096)
            for rows in (1, 4)
            for canvas in (64, 256, 1024, 4096)
        ]
        samples = [Sample(point, max(self.law.seconds(point), 1e-9)) for point in points]
        rows = weighed(numbers(samples), self.law.knots, self.law.experts)
        gram, moment = rows.T @ rows / len(rows), rows.mean(0)
        self.first, self.kept = weights_of(self.law), (KEPT * gram, KEPT * moment)
        self.gram, self.moment = (weight - KEPT) * gram, (weight - KEPT) * moment

    def seconds(self, features: Features, refreshes: bool) -> float:
        return self.law.seconds(features) * self.factors[refreshes]

    def observe(self, features: Features, refreshes: bool, seconds: float) -> None:
        seconds = max(seconds, 1e-9)
        residual = math.log(seconds / self.law.seconds(features))
        old = self.corrections[refreshes]
        rest = abs(residual - old)
        self.errors += rest
        self.tail = max(0.01, self.tail + QUANTILE_RATE * self.tail * (0.9 if rest > self.tail else -0.1))
        bounded = -1.0 if residual < -1.0 else 1.0 if residual > 1.0 else residual
        self.correct(refreshes, old + 0.02 * (bounded - old))
        if bounded != residual and not self.law.guess:
            seconds *= math.exp(bounded - residual)  # as residuals are relative, one short step would outweigh all
        self.news.extend((*features, seconds))
        self.steps += 1
        if self.steps % RELEARN == 0 or (self.law.guess and self.steps in FIRST_FITS):
            self.relearn()

    def correct(self, refreshes: bool, value: float) -> None:
        self.corrections[refreshes] = value
        self.factors[refreshes] = math.exp(value)

    def relearn(self) -> None:
        """min |A w - 1|² from AᵀA and Aᵀ1 alone: with AᵀA = L Lᵀ it is nnls(Lᵀ, L⁻¹ Aᵀ1)."""
        rows = weighed(self.news, self.law.knots, self.law.experts)
        weights = FORGET ** np.arange(len(rows) - 1, -1, -1)
        faded = FORGET ** len(rows)
        slower = math.exp(sum(self.corrections.values()) / 2)
        if slower > SLOWER:  # what was seen before would outweigh all, as residuals are relative and it was shorter
            self.gram, self.moment = self.gram / slower**2, self.moment / slower
        self.gram = faded * self.gram + (rows * weights[:, None]).T @ rows
        self.moment = faded * self.moment + weights @ rows
        self.news = array("d")
        longer = 1.0 / float(np.median(rows @ self.first))  # times as long as by the first law do steps take now
        gram, moment = self.gram + self.kept[0] / longer**2, self.moment + self.kept[1] / longer
        scale = np.sqrt(np.maximum(np.diag(gram), 1e-30))
        lower = np.linalg.cholesky(gram / np.outer(scale, scale) + 1e-9 * np.eye(len(scale)))
        solution, _ = nnls(lower.T, np.linalg.solve(lower, moment / scale))
        guess = self.law.guess and self.steps < FIRST_FITS[-1]
        law = from_weights(solution / scale, self.law.knots, self.law.experts, self.law.error, self.law.samples)
        self.law = msgspec.structs.replace(law, guess=guess)
        for kind, value in self.corrections.items():
            self.correct(kind, value / 2)
