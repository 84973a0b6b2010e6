"""Steps ahead by the recursion against plain simulation of the same chain; drops that never fall; learning."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.errors import ConfigError
from dilaserve.profiles import guessed, pace, read, write
from dilaserve.quality import ANY, BINS, Forecast, Law, chain, chances, isotonic, part_of

BLOCK = 32


def ending(tokens, chance):
    """A law under which the text also ends, with this chance a step."""
    rows = [(chance * sum(row), *(count * (1 - chance) for count in row[1:])) for row in pace(tokens).unmasked]
    return Law(tuple(rows))


def play(law, masks, rng):
    steps = 0
    while masks:
        odds = chances(law, law, masks)
        drawn = rng.choices(range(len(odds)), odds)[0]
        steps += 1
        if drawn == 0:
            return steps, True
        masks -= drawn
    return steps, False


@pytest.mark.parametrize("law", [pace(2.5), pace(6.0), ending(3.0, 0.05)])
def test_the_recursion_agrees_with_playing_the_chain(law):
    rng, known = random.Random(0), chain(law, law, BLOCK)
    for masks in (1, 7, 32):
        runs = [play(law, masks, rng) for _ in range(4000)]
        steps = [count for count, _ in runs]
        assert known.steps[masks] == pytest.approx(statistics.fmean(steps), rel=0.05)
        assert known.variance[masks] == pytest.approx(statistics.pvariance(steps), rel=0.15, abs=0.05)
        assert known.ends[masks] == pytest.approx(statistics.fmean(ended for _, ended in runs), abs=0.04)


def forecast():
    return Forecast(guessed("a model", "cpu").quality)


def test_a_request_gets_nearer_to_its_end():
    ahead = forecast()
    start = ahead.outlook(None, 0, 0, BLOCK, 4, BLOCK, False)
    later = ahead.outlook(None, 0, 2, 10, 4, BLOCK, True)
    last = ahead.outlook(None, 0, 3, 1, 4, BLOCK, True)
    assert start.steps > later.steps > last.steps == 1.0
    assert (start.refreshes, later.refreshes, last.refreshes) == (4.0, 1.0, 0.0)
    assert ahead.outlook("unheard of", 3, 0, BLOCK, 4, BLOCK, False).steps < start.steps


def test_blocks_of_any_length_have_an_outlook():
    assert forecast().outlook(None, 0, 0, 500, 1, 512, False).steps > 100
    assert part_of(0) == 0
    assert part_of(9) == 2


def test_what_is_seen_moves_the_laws():
    ahead = forecast()
    before = ahead.outlook(None, 0, 0, BLOCK, 1, BLOCK, False).steps
    for _ in range(4000):
        ahead.observe(None, 0, 0, BLOCK, 16)
        ahead.observe(None, 0, 0, 16, 16)
    assert ahead.outlook(None, 0, 0, BLOCK, 1, BLOCK, False).steps < before / 2


@given(st.integers(1, 64), st.floats(1.1, 20.0))
def test_chances_are_a_distribution_over_what_can_happen(masks, tokens):
    odds = chances(pace(tokens), pace(2.0), masks)
    assert len(odds) == masks + 1
    assert sum(odds) == pytest.approx(1.0)


@given(st.lists(st.floats(-10, 60), min_size=1, max_size=8))
def test_drops_start_at_zero_and_never_fall(drops):
    flat = isotonic(drops)
    assert len(flat) == len(drops)
    assert flat[0] == 0.0
    assert list(flat) == sorted(flat)


def test_a_profile_is_read_as_it_was_written(tmp_path):
    profile = guessed("a model", "cpu")
    file = write(profile, tmp_path)
    assert read(file) == profile
    assert len(profile.quality.tasks[ANY].laws[0][0].unmasked) == len(BINS)
    assert max(len(line) for line in file.read_text().splitlines()) < 1000
    file.write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        read(file)
