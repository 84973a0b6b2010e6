"""What a caller may ask for, checked against what the model and the configuration allow."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from dilaserve.config import CacheKind, DecodeConfig
from dilaserve.engine import noise_options
from dilaserve.errors import BadRequest, ConfigError, quoted
from dilaserve.types import MAX_STOP_IDS, MAX_TOP_LOGPROBS, DecodeRule, Decoding, Ending, FamilyTraits, OnMiss
from dilaserve.validation import converted, plain, whole

MAX_STOPS, MAX_STOP_LENGTH = 16, 1024
MAX_TENANT_LENGTH = 512  # characters; tenants are remembered
MOST_STEPS = 4096  # denoising steps of an answer whose schedule may have more steps than tokens
MAX_DEADLINE = 86_400_000.0  # milliseconds: a day
RENAMED = {
    "tenant": ("user", 1),
    "deadline": ("deadline_ms", 1000),
}  # old name: the new one, and its units in an old one
KNOBS: dict[str, tuple[DecodeRule, ...]] = {  # the rules under which a knob has a meaning; without `decode` the first
    "confidence_threshold": ("threshold", "dynamic"),
    "num_denoising_steps": ("steps", "dynamic", "sequential", "entropy", "margin", "entropy-bound"),
    "factor": ("factor",),
}
NO_EDITS = "this model's family does not replace tokens that are unmasked; leave editing_threshold out"
DEFAULT_BLOCK = 32  # tokens


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The wishes of one request; None leaves a knob to the configuration.

    Without `decode` the rule follows from the knob that is given: `confidence_threshold` (unmask what reaches it),
    `num_denoising_steps` (a fixed number of steps over the whole canvas, or in each block where the family's authors
    count so), both (`dynamic`: what reaches the threshold, but no fewer than the steps ask for) or `factor`
    (Fast-dLLM's rule). `sequential`, `entropy` and `margin` go by the number of steps and unmask the leftmost, the
    least entropy or the largest lead first. The model's family says which rules it knows. `editing_threshold`, for
    families that were trained to correct themselves: tokens of the open block are replaced by others that are at least
    so probable.

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
    owns the accuracy budget, of `accuracy_budget` points where that is less than --accuracy-budget; `task` names a
    quality profile. `top_logprobs`: how many of the most probable tokens of each position chunks carry, as they were
    in the step that unmasked it; 5 at most.

    `resume_token_ids`: tokens of the answer that its client has already, from this or another server. The answer goes
    on behind them and has only what is new; `max_tokens`, `min_tokens`, `stop` and `seed` mean the whole answer. With
    the options of the first request, and its seed above temperature 0, all of it is what it would have been without the
    break, as far as equal steps give equal tokens: not under thresholds that deadlines lower.

    `elapsed_ms`: milliseconds since the request came to the first server that had it; its deadline, and its place in
    the order of arrivals, count from then.

    `include_canvas`: a stream has chunks between the others that show the open block after each step, and no text.

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
    editing_threshold: float | None = None
    block_length: int | None = None
    cache: CacheKind | None = None
    refresh_interval: int = 0
    ignore_eos: bool = False
    deadline_ms: float | None = None
    slo_class: str | None = None
    on_miss: OnMiss = "best_effort"
    priority: int = 0
    min_confidence_threshold: float | None = None
    top_logprobs: int = 0
    user: str = ""
    accuracy_budget: float | None = None
    task: str | None = None
    include_canvas: bool = False
    resume_token_ids: tuple[int, ...] = ()
    elapsed_ms: float = 0.0
    # old names
    deadline: float | None = None
    tenant: str | None = None

    def __post_init__(self) -> None:
        for old, (new, scale) in RENAMED.items():
            if getattr(self, old) is not None:
                units = " (in milliseconds)" if scale != 1 else ""
                warnings.warn(f"Options({old}=…) is deprecated; write {new}{units}", DeprecationWarning, stacklevel=2)


class ResolvedOptions(NamedTuple):
    """A checked request: the layout of its canvas and how to decode it."""

    canvas_tokens: int
    max_tokens: int
    decoding: Decoding


def resolve(
    options: Options,
    prompt_tokens: int,
    limit: int,
    seed: int,
    defaults: DecodeConfig,
    traits: FamilyTraits = FamilyTraits(),  # noqa: B008 - a frozen value
) -> ResolvedOptions:
    """Fill in what is left open and lay out the canvas, at most `limit` tokens.

    The options are `validated`. The answer's region is rounded up to whole blocks where the canvas has room. Raises
    `BadRequest`.
    """
    if traits.noise_steps:
        noise_options.check({name: getattr(options, name) for name in noise_options.USUAL}, traits.block_length)
    rule = rule_of(options, traits)
    cache = cache_of(options, defaults, traits)
    block_length = options.block_length or defaults.block_length or traits.block_length or DEFAULT_BLOCK
    if traits.noise_steps and traits.block_length:
        block_length = traits.block_length
    max_tokens = answer_length(options, prompt_tokens, limit, defaults)
    begin = prompt_tokens if traits.grid == "prompt" else prompt_tokens // block_length * block_length
    end = prompt_tokens + max_tokens
    canvas_tokens = min(begin + -(-(end - begin) // block_length) * block_length, limit)
    if traits.noise_steps:
        noise_options.check_room(prompt_tokens, canvas_tokens - begin, block_length, limit)
    origin = prompt_tokens if traits.grid == "prompt" else 0
    block_length = min(block_length, canvas_tokens - origin)  # estimates take time and memory with the block's length
    steps = steps_of(options, rule, canvas_tokens - begin, block_length, traits)
    threshold = options.confidence_threshold
    editing = defaults.editing_threshold if options.editing_threshold is None else options.editing_threshold
    if editing is not None and not traits.edits:
        raise BadRequest(NO_EDITS, param="editing_threshold")
    decoding = Decoding(
        editing_threshold=editing,
        rule=rule,
        confidence_threshold=default_threshold(defaults, traits) if threshold is None else threshold,
        num_denoising_steps=steps,
        factor=1.0 if options.factor is None else options.factor,
        block_length=block_length,
        cache=cache,
        refresh_interval=options.refresh_interval,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=max(0, options.top_k),
        min_p=options.min_p,
        seed=seed if options.seed is None else options.seed,
        top_logprobs=options.top_logprobs,
        traits=traits,
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
    within("editing_threshold", options.editing_threshold, 0.0, 1.0)
    within("top_logprobs", options.top_logprobs, 0, MAX_TOP_LOGPROBS)
    within("factor", options.factor, 0.0, 1e6)
    within("seed", options.seed, -(2**63), 2**63 - 1)
    within("max_tokens", options.max_tokens, 1, 2**31)
    within("block_length", options.block_length, 1, 2**31)
    within("num_denoising_steps", options.num_denoising_steps, 1, 2**63 - 1)
    within("refresh_interval", options.refresh_interval, 0, 2**31)
    within("priority", options.priority, -8, 8)
    within("min_confidence_threshold", options.min_confidence_threshold, 0.0, 1.0)
    within("accuracy_budget", options.accuracy_budget, 0.0, 100.0)
    within("elapsed_ms", options.elapsed_ms, 0.0, MAX_DEADLINE)
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


def within(name: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:  # NaN is not
        low, high = (bound if isinstance(bound, int) else f"{bound:g}" for bound in (least, most))
        raise BadRequest(f"{name} must lie between {low} and {high}, not {quoted(value)}", param=name)


def rule_of(options: Options, traits: FamilyTraits) -> DecodeRule:
    given = [knob for knob in KNOBS if getattr(options, knob) is not None]
    rule = options.decode or implied(given, traits)
    for knob in given:
        if rule not in KNOBS[knob]:
            raise BadRequest(f"{knob} has no meaning under decode {rule!r}", param=knob)
    if rule not in traits.rules:
        known = ", ".join(traits.rules)
        raise BadRequest(f"this model's family does not decode by {rule!r}; it knows {known}", param="decode")
    if rule in KNOBS["num_denoising_steps"] and options.num_denoising_steps is None and not traits.noise_steps:
        raise BadRequest(f"decode {rule!r} needs num_denoising_steps", param="num_denoising_steps")
    return rule


def implied(given: Sequence[str], traits: FamilyTraits) -> DecodeRule:
    """The rule that has a use for all these knobs. Raises `BadRequest`."""
    if not given:
        return "threshold" if "threshold" in traits.rules else traits.rules[0]
    shared = [rule for rule in KNOBS[given[0]] if all(rule in KNOBS[knob] for knob in given)]
    if len(given) > 1 and not set(shared) & set(traits.rules):
        raise BadRequest(f"{given[0]} and {given[-1]} belong to different decode rules; give one", param=given[-1])
    return next((rule for rule in shared if rule in traits.rules), shared[0])


def cache_of(options: Options, defaults: DecodeConfig, traits: FamilyTraits) -> CacheKind:
    """The cache kind that is asked for, if the family has it. Raises `BadRequest`."""
    if options.refresh_interval and traits.exact:
        raise BadRequest("refresh_interval has no meaning for this model: its K/V are exact", param="refresh_interval")
    asked = options.cache or defaults.cache
    if asked is None:
        return "exact" if traits.exact else "dual"
    if wrong := wrong_cache(asked, traits):
        raise BadRequest(wrong, param="cache")
    return asked


def wrong_cache(asked: CacheKind, traits: FamilyTraits) -> str | None:
    """Why the family does not have this kind of cache, if it does not."""
    if (asked == "exact") == traits.exact:
        return None
    known = "'exact' alone: its K/V never change" if traits.exact else "'none', 'prefix' and 'dual': its K/V change"
    return f"this model has no cache {asked!r}; it knows {known}"


def check_defaults(defaults: DecodeConfig, traits: FamilyTraits) -> None:
    """Raise `ConfigError` for decoding defaults under which every request would be refused."""
    if defaults.cache and (wrong := wrong_cache(defaults.cache, traits)):
        raise ConfigError(f"--cache {defaults.cache}: {wrong}", param="cache")
    if defaults.editing_threshold is not None and not traits.edits:
        raise ConfigError(f"--editing-threshold {defaults.editing_threshold}: {NO_EDITS}", param="editing_threshold")


def default_threshold(defaults: DecodeConfig, traits: FamilyTraits) -> float:
    if defaults.confidence_threshold is None:
        return traits.confidence_threshold
    return defaults.confidence_threshold


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


def steps_of(options: Options, rule: DecodeRule, answer: int, block_length: int, traits: FamilyTraits) -> int:
    """Denoising steps of the answer, or of each block; 0 for rules that do not count them."""
    steps = options.num_denoising_steps
    if traits.noise_steps:
        return min(traits.noise_steps if steps is None else steps, MOST_STEPS)
    if rule not in KNOBS["num_denoising_steps"] or steps is None:
        return 0
    if traits.steps_per_block:
        return min(steps, block_length)
    if steps < (blocks := -(-answer // block_length)):
        raise BadRequest(
            f"num_denoising_steps must be at least {blocks} (one a block), not {steps}", param="num_denoising_steps"
        )
    return min(steps, answer if traits.schedule == "even" else MOST_STEPS)


def check_pool(resolved: ResolvedOptions, pool: int) -> None:
    """Raise `BadRequest` for a canvas that `pool` tokens of K/V do not hold."""
    if resolved.canvas_tokens > pool:
        cure = "lower max_tokens" if resolved.max_tokens > resolved.decoding.block_length else "shorten the prompt"
        raise BadRequest(
            f"a canvas of {resolved.canvas_tokens} tokens exceeds the K/V pool of {pool}; "
            f"{cure} or raise --kv-cache-tokens",
            param="max_tokens",
        )


def ending(options: Options) -> Ending:
    return Ending(ignore_eos=options.ignore_eos, stop_ids=options.stop_token_ids, min_tokens=options.min_tokens)
