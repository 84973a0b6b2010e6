"""The rules of the scheduler: examples of each, and a property that holds for all inputs."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.scheduler.rules.accuracy_budget import CREDIT, Bank, affordable_level, budget_left, charged, price
from dilaserve.scheduler.rules.admission import (
    COMPANY,
    HELD,
    KEPT,
    DeadlineRow,
    Room,
    beyond_hope,
    fits,
    hopeless,
    least_loaded,
    place_in,
    retry_after,
)
from dilaserve.scheduler.rules.composition import COMPOSITIONS, Candidate, in_order, within_slack
from dilaserve.scheduler.rules.demand import alone, drifted, ends, load
from dilaserve.scheduler.rules.fairness import (
    Ride,
    Turns,
    allowances,
    gives_way,
    granted,
    in_turn,
    left_over,
    riders,
    start,
)
from dilaserve.scheduler.rules.ordering import without_deadline
from dilaserve.scheduler.rules.thresholds import ThresholdQuery, by_slack, crowding, fixed_levels, moved
from dilaserve.types import Load


def together(loads, fixed):
    """Seconds until rows are done that run together, the slow way: the longest row's steps pay the fixed part."""
    return max([load.steps for load in loads], default=0.0) * fixed + sum(load.work for load in loads)


def test_admission_prefers_the_emptiest_instance_and_skips_full_ones():
    rooms = [Room(0, 3, 4), Room(1, 4, 4), Room(2, 1, 4), Room(3, 1, 4)]
    assert least_loaded(rooms) == [2, 3, 0]
    assert least_loaded([Room(0, 0, 4, 1.0), Room(1, 1, 16, 0.4), Room(2, 2, 16, 0.4)]) == [1, 0, 2]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9))))
def test_admission_names_every_instance_with_room_once(pairs):
    rooms = [Room(i, residents, limit) for i, (residents, limit) in enumerate(pairs)]
    assert sorted(least_loaded(rooms)) == [
        budget_left.instance for budget_left in rooms if budget_left.residents < budget_left.limit
    ]


def keys(chosen):
    return [candidate.key for candidate in chosen]


def test_first_come_first_served_takes_what_fits_in_order():
    residents = [Candidate(2, 50), Candidate(1, 60), Candidate(3, 40), Candidate(4, 10)]
    assert keys(in_order(residents, 100, 9)) == [2, 3, 4]
    assert keys(in_order(residents, 10, 9)) == [2]
    assert keys(in_order(residents, 100, 2)) == [2, 3]


@given(st.sampled_from(list(COMPOSITIONS)), st.lists(st.integers(1, 600), min_size=1), st.integers(1, 1000))
def test_the_first_always_steps_and_the_rest_fit(kind, tokens, limit):
    residents = [Candidate(i, size, size / 1000, 0.5) for i, size in enumerate(tokens)]
    chosen = keys(COMPOSITIONS[kind](residents, limit, 8))
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen) <= 8
    assert sum(tokens[key] for key in chosen) <= max(limit, tokens[0])


def test_a_cheap_row_joins_the_step_and_a_costly_one_waits_while_the_first_has_little_slack():
    first, reuse, refresh = Candidate(0, 32, 0.001, 0.01), Candidate(1, 32, 0.001, 1.0), Candidate(2, 900, 0.03, 1.0)
    assert keys(within_slack([first, reuse, refresh], 10_000, 9)) == [0, 1]
    assert keys(within_slack([msgspec.structs.replace(first, slack=0.1), reuse, refresh], 10_000, 9)) == [0, 1, 2]


@given(st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 1)), min_size=1))
def test_rows_join_a_step_only_within_the_slack_of_the_first(rows):
    candidates = [Candidate(i, 1, seconds, slack) for i, (seconds, slack) in enumerate(rows)]
    chosen = keys(within_slack(candidates, 10_000, len(rows)))
    for key, (_, slack) in enumerate(rows):
        joined_later = sum(rows[other][0] for other in chosen if other > key)
        assert joined_later <= slack + 1e-9


LOADS = st.builds(Load, st.floats(0, 100), st.floats(0, 10))


@given(st.lists(LOADS), LOADS, st.floats(0, 0.1))
def test_a_batch_takes_longer_than_one_row_and_no_longer_than_its_rows_in_sequence(loads, more, fixed):
    before, after = together(loads, fixed), together([*loads, more], fixed)
    assert before <= after <= before + alone(more, fixed) + 1e-9
    assert together([more], fixed) == alone(more, fixed)


