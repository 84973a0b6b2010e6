"""Steps ahead by the recursion against plain simulation of the same chain; drops that never fall; learning."""

import itertools
import random
import statistics
from itertools import combinations, pairwise
from statistics import pvariance

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dilaserve.calibrate.fitting import isotonic, parted
from dilaserve.calibrate.quality import unexplained_spread
from dilaserve.errors import ConfigError
from dilaserve.profile.block_chain import Chain, Outlook, alike, chain, with_block
from dilaserve.profile.decode_speed import ANY, BINS, PARTS, Law, QualityProfile, TaskProfile, chances, part_of
from dilaserve.profile.forecast import FIRST_LOOK, Forecast, hull, slope
from dilaserve.profile.problems import held_out
from dilaserve.profile.profile_file import cut, guessed, pace, read, write

BLOCK = 32


def ending(tokens, chance):
    """A law under which the text also ends, with this chance a step."""
    rows = [(chance * sum(row), *(count * (1 - chance) for count in row[1:])) for row in pace(tokens).unmasked]
    return Law(tuple(rows))


def play(law, masks, rng):
    steps = 0
    while masks:
        odds = chances([law], masks)
        drawn = rng.choices(range(len(odds)), odds)[0]
        steps += 1
        if drawn == 0:
            return steps, True
        masks -= drawn
    return steps, False


@pytest.mark.parametrize("law", [pace(2.5), pace(6.0), ending(3.0, 0.05)])
def test_the_recursion_agrees_with_playing_the_chain(law):
    rng, known = random.Random(0), chain([law], BLOCK)
    for masks in (1, 7, 32):
        runs = [play(law, masks, rng) for _ in range(4000)]
        steps = [count for count, _ in runs]
        assert known.steps[masks] == pytest.approx(statistics.fmean(steps), rel=0.05)
        assert known.variance[masks] == pytest.approx(statistics.pvariance(steps), rel=0.15, abs=0.05)
        assert known.ends[masks] == pytest.approx(statistics.fmean(ended for _, ended in runs), abs=0.04)


@pytest.mark.parametrize("tokens", [2.5, 3.5, 5.5])
@pytest.mark.parametrize(("block", "part"), [(32, 8), (32, 32), (16, 4)])
def test_a_guess_knows_that_no_step_goes_beyond_its_part_of_the_block(tokens, block, part):
    rng, steps = random.Random(0), 0
    for _ in range(500 * (block // part)):
        masks = part
        while masks:
            masks -= rng.choices(range(masks + 1), cut(tokens, masks))[0]
            steps += 1
    assert chain([pace(tokens, part_length=part)], block).steps[block] == pytest.approx(steps / 500, rel=0.1)


def forecast():
    return Forecast(guessed("a model", "cpu").quality)


def test_a_request_gets_nearer_to_its_end():
    ahead = forecast()
    start = ahead.outlook(ANY, 0, 0, BLOCK, 4, BLOCK, False)
    later = ahead.outlook(ANY, 0, 2, 10, 4, BLOCK, True)
    last = ahead.outlook(ANY, 0, 3, 1, 4, BLOCK, True)
    assert start.steps > later.steps > last.steps == 1.0
    assert (start.refreshes, later.refreshes, last.refreshes) == (4.0, 1.0, 0.0)
    assert ahead.outlook(ahead.kind("unheard of", 5), 5, 0, BLOCK, 4, BLOCK, False).steps < start.steps


def test_blocks_of_any_length_have_an_outlook():
    assert forecast().outlook(ANY, 0, 0, 500, 1, 512, False).steps > 100
    assert part_of(0) == 0
    assert part_of(9) == 2


def test_what_is_seen_moves_the_laws():
    ahead = forecast()
    before = ahead.outlook(ANY, 0, 0, BLOCK, 1, BLOCK, False).steps
    for _ in range(4000):
        ahead.observe(ANY, 0, 0, BLOCK, 16)
        ahead.observe(ANY, 0, 0, 16, 16)
    assert ahead.outlook(ANY, 0, 0, BLOCK, 1, BLOCK, False).steps < before / 2


@given(st.integers(1, 64), st.floats(1.1, 20.0))
def test_chances_are_a_distribution_over_what_can_happen(masks, tokens):
    odds = chances([pace(tokens), pace(2.0)], masks)
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


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(100, 2000)), min_size=1, max_size=8))
def test_threshold_steps_lie_on_the_convex_hull_of_steps_and_accuracy(levels):
    """Drops and steps in hundredths."""
    drops = [more / 100 for more in itertools.accumulate([0, *(more for more, _ in levels[1:])])]
    steps = [count / 100 for _, count in levels]
    kept = hull(drops, steps)
    assert kept[0] == 0
    assert kept == sorted(kept)
    assert all(steps[b] < steps[a] for a, b in itertools.pairwise(kept))
    slopes = [slope(drops, steps, a, b) for a, b in itertools.pairwise(kept)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(slopes))
    assert min(steps) == steps[kept[-1]]
    for a, b in itertools.pairwise(kept):
        for between in range(a + 1, b):
            width = drops[b] - drops[a]
            share = (drops[between] - drops[a]) / width if width else 1.0
            assert steps[between] >= (1 - share) * steps[a] + share * steps[b] - 1e-9


