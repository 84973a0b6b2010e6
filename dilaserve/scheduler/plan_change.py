"""Which instances there are, which there should be, and the change from one to the other. Remembers, has no clock."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from dilaserve.plans import shrunk
from dilaserve.scheduler.rules.time_limits import forming_limit
from dilaserve.types import PAGE, Change, Instance, Plan


class PlanState:
    """The wanted plan, the workers that are up, and the instances that are being formed, for `patience` seconds each.

    Without a wanted plan, instances are taken as they come.
    """

    def __init__(self, wanted: Plan | None, degrees: Sequence[int], patience: float) -> None:
        self.wanted, self.degrees, self.patience = wanted, tuple(degrees), patience
        self.workers: dict[int, int] = {}  # K/V tokens at degree 1, by rank
        self.forming: dict[int, Instance] = {}
        self.next_id = 0
        self.limits: dict[int, float] = {}  # when each of them counts as hung
        self.hung: Counter[int] = Counter()  # that were not formed in time, in a row, by degree
        self.needs_reshape = False  # something has happened that may call for moves
        self.change: Pending | None = None
        self.stopped: dict[int, float] = {}  # end of the last step with rows, by rank whose instance is no more

    def target(self) -> Plan:
        """The wanted plan, as far as workers are up."""
        return shrunk(self.wanted, self.workers, self.degrees) if self.wanted else Plan(())

    @property
    def whole(self) -> bool:
        """Whether all workers of the wanted plan are up."""
        return self.wanted is None or self.target() == self.wanted

    def asked(self, at: float, before: Iterable[Instance], reason: str) -> None:
        """Something calls for another layout; a change that is not done yet goes on as part of this one."""
        self.needs_reshape = True
        if self.change is None:
            self.change = Pending(at, plan_of(before))
        if reason not in self.change.reasons:
            self.change.at, self.change.reasons = at, [*self.change.reasons[-2:], reason]

    @property
    def form_by(self) -> float:
        """When the first of the instances that are being formed counts as hung."""
        return min(self.limits.values(), default=math.inf)

    def begun(self, busy: set[int], now: float) -> list[Instance]:
        """The groups of the target whose devices are all free, as instances that are being formed from now on."""
        begins = []
        for group in self.target().groups:
            if busy.isdisjoint(group):
                room = min(self.workers[rank] for rank in group) // PAGE * PAGE * len(group)
                begins.append(Instance(self.next_id, group, room))
                self.next_id += 1
        for instance in begins:
            self.forming[instance.id] = instance
            self.limits[instance.id] = self.limit(instance, now)
        return begins

    def limit(self, instance: Instance, now: float) -> float:
        return math.ceil(now + forming_limit(self.patience, self.hung[len(instance.ranks)]))

    def formed(self, instance: Instance) -> None:
        self.over(instance.id)
        self.needs_reshape = True
        del self.hung[len(instance.ranks)]

    def over(self, instance: int) -> None:
        """The instance is not being formed any more."""
        self.forming.pop(instance, None)
        self.limits.pop(instance, None)

    def overdue(self, now: float) -> list[int]:
        """The instances that should have been formed by now; each is given its time once more until it is lost."""
        late = [id for id, limit in self.limits.items() if now >= limit]
        for id in late:
            self.hung[len(self.forming[id].ranks)] += 1
            self.limits[id] = self.limit(self.forming[id], now)
        return late

    def paused(self, seconds: float) -> None:
        """What is being formed gets the time again in which nothing ran."""
        self.limits = {id: limit + seconds for id, limit in self.limits.items()}

    def resumed(self, ranks: Sequence[int], now: float) -> None:
        """The first step of a new instance: its rows have waited since the earliest end of its devices' last ones."""
        stops = [self.stopped.pop(rank) for rank in ranks if rank in self.stopped]
        if stops and self.change:
            self.change.pause = max(self.change.pause or 0.0, now - min(stops))

    def completed(self, there: Iterable[Instance], now: float) -> Change | None:
        """The change that is done now, if one is: the instances are those of the target, and nothing is on its way."""
        if self.change is None or self.forming or (after := plan_of(there)) != self.target():
            return None
        change, self.change = self.change, None
        self.stopped.clear()
        return Change(
            at=change.at,
            before=change.before,
            after=after,
            reason="; ".join(change.reasons),
            seconds=now - change.at,
            pause=change.pause,
        )


class Pending:
    """A change that is not done yet."""

    def __init__(self, at: float, before: Plan) -> None:
        self.at, self.before = at, before
        self.reasons: list[str] = []
        self.pause: float | None = None


def plan_of(instances: Iterable[Instance]) -> Plan:
    return Plan(tuple(sorted(instance.ranks for instance in instances)))
