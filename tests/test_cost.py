"""The law of step times: fitted, held out, and followed while it changes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.cost import KNOTS, Features, Learner, Sample, StepCost, fit
from dilaserve.errors import ConfigError

TRUE = StepCost(
    fixed=0.004,
    token=2e-6,
    bends=(0.0, 0.0, 3e-5, 0.0, 0.0, 1e-5),
    attention=2e-10,
    key=1e-7,
    projection=1e-6,
    row=1e-5,
)


def features(rng):
    rows, fresh = rng.randint(1, 16), rng.randint(0, 3)
    lengths = [32] * rows + [rng.randint(100, 1500) for _ in range(fresh)]
    keys = [rng.randint(length, 1500) for length in lengths]
    attention = sum(length * context for length, context in zip(lengths, keys, strict=True))
    return Features(sum(lengths), attention, sum(keys), 16 * len(lengths), len(lengths))


def samples(count, law=TRUE, noise=0.02, seed=0):
    rng = random.Random(seed)
    points = [features(rng) for _ in range(count)]
    return [Sample(point, law.seconds(point) * rng.lognormvariate(0, noise)) for point in points]


def test_a_fit_predicts_steps_it_has_not_seen():
    law = fit(samples(150))
    assert law.error < 0.03
    unseen = samples(100, noise=0.0, seed=9)
    errors = [abs(law.seconds(point) / seconds - 1) for point, seconds in unseen]
    assert sum(errors) / len(errors) < 0.02
    assert min(law.fixed, law.token, *law.bends, law.attention, law.key, law.projection, law.row) >= 0.0


def test_a_straight_line_would_not_do():
    bent, straight = fit(samples(150, noise=0.0)), fit(samples(150, noise=0.0), knots=(10**9,))
    assert bent.error < straight.error / 2


def test_too_few_samples_are_refused():
    with pytest.raises(ConfigError):
        fit(samples(5))


@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 10**7))
def test_more_work_never_takes_less_time(tokens, more, attention):
    small = TRUE.seconds(Features(tokens, attention, 512, 1, 1))
    assert TRUE.seconds(Features(tokens + more, attention, 512, 1, 1)) >= small
    assert TRUE.scaled(2.0).seconds(Features(tokens, attention, 512, 1, 1)) == pytest.approx(2 * small)


def test_a_device_that_turns_slower_is_followed():
    learner, slow = Learner(TRUE), TRUE.scaled(1.5)
    for point, seconds in samples(3000, slow, seed=3):
        learner.observe(point, point.tokens > 600, seconds)
    errors = [
        abs(learner.seconds(point, point.tokens > 600) / seconds - 1)
        for point, seconds in samples(200, slow, noise=0.0, seed=4)
    ]
    assert sum(errors) / len(errors) < 0.05
    assert learner.tail < 0.2


def test_without_surprises_nothing_is_unlearned():
    learner = Learner(TRUE)
    for point, seconds in samples(600, noise=0.0):
        learner.observe(point, point.tokens > 600, seconds)
    point = Features(1000, 512_000, 2048, 16, 4)
    assert learner.seconds(point, True) == pytest.approx(TRUE.seconds(point), rel=0.02)
    assert len(learner.law.bends) == len(KNOTS)
