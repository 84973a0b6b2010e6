"""The plan over HTTP: what it is, what it was and why, and how to ask for another."""

import time
from typing import Any

import msgspec

from dilaserve.engine.engine import Engine
from dilaserve.errors import BadRequest
from dilaserve.plans import spelled
from dilaserve.types import Change, Plan


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`plan` as COUNTxDEGREE, or as groups of device numbers; of one `node` where there are several, else of all."""

    plan: str | list[list[int]]
    reason: str | None = None
    node: str | None = None


def wanted(asked: PlanRequest) -> Plan | str:
    """The plan as the engine takes it; raises `BadRequest` for absurdly long ones."""
    if len(asked.plan) > 4096:
        raise BadRequest("a plan has at most 4096 parts", param="plan")
    if len(asked.reason or "") > 200:
        raise BadRequest("the reason of a plan has at most 200 characters", param="reason")
    return asked.plan if isinstance(asked.plan, str) else Plan(tuple(tuple(group) for group in asked.plan))


def because(asked: PlanRequest) -> str:
    """The caller's reason as one printable line, for it goes into the log."""
    line = "".join(sign if sign.isprintable() else " " for sign in asked.reason or "")
    return " ".join(line.split()) or "asked for over HTTP"


def shown(engine: Engine) -> dict[str, Any]:
    return {
        "plan": spelled(engine.plan),
        "groups": engine.plan.groups,
        "wanted": spelled(engine.wanted_plan),
        "auto": engine.scheduler.questions.solves,
        "no_planner": engine.unplanned,
        "devices": engine.devices,
        "degrees": engine.degrees,
        "history": [as_json(engine, change) for change in reversed(engine.history)],
    }


def as_json(engine: Engine, change: Change) -> dict[str, Any]:
    """One change; `at` in Unix seconds."""
    return {
        "at": round(time.time() - engine.loop.time() + change.at, 3),
        "before": spelled(change.before),
        "plan": spelled(change.after),
        "groups": change.after.groups,
        "reason": change.reason,
        "seconds": round(change.seconds, 6),
        "pause_seconds": None if change.pause is None else round(change.pause, 6),
    }
