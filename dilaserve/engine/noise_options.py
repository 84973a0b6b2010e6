"""Options that have no meaning where blocks begin as noise, and why; and whether whole blocks fit."""

from collections.abc import Mapping

from dilaserve.errors import BadRequest

DRAWN = "its tokens are drawn at temperatures of its own, which fall from step to step"
EARLY = "tokens are written when their block is finished, wherever it ends"
USUAL: dict[str, tuple[object, ...]] = {  # values that change nothing
    "temperature": (0.0, 1.0),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "min_tokens": (0,),
    "top_logprobs": (0,),
    "confidence_threshold": (None,),
    "block_length": (None,),
}
REASONS = {
    "min_tokens": EARLY,
    "top_logprobs": EARLY,
    "confidence_threshold": "an entropy bound takes its place, which stands in generation_config.json",
}


def check(options: Mapping[str, object], block_length: int | None) -> None:
    """Raise `BadRequest` for the first of these options that has no meaning."""
    for name, value in options.items():
        if name == "block_length" and value == block_length:
            continue
        if value not in USUAL[name]:
            own = f"it answers in blocks of {block_length} tokens" if name == "block_length" else DRAWN
            reason = REASONS.get(name, own)
            raise BadRequest(f"{name} has no meaning for this model: {reason}; leave it out", param=name)


def check_room(prompt: int, answer: int, block_length: int, limit: int) -> None:
    """Raise `BadRequest` where the limit would cut the answer's last block short."""
    if answer % block_length:
        raise BadRequest(
            f"this model answers in whole blocks of {block_length} tokens, and {limit} tokens of context do not hold "
            f"a prompt of {prompt} and so many blocks; shorten it or lower max_tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
