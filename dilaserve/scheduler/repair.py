"""Makes the scheduler's lists and counts agree again after a handler stopped half-way.

Its input is what each request and each batch in flight says of itself; everything that is derived from that is made
anew. It decides nothing: rows keep their tokens, and a row whose step never began, or was lost, refreshes.

1. Rows on an instance that ended, or that are in no batch although they say so, are put right or taken off.
2. Requests that say they are on an instance which does not know them wait again.
3. The queues, each instance's rows with deadlines and its pages, and the sums by tenant are made anew.
"""

from collections import Counter
from collections.abc import Mapping

from dilaserve.scheduler.backlog import Backlog
from dilaserve.scheduler.deadline_queue import DeadlineQueue
from dilaserve.scheduler.expiry import Expiry
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.placement import Placement, turn
from dilaserve.scheduler.request_state import RequestState, Status
from dilaserve.scheduler.waiting_queue import WaitingQueue


def repair(placement: Placement, requests: Mapping[str, RequestState]) -> list[int]:
    """Returns rows of the request table that no request uses and that were not released."""
    replicas = list(placement.all_replicas())
    free = [row for replica in replicas for row in end_step(replica, requests)]
    for state in requests.values():
        if not is_held(state, replicas):
            wait(state)
    for replica in replicas:
        derive(replica, placement)
    placement.deadlines.ledger.restore(requests.values())
    placement.held = Counter(row.request.slo.tenant for replica in replicas for row in replica.residents.values())
    moving = {id(row) for row in placement.moving}
    placement.moving = [row for row in requests.values() if row.status is Status.WAITING and id(row) in moving]
    placement.queue, placement.waiting, placement.hopeless = (
        DeadlineQueue(placement.deadlines.rank),
        WaitingQueue(turn),
        Expiry(),
    )
    for state in requests.values():
        if state.status is Status.WAITING and id(state) not in moving:
            placement.enter(state)
    placement.backlog = Backlog()
    for state in requests.values():
        placement.backlog.add(state)
    return free


def end_step(replica: InstanceState, requests: Mapping[str, RequestState]) -> list[int]:
    """Rows agree with the batch in flight; returns those that have ended and are in no step any more."""
    free = []
    in_flight = {id(row) for row in replica.in_flight or ()}
    for key, row in list(replica.residents.items()):
        if id(row) in in_flight:
            row.status = Status.STEPPING if requests.get(row.request.id) is row else Status.LEAVING
        elif requests.get(row.request.id) is row and row.replica is replica:
            if row.status is not Status.RESIDENT:
                row.status = Status.RESIDENT
                refresh(row)
        else:
            del replica.residents[key]
            if row.status is Status.LEAVING:
                row.status = Status.GONE
                free.append(key)
    return free


def is_held(state: RequestState, replicas: list[InstanceState]) -> bool:
    replica = state.replica
    return any(replica is one for one in replicas) and replica.residents.get(state.request.row) is state  # type: ignore[union-attr]


def wait(state: RequestState) -> None:
    state.status, state.replica = Status.WAITING, None
    refresh(state)


def refresh(state: RequestState) -> None:
    """The next step computes the row's K/V anew, and nothing that was worked out for it holds."""
    state.cached, state.loads, state.ready = 0, None, None


def derive(replica: InstanceState, placement: Placement) -> None:
    """The rows with deadlines of an instance in the order of service, and the pages that its rows own."""
    rows = replica.residents.values()
    with_deadline = [row for row in rows if row.has_deadline and row.status is not Status.LEAVING]
    replica.with_deadline[:] = sorted(with_deadline, key=placement.deadlines.rank)
    for start in set(replica.pages.runs) - {row.kv_start for row in rows}:
        replica.pages.give(start)
