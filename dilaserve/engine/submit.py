"""What a caller may ask for, checked against what the model and the configuration allow."""

import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from dilaserve.config import CacheKind, DecodeConfig
from dilaserve.errors import BadRequest, ConfigError, quoted
from dilaserve.types import MAX_STOP_IDS, DecodeRule, Decoding, Ending, OnMiss, Schedule, Slo
from dilaserve.validation import converted, plain, whole

MAX_STOPS, MAX_STOP_LENGTH = 16, 1024
MAX_TENANT_LENGTH = 512  # characters; tenants are remembered
MOST_STEPS = 4096  # denoising steps of an answer whose schedule may have more steps than tokens
MAX_DEADLINE = 86_400_000.0  # milliseconds: a day
RENAMED = {
    "tenant": ("user", 1),
    "deadline": ("deadline_ms", 1000),
}  # old name: the new one, and its units in an old one
KNOBS: dict[str, DecodeRule] = {
    "confidence_threshold": "threshold",
    "num_denoising_steps": "steps",
    "factor": "factor",
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The wishes of one request; None leaves a knob to the configuration.

    Without `decode` the rule follows from the knob that is given: `confidence_threshold` (unmask what reaches it),
    `num_denoising_steps` (a fixed number of steps over the whole canvas) or `factor` (Fast-dLLM's rule).

    At a temperature above 0 the token is drawn from the `top_k` most probable ones (0 or -1: all), of those only from
    the smallest set that has the probability `top_p`, and never from those less probable than `min_p` times the best.

    The answer ends at an end token of the model (unless `ignore_eos`), at one of `stop_token_ids`, or at a `stop`
    string, and has what ended it in its text with `include_stop_str_in_output`. It does not end before `min_tokens`
    tokens: no end token is chosen for a position before, even if one later in the canvas is unmasked earlier, and no
    stop string that is complete before counts.

    `deadline_ms` is in milliseconds from arrival, or `slo_class` names a deadline that was configured; `on_miss` says
    what becomes of the request when it cannot be met. `priority` n counts 2ⁿ times as much as 0; without a deadline
    each level is a head start of a minute over other requests of the same user. `min_confidence_threshold` bounds
    threshold control, which leaves alone a request that states its `confidence_threshold`. `user` is the tenant that
    owns the accuracy budget, `task` names a quality profile.

    `deadline` (in seconds) and `tenant` are old names of `deadline_ms` and `user`; they raise a `DeprecationWarning`.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    decode: DecodeRule | None = None
    confidence_threshold: float | None = None
    num_denoising_steps: int | None = None
    factor: float | None = None
    block_length: int | None = None
    cache: CacheKind | None = None
    refresh_interval: int = 0
    ignore_eos: bool = False
    deadline_ms: float | None = None
    slo_class: str | None = None
    on_miss: OnMiss = "best_effort"
    priority: int = 0
    min_confidence_threshold: float | None = None
    user: str = ""
    task: str | None = None
    # old names
    deadline: float | None = None
    tenant: str | None = None

    def __post_init__(self) -> None:
        for old, (new, scale) in RENAMED.items():
            if getattr(self, old) is not None:
                units = " (in milliseconds)" if scale != 1 else ""
                warnings.warn(f"Options({old}=…) is deprecated; write {new}{units}", DeprecationWarning, stacklevel=2)


class SloClass(NamedTuple):
    """A configured deadline: a multiple of the unloaded latency, or seconds, or neither; and what it is worth."""

    multiple: float | None
    seconds: float | None
    weight: float


class ResolvedOptions(NamedTuple):
    """A checked request: the layout of its canvas and how to decode it."""

    canvas_tokens: int
    max_tokens: int
    decoding: Decoding


def resolve(
    options: Options, prompt_tokens: int, limit: int, seed: int, defaults: DecodeConfig, schedule: Schedule = "even"
) -> ResolvedOptions:
    """Fill in what is left open and lay out the canvas, at most `limit` tokens.

    The options are `validated`. The answer's region is rounded up to whole blocks where the canvas has room. Raises
    `BadRequest`.
    """
    rule = rule_of(options)
    block_length = options.block_length or defaults.block_length
    max_tokens = answer_length(options, prompt_tokens, limit, defaults)
    canvas_tokens = min(prompt_tokens + -(-max_tokens // block_length) * block_length, limit)
    block_length = min(block_length, canvas_tokens - prompt_tokens)
    steps = steps_of(options, rule, canvas_tokens - prompt_tokens, block_length, schedule)
    threshold = defaults.confidence_threshold if options.confidence_threshold is None else options.confidence_threshold
    decoding = Decoding(
        rule=rule,
        schedule=schedule,
        confidence_threshold=threshold,
        num_denoising_steps=steps,
        factor=1.0 if options.factor is None else options.factor,
        block_length=block_length,
        cache=options.cache or defaults.cache,
        refresh_interval=options.refresh_interval,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=max(0, options.top_k),
        min_p=options.min_p,
        seed=seed if options.seed is None else options.seed,
    )
    return ResolvedOptions(canvas_tokens, max_tokens, decoding)


def validated(options: Options | None) -> Options:
    """The options with the type and the range of every field checked, and old names replaced.

    Whatever passes is safe for the scheduler and the workers. Raises `BadRequest`, which names the field.
    """
    if options is None:
        return Options()
    if not isinstance(options, Options):
        kind = type(options).__name__
        raise BadRequest(
            f"options must be dilaserve.Options, not {kind}; write Options(max_tokens=32)", param="options"
        )
    found = converted(renamed({name: plain(getattr(options, name)) for name in Options.__struct_fields__}), Options)
    check(found)
    return found


def renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without old names, whose values go to the new ones."""
    for old, (new, scale) in RENAMED.items():
        value = fields.pop(old)
        if value is None:
            continue
        if type(fields[new]) not in (str, type(None)) or fields[new]:
            raise BadRequest(f"{old} is an old name of {new}; give {new} alone", param=new)
        fields[new] = value * scale if type(value) in (int, float) else value
    return fields


def check(options: Options) -> None:
    """Every number inside its limits, or `BadRequest` for the first that is not."""
    within("temperature", options.temperature, 0.0, 2.0)
    within("top_p", options.top_p, 0.0, 1.0)
    within("top_k", options.top_k, -1, 2**31 - 1)
    within("min_p", options.min_p, 0.0, 1.0)
    within("min_tokens", options.min_tokens, 0, 2**31 - 1)
    within("confidence_threshold", options.confidence_threshold, 0.0, 1.0)
    within("factor", options.factor, 0.0, 1e6)
    within("seed", options.seed, -(2**63), 2**63 - 1)
    within("max_tokens", options.max_tokens, 1, 2**31)
    within("block_length", options.block_length, 1, 2**31)
    within("num_denoising_steps", options.num_denoising_steps, 1, 2**63 - 1)
    within("refresh_interval", options.refresh_interval, 0, 2**31)
    within("priority", options.priority, -8, 8)
    within("min_confidence_threshold", options.min_confidence_threshold, 0.0, 1.0)
    if options.deadline_ms is not None and not 0.0 < options.deadline_ms <= MAX_DEADLINE:
        raise BadRequest(f"deadline_ms must be above 0 and at most {MAX_DEADLINE:.0f} (a day)", param="deadline_ms")
    if options.top_p == 0.0:
        raise BadRequest("top_p must be above 0", param="top_p")
    for name, text in {"user": options.user, "task": options.task or "", "stop": "".join(options.stop)}.items():
        whole(text, name)
    if len(options.user) > MAX_TENANT_LENGTH:
        raise BadRequest(f"user has at most {MAX_TENANT_LENGTH} characters, not {len(options.user)}", param="user")
    if len(options.stop) > MAX_STOPS:
        raise BadRequest(f"at most {MAX_STOPS} stop strings are allowed, not {len(options.stop)}", param="stop")
    if len(options.stop_token_ids) > MAX_STOP_IDS:
        raise BadRequest(
            f"at most {MAX_STOP_IDS} stop_token_ids are allowed, not {len(options.stop_token_ids)}",
            param="stop_token_ids",
        )
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in options.stop):
        raise BadRequest(f"a stop string has 1 to {MAX_STOP_LENGTH} characters", param="stop")


def wanted(options: Options, classes: Mapping[str, SloClass]) -> Slo:
    """The deadline and its terms; raises `BadRequest` for an unknown class, or for a class and a deadline at once."""
    seconds = None if options.deadline_ms is None else options.deadline_ms / 1000
    multiple, weight = None, 2.0**options.priority
    if options.slo_class is not None:
        if seconds is not None:
            raise BadRequest("deadline_ms and slo_class exclude each other; give one", param="slo")
        if options.slo_class not in classes:
            known = ", ".join(sorted(classes)) or "none are configured (--slo-class)"
            raise BadRequest(f"unknown class {quoted(options.slo_class)}; known: {known}", param="slo_class")
        multiple, seconds, share = classes[options.slo_class]
        weight *= share
    return Slo(
        seconds=seconds,
        multiple=multiple,
        weight=weight,
        floor=options.min_confidence_threshold or 0.0,
        on_miss=options.on_miss,
        tenant=options.user,
        task=options.task,
        fixed=options.confidence_threshold is not None,
    )


CLASS = re.compile(
    r"(?P<name>[\w.-]+)=(?:(?P<x>\d+(?:\.\d+)?)x|(?P<ms>\d+(?:\.\d+)?)ms|none)(?:\*(?P<weight>\d+(?:\.\d+)?))?"
)


def parse_classes(text: str) -> dict[str, SloClass]:
    """`chat=2.0x*3,fast=800ms,batch=none` as classes by name; raises `ConfigError`."""
    classes = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = CLASS.fullmatch(part)
        if not found or found["name"] in classes:
            raise ConfigError(
                f"--slo-class {part!r} is not NAME=2.0x, NAME=800ms or NAME=none, each once, with *WEIGHT behind",
                param="slo_class",
            )
        multiple = float(found["x"]) if found["x"] else None
        seconds = float(found["ms"]) / 1000 if found["ms"] else None
        if not all(0.0 < value < 1e9 for value in (multiple, seconds) if value is not None):
            raise ConfigError(f"--slo-class {part!r}: a deadline is above 0 and finite", param="slo_class")
        weight = float(found["weight"] or 1.0)
        if not 0.0 < weight < 1e9:
            raise ConfigError(f"--slo-class {part!r}: a weight is above 0 and finite", param="slo_class")
        classes[found["name"]] = SloClass(multiple, seconds, weight)
    return classes


def within(name: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:  # NaN is not
        low, high = (bound if isinstance(bound, int) else f"{bound:g}" for bound in (least, most))
        raise BadRequest(f"{name} must lie between {low} and {high}, not {quoted(value)}", param=name)


def rule_of(options: Options) -> DecodeRule:
    given = [knob for knob in KNOBS if getattr(options, knob) is not None]
    if len(given) > 1:
        raise BadRequest(f"{given[0]} and {given[1]} belong to different decode rules; give one", param=given[1])
    rule = options.decode or (KNOBS[given[0]] if given else "threshold")
    if given and KNOBS[given[0]] != rule:
        raise BadRequest(f"{given[0]} has no meaning under decode {rule!r}", param=given[0])
    if rule == "steps" and not given:
        raise BadRequest("decode 'steps' needs num_denoising_steps", param="num_denoising_steps")
    return rule


def answer_length(options: Options, prompt_tokens: int, limit: int, defaults: DecodeConfig) -> int:
    room = limit - prompt_tokens
    if prompt_tokens == 0:
        raise BadRequest("the prompt is empty", param="prompt")
    if room < 1:
        raise BadRequest(
            f"this model's maximum context length is {limit} tokens, and a prompt of {prompt_tokens} tokens leaves no "
            "room for an answer; shorten it",
            param="prompt",
            code="context_length_exceeded",
        )
    default = min(max(defaults.default_max_tokens, options.min_tokens), room)
    wanted = default if options.max_tokens is None else options.max_tokens
    if wanted > room:
        raise BadRequest(
            f"this model's maximum context length is {limit} tokens, and a prompt of {prompt_tokens} with max_tokens "
            f"{wanted} exceeds it; lower max_tokens to {room} or less",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if options.min_tokens > wanted:
        raise BadRequest(
            f"min_tokens {options.min_tokens} exceeds the answer's {wanted} tokens; lower it or raise max_tokens",
            param="min_tokens",
        )
    return wanted


def steps_of(options: Options, rule: DecodeRule, answer: int, block_length: int, schedule: Schedule) -> int:
    if rule != "steps":
        return 0
    blocks, steps = -(-answer // block_length), options.num_denoising_steps or 0
    if steps < blocks:
        raise BadRequest(
            f"num_denoising_steps must be at least {blocks} (one a block), not {steps}", param="num_denoising_steps"
        )
    return min(steps, answer if schedule == "even" else MOST_STEPS)


def ending(options: Options) -> Ending:
    return Ending(ignore_eos=options.ignore_eos, stop_ids=options.stop_token_ids, min_tokens=options.min_tokens)
