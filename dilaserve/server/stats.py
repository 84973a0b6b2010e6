"""What `GET /v1/stats` tells of the server, for the page: its last minutes, its plan, and the steps of its requests."""

from collections.abc import Sequence
from typing import Any

import msgspec

from dilaserve import __version__
from dilaserve.engine.engine import Engine
from dilaserve.engine.request_views import RequestView, under_way, views
from dilaserve.errors import BadRequest, quoted
from dilaserve.server import plan_api
from dilaserve.server.history import History, Second

Json = dict[str, Any]
MOST_REQUESTS = 32  # running ones that are shown


def shown(engine: Engine, history: History, since: float, now: float) -> Json:
    """All of it; of the history the seconds that ended after `since`. Both and `now` in Unix seconds."""
    return {
        "now": round(now, 3),
        "version": __version__,
        "model": about(engine),
        "requests": requests(engine),
        "budget": budget(engine),
        "plan": plan_api.shown(engine),
        "history": columns([second for second in history.seconds if second.at > since]),
        "timelines": [as_json(one, now - engine.loop.time()) for one in views(engine.scheduler, MOST_REQUESTS)],
    }


def since_of(text: str | None) -> float:
    """The query's `since`. Raises `BadRequest`."""
    try:
        return float(text or 0.0)
    except ValueError as error:
        raise BadRequest(f"since is a time in Unix seconds, not {quoted(text)}", param="since") from error


def about(engine: Engine) -> Json:
    """The model, and what a request gets that asks for nothing else."""
    model, decode = engine.model, engine.config.decode
    own = decode.confidence_threshold
    return {
        "name": model.name,
        "parameters": model.parameters,
        "max_model_len": model.max_model_len,
        "chats": engine.text.template is not None,
        "confidence_threshold": model.traits.confidence_threshold if own is None else own,
        "default_max_tokens": decode.default_max_tokens,
    }


def requests(engine: Engine) -> Json:
    """Counts since the start, and of now."""
    totals = engine.scheduler.totals
    now = under_way(engine.scheduler)._asdict() | {"received": totals.received}
    return now | {"fates": totals.fates, "deadlines": totals.deadlines, "steps": totals.steps}


def budget(engine: Engine) -> Json:
    """The accuracy that lower thresholds may cost, in points a request, and what they have cost so far."""
    ledger = engine.scheduler.deadlines.ledger
    mean = ledger.all.spent / max(1.0, ledger.all.served)
    return {"limit": ledger.budget, "mean_drop": round(mean, 6), "used": ledger.used, "answers": ledger.all.served}


def columns(seconds: Sequence[Second]) -> Json:
    """One list for each field, so that names are not repeated."""
    rows = [msgspec.structs.astuple(second) for second in seconds]
    names = Second.__struct_fields__
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)) if rows else {name: [] for name in names}


def as_json(one: RequestView, offset: float) -> Json:
    """A request with its instants in Unix seconds, which are `offset` later than those of the engine's clock."""
    known = msgspec.structs.asdict(one)
    for name in ("arrived_at", "started_at", "deadline"):
        known[name] = None if known[name] is None else round(known[name] + offset, 4)
    steps = [(step.kind, round(step.began_at + offset, 4), round(step.seconds, 5)) for step in one.timeline]
    return known | {"timeline": steps}
