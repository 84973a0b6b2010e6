"""Carries a plan out: instances that are not of it close between two steps, their rows move, and hung ones end."""

from collections.abc import Callable, Iterator

from dilaserve.scheduler.batching import Batcher
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.plan_change import PlanState
from dilaserve.scheduler.request_state import Phase, RequestState, Transition
from dilaserve.types import Change, Command, Kill, Moves, Reshard

MOVE_PATIENCE = 1.0  # seconds that rows of an old plan wait for its new instances, before they go on where room is
NEVER = float("inf")
Contained = Callable[[RequestState, Iterator[Command]], Iterator[Command]]


class PlanExecution:
    """Moves from the instances that there are to those of the wanted plan.

    `contained` ends a request whose handling raises, so that the others of its instance move all the same.
    """

    def __init__(self, plan_state: PlanState, placement: Placement, batcher: Batcher, contained: Contained) -> None:
        self.plan_state, self.placement, self.batcher, self.contained = plan_state, placement, batcher, contained
        self.move_by = NEVER  # when rows of an old plan wait no longer
        self.overdue_at = NEVER  # no step in flight counts as hung before

    def change(self, now: float) -> Iterator[Command]:
        """Close the instances that are not of the plan, as soon as their step is done, and open those that are missing.

        Instances of both plans are not touched.
        """
        if not self.plan_state.needs_reshape:
            return
        self.plan_state.needs_reshape = False
        if self.plan_state.wanted is None:
            self.plan_state.change = None
            return
        self.part_instances()
        ended = []
        for id, replica in list(self.placement.closing.items()):
            if replica.in_flight is None:
                yield from self.vacate(self.placement.closing.pop(id), now)
                ended.append(id)
        self.placement.instances_changed()
        there = [*self.placement.instances(), *self.plan_state.forming.values()]
        begun = self.plan_state.begun({rank for instance in there for rank in instance.ranks}, now)
        if ended or begun:
            yield Reshard(Moves(tuple(ended), tuple(begun)))

    def part_instances(self) -> None:
        """Instances that are of the plan stay or come back; the others close."""
        groups = set(self.plan_state.target().groups)
        replicas, closing = self.placement.replicas, self.placement.closing
        for id, replica in list(closing.items()):
            if replica.instance.ranks in groups and not replica.doomed:
                replicas[id] = closing.pop(id)
        for id, replica in list(replicas.items()):
            if replica.instance.ranks not in groups or replica.doomed:
                closing[id] = replicas.pop(id)

    def vacate(self, replica: InstanceState, now: float) -> Iterator[Command]:
        """The instance goes between two steps: its rows keep all committed tokens and lose their K/V.

        For a moment they wait for the new instances rather than crowd the old ones that stay.
        """
        if not self.placement.moving:
            self.move_by = now + MOVE_PATIENCE
        rows = list(replica.residents.values())
        if ends := [row.stepped_at for row in rows if row.steps]:
            self.plan_state.stopped |= dict.fromkeys(replica.instance.ranks, max(ends))
        for state in rows:
            yield from self.contained(state, self.vacated(state, replica))
        self.placement.moving += [state for state in rows if state.phase is Phase.WAITING]

    def vacated(self, state: RequestState, replica: InstanceState) -> Iterator[Command]:
        self.placement.unassign(state, replica)
        state.did(Transition.EVICTED)
        yield from ()

    def resume_moved_rows(self, now: float) -> None:
        """Rows of an old plan whose instances do not come in time go on wherever there is room."""
        if self.placement.moving and (now >= self.move_by or not (self.placement.closing or self.plan_state.forming)):
            moved_rows, self.placement.moving = self.placement.moving, []
            self.placement.wait_again(moved_rows)

    def kill_hung(self, now: float) -> Iterator[Command]:
        """Give up on instances whose step takes many times as long as predicted, or that do not come up."""
        if now < self.overdue_at and now < self.plan_state.form_by:
            return
        for replica in self.placement.all_replicas():
            if now >= replica.overdue_at:
                self.batcher.hung(replica, now)
                yield Kill(replica.instance.id, f"no answer to a step for {now - replica.launched_at:.3g} s")
        self.overdue_at = self.next_overdue()
        for id in self.plan_state.overdue(now):
            yield Kill(id, "the instance was not formed in time")

    def launched(self, replica: InstanceState, now: float) -> None:
        """A step has begun on the instance."""
        self.overdue_at = min(self.overdue_at, replica.overdue_at)
        if self.plan_state.stopped:
            self.plan_state.resumed(replica.instance.ranks, now)

    def completed(self, now: float) -> Change | None:
        """The change that is done now, if one is."""
        if self.plan_state.change is None or self.placement.closing:
            return None
        return self.plan_state.completed(self.placement.instances(), now)

    def paused(self, seconds: float) -> None:
        """The engine did not run for so long. What is under way gets the time again, and its step teaches nothing."""
        for replica in self.placement.all_replicas():
            if replica.in_flight is not None:
                replica.overdue_at += seconds
                replica.launched_at += seconds
                replica.disturbed = True
        self.plan_state.paused(seconds)
        self.overdue_at = self.next_overdue()

    def next_overdue(self) -> float:
        """When the first of the steps in flight counts as hung."""
        return min([replica.overdue_at for replica in self.placement.all_replicas()], default=NEVER)

    def wake_at(self) -> float:
        """When something is due here."""
        return min(self.plan_state.form_by, self.next_overdue(), self.move_by if self.placement.moving else NEVER)
