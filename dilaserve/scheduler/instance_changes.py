"""How instances come and go: a change of plan, a hung step, a lost worker; and what becomes of the rows on them.

Rows keep all committed tokens and lose their K/V; their next step refreshes.
"""

from collections.abc import Iterator

from dilaserve.scheduler.batching import Batcher
from dilaserve.scheduler.endings import Endings
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.plan_change import PlanState
from dilaserve.scheduler.request_state import RequestState, Status, Transition
from dilaserve.types import Command, Fail, Instance, Kill, Moves, Release, Reshard

MOVE_PATIENCE = 1.0  # seconds that rows of an old plan wait for its new instances, before any instance may take them
NEVER = float("inf")


class InstanceChanges:
    """Opens, closes and loses instances. `overdue_at`: no step in flight counts as hung before."""

    def __init__(self, placement: Placement, plan_state: PlanState, batcher: Batcher, endings: Endings) -> None:
        self.placement, self.plan_state, self.batcher, self.endings = placement, plan_state, batcher, endings
        self.move_by = NEVER  # when rows of an old plan wait no longer for its new instances
        self.overdue_at = NEVER

    def opened(self, instance: Instance) -> None:
        """The instance is up: it may take rows, those of an old plan first."""
        self.plan_state.formed(instance)
        self.placement.replicas[instance.id] = InstanceState(instance)
        self.placement.instances_changed()
        self.placement.move_to(instance, self.plan_state.forming.values())

    def launched(self, replica: InstanceState, now: float) -> None:
        """A step has begun on the instance: note when it counts as hung, and that rows of an old plan go on."""
        self.overdue_at = min(self.overdue_at, replica.overdue_at)
        if self.plan_state.stopped:
            self.plan_state.resumed(replica.instance.ranks, now)

    def lost(self, instance: int, reason: str, outside: bool, now: float) -> Iterator[Command]:
        """The instance is lost, or could not be formed."""
        self.plan_state.over(instance)
        self.plan_state.needs_reshape = True
        if replica := self.placement.replicas.pop(instance, None) or self.placement.closing.pop(instance, None):
            self.placement.instances_changed()
            yield from self.evict(replica, reason, outside, now)

    def change_plan(self, now: float) -> Iterator[Command]:
        """Close the instances that are not of the plan, as soon as their step is done, and open those that are missing.

        Instances of both plans are not touched.
        """
        if not self.plan_state.needs_reshape:
            return
        self.plan_state.needs_reshape = False
        if self.plan_state.wanted is None:
            self.plan_state.change = None
            return
        self.sort_by_plan()
        ends = []
        for id, replica in list(self.placement.closing.items()):
            if replica.in_flight is None:
                yield from self.vacate(self.placement.closing.pop(id), now)
                ends.append(id)
        self.placement.instances_changed()
        there = [*self.placement.instances(), *self.plan_state.forming.values()]
        begins = self.plan_state.begun({rank for instance in there for rank in instance.ranks}, now)
        if ends or begins:
            yield Reshard(Moves(tuple(ends), tuple(begins)))

    def sort_by_plan(self) -> None:
        """Instances of the target plan run, the others close."""
        groups = set(self.plan_state.target().groups)
        for id, replica in list(self.placement.closing.items()):
            if replica.instance.ranks in groups and not replica.doomed:
                self.placement.replicas[id] = self.placement.closing.pop(id)
        for id, replica in list(self.placement.replicas.items()):
            if replica.instance.ranks not in groups or replica.doomed:
                self.placement.closing[id] = self.placement.replicas.pop(id)

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
            yield from self.endings.contained(state, self.vacated(state, replica))
        self.placement.moving += [state for state in rows if state.status is Status.WAITING]

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

    def next_overdue(self) -> float:
        """When the first of the steps in flight counts as hung."""
        return min([replica.overdue_at for replica in self.placement.all_replicas()], default=NEVER)

    def paused(self, seconds: float) -> None:
        """What is under way gets the time again, and its step teaches nothing of what steps cost."""
        for replica in self.placement.all_replicas():
            if replica.in_flight is not None:
                replica.overdue_at += seconds
                replica.launched_at += seconds
                replica.disturbed = True
        self.plan_state.paused(seconds)
        self.overdue_at = self.next_overdue()

    def evict(self, replica: InstanceState, reason: str, outside: bool, now: float) -> Iterator[Command]:
        """The instance is lost: its rows wait again, where they were in the order; they keep all committed tokens.

        Those in flight are suspected of it, unless it was killed from outside: the next step of each is taken alone,
        and if that is lost too, so are they.
        """
        rows = list(replica.residents.values())
        for state in rows:
            yield from self.endings.contained(state, self.row_lost(state, replica, reason, outside, now))
        self.placement.wait_again([state for state in rows if state.status is Status.WAITING])

    def row_lost(
        self, state: RequestState, replica: InstanceState, reason: str, outside: bool, now: float
    ) -> Iterator[Command]:
        """One row of an instance that is lost."""
        stepping = state.status is Status.STEPPING and not outside
        if stepping and state.suspect:
            for_client = "the request failed twice on our side; it was given up"
            why = f"in flight at two lost workers in a row, the last: {reason}"
            yield from self.endings.gone(
                state, Fail(state.request, why, for_client, usage=state.usage(now)), now, "failed"
            )
        leaving = state.status is Status.LEAVING
        state.suspect |= stepping
        self.placement.unassign(state, replica)
        state.did(Transition.EVICTED)
        if leaving:
            yield Release(state.request.row)

    def fail_large(self, now: float) -> Iterator[Command]:
        """All workers are back, some with less memory than before: rows that fit on no instance end."""
        for state in list(self.endings.requests.values()):
            if state.replica is None and not self.placement.ever_fits(state):
                tokens = state.request.canvas_tokens
                reason = f"a canvas of {tokens} tokens has no place any more: a worker came back with less memory"
                fail = Fail(state.request, reason, f"{reason}; lower max_tokens", usage=state.usage(now))
                yield from self.endings.gone(state, fail, now, "failed")
