"""Types of the whole package: requests, spans, batches, instances, plans; events that rise, commands that descend.

Values only; nothing here behaves.
"""

import warnings
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from dilaserve.config import CacheKind

DecodeRule = Literal["threshold", "steps", "factor"]
FinishReason = Literal["stop", "length", "cancelled"]
OnMiss = Literal["best_effort", "reject", "cancel_when_late"]
MAX_STOP_IDS = 32  # end tokens of a request's own
PAGE = 32  # tokens of K/V that are handed out together; one block of the default length


# Requests


class Decoding(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """How one row is decoded; every knob is per row.

    `threshold` unmasks what reaches a confidence, `steps` a fixed number of tokens each step (LLaDA's own loop, from
    `num_denoising_steps` over the whole canvas), `factor` Fast-dLLM's rule. `refresh_interval` counts steps between
    refreshes inside a block; 0 refreshes at block starts only. `top_p`, `top_k` (0: all) and `min_p` narrow the choice
    at a temperature above 0.
    """

    rule: DecodeRule = "threshold"
    confidence_threshold: float = 0.9
    num_denoising_steps: int = 0
    factor: float = 1.0
    block_length: int = 32
    cache: CacheKind = "dual"
    refresh_interval: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


class Ending(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Which tokens end a row's answer: those of the model unless `ignore_eos`, and `stop_ids`.

    None of them is chosen for the first `min_tokens` positions of the answer, so that it cannot end before.
    """

    ignore_eos: bool = False
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0


class Slo(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What the client wants besides the answer.

    `seconds` from arrival to the end, or `multiple` of what the request would take alone at the reference threshold;
    neither: no deadline. `weight` says what the request is worth against others, `floor` is its least confidence
    threshold, `on_miss` what to do when the deadline cannot be met. `tenant` owns the accuracy bank that pays, `task`
    names the quality profile. `fixed`: the threshold is the client's and stays.
    """

    seconds: float | None = None
    multiple: float | None = None
    weight: float = 1.0
    floor: float = 0.0
    on_miss: OnMiss = "best_effort"
    tenant: str = ""
    task: str | None = None
    fixed: bool = False


class Request(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A prompt that waits in, or runs from, a row of the request table.

    The canvas is `[0, prompt_tokens)` prompt and `[prompt_tokens, canvas_tokens)` masks; the client wants at most
    `max_tokens` of the latter.
    """

    id: str
    row: int
    generation: int
    prompt_tokens: int
    canvas_tokens: int
    max_tokens: int
    arrived_at: float
    decoding: Decoding
    slo: Slo = Slo()


class Usage(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a finished request has cost; seconds since arrival until its first step, and from there to the end.

    `deadline` counts from arrival. `expected_accuracy_drop` is in percentage points of accuracy against the reference
    threshold, that of `min_threshold`; `device` are the seconds of its instance that its part of the steps has taken.
    `expected_drop` is an old name of `expected_accuracy_drop`, and raises a `DeprecationWarning`.
    """

    steps: int
    refreshes: int
    queued: float
    served: float
    mean_confidence: float | None
    deadline: float | None = None
    deadline_met: bool | None = None
    min_threshold: float | None = None
    mean_threshold: float | None = None
    expected_accuracy_drop: float = 0.0
    device: float = 0.0

    @property
    def expected_drop(self) -> float:
        warnings.warn("expected_drop is deprecated; read expected_accuracy_drop", DeprecationWarning, stacklevel=2)
        return self.expected_accuracy_drop


class Load(msgspec.Struct, frozen=True, gc=False):
    """What one row still needs at one threshold: steps, and seconds of device time beyond each step's fixed part."""

    steps: float
    work: float


# Steps


class Span(NamedTuple):
    """One row's part of a step; positions count from the start of its canvas.

    Queries are positions `[start, start + length)`; they see the row's first `keys` positions, whose K/V lie in the
    pool from token `kv_start` on. Masks are filled in `[block_start, block_end)` only. `quota` is the number of tokens
    to unmask under the steps rule; `step` numbers the row's steps, for its random stream.
    """

    row: int
    generation: int
    kv_start: int
    start: int
    length: int
    keys: int
    block_start: int
    block_end: int
    quota: int
    step: int


class RowResult(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What one step did to one row.

    `prefix` is the first position of the active block still masked (its end if none), `stop_at` the first stop token
    in the block (-1 if none counts), `confidence` the sum over the tokens unmasked.

    `stage` says what the step was: the row's first span in the batch (0) or one that follows it (n + 1: the n-th of its
    `then`). `rested`: an earlier step of the batch has done the block, so that the row took no part.
    """

    row: int
    generation: int
    unmasked: int
    masks_left: int
    prefix: int
    stop_at: int
    confidence: float
    stage: int = 0
    rested: bool = False


class Batch(msgspec.Struct, frozen=True, gc=False):
    """The rows that share a forward pass on one instance, and others after it, up to `steps` in all; there is a
    `StepDone` for each.

    `then` are the spans that follow each row's first, if `steps` is more than 1: the next one is taken up after a step,
    or when the block is done if it is of another block. The batch ends with a step after which a row has none, or no
    mask before a stop token, or all together too many tokens for a step. Another may have begun by then, in which a row
    whose block is done rests.
    """

    id: int
    instance: int
    spans: tuple[Span, ...]
    steps: int = 1
    then: tuple[tuple[Span, ...], ...] = ()


class Instance(msgspec.Struct, frozen=True, gc=False):
    """One copy of the model on a TP group; `kv_tokens` is the size of its K/V pool. No two ever have the same id."""

    id: int
    ranks: tuple[int, ...]
    kv_tokens: int


# Plans


class Plan(msgspec.Struct, frozen=True, gc=False):
    """Which devices form instances: groups of ranks, sorted within and among each other."""

    groups: tuple[tuple[int, ...], ...]


class Moves(msgspec.Struct, frozen=True, gc=False):
    """From one plan to another: instances that are no more, none of which has a step in flight, and new ones."""

    ends: tuple[int, ...]
    begins: tuple[Instance, ...]


class Change(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A change of plan that is done.

    `seconds` from `at`, when it was asked for, until all instances were up; `pause` is the longest time that rows have
    waited between their last step on an old instance and the first on a new one, None if no row was moved.
    """

    at: float
    before: Plan
    after: Plan
    reason: str
    seconds: float
    pause: float | None


class Flow(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Requests of one kind: mean tokens of canvas and answer, mean deadline over the time alone on one device (None: no
    deadline), and how many came in a second.
    """

    canvas_tokens: int
    answer_tokens: int
    tightness: float | None
    rate: float


class Demand(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The recent traffic and the present plan, as the planner sees them. `backlog` counts requests that wait for a row,
    `ended` those that have come and gone under this plan lately, of which `met` were in time for their deadline.
    """

    seconds: float
    flows: tuple[Flow, ...]
    backlog: int
    plan: Plan
    ranks: tuple[int, ...]
    degrees: tuple[int, ...]
    met: int = 0
    ended: int = 0


# Events


class Arrival(msgspec.Struct, frozen=True, gc=False):
    request: Request


class Cancel(msgspec.Struct, frozen=True, gc=False):
    """The client left (`cancelled`), or the text ended at a stop string (`stop`)."""

    id: str
    reason: FinishReason


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

    The rows have lost their K/V and nothing else. `outside`: somebody else killed the worker, so that no row can be the
    reason.
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
    """Somebody wants this plan, which has been checked, and no other; None: from now on what the planner wants."""

    plan: Plan | None
    reason: str


class PlanReady(msgspec.Struct, frozen=True, gc=False):
    """The planner's answer to `Solve`; None: leave it as it is."""

    plan: Plan | None
    reason: str


class Full(msgspec.Struct, frozen=True, gc=False):
    """Every place is taken and a request of this tenant wants one."""

    tenant: str


Event: TypeAlias = (
    Arrival
    | Full
    | Cancel
    | StepDone
    | InstanceReady
    | InstanceLost
    | WorkerUp
    | WorkerLost
    | Paused
    | Replan
    | PlanReady
)


# Commands


class Launch(msgspec.Struct, frozen=True, gc=False):
    batch: Batch


class Emit(msgspec.Struct, frozen=True, gc=False):
    """The canvas is final up to `prefix`."""

    request: Request
    prefix: int


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The request has ended; nothing more of it is emitted."""

    request: Request
    reason: FinishReason
    usage: Usage


class Fail(msgspec.Struct, frozen=True):
    """The request could not be finished; `reason` is for the log, `for_client` for the client. `error` is what its
    handling has raised, if that is why.
    """

    request: Request
    reason: str
    for_client: str
    error: Exception | None = None


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
    """A waiting request that has not started gives its place to another tenant's; `retry_after` in seconds."""

    request: Request
    retry_after: float


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
    """The wanted plan stands."""

    change: Change


class Kill(msgspec.Struct, frozen=True, gc=False):
    """The instance's step takes so long that it must be taken for dead."""

    instance: int
    reason: str


class StopEarly(msgspec.Struct, frozen=True, gc=False):
    """Somebody waits for the instance: its batch ends with the step that is under way."""

    batch: Batch


class Solve(msgspec.Struct, frozen=True, gc=False):
    """Ask the planner; `PlanReady` is the answer."""

    demand: Demand


Command: TypeAlias = (
    Launch | StopEarly | Adjust | Emit | Finish | Fail | Decline | Refuse | Release | Reshard | Reshaped | Kill | Solve
)
