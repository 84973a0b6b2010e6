"""Quotes: what would become of a request now. Asking changes nothing, and the answer is what becomes of it."""

from collections import deque

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_builders import SINGLES, feed, request, scheduler
from scheduler_world import World

from dilaserve.scheduler.request_state import Loads
from dilaserve.scheduler.rules.admission import DeadlineRow, finish, fits
from dilaserve.scheduler.rules.demand import end_beside, ends
from dilaserve.types import Arrival, Decline, Instance, InstanceReady, Load, Refuse, Slo

MEMOS = {"chains", "known_tracks", "ladders", "nearest", "known"}  # filled when asked for; they follow from the rest


def frozen(one, names):
    """A part of the scheduler's memory as values; requests and instances in it by their `names`, as those of parts."""
    if id(one) in names:
        return names[id(one)]
    if isinstance(one, dict):
        return [(frozen(key, names), frozen(value, names)) for key, value in one.items()]
    if isinstance(one, list | tuple | deque):
        return [frozen(item, names) for item in one]
    if isinstance(one, Loads):
        return [getattr(one, name) for name in one.__struct_fields__ if name not in MEMOS]
    if type(one).__module__.startswith("dilaserve") and hasattr(one, "__dict__"):
        return [(name, frozen(value, names)) for name, value in vars(one).items() if name not in MEMOS]
    return sorted(map(repr, one)) if isinstance(one, set) else repr(one)


def state_of(machine):
    """What the scheduler remembers; each request, instance and part once."""
    parts = [value for value in vars(machine).values() if hasattr(value, "__dict__")]
    owners = [*machine.requests.values(), *machine.placement.all_replicas(), *machine.endings.recent, *parts]
    owners += [machine.estimates.forecast, machine.placement.check]
    names = {id(owner): (type(owner).__name__, place) for place, owner in enumerate(owners)}
    flat = [{name: value for name, value in vars(owner).items() if name not in MEMOS} for owner in owners]
    rest = {name: value for name, value in vars(machine).items() if id(value) not in names}
    return [frozen(one, names) for one in (*flat, rest)]


class QuotedWorld(World):
    """Asks before each arrival, and holds what becomes of the request beside the answer; now and then also all that
    the scheduler remembers before and after.
    """

    def __init__(self, seed, looks=0.25):
        super().__init__(seed)
        self.looks = looks
        if self.rng.random() < 0.5:
            self.machine.arrival_check.most_best_effort = (self.rng.choice((0.1, 5.0)), self.rng.choice((1, 4)))
        self.answers = []

    def observe(self, event):
        if not isinstance(event, Arrival) or event.request.ended:
            return super().observe(event)
        before = state_of(self.machine) if self.rng.random() < self.looks else None
        quote = self.machine.quotes.quote(event.request, self.now)
        assert before is None or state_of(self.machine) == before
        running, known = self.machine.placement.running, len(self.machine.requests)
        assert (quote.running, quote.waiting) == (running, known - running)
        commands = super().observe(event)
        ends = [one for one in commands if isinstance(one, Decline | Refuse) and one.request is event.request]
        assert quote.admitted == (not ends)
        for end in ends:
            if isinstance(end, Refuse):
                assert quote.retry_after == end.retry_after
            else:
                assert (quote.met, quote.never_feasible) == (False, end.never_feasible)
                assert quote.retry_after == (None if end.never_feasible else end.retry_after)
        if quote.met:
            assert quote.finish + quote.slack == pytest.approx(quote.deadline)
        self.answers.append(quote)
        return commands


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_a_quote_changes_nothing_and_says_what_becomes_of_the_request(seed):
    world = QuotedWorld(seed)
    for _ in range(100):
        world.act()
    world.settle()
    world.check_that_all_ended()


@settings(max_examples=10)
@given(st.integers(0, 2**32))
def test_commands_are_the_same_with_and_without_quotes(seed):
    world = World(seed)
    for _ in range(100):
        world.act()
    first, second = (scheduler(plan=SINGLES, **world.settings) for _ in range(2))
    asked = [
        request(900, 20, 40),
        request(901, 20, 40, slo=Slo(seconds=3.0)),
        request(902, 9, 9, slo=Slo(multiple=2.0)),
    ]
    for call, *event in world.log:
        wanted = list(getattr(first, call)(*event))
        for one in asked:
            second.quotes.quote(msgspec.structs.replace(one, arrived_at=event[-1]), event[-1])
        assert list(getattr(second, call)(*event)) == wanted


