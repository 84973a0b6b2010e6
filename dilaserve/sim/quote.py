"""What a node would say of a request that is not there; a run goes on as if nobody had asked."""

import msgspec

from dilaserve.engine.engine import Engine
from dilaserve.engine.new_request import Place, new_request
from dilaserve.engine.slo_classes import wanted
from dilaserve.engine.submit import Options, resolve, validated
from dilaserve.types import Quote


def quote(engine: Engine, prompt_tokens: int, options: Options, spent: float = 0.0) -> Quote | None:
    """The quote for a request that has been under way for `spent` seconds.

    None where there is nothing to test: it has no deadline, or the node admits all, or has no instance yet. Raises
    `BadRequest`.
    """
    found = engine.quote(prompt_tokens, hurried(options, spent))
    return None if found.met is None else found


def hurried(options: Options, spent: float) -> Options:
    """The options of a request that has been under way for `spent` seconds."""
    return msgspec.structs.replace(options, elapsed_ms=1000 * spent) if spent else options


def alone(engine: Engine, prompt_tokens: int, options: Options) -> float:
    """Seconds that the request would take with nothing else on the node. Raises `BadRequest`."""
    checked, limit = validated(options), engine.model.max_model_len
    resolved = resolve(checked, prompt_tokens, limit, 0, engine.config.decode, engine.model.traits)
    slo, now = wanted(checked, engine.classes), engine.loop.time()
    with engine.scheduler.estimates.forecast.unkept():
        state = engine.scheduler.deadlines.arrived(new_request(Place(), prompt_tokens, checked, resolved, slo, now))
        return engine.scheduler.estimates.unloaded(state)
