"""Work that is not done yet: seconds that requests take alone, as was expected when they came."""

from dilaserve.scheduler.request_state import RequestState


class Backlog:
    """Sums over unfinished requests, those with a deadline that is being kept apart from the others."""

    def __init__(self) -> None:
        self.timed = self.best_effort = 0.0  # seconds
        self.requests = 0  # of best effort
        self.unfinished = 0  # requests of both kinds

    def add(self, state: RequestState) -> None:
        self.change(state, 1)

    def remove(self, state: RequestState) -> None:
        self.change(state, -1)

    def change(self, state: RequestState, sign: int) -> None:
        self.unfinished += sign
        if state.has_deadline:
            self.timed = max(0.0, self.timed + sign * state.seconds)
            return
        self.requests += sign
        self.best_effort = max(0.0, self.best_effort + sign * state.seconds) if self.requests else 0.0