@given(st.floats(0, 500), st.floats(0, 500))
def test_drift_stays_near_one(observed, expected):
    assert 0.6 <= drifted(observed, expected) <= 1.8
    assert drifted(0, 0) == 1.0


def test_a_request_has_no_more_refreshes_than_steps():
    assert load(2.0, 5.0, 1.0, 0.1, 0.01) == Load(2.0, 0.2)
    assert load(10.0, 2.0, 1.0, 0.1, 0.01) == Load(10.0, pytest.approx(0.28))


ROWS = st.builds(DeadlineRow, st.floats(0.01, 10), st.floats(1, 50), st.floats(0, 5), st.sampled_from([0.5, 1.0, 2.0]))


@given(ROWS, st.lists(ROWS, max_size=6), st.floats(0.0001, 0.05))
def test_an_admitted_row_takes_no_slack_from_rows_of_equal_weight(newcomer, residents, fixed):
    residents = sorted(residents, key=lambda row: row.left)
    slack = fits(newcomer, residents, fixed)
    batch = sorted([*residents, newcomer], key=lambda row: row.left)
    if slack is None:
        return
    for row in residents:
        if row.weight < newcomer.weight:
            continue
        before = [Load(one.steps, one.work) for one in residents if residents.index(one) <= residents.index(row)]
        after = [Load(one.steps, one.work) for one in batch if batch.index(one) <= batch.index(row)]
        if HELD * together(before, fixed) <= row.left - 1e-9:
            assert HELD * together(after, fixed) <= row.left + 1e-9


def test_a_row_whose_deadline_is_lost_does_not_block_admission():
    newcomer = DeadlineRow(1.0, 10, 0.1, 1.0)
    blocked = [fits(newcomer, [DeadlineRow(left, 10, 1.0, 1.0)], 0.01) is None for left in (1.5, 1.4, 1.3)]
    assert blocked == [False, True, False]  # with the margin: 1.32 s without the newcomer, 1.44 s with it


@given(ROWS, st.floats(0.0001, 0.05))
def test_an_empty_instance_admits_any_request_that_can_be_in_time(newcomer, fixed):
    slack = newcomer.left - newcomer.steps * fixed - newcomer.work
    assert (fits(newcomer, [], fixed) is not None) == (
        slack > 0 and newcomer.left - COMPANY * (newcomer.left - slack) >= KEPT * slack
    )


@given(st.lists(st.tuples(st.floats(-1, 10), st.floats(0, 10)), max_size=8))
def test_infeasible_requests_are_shed_except_the_last_one_with_time_left(rows):
    left, needs = [row[0] for row in rows], [row[1] for row in rows]
    lost = beyond_hope(left, needs)
    assert all(hopeless(left[place], needs[place]) for place in lost)
    kept = [place for place in range(len(rows)) if place not in lost]
    tried = [place for place in kept if hopeless(left[place], needs[place])]
    assert not tried or kept == tried
    assert len(tried) <= 1
    if rows and not kept:
        assert left[max(lost, key=lambda place: left[place] - needs[place])] <= 0.0


WISHES = st.tuples(st.floats(-1, 10), st.floats(1, 50), st.integers(0, 3), st.integers(0, 3))


@given(st.lists(WISHES, max_size=8), st.integers(0, 1))
def test_thresholds_never_go_below_what_is_allowed_nor_above_the_floor(rows, floor):
    wishes = [
        ThresholdQuery(left, [Load(steps / (level + 1), 0.0) for level in range(4)], *deep)
        for left, steps, *deep in rows
    ]
    for wish, verdict in zip(wishes, by_slack(wishes, floor, 0.01), strict=True):
        assert min(floor, wish.deepest) <= verdict.level <= wish.deepest
        assert verdict.slack >= 0.0
    assert all(verdict.level == 0 for verdict in fixed_levels(wishes, floor, 0.01))


def test_a_row_short_of_time_runs_at_a_lower_threshold():
    loads = [Load(100, 0.0), Load(70, 0.0), Load(50, 0.0)]
    levels = [by_slack([ThresholdQuery(left, loads, 2, 2)], 0, 0.01)[0].level for left in (2.1, 1.5, 1.1, 0.4, 0.3)]
    assert levels == [0, 1, 2, 2, 0]  # points would not save the last one


