"""Every policy: examples, and a property that holds for all inputs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.policy.admission import Room, least_loaded
from dilaserve.policy.caching import CACHES, View, Work, work
from dilaserve.policy.composition import Candidate, fcfs
from dilaserve.policy.transfer import even, steps_per_block

FRESH, STALE = View(100, 40, 72, True), View(100, 40, 72, False)


@pytest.mark.parametrize(
    ("cache", "view", "expected"),
    [
        ("none", FRESH, Work(0, 100, True)),
        ("none", STALE, Work(0, 100, True)),
        ("prefix", STALE, Work(0, 100, True)),
        ("prefix", FRESH, Work(40, 60, False)),
        ("dual", STALE, Work(0, 100, True)),
        ("dual", FRESH, Work(40, 32, False)),
    ],
)
def test_a_cache_kind_says_what_a_step_computes(cache, view, expected):
    assert work(cache, view) == expected


@given(st.sampled_from(list(CACHES)), st.integers(1, 500), st.data())
def test_every_step_covers_the_active_block_and_stays_on_the_canvas(cache, canvas, data):
    start = data.draw(st.integers(0, canvas - 1))
    end = data.draw(st.integers(start + 1, canvas))
    todo = work(cache, View(canvas, start, end, data.draw(st.booleans())))
    assert 0 <= todo.start <= start
    assert end <= todo.start + todo.length <= canvas


@pytest.mark.parametrize(
    ("total", "parts", "expected"), [(32, 32, [1] * 32), (32, 5, [7, 7, 6, 6, 6]), (3, 5, [1, 1, 1, 0, 0]), (8, 1, [8])]
)
def test_quotas_are_even_and_the_larger_come_first(total, parts, expected):
    assert even(total, parts) == expected


@given(st.integers(0, 2000), st.integers(1, 200))
def test_quotas_add_up_and_differ_by_one_at_most(total, parts):
    shares = even(total, parts)
    assert sum(shares) == total
    assert shares == sorted(shares, reverse=True)
    assert max(shares) - min(shares) <= 1


@given(st.integers(1, 500), st.integers(1, 50))
def test_every_block_gets_a_step(steps, blocks):
    assert len(steps_per_block(steps, blocks)) == blocks
    assert min(steps_per_block(steps, blocks)) >= 1


def test_the_emptiest_instance_comes_first_and_a_full_one_never():
    rooms = [Room(0, 3, 4), Room(1, 4, 4), Room(2, 1, 4), Room(3, 1, 4)]
    assert least_loaded(rooms) == [2, 3, 0]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9))))
def test_admission_names_every_instance_with_room_once(pairs):
    rooms = [Room(i, residents, limit) for i, (residents, limit) in enumerate(pairs)]
    assert sorted(least_loaded(rooms)) == [room.instance for room in rooms if room.residents < room.limit]


def test_first_come_is_first_served_and_what_fits_rides_along():
    residents = [Candidate(1, 2.0, 60), Candidate(2, 1.0, 50), Candidate(3, 3.0, 40), Candidate(4, 4.0, 10)]
    assert fcfs(residents, 100) == [2, 3, 4]
    assert fcfs(residents, 10) == [2]


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 600)), min_size=1), st.integers(1, 1000))
def test_the_oldest_always_steps_and_the_rest_fit(items, limit):
    residents = [Candidate(i, arrived_at, tokens) for i, (arrived_at, tokens) in enumerate(items)]
    chosen = fcfs(residents, limit)
    oldest = min(residents, key=lambda candidate: candidate.arrived_at)
    assert residents[chosen[0]].arrived_at == oldest.arrived_at
    assert len(set(chosen)) == len(chosen)
    assert sum(residents[key].tokens for key in chosen) <= max(limit, residents[chosen[0]].tokens)
