"""Events: what rises to the scheduler from clients, workers, instances and the planner. Values only."""

from typing import TypeAlias

import msgspec

from dilaserve.types.plans import Instance, Plan
from dilaserve.types.requests import FinishReason, Request
from dilaserve.types.steps import RowResult


class Arrival(msgspec.Struct, frozen=True, gc=False):
    request: Request


class Cancel(msgspec.Struct, frozen=True, gc=False):
    """The client left (`cancelled`), or the text ended at a stop string (`stop`)."""

    id: str
    reason: FinishReason


class PrefixGrown(msgspec.Struct, frozen=True, gc=False):
    """More of a request's canvas is final: `hashes` of its next pages, which go behind `Request.prefix_hashes`."""

    id: str
    hashes: tuple[int, ...]


class StepDone(msgspec.Struct, frozen=True, gc=False):
    """A step is finished; `seconds` by the worker's clock, `forward` the part inside the model. `last`: its batch is,
    too.
    """

    instance: int
    batch: int
    results: tuple[RowResult, ...]
    seconds: float
    forward: float
    last: bool = True


class InstanceReady(msgspec.Struct, frozen=True, gc=False):
    instance: Instance


class InstanceLost(msgspec.Struct, frozen=True, gc=False):
    """A worker of the instance is gone, and the others have left it, so that none of them writes to its rows any more.

    The rows have lost their K/V and nothing else. `outside`: another process killed the worker, so no row is to blame.
    """

    instance: int
    reason: str
    outside: bool = False


class WorkerUp(msgspec.Struct, frozen=True, gc=False):
    """The worker may join instances; `kv_tokens` is what its pool holds at degree 1."""

    rank: int
    kv_tokens: int


class WorkerLost(msgspec.Struct, frozen=True, gc=False):
    """The worker is gone; if it belonged to an instance, `InstanceLost` follows once its peers have left that."""

    rank: int
    reason: str


class Paused(msgspec.Struct, frozen=True, gc=False):
    """The engine's own process did not run for so many seconds that have just passed, and perhaps no worker did."""

    seconds: float


class Replan(msgspec.Struct, frozen=True, gc=False):
    """A user wants this plan, which has been checked, and no other; None: from now on what the planner wants."""

    plan: Plan | None
    reason: str


class PlanReady(msgspec.Struct, frozen=True, gc=False):
    """The planner's answer to `Solve`; None: leave it as it is."""

    plan: Plan | None
    reason: str


class Full(msgspec.Struct, frozen=True, gc=False):
    """All rows of the request table are taken, and a request of this tenant needs one."""

    tenant: str


Event: TypeAlias = (
    Arrival
    | Full
    | Cancel
    | PrefixGrown
    | StepDone
    | InstanceReady
    | InstanceLost
    | WorkerUp
    | WorkerLost
    | Paused
    | Replan
    | PlanReady
)