def test_a_small_accuracy_budget_lowers_thresholds_of_late_rows_only_unless_rows_crowd():
    loads = [Load(100, 0.0), Load(70, 0.0), Load(50, 0.0)]
    wishes = [ThresholdQuery(left, loads, 2, 1) for left in (1.5, 1.1, 0.76)]
    assert [by_slack([wish], 0, 0.01)[0].level for wish in wishes] == [1, 1, 2]
    assert [by_slack([wish], 1, 0.01)[0].level for wish in wishes] == [1, 2, 2]
    assert [affordable_level((0.0, 0.5, 0.9, 2.0), budget) for budget in (0.0, 0.6, 0.9, 5.0)] == [0, 1, 2, 3]
    assert affordable_level((1.6, 6.9), 0.9) == 0


def test_the_threshold_floor_follows_the_share_of_late_rows_and_crowding():
    quiet = [moved(0, 0.3, 0.0, 1), moved(1, 0.3, 0.0, 1), moved(1, 0.1, 0.0, 1), moved(1, 0.01, 0.0, 1)]
    assert [*quiet, moved(0, 0.0, 0.0, 1)] == [1, 1, 1, 0, 0]
    crowded = [moved(0, 0.0, 2.0, 1), moved(0, 0.0, 1.0, 1), moved(1, 0.0, 1.0, 1), moved(1, 0.01, 0.5, 1)]
    assert crowded == [1, 0, 1, 0]


@given(st.lists(st.builds(Load, st.floats(1, 50), st.floats(0, 5)), min_size=1, max_size=8), st.floats(0.001, 1.0))
def test_crowding_is_zero_for_a_single_row_and_at_most_the_number_of_rows(loads, fixed):
    assert crowding([], fixed) == 0.0
    assert crowding(loads[:1], fixed) == 0.0
    several = [*loads, loads[0]]
    assert 1.0 - 1e-9 <= crowding(several, fixed) <= len(several) + 1e-9
    assert crowding([Load(9.0, 0.0)] * 3, fixed) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), min_size=200, max_size=400), st.floats(0.1, 2.0))
def test_the_bank_holds_the_mean_drop_within_its_budget(wishes, budget):
    bank = Bank()
    for drop, late in wishes:
        taken = drop if late and drop <= budget_left(bank, budget) else 0.0
        bank = charged(bank, taken)
        assert bank.spent <= budget * (bank.served + CREDIT) + 1e-9


@given(st.floats(0.3, 2.0), st.floats(0.2, 1.0), st.floats(2.0, 5.0))
def test_accuracy_points_are_spent_where_they_save_most_steps(budget, poor, better):
    """Of two kinds of requests that would each take all there is, the one that saves more a point gets nearly all."""
    bank, taken = Bank(), {poor: 0.0, better * poor: 0.0}
    for turn in range(4000):
        yields = list(taken)[turn % 2]
        left = budget_left(bank, budget)
        drop = 3.0 if yields >= price(left, budget) and left >= 3.0 else 0.0
        taken[yields] += drop if turn > 1000 else 0.0
        bank = charged(bank, drop)
    rich = min(1.5, budget) * 3000  # what comes in, or all that they can take
    assert taken[better * poor] >= 0.6 * rich
    assert taken[better * poor] >= taken[poor]


def test_a_cancelled_answer_is_charged_in_full_and_adds_budget_for_its_tokens_only():
    bank = charged(charged(Bank(), 2.0, share=0.25), 0.0)
    assert bank == Bank(spent=2.0, served=1.25)


def test_what_is_reserved_for_running_requests_cannot_be_spent_twice():
    assert budget_left(Bank(), 0.9, pending=40.0) == 0.9 * CREDIT - 40.0
    assert budget_left(Bank(), 0.9, pending=50.0) == 0.0
    assert budget_left(Bank(spent=100.0), 0.9) == 0.0


@given(st.floats(0, 1e6), st.integers(0, 64))
def test_retry_after_is_a_sensible_wait(backlog, instances):
    assert 0.1 <= retry_after(backlog, instances) <= 60.0


SIZES = st.lists(st.floats(0.01, 5.0), min_size=1, max_size=40)


