"""The K/V pool's bookkeeping."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dilaserve.scheduler.kv_pages import PagePool, coalesced, rounded
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


class Memory:
    """A pool's K/V, page by page: which beginning of a prompt lies where, beside the bookkeeping under test.

    A prompt is a tuple of page contents; a page holds the whole beginning that its K/V depend on.
    """

    def __init__(self, pages):
        self.pool, self.pages = PagePool(pages * PAGE), [None] * pages
        self.rows = {}  # prompt by start

    def take(self, prompt, size, spare):
        kept, unused = list(self.pool.kept), self.pool.unused
        start = self.pool.take(size, spare)
        self.expect_oldest_dropped(kept, start is not None)
        if start is None:
            return
        assert unused >= rounded(size) + spare
        self.rows[start] = prompt
        if hit := self.pool.find(beginnings(prompt)[: rounded(size) // PAGE]):
            self.copy(hit.start, start, hit.tokens // PAGE)

    def grow(self, start, size):
        kept, old = list(self.pool.kept), self.pool.runs[start]
        place = self.pool.grow(start, old + size)
        self.expect_oldest_dropped(kept, place is not None)
        if place is None:
            return
        prompt = self.rows.pop(start)
        self.rows[place] = prompt
        self.copy(start, place, old // PAGE)

    def publish(self, start, pages):
        """A step has written so many pages of the row's prompt."""
        hashes = beginnings(self.rows[start])[: min(pages, self.pool.runs[start] // PAGE)]
        if len(hashes) > len(self.pool.published.get(start, ())):
            self.pages[start // PAGE : start // PAGE + len(hashes)] = hashes
            self.pool.publish(start, hashes)

    def give(self, start):
        """Behind the row its run is overwritten, but for what is kept."""
        length = self.pool.runs[start]
        self.pool.give(start)
        del self.rows[start]
        for page in range((start + self.pool.kept.get(start, 0)) // PAGE, (start + length) // PAGE):
            self.pages[page] = None

    def copy(self, source, target, pages):
        part = self.pages[source // PAGE : source // PAGE + pages]
        self.pages[target // PAGE : target // PAGE + pages] = part

    def expect_oldest_dropped(self, kept, done):
        dropped = [start for start in kept if start not in self.pool.kept]
        assert dropped == kept[: len(dropped)]
        assert done or not dropped

    def check(self):
        pool = self.pool
        assert pool.runs.keys() == self.rows.keys()
        whole = coalesced(sorted([*pool.free, *pool.runs.items(), *pool.kept.items()]))
        assert whole == ([(0, pool.capacity)] if pool.capacity else [])
        assert pool.kept.keys() <= pool.published.keys() <= {*pool.runs, *pool.kept}
        for hash, starts in pool.holders.items():
            for start in starts:
                assert self.pages[start // PAGE + len(hash) - 1] == hash
        kept = dict(pool.kept)
        for prompt in PROMPTS:
            hashes = beginnings(prompt)
            hit = pool.find(hashes)
            there = max([len(hash) for hash in hashes if hash in self.held()], default=0)
            assert (hit.tokens // PAGE if hit else 0) == there
            if hit:
                first = hit.start // PAGE
                assert tuple(self.pages[first : first + there]) == hashes[:there]
        pool.kept = kept  # in the order before these questions

    def held(self):
        return {hash for hashes in self.pool.published.values() for hash in hashes}


PROMPTS = ("", "a", "abc", "abcd", "abx", "zz")


def beginnings(prompt):
    """One hash a page: the beginning itself, which shows where it lies."""
    return tuple(prompt[: end + 1] for end in range(len(prompt)))


ACTIONS = st.tuples(
    st.sampled_from(("take", "take", "grow", "grow", "publish", "publish", "give")),
    st.integers(0, 100),
    st.sampled_from(PROMPTS),
    st.integers(1, 6 * PAGE),
    st.sampled_from((0, 0, PAGE, 3 * PAGE)),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(ACTIONS, max_size=60), st.integers(0, 14))
def test_a_hit_points_to_memory_that_holds_it_and_no_page_is_lost_or_has_two_owners(actions, pages):
    memory = Memory(pages)
    for action, which, prompt, size, spare in actions:
        rows = sorted(memory.rows)
        match action:
            case "take":
                memory.take(prompt, size, spare)
            case "grow" if rows:
                memory.grow(rows[which % len(rows)], size)
            case "publish" if rows:
                memory.publish(rows[which % len(rows)], -(-size // PAGE))
            case "give" if rows:
                memory.give(rows[which % len(rows)])
        memory.check()
    for start in sorted(memory.rows)[1:]:
        memory.give(start)
    for start in list(memory.rows):  # a row alone always has the whole pool
        memory.grow(start, memory.pool.capacity - memory.pool.runs[start])
        memory.check()
        assert memory.pool.runs == {0: memory.pool.capacity}
        assert not memory.pool.kept


def test_a_run_that_finds_no_room_drops_nothing_that_is_kept():
    pool = PagePool(6 * PAGE)
    kept, row, _ = pool.take(2 * PAGE), pool.take(PAGE), pool.take(PAGE)
    pool.publish(kept, ("a", "ab"))
    pool.give(kept)
    assert pool.take(4 * PAGE) is None
    assert pool.grow(row, 4 * PAGE) is None
    assert pool.find(("a", "ab")) == (kept, 2 * PAGE)
