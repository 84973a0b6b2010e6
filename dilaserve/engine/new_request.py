"""A checked request as the scheduler sees it."""

from typing import NamedTuple

from dilaserve.engine.submit import Options, ResolvedOptions
from dilaserve.types import FinishReason, Request, Slo


class Place(NamedTuple):
    """Where the request stands in the table; a request that is not submitted stands nowhere."""

    id: str = ""
    row: int = -1
    generation: int = 0


def new_request(
    place: Place,
    prompt_tokens: int,
    options: Options,
    resolved: ResolvedOptions,
    slo: Slo,
    now: float,
    prefix_hashes: tuple[int, ...] = (),
    ended: FinishReason | None = None,
) -> Request:
    """`ended`: how the tokens that are resumed end the answer."""
    elapsed = options.elapsed_ms / 1000
    return Request(
        id=place.id,
        row=place.row,
        generation=place.generation,
        prompt_tokens=prompt_tokens,
        canvas_tokens=resolved.canvas_tokens,
        max_tokens=resolved.max_tokens,
        arrived_at=now - elapsed,
        decoding=resolved.decoding,
        slo=slo,
        prefix_hashes=prefix_hashes,
        shows_canvas=options.include_canvas,
        resumed_tokens=len(options.resume_token_ids),
        ended=ended,
        elapsed=elapsed,
    )
