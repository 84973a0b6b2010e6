"""The K/V pool's bookkeeping."""

from hypothesis import given
from hypothesis import strategies as st

from dilaserve.scheduler.kv_pages import PagePool, rounded
from dilaserve.types import PAGE


def test_runs_are_taken_first_fit_and_joined_again():
    pool = PagePool(10 * PAGE + 5)
    a, b, c = pool.take(3 * PAGE), pool.take(PAGE + 1), pool.take(5 * PAGE)
    assert (a, b, c) == (0, 3 * PAGE, 5 * PAGE)
    assert pool.take(1) is None
    pool.give(a)
    pool.give(b)
    assert pool.take(5 * PAGE) == 0
    assert not pool.ever_fits(10 * PAGE + 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300))), st.integers(0, 2000))
def test_runs_never_overlap_and_nothing_is_lost(actions, tokens):
    pool, held = PagePool(tokens), {}
    for taking, size in actions:
        if taking:
            start = pool.take(size)
            if start is not None:
                for other, length in held.items():
                    assert start + rounded(size) <= other or other + length <= start
                assert start + rounded(size) <= pool.capacity
                held[start] = rounded(size)
        elif held:
            start = sorted(held)[size % len(held)]
            pool.give(start)
            del held[start]
    for start in held:
        pool.give(start)
    assert pool.free == ([(0, pool.capacity)] if pool.capacity else [])
