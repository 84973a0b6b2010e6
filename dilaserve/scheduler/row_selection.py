"""Which rows of an instance take its next step, in the order of service, and at which confidence thresholds."""

from collections.abc import Iterator, Mapping, Sequence

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
from dilaserve.scheduler.rules.thresholds import ThresholdChoice, ThresholdQuery
from dilaserve.types import Adjust


class RowSelection:
    """Selects rows by the policies. `tightest`: the shortest recent deadline, in seconds from arrival."""

    def __init__(self, placement: Placement, deadlines: Deadlines, batcher: Batcher, tightest: RecentMinimum) -> None:
        self.placement, self.deadlines, self.batcher, self.tightest = placement, deadlines, batcher, tightest
        self.estimates = deadlines.estimates

    def queries(self, replica: InstanceState, now: float) -> list[ThresholdQuery]:
        """What the rule of thresholds asks of each row with a deadline, in the order of service."""
        return [self.deadlines.threshold_query(state, now, replica.degree) for state in replica.with_deadline]

    def beyond_hope(self, replica: InstanceState, queries: Sequence[ThresholdQuery]) -> list[int]:
        """Places of the rows whose deadlines are lost, if hopeless work is given up at all."""
        if not self.deadlines.sheds:
            return []
        fixed, sure = self.estimates.pace(replica.degree).fixed, self.deadlines.shed
        needs = [alone(query.loads[query.deepest], fixed) if sure else 0.0 for query in queries]
        return beyond_hope([query.left for query in queries], needs)

    def selected(self, replica: InstanceState, choices: Mapping[int, ThresholdChoice], now: float) -> list[Candidate]:
        """The rows of the next step, sorted by the length of their part."""
        candidates = self.composed(replica, self.candidates(replica, choices, now), now)
        if len(candidates) > 1:
            candidates.sort(key=lambda one: (one.tokens, replica.residents[one.key].request.canvas_tokens))
        return candidates

    def composed(self, replica: InstanceState, found: list[Candidate], now: float) -> list[Candidate]:
        """Those of the candidates that fit into one step. Rows with admitted deadlines go before shares of tenants."""
        if self.deadlines.admits and replica.with_deadline:
            return self.batcher.keeping(replica, found)
        if self.deadlines.admits:
            found = within(found, STEP * self.tightest.at(now))
        sure = self.estimates.sure((replica.degree,))
        return self.batcher.shared(replica, found) if sure else self.batcher.fitting(found)

    def adjusted(
        self, replica: InstanceState, candidates: Sequence[Candidate], choices: Mapping[int, ThresholdChoice]
    ) -> Iterator[Adjust]:
        """Set the thresholds of the rows that step; yields those that differ from the request table."""
        for candidate in candidates:
            state = replica.residents[candidate.key]
            choice = choices.get(state.request.row)
            if choice or state.level or state.table_threshold != state.thresholds[0]:
                self.apply_threshold(state, choice)
                if state.table_threshold != (threshold := state.threshold):
                    state.table_threshold = threshold
                    yield Adjust(state.request.row, threshold)

    def choices(self, replica: InstanceState, queries: Sequence[ThresholdQuery]) -> dict[int, ThresholdChoice]:
        """Threshold choices by row, of rows with deadlines."""
        rows = [state.request.row for state in replica.with_deadline]
        return dict(zip(rows, self.deadlines.choose_thresholds(queries, replica.degree), strict=True)) if rows else {}

    def candidates(self, replica: InstanceState, choices: Mapping[int, ThresholdChoice], now: float) -> list[Candidate]:
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
        """The rows that may step, in the order of service.

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

    def apply_threshold(self, state: RequestState, choice: ThresholdChoice | None) -> None:
        """The threshold of the row's next step, and what it may cost."""
        deepest = self.deadlines.ledger.deepest  # asked again, as rows before it may have spent since
        state.level = level = min(choice.level, deepest(state)) if choice else 0
        if len(state.thresholds) > 1:
            spent, spends = state.drop, state.drops[level] if level else 0.0
            self.deadlines.ledger.reserve(state, spends if spends > spent else spent)


def quarantined(rows: list[RequestState]) -> list[RequestState]:
    """Without suspects all, else the first of these alone."""
    suspects = [row for row in rows if row.suspect]
    return suspects[:1] or rows
