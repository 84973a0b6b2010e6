"""Which rows of an instance take its next step, and at which threshold."""

from collections.abc import Collection, Mapping, Sequence

from dilaserve.scheduler.batching import Batcher
from dilaserve.scheduler.deadlines import Deadlines
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.placement import ARRIVAL, Placement, turn
from dilaserve.scheduler.recent_minimum import RecentMinimum
from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.rules.admission import beyond_hope
from dilaserve.scheduler.rules.best_effort import STEP, may_lead
from dilaserve.scheduler.rules.composition import Candidate, within
from dilaserve.scheduler.rules.demand import alone
from dilaserve.scheduler.rules.thresholds import ThresholdChoice, ThresholdQuery, crowding

Choices = Mapping[int, ThresholdChoice]  # by row, of rows with deadlines


class StepSelection:
    """Asks the rules for an instance's next step.

    `tightest` are the shortest seconds from arrival to deadline lately, which bound steps without deadlines.
    """

    def __init__(self, deadlines: Deadlines, placement: Placement, batcher: Batcher, tightest: RecentMinimum) -> None:
        self.deadlines, self.placement, self.batcher, self.tightest = deadlines, placement, batcher, tightest
        self.estimates = deadlines.estimates

    def queries(self, replica: InstanceState, now: float) -> list[ThresholdQuery]:
        """What the threshold rule needs to know of each row with a deadline, in the order of service."""
        if self.deadlines.rank_moves:
            replica.with_deadline.sort(key=self.deadlines.rank)
        return [self.deadlines.query(state, now, replica.degree) for state in replica.with_deadline]

    def hopeless(self, replica: InstanceState, queries: Sequence[ThresholdQuery]) -> Collection[int]:
        """Places of the rows whose deadlines cannot be met whatever else is given up."""
        if not self.deadlines.sheds:
            return ()
        sure, fixed = self.deadlines.shed, self.estimates.pace(replica.degree).fixed
        needs = [alone(query.loads[query.deepest], fixed) if sure else 0.0 for query in queries]
        return beyond_hope([query.left for query in queries], needs)

    def choices(self, replica: InstanceState, queries: Sequence[ThresholdQuery]) -> Choices:
        """Threshold choices, and how many deadlines the instance is going to miss with them."""
        rows = [state.request.row for state in replica.with_deadline]
        choices = dict(zip(rows, self.deadlines.choices(queries, replica.degree), strict=True)) if rows else {}
        replica.late = sum(choice.late for choice in choices.values())
        replica.crowding = crowding([query.loads[0] for query in queries], self.estimates.pace(replica.degree).fixed)
        return choices

    def rows(self, replica: InstanceState, choices: Choices, now: float) -> list[Candidate]:
        """The rows of the step, short spans first."""
        found = self.candidates(replica, choices, now)
        if self.deadlines.admits and replica.with_deadline:  # deadlines that were admitted go before shares
            taken = self.batcher.keeping(replica, found)
        else:
            if self.deadlines.admits:
                found = within(found, STEP * self.tightest.at(now))
            sure = self.estimates.sure((replica.degree,))
            taken = self.batcher.shared(replica, found) if sure else self.batcher.fitting(found)
        if len(taken) > 1:
            taken.sort(key=lambda one: (one.tokens, replica.residents[one.key].request.canvas_tokens))
        return taken

    def candidates(self, replica: InstanceState, choices: Choices, now: float) -> list[Candidate]:
        """In the order of service."""
        found, degree = [], replica.degree
        for state in quarantined(self.served(replica, now)):
            ready = state.ready  # most of many rows are not in the step, and are as they were: no call for those
            if ready is None or ready.degree != degree:
                ready = self.batcher.ready(state, degree)
            candidate = ready.candidate
            if choices and (choice := choices.get(candidate.key)):
                candidate = Candidate(candidate.key, candidate.tokens, candidate.seconds, choice.slack)
            found.append(candidate)
        return found

    def served(self, replica: InstanceState, now: float) -> list[RequestState]:
        """Rows that may step, in the order of service.

        Rows with admitted deadlines go before the others. Of these one leads the step now and then, as far as their
        share of device time allows; those that reuse their K/V ride where deadlines have time to spare.
        """
        rows = replica.residents.values()
        if not self.deadlines.admits:
            return self.served_unadmitted(replica, now)
        rest = sorted([row for row in rows if not row.has_deadline], key=turn)
        if not replica.with_deadline:
            return rest
        lead = rest[:1] if may_lead(replica.saved) else []
        ride = [row for row in rest[len(lead) :] if not self.batcher.ready(row, replica.degree).work.refresh]
        return [*lead, *replica.with_deadline, *ride]

    def served_unadmitted(self, replica: InstanceState, now: float) -> list[RequestState]:
        """The same where deadlines are not tested: one order for all, but for one row that has aged."""
        rows, rank = replica.residents.values(), self.deadlines.rank
        oldest = min([row for row in rows if not row.has_deadline], key=ARRIVAL, default=None)
        if oldest and not self.placement.aged(oldest, now):
            oldest = None
        return sorted(rows, key=lambda row: (row is not oldest, row.late, rank(row), turn(row)))

    def apply(self, state: RequestState, choice: ThresholdChoice | None) -> bool:
        """Set the threshold of the row's next step and reserve what it may cost; whether the table's value changes."""
        if not (choice or state.level or state.table_threshold != state.thresholds[0]):
            return False
        # The rows before it may have spent what was left of the budget.
        level = min(choice.level, self.deadlines.ledger.deepest(state)) if choice else 0
        state.level = level
        if len(state.thresholds) > 1:
            spent, spends = state.drop, state.drops[level] if level else 0.0
            self.deadlines.ledger.reserve(state, spends if spends > spent else spent)
        changed = state.table_threshold != state.threshold
        state.table_threshold = state.threshold
        return changed


def quarantined(rows: list[RequestState]) -> list[RequestState]:
    """All rows, or the first suspect alone where there are suspects."""
    suspects = [row for row in rows if row.suspect]
    return suspects[:1] or rows
