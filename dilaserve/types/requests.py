"""Requests: how they are decoded, what their client wants, what they cost. Values only."""

import warnings
from typing import Literal

import msgspec

from dilaserve.config import CacheKind
from dilaserve.types.families import DecodeRule, FamilyTraits

FinishReason = Literal["stop", "length", "cancelled"]
OnMiss = Literal["best_effort", "reject", "cancel_when_late"]
MAX_STOP_IDS = 32  # end tokens that one request may add to those of the model
MAX_TOP_LOGPROBS = 5  # alternatives of a token; each is a sweep over the vocabulary


class Decoding(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """How one row is decoded; every knob is per row.

    The rules: `threshold` unmasks what reaches a confidence; `steps` a fixed number of tokens each step, the most
    confident first (from `num_denoising_steps` for the answer or for each block, as `traits` say); `dynamic` what
    reaches the threshold, but no fewer than `steps` would; `sequential`, `entropy` and `margin` as many as `steps`,
    the leftmost first, those with the least entropy, or with the largest lead of the best token over the second;
    `factor` is Fast-dLLM's. One token at least, under all of them.

    `editing_threshold`: a token of the open block that is no mask any more is replaced by another of at least this
    confidence; None: never. `block_length` is that of the grid. `refresh_interval` counts steps between refreshes
    inside a block; 0 refreshes at block starts only. `top_p`, `top_k` (0: all) and `min_p` narrow the choice at a
    temperature above 0. `top_logprobs`: the most probable tokens of a position that are reported as it is unmasked.
    """

    rule: DecodeRule = "threshold"
    confidence_threshold: float = 0.9
    num_denoising_steps: int = 0
    factor: float = 1.0
    editing_threshold: float | None = None
    block_length: int = 32
    cache: CacheKind = "dual"
    refresh_interval: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    top_logprobs: int = 0
    traits: FamilyTraits = FamilyTraits()


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
    threshold, `on_miss` what to do when the deadline cannot be met. `tenant` owns the accuracy bank that pays, from
    `budget` points for each answer where that is less than everybody's. `task` names the quality profile, `name` the
    class of --slo-class. `fixed`: the threshold is the client's and stays.
    """

    seconds: float | None = None
    multiple: float | None = None
    weight: float = 1.0
    floor: float = 0.0
    on_miss: OnMiss = "best_effort"
    tenant: str = ""
    budget: float | None = None
    task: str | None = None
    name: str = ""
    fixed: bool = False


class Request(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A prompt that waits in, or runs from, a row of the request table.

    The canvas is `[0, prompt_tokens)` prompt and `[prompt_tokens, canvas_tokens)` masks; the client wants at most
    `max_tokens` of the latter. `prefix_hashes`: of the first PAGE tokens, of the first two times so many, …, as far as
    they are final, where K/V of equal beginnings are equal. `shows_canvas`: its client sees the block after each step.

    The client has `resumed_tokens` of the answer already. They stand in the row, and those of whole blocks are final;
    the others are put back when their positions are unmasked again. `ended`: how they end the answer, if they do.
    `elapsed`: seconds from `arrived_at` until it came here, for a request that had come to another server before.
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
    prefix_hashes: tuple[int, ...] = ()
    shows_canvas: bool = False
    resumed_tokens: int = 0
    ended: FinishReason | None = None
    elapsed: float = 0.0

    @property
    def begin(self) -> int:
        """The canvas position of the first token that the client does not have."""
        return self.prompt_tokens + self.resumed_tokens

    @property
    def received_at(self) -> float:
        """When it came to this server."""
        return self.arrived_at + self.elapsed


class Usage(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a finished request has cost; seconds since arrival until its first step, and from there to the end.

    `deadline` counts from arrival. `expected_accuracy_drop` is in percentage points of accuracy against the reference
    threshold, that of `min_threshold`; `cached_prompt_tokens` are those of the prompt whose K/V another request had
    computed; `device` are the seconds of its instance that its part of the steps has taken.

    Where the time went: `alone` are the seconds that it was expected to take with nothing else on the server,
    `stepping` those of all steps that it took part in, whole (the rest of `served` it waited between steps), and
    `restarts` counts how often it lost its K/V: to another request, a change of plan, or a lost worker.
    `resumed_tokens`: those of the answer that the client had before; all else counts what is new.
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
    cached_prompt_tokens: int = 0
    alone: float = 0.0
    stepping: float = 0.0
    restarts: int = 0
    resumed_tokens: int = 0

    @property
    def expected_drop(self) -> float:
        warnings.warn("expected_drop is deprecated; read expected_accuracy_drop", DeprecationWarning, stacklevel=2)
        return self.expected_accuracy_drop


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler would say now of a request that is not submitted; lengths of time in seconds.

    `admitted`: it would not be declined or refused on arrival, by its own `on_miss`. `met`: the test says that its
    `deadline`, counted from now, would be met; None without a deadline, and where it is not tested: while step costs
    are a guess, or no instance has run for long. Where it would be met: by how much (`slack`), and at which confidence
    `threshold`. Where it would not: whether that is `never_feasible`, or else after how long to ask again.

    `wait` and `finish` are expected until its first step and its end; None where that is not known. `running` and
    `waiting` count the requests that there are.
    """

    admitted: bool
    deadline: float | None = None
    met: bool | None = None
    slack: float | None = None
    threshold: float | None = None
    never_feasible: bool = False
    retry_after: float | None = None
    wait: float | None = None
    finish: float | None = None
    running: int = 0
    waiting: int = 0


class Load(msgspec.Struct, frozen=True, gc=False):
    """What one row still needs at one threshold: steps, and seconds of device time beyond each step's fixed part."""

    steps: float
    work: float