def by_length(short, long):
    """A profile whose task "sums" has its own law for prompts of up to ten tokens, and one for longer ones."""
    laws = [((pace(tokens, 1000.0),) * PARTS,) for tokens in (short, long)]
    nothing = (0.0,)
    task = TaskProfile(
        laws=laws[0], drop=nothing, mean_drop=nothing, steps=(1.0,), lengths=(10,), by_length=tuple(laws)
    )
    return QualityProfile(
        tasks={"sums": task, ANY: TaskProfile(laws=laws[0], drop=nothing, mean_drop=nothing)}, levels=(0.9,)
    )


def test_long_prompts_have_a_law_of_their_own_and_it_learns_apart(tmp_path):
    ahead = Forecast(by_length(8.0, 2.0))
    short, long = ahead.kind("sums", 10), ahead.kind("sums", 11)
    assert len({short, long, ahead.kind(None, 11)}) == 3

    def steps(kind):
        return ahead.outlook(kind, 0, 0, BLOCK, 1, BLOCK, False).steps

    before = steps(short)
    assert steps(long) > 2 * before
    for _ in range(300):
        ahead.observe(long, 0, 0, BLOCK, BLOCK)
    ahead.relearn()
    assert steps(long) < before
    assert steps(short) == pytest.approx(before, rel=0.25)
    profile = msgspec.structs.replace(guessed("a model", "cpu"), quality=ahead.profile)
    assert read(write(profile, tmp_path)).quality == ahead.profile
    assert Forecast(ahead.profile).outlook(long, 0, 0, BLOCK, 1, BLOCK, False).steps == steps(long)


@given(st.floats(1, 30), st.floats(0, 50), st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 0.3, 1.0]), st.integers(0, 300))
def test_many_blocks_of_one_law_are_summed_up_as_if_one_by_one(steps, variance, ends, blocks):
    law, ahead = Chain((0.0, steps), (0.0, variance), (0.0, ends)), Outlook(0.0, 0.0, 0.0)
    for _ in range(blocks):
        ahead = with_block(law, 1, ahead, 1.0)
    assert tuple(alike(law, 1, blocks)) == pytest.approx(tuple(ahead), rel=1e-3, abs=1e-9)


def test_samples_are_absorbed_gradually_and_completely():
    at_once, bit_by_bit = Forecast(by_length(8.0, 2.0)), Forecast(by_length(8.0, 2.0))
    rng = random.Random(5)
    steps = [
        (rng.choice([0, 1]), rng.randint(0, 2), rng.randint(1, BLOCK), rng.randint(0, 9)) for _ in range(FIRST_LOOK)
    ]
    for long, part, masks, unmasked in steps:
        for ahead in (at_once, bit_by_bit):
            ahead.observe(ahead.kind("sums", 11 * long), 0, part, masks, unmasked)
    assert bit_by_bit.version == 0
    at_once.relearn()
    bit_by_bit.learns, more = False, 0
    while bit_by_bit.learning is not None:
        bit_by_bit.observe(bit_by_bit.kind(ANY, 1), 0, 0, 1, 1)
        more += 1
    assert bit_by_bit.profile == at_once.profile
    assert more > 5
    assert sum(bit_by_bit.counts.values()) == more


