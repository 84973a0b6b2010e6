"""Commands: what the scheduler asks of the engine. Values only."""

from typing import TypeAlias

import msgspec

from dilaserve.types.plans import Change, Demand, Moves
from dilaserve.types.requests import FinishReason, Request, Usage
from dilaserve.types.steps import Batch, StepKind


class Launch(msgspec.Struct, frozen=True, gc=False):
    batch: Batch


class Emit(msgspec.Struct, frozen=True, gc=False):
    """The canvas is final up to `prefix`."""

    request: Request
    prefix: int


class Denoised(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A step is done of a request that shows its canvas: `[start, end)` is the part of the open block that is answer.

    `step` counts from 1, `block` from 0. `refresh`: the step has rewritten K/V that are kept; one of kind `commit` may
    have. `threshold` is the one in force, None under rules without one.
    """

    request: Request
    step: int
    kind: StepKind
    refresh: bool
    block: int
    start: int
    end: int
    threshold: float | None


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The request has ended; nothing more of it is emitted."""

    request: Request
    reason: FinishReason
    usage: Usage


class Fail(msgspec.Struct, frozen=True):
    """The request could not be finished; `reason` is for the log, `for_client` for the client. `error` is what its
    handling has raised, if that is why. `usage`: None where its state is in doubt.
    """

    request: Request
    reason: str
    for_client: str
    error: Exception | None = None
    usage: Usage | None = None


class Decline(msgspec.Struct, frozen=True, gc=False):
    """The deadline cannot be met and the client does not want the answer late.

    `retry_after` seconds make sense for one that never started; None: it had started and has been given up.
    `never_feasible`: it would not make it even if nothing else ran.
    """

    request: Request
    usage: Usage
    retry_after: float | None
    never_feasible: bool = False


class Refuse(msgspec.Struct, frozen=True, gc=False):
    """A request that has not started finds no place, or gives its own to another tenant's; `retry_after` in seconds.
    `too_much`: there is a place, but too much work without deadlines waits.
    """

    request: Request
    retry_after: float
    usage: Usage
    too_much: bool = False


class Adjust(msgspec.Struct, frozen=True, gc=False):
    """The row is decoded at this confidence threshold from its next step on."""

    row: int
    threshold: float


class Release(msgspec.Struct, frozen=True, gc=False):
    """No step in flight touches the row any more; it may be given away."""

    row: int


class Reshard(msgspec.Struct, frozen=True, gc=False):
    moves: Moves


class Reshaped(msgspec.Struct, frozen=True, gc=False):
    """All instances of the wanted plan are up."""

    change: Change


class Kill(msgspec.Struct, frozen=True, gc=False):
    """The instance's step takes so long that the instance counts as hung."""

    instance: int
    reason: str


class StopEarly(msgspec.Struct, frozen=True, gc=False):
    """Another request waits for the instance: its batch ends with the step that is under way."""

    batch: Batch


class Solve(msgspec.Struct, frozen=True, gc=False):
    """Ask the planner; `PlanReady` is the answer."""

    demand: Demand


Command: TypeAlias = (
    Launch
    | StopEarly
    | Adjust
    | Emit
    | Denoised
    | Finish
    | Fail
    | Decline
    | Refuse
    | Release
    | Reshard
    | Reshaped
    | Kill
    | Solve
)
