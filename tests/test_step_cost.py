"""The law of step times: fitted, held out, and followed while it changes."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.errors import ConfigError
from dilaserve.profile.step_cost import KNOTS, ExpertCounts, Features, Learner, Sample, StepCost, alike, derived, fit

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


def test_a_linear_step_cost_does_not_fit():
    bent, straight = fit(samples(150, noise=0.0)), fit(samples(150, noise=0.0), knots=(10**9,))
    assert bent.error < straight.error / 2


MOE = msgspec.structs.replace(TRUE, expert=3e-5, experts=ExpertCounts(256, 8))


def small_steps(count, seed):
    """Reuse steps of few rows, which touch some of the experts only."""
    rng = random.Random(seed)
    for _ in range(count):
        rows, canvas, width = rng.randint(1, 8), rng.randint(64, 1024), rng.choice((4, 8, 32))
        tokens = rows * width
        yield Features(tokens, tokens * canvas, rows * canvas, rng.randint(1, tokens), rows)


def test_the_experts_that_a_step_reads_are_part_of_its_cost():
    counts = ExpertCounts(256, 8)
    assert [round(counts.touched(tokens)) for tokens in (0, 1, 32, 128, 4096)] == [0, 8, 163, 252, 256]
    seen = [Sample(point, MOE.seconds(point)) for point in [*small_steps(150, 1), *(one[0] for one in samples(100))]]
    knowing, blind = fit(seen, experts=counts), fit(seen)
    assert knowing.error < 0.005 < 0.02 < blind.error
    assert knowing.expert == pytest.approx(MOE.expert, rel=0.02)
    assert knowing.scaled(2.0).expert == 2 * knowing.expert
    assert derived(knowing, 2).expert == knowing.expert / 2


def test_the_cost_of_experts_is_learned_while_serving():
    learner = Learner(msgspec.structs.replace(MOE, fixed=0.005, expert=0.0, token=3e-5, guess=True))
    for point in small_steps(1000, 2):
        learner.observe(point, False, MOE.seconds(point))
    errors = [abs(learner.seconds(point, False) / MOE.seconds(point) - 1) for point in small_steps(50, 3)]
    assert sum(errors) / len(errors) < 0.05
    assert learner.law.expert > 0.5 * MOE.expert


def test_too_few_samples_are_refused():
    with pytest.raises(ConfigError):
        fit(samples(5))


@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 10**7))
def test_more_work_never_takes_less_time(tokens, more, attention):
    small = TRUE.seconds(Features(tokens, attention, 512, 1, 1))
    assert TRUE.seconds(Features(tokens + more, attention, 512, 1, 1)) >= small
    assert TRUE.scaled(2.0).seconds(Features(tokens, attention, 512, 1, 1)) == pytest.approx(2 * small)


def test_a_gradual_slowdown_of_the_device_is_learned():
    learner, slow = Learner(TRUE), TRUE.scaled(1.5)
    for point, seconds in samples(3000, slow, seed=3):
        learner.observe(point, point.tokens > 600, seconds)
    errors = [
        abs(learner.seconds(point, point.tokens > 600) / seconds - 1)
        for point, seconds in samples(200, slow, noise=0.0, seed=4)
    ]
    assert sum(errors) / len(errors) < 0.05
    assert learner.tail < 0.2


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_sudden_change_of_device_speed_is_learned_soon(factor):
    """In both directions: of relative residuals those of the shorter steps outweigh the others."""
    learner = Learner(TRUE)
    for point, seconds in samples(1200, TRUE.scaled(factor), seed=11):
        learner.observe(point, point.tokens > 600, seconds)
    for point, seconds in samples(100, TRUE.scaled(factor), noise=0.0, seed=12):
        assert learner.seconds(point, point.tokens > 600) == pytest.approx(seconds, rel=0.2)


def test_exact_measurements_change_no_cost():
    learner = Learner(TRUE)
    for point, seconds in samples(600, noise=0.0):
        learner.observe(point, point.tokens > 600, seconds)
    point = Features(1000, 512_000, 2048, 16, 4)
    assert learner.seconds(point, True) == pytest.approx(TRUE.seconds(point), rel=0.02)
    assert len(learner.law.bends) == len(KNOTS)


@pytest.mark.parametrize("slower", [1.0, 2.0])
def test_costs_of_unseen_sizes_are_kept(slower):
    """A day of one kind of request says nothing of the others, but how fast the device is."""
    learner, device = Learner(TRUE), TRUE.scaled(slower)
    rng = random.Random(5)
    kinds = (Features(256, 256 * 256, 256, 32, 1), Features(32, 32 * 256, 256, 20, 1))
    for step in range(40_000):
        point = kinds[step % 8 > 0]
        learner.observe(point, point.tokens > 32, device.seconds(point) * rng.lognormvariate(0, 0.03))
    for rows in (1, 6):
        for canvas in (64, 512, 2048):
            for tokens in (32 * rows, canvas * rows):
                point = Features(tokens, tokens * canvas, canvas * rows, 32 * rows, rows)
                assert learner.seconds(point, tokens > 32 * rows) == pytest.approx(device.seconds(point), rel=0.1)


def test_a_few_steps_that_seem_much_too_short_change_little():
    learner, rng = Learner(TRUE), random.Random(6)
    for point, seconds in samples(3000, seed=7):
        learner.observe(point, point.tokens > 600, seconds * (0.02 if rng.random() < 0.002 else 1.0))
    for point, seconds in samples(100, noise=0.0, seed=8):
        assert learner.seconds(point, point.tokens > 600) == pytest.approx(seconds, rel=0.1)


def test_a_guess_that_is_far_off_is_soon_corrected():
    guess = msgspec.structs.replace(TRUE.scaled(10.0), guess=True)
    learner = Learner(guess)
    for point, seconds in samples(200, seed=9):
        learner.observe(point, point.tokens > 600, seconds)
    assert not learner.law.guess
    errors = [
        abs(learner.seconds(point, point.tokens > 600) / seconds - 1)
        for point, seconds in samples(100, noise=0.0, seed=10)
    ]
    assert sum(errors) / len(errors) < 0.1


def test_no_step_is_ever_said_to_take_nothing():
    """Even where what was measured seems to come of logits alone: a step of rows that rest has none."""
    rng = random.Random(0)
    points = [Features(32 * n, 32 * n * 150, 150 * n, rng.randrange(1, 32 * n), n) for n in (1, 2, 3, 4) * 20]
    law = fit([Sample(point, 2e-4 * point.projected) for point in points])
    resting = Features(64, 9216, 288, 0, 2)
    assert law.seconds(resting) > 0
    assert law.seconds(points[0]) == pytest.approx(2e-4 * points[0].projected, rel=0.01)
    learner = Learner(law)
    learner.observe(resting, False, 0.001)
    assert alike({1: learner.law}, {1: law})
