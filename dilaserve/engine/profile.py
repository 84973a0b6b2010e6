"""Where an engine's time went."""

import msgspec

from dilaserve.types import Event, StepDone, WorkerLost


class Profile(msgspec.Struct):
    """Where time went since the start: over all steps, the workers' seconds and the part inside the model;
    and the seconds in which the scheduler decided.
    """

    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    forward: float = 0.0
    decisions: int = 0
    deciding: float = 0.0
    changes: int = 0  # of the plan
    paused: float = 0.0  # seconds that rows have waited for them, the longest wait of each
    workers_lost: int = 0

    def count(self, event: Event) -> None:
        match event:
            case StepDone():
                self.steps += 1
                self.rows += len(event.results)
                self.seconds += event.seconds
                self.forward += event.forward
            case WorkerLost():
                self.workers_lost += 1