def test_a_profile_whose_lengths_have_no_laws_is_damaged(tmp_path):
    quality = by_length(8.0, 2.0)
    task = msgspec.structs.replace(quality.tasks["sums"], lengths=(10, 20))
    broken = msgspec.structs.replace(quality, tasks={**quality.tasks, "sums": task})
    file = write(msgspec.structs.replace(guessed("a model", "cpu"), quality=broken), tmp_path)
    with pytest.raises(ConfigError, match="damaged"):
        read(file)


def test_levels_that_save_nothing_are_no_choice():
    drops, laws = (0.0, 1.0, 2.0), ((pace(2.0),) * PARTS, (pace(2.0),) * PARTS, (pace(8.0),) * PARTS)
    task = TaskProfile(laws=laws, drop=drops, mean_drop=drops)
    ladder = Forecast(QualityProfile(tasks={ANY: task}, levels=(0.9, 0.8, 0.7))).ladder("whatever")
    assert [rung.threshold for rung in ladder] == [0.9, 0.7]
    assert 0.2 < ladder[1].yields < 0.5


@example([[1, 1, 8], [1, 2, 7], [2, 2, 6]], 2)  # equal means: a cut is worth a rounding error
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=6), st.integers(1, 4))
def test_prompts_are_parted_where_their_steps_differ_most(groups, most):
    def spread(cuts):
        parts = [
            list(itertools.chain.from_iterable(groups[start:end])) for start, end in pairwise([0, *cuts, len(groups)])
        ]
        return sum(len(part) * pvariance(part) for part in parts)

    cuts = parted(groups, most, 1, 0.0)
    count = min(most, len(groups))
    every = [list(cut) for parts in range(count) for cut in combinations(range(1, len(groups)), parts)]
    assert cuts in every
    assert spread(cuts) == pytest.approx(min(map(spread, every)), abs=1e-6)
    assert all(len(cuts) <= len(cut) for cut in every if spread(cut) < spread(cuts) + 1e-9)


def test_prompt_lengths_are_split_only_with_enough_prompts_and_a_real_difference():
    groups = [[2] * 60, [2] * 60, [9] * 60, [20] * 10, [5] * 60]
    assert parted(groups, 8, 50, 0.01) == [2, 4]
    assert parted(groups, 8, 10, 0.01) == [2, 3, 4]
    assert parted(groups[:2], 8, 50, 0.01) == []
    assert parted([[1, 2]], 8, 50, 0.01) == []


def test_the_spread_of_like_requests_is_the_variance_beyond_the_laws():
    law = pace(8.0, 1000.0)
    task = TaskProfile(laws=((law,) * PARTS,), drop=(0.0,), mean_drop=(0.0,))
    profile = QualityProfile(tasks={"sums": task, ANY: task}, levels=(0.9,))
    ahead = Forecast(profile).outlook("sums", 0, 0, BLOCK, 1, BLOCK, False)
    for spread in (0.0, 0.3):
        away = (ahead.variance + (spread * ahead.steps) ** 2) ** 0.5
        counts = [ahead.steps - away, ahead.steps + away] * 50
        assert unexplained_spread(profile, {"sums": [9] * 100}, {"sums": counts}, BLOCK) == pytest.approx(
            spread, abs=0.01
        )


def test_a_part_of_the_canvas_without_samples_takes_the_law_of_the_part_before():
    law, nothing = pace(8.0, 1000.0), Law(((),) * len(BINS))
    task = TaskProfile(laws=((law, law, nothing),), drop=(0.0,), mean_drop=(0.0,))
    ahead = Forecast(QualityProfile(tasks={ANY: task}, levels=(0.9,)))
    known, unknown = (ahead.outlook(ANY, 0, part, BLOCK, 3, BLOCK, False).steps for part in (1, 2))
    assert unknown == pytest.approx(known / 2)


def test_a_task_with_few_problems_gives_all_it_has(monkeypatch):
    monkeypatch.setattr("dilaserve.profile.problems.DRY", 2000)
    problems = held_out("add", 10**9)
    assert len({problem.prompt for problem in problems}) == len(problems) > 100
