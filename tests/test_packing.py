"""Which devices form which instances: aligned, disjoint, and as many kept as possible."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_examples import ALIVE, DEGREES, counts_of, every_layout, full

from dilaserve.planner.packing import block, changed, groups, layout, quick_layout


def test_a_box_of_eight_has_26_aligned_layouts():
    assert len(full(every_layout(set(range(8)), DEGREES), range(8))) == 26


@pytest.mark.parametrize(
    ("counts", "alive", "running", "expected"),
    [
        ({8: 1}, range(8), [], ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ({2: 2, 4: 1}, range(8), [(0, 1), (2, 3)], ((0, 1), (2, 3), (4, 5, 6, 7))),
        ({2: 2, 4: 1}, range(8), [], ((0, 1, 2, 3), (4, 5), (6, 7))),
        ({1: 4, 2: 2}, range(8), [(2, 3), (4, 5)], ((0,), (1,), (2, 3), (4, 5), (6,), (7,))),
        ({2: 3}, range(6), [], ((0, 1), (2, 3), (4, 5))),
        ({1: 3, 2: 2}, [0, 1, 3, 4, 5, 6, 7], [(4, 5)], ((0, 1), (3,), (4, 5), (6,), (7,))),
        ({}, range(8), [], ()),
    ],
)
def test_a_layout_keeps_what_runs(counts, alive, running, expected):
    assert layout(counts, alive, running) == expected


def test_counts_that_do_not_fit_are_an_error():
    for counts, alive in (({4: 1}, [0, 1, 2, 4, 5]), ({2: 1, 1: 8}, range(8)), ({3: 1}, [1, 2, 3])):
        with pytest.raises(ValueError, match="do not fit"):
            layout(counts, alive)


def valid(plan, counts):
    """Whether the groups are aligned and disjoint, and as many as wanted."""
    ranks = list(itertools.chain(*plan))
    aligned = all(group == block(group[0], len(group)) and group[0] % len(group) == 0 for group in plan)
    return aligned and len(ranks) == len(set(ranks)) and Counter(map(len, plan)) == counts


@pytest.mark.parametrize("devices", [256, 4096])
def test_plans_of_thousands_of_devices_keep_what_they_can(devices):
    alive = set(range(devices)) - {5, 77}
    twos = tuple(block(start, 2) for start in range(0, devices // 2, 2) if alive.issuperset(block(start, 2)))
    counts = {8: devices // 64, 4: devices // 32, 2: len(twos)}
    counts[1] = len(alive) - sum(degree * count for degree, count in counts.items())
    found = layout(counts, alive, twos)
    assert valid(found, counts)
    assert set(twos) <= set(found)
    with pytest.raises(ValueError, match="do not fit"):
        layout({8: devices // 8}, alive)


@settings(deadline=None)
@given(ALIVE, ALIVE, st.randoms(use_true_random=False))
def test_layouts_are_aligned_disjoint_and_keep_as_much_as_any_other(alive, before, chance):
    old = chance.choice(full(every_layout(before, DEGREES), before))
    new = chance.choice(full(every_layout(alive, DEGREES), alive))
    found = layout(counts_of(new), alive, old)
    assert sorted(itertools.chain(*found)) == sorted(alive)
    assert valid(found, counts_of(new))
    assert valid(quick_layout(counts_of(new), alive, old), counts_of(new))
    rivals = [plan for plan in every_layout(alive, DEGREES) if counts_of(plan) == counts_of(new)]
    score = lambda plan: (len(set(plan) & set(old)), sum(map(len, set(plan) & set(old))))  # noqa: E731
    assert score(found) == max(map(score, rivals))
    assert changed(old, found) == pytest.approx(sum(len(group) for group in found if group not in old) / len(alive))


@given(ALIVE, st.sets(st.sampled_from(DEGREES), min_size=1))
def test_counts_fit_exactly_when_their_nested_sums_do(alive, degrees):
    most = groups(alive, degrees)
    packable = {tuple(sorted(counts_of(plan).items())) for plan in every_layout(alive, degrees)}
    for picked in itertools.product(*(range(most[degree] + 1) for degree in most)):
        counts = {degree: count for degree, count in zip(most, picked, strict=True) if count}
        nested = all(
            sum(count * other / degree for other, count in counts.items() if other >= degree) <= most[degree]
            for degree in most
        )
        assert nested == (tuple(sorted(counts.items())) in packable)
