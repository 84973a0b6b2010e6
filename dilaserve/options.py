"""What a caller may ask for, checked against what the model and the house allow."""

import math
from typing import NamedTuple

import msgspec

from dilaserve.config import CacheKind, DecodeConfig
from dilaserve.errors import BadRequest
from dilaserve.terms import DecodeRule, Decoding

MAX_STOPS, MAX_STOP_LENGTH = 4, 1024
KNOBS: dict[str, DecodeRule] = {
    "confidence_threshold": "threshold",
    "num_denoising_steps": "steps",
    "factor": "factor",
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The wishes of one request; None leaves a knob to the configuration.

    Without `decode` the rule follows from the knob that is given: `confidence_threshold` (unmask what reaches it),
    `num_denoising_steps` (a fixed number of steps over the whole canvas) or `factor` (Fast-dLLM's rule).
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    decode: DecodeRule | None = None
    confidence_threshold: float | None = None
    num_denoising_steps: int | None = None
    factor: float | None = None
    block_length: int | None = None
    cache: CacheKind | None = None
    refresh_interval: int = 0
    ignore_eos: bool = False


class Settled(NamedTuple):
    """A checked request: the layout of its canvas and how to decode it."""

    canvas_tokens: int
    max_tokens: int
    decoding: Decoding


def settle(options: Options, prompt_tokens: int, limit: int, seed: int, defaults: DecodeConfig) -> Settled:
    """Fill in what is left open and lay out the canvas, at most `limit` tokens.

    The answer's region is rounded up to whole blocks where the canvas has room. Raises `BadRequest`.
    """
    check(options)
    rule = rule_of(options)
    block_length = options.block_length or defaults.block_length
    max_tokens = answer_length(options, prompt_tokens, limit, defaults)
    canvas_tokens = min(prompt_tokens + -(-max_tokens // block_length) * block_length, limit)
    steps = steps_of(options, rule, canvas_tokens - prompt_tokens, block_length)
    threshold = defaults.confidence_threshold if options.confidence_threshold is None else options.confidence_threshold
    decoding = Decoding(
        rule=rule,
        confidence_threshold=threshold,
        num_denoising_steps=steps,
        factor=1.0 if options.factor is None else options.factor,
        block_length=block_length,
        cache=options.cache or defaults.cache,
        refresh_interval=options.refresh_interval,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=seed if options.seed is None else options.seed,
    )
    return Settled(canvas_tokens, max_tokens, decoding)


def check(options: Options) -> None:
    """Every number inside its limits, or `BadRequest` for the first that is not."""
    within("temperature", options.temperature, 0.0, 2.0)
    within("top_p", options.top_p, 0.0, 1.0)
    within("confidence_threshold", options.confidence_threshold, 0.0, 1.0)
    within("factor", options.factor, 0.0, 1e6)
    within("seed", options.seed, -(2**63), 2**63 - 1)
    within("max_tokens", options.max_tokens, 1, 2**31)
    within("block_length", options.block_length, 1, 2**31)
    within("num_denoising_steps", options.num_denoising_steps, 1, 2**31)
    within("refresh_interval", options.refresh_interval, 0, 2**31)
    if options.top_p == 0.0:
        raise BadRequest("top_p must be above 0", param="top_p")
    if len(options.stop) > MAX_STOPS:
        raise BadRequest(f"at most {MAX_STOPS} stop strings are allowed, not {len(options.stop)}", param="stop")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in options.stop):
        raise BadRequest(f"a stop string has 1 to {MAX_STOP_LENGTH} characters", param="stop")


def within(name: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not (math.isfinite(value) and least <= value <= most):
        raise BadRequest(f"{name} must lie between {least:g} and {most:g}, not {value}", param=name)


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
            f"the prompt has {prompt_tokens} tokens and leaves no room for an answer; the canvas holds {limit}",
            param="prompt",
            code="context_length_exceeded",
        )
    wanted = min(defaults.default_max_tokens, room) if options.max_tokens is None else options.max_tokens
    if wanted > room:
        raise BadRequest(
            f"max_tokens {wanted} and a prompt of {prompt_tokens} tokens exceed the canvas limit of {limit}; "
            f"lower max_tokens to {room} or less",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return wanted


def steps_of(options: Options, rule: DecodeRule, answer: int, block_length: int) -> int:
    if rule != "steps":
        return 0
    blocks, steps = -(-answer // block_length), options.num_denoising_steps or 0
    if not blocks <= steps <= answer:
        raise BadRequest(
            f"num_denoising_steps must lie between {blocks} (one a block) and {answer} (one a token), not {steps}",
            param="num_denoising_steps",
        )
    return steps
