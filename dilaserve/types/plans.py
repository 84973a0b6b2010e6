"""Instances and plans: which devices run the model together, and how that changes. Values only."""

import msgspec

PAGE = 32  # tokens of K/V that are allocated together; one block of the default length


class Instance(msgspec.Struct, frozen=True, gc=False):
    """One copy of the model on a TP group; `kv_tokens` is the size of its K/V pool. No two ever have the same id."""

    id: int
    ranks: tuple[int, ...]
    kv_tokens: int


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
    `ended` those that recently came and ended under this plan, of which `met` were on time for their deadline.
    """

    seconds: float
    flows: tuple[Flow, ...]
    backlog: int
    plan: Plan
    ranks: tuple[int, ...]
    degrees: tuple[int, ...]
    met: int = 0
    ended: int = 0