@given(st.dictionaries(st.sampled_from("abcd"), SIZES, min_size=1))
def test_tenants_with_work_waiting_get_equal_service_within_the_largest_requests(lines):
    """Also in any part of the time: none starves, and a tenant alone gets every row."""
    turns, queues, service = Turns(), {tenant: list(line) for tenant, line in lines.items()}, dict.fromkeys(lines, 0.0)
    most = {tenant: max(line) for tenant, line in lines.items()}
    while all(queues.values()):
        tenant = min(queues, key=lambda name: start(turns, name))
        seconds = queues[tenant].pop(0)
        turns, service[tenant] = granted(turns, tenant, seconds), service[tenant] + seconds
        for one in lines:
            assert all(abs(service[one] - service[other]) <= most[one] + most[other] + 1e-6 for other in lines)
    if len(lines) == 1:
        assert service == {tenant: pytest.approx(sum(line)) for tenant, line in lines.items()}


@given(st.dictionaries(st.sampled_from("abcd"), SIZES, min_size=1))
def test_a_waiting_request_is_queued_once_and_in_the_order_of_its_tenant(lines):
    numbered = {tenant: [(tenant, place) for place in range(len(line))] for tenant, line in lines.items()}
    order = list(in_turn(numbered, Turns(), lambda row: lines[row[0]][row[1]]))
    assert sorted(order) == sorted(row for line in numbered.values() for row in line)
    for tenant, line in numbered.items():
        assert [row for row in order if row[0] == tenant] == line
    assert {row[0] for row in order[: len(lines)]} == set(lines)  # the first of each before the second of any


def test_a_new_tenant_is_next_and_has_no_credit_for_the_past():
    turns = Turns()
    for _ in range(100):
        turns = granted(turns, "busy", 1.0)
    assert list(in_turn({"busy": [0, 0, 0], "new": [1, 1, 1]}, turns, lambda row: 1.0)) == [1, 0, 1, 0, 1, 0]
    assert len(turns.until) == 1


def test_the_tenant_with_most_rows_loses_rows_until_it_has_no_more_than_the_new_tenant():
    assert gives_way({"a": 9}, {"a": 10}, "b") == "a"
    assert gives_way({"a": 9}, {"a": 10}, "a") is None
    assert gives_way({"a": 3, "b": 2}, {"a": 6, "b": 4}, "b") == "a"
    assert gives_way({"a": 3, "b": 2}, {"a": 5, "b": 5}, "b") is None
    assert gives_way({}, {"a": 10}, "b") is None  # all of them run


RIDES = st.lists(st.builds(Ride, st.sampled_from("abc"), st.floats(0.002, 0.1)), min_size=1, max_size=12)


@given(RIDES, st.floats(0.0001, 0.05))
def test_tenants_in_one_batch_share_the_step_time_and_each_has_a_row_in_it(rides, fixed):
    credits, spent = {}, dict.fromkeys({ride.tenant for ride in rides}, 0.0)
    wants = {tenant: sum(ride.seconds for ride in rides if ride.tenant == tenant) for tenant in spent}
    for _ in range(60):
        allowed = allowances(rides, credits, fixed)
        rode = riders(rides, allowed)
        assert rode
        assert len(set(rode)) == len(rode)
        credits = left_over(rides, allowed, rode)
        for place in rode:
            spent[rides[place].tenant] += rides[place].seconds
    for one in spent:
        assert spent[one] > 0.0
        for other in spent:
            if wants[one] > wants[other] > fixed:  # who wants more gets no less, and hardly more
                assert spent[other] - 0.3 <= spent[one] + 1e-9
    if len(spent) == 1:
        assert riders(rides, {tenant: float("inf") for tenant in spent}) == list(range(len(rides)))


def test_priority_moves_a_request_forward_by_a_bounded_time():
    assert without_deadline(100.0, 2.0) < without_deadline(41.0, 1.0) < without_deadline(120.0, 2.0)
    assert without_deadline(0.0, 0.5) < without_deadline(61.0, 1.0)


@given(st.lists(st.builds(Load, st.floats(1, 50), st.floats(0, 5)), min_size=1, max_size=8), st.floats(0.001, 0.1))
def test_rows_that_run_together_end_in_order_and_the_last_when_all_is_done(loads, fixed):
    found = ends(loads, fixed)
    assert found == pytest.approx(sorted(found))
    assert found[-1] == pytest.approx(together(loads, fixed))
    assert ends(loads[:1], fixed) == [pytest.approx(alone(loads[0], fixed))]


def test_refused_requests_get_different_retry_times():
    assert [place_in([2.0, 1.0], number) for number in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, 4.0]
    assert place_in([], 1) == 5.0
    assert place_in([100.0], 9) == 60.0