def test_random_worlds_ask_for_quotes_of_all_kinds():
    found = []
    for seed in range(8):
        world = QuotedWorld(seed, looks=0.0)
        for _ in range(150):
            world.act()
        found += world.answers
    assert {(quote.admitted, quote.met) for quote in found} >= {
        (True, None),
        (True, True),
        (True, False),
        (False, False),
    }
    assert any(quote.never_feasible for quote in found)
    assert any(not quote.admitted and quote.met is None for quote in found)
    assert any(quote.wait for quote in found)


def one_instance(rows=0, **slo):
    machine = scheduler(scheduling="composed", max_num_seqs=8)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    for row in range(rows):
        feed(machine, Arrival(request(row, slo=Slo(**slo))))
    return machine


def test_an_idle_instance_keeps_a_far_deadline_and_not_one_shorter_than_the_answer():
    machine = one_instance()
    far, near = (machine.quotes.quote(request(1, slo=Slo(seconds=seconds)), 0.0) for seconds in (1e4, 1e-4))
    alone = machine.estimates.unloaded(machine.deadlines.arrived(request(1)))
    assert (far.met, far.threshold, far.wait) == (True, 0.9, 0.0)
    assert (far.finish, far.slack) == (pytest.approx(alone), pytest.approx(1e4 - alone))
    assert (near.met, near.admitted, near.never_feasible, near.retry_after) == (False, True, True, None)
    late = machine.quotes.quote(request(1, slo=Slo(seconds=1e-4, on_miss="reject")), 0.0)
    assert (late.admitted, late.never_feasible) == (False, True)


def test_a_deadline_that_load_alone_prevents_is_to_be_asked_for_again():
    alone = one_instance().estimates.unloaded(one_instance().deadlines.arrived(request(1)))
    machine = one_instance(rows=6, seconds=8 * alone)
    quote = machine.quotes.quote(request(9, slo=Slo(seconds=1.3 * alone)), 0.0)
    if quote.met is False:
        assert (quote.never_feasible, quote.retry_after > 0) == (False, True)
    full = machine.quotes.quote(request(9, slo=Slo(seconds=8 * alone)), 0.0, has_row=False)
    assert (full.admitted, full.retry_after > 0) == (False, True) or machine.placement.gives_way("")


def test_without_a_deadline_a_quote_says_when_it_would_start_and_end():
    machine = one_instance()
    idle = machine.quotes.quote(request(1), 0.0)
    alone = machine.estimates.unloaded(machine.deadlines.arrived(request(1)))
    assert (idle.admitted, idle.met, idle.wait, idle.finish) == (True, None, 0.0, pytest.approx(alone))
    busy = one_instance(rows=8).quotes.quote(request(9), 0.0)
    assert busy.wait > 0
    assert busy.finish > busy.wait + alone
    assert (busy.running, busy.waiting) == (8, 0)
    unknown = scheduler(guess=True).quotes.quote(request(1), 0.0)
    assert (unknown.admitted, unknown.wait, unknown.finish) == (True, None, None)


load = st.builds(Load, st.floats(1, 100), st.floats(0, 10))
deadline_rows = st.builds(DeadlineRow, st.floats(0.1, 50), st.floats(1, 100), st.floats(0, 10), st.just(1.0))


@given(load, st.lists(load, max_size=6), st.floats(0.001, 1))
def test_the_end_beside_others_is_that_of_all_ends_together(mine, others, fixed):
    place = sum(other.steps < mine.steps for other in others)
    assert end_beside(mine, others, fixed) == pytest.approx(ends([mine, *others], fixed)[place])


@given(deadline_rows, st.lists(deadline_rows, max_size=6), st.floats(0.001, 0.2))
def test_a_newcomer_that_fits_is_done_about_in_time(newcomer, residents, fixed):
    residents.sort(key=lambda row: row.left)
    seconds = finish(newcomer, residents, fixed)
    assert seconds >= newcomer.steps * fixed + newcomer.work - 1e-9
    if fits(newcomer, residents, fixed) is not None:
        assert 0.9 * seconds <= newcomer.left + 1e-9
