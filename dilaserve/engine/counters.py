"""Counters of one engine: steps, seconds, decisions, changes of plan. Values only."""

import msgspec


class Profile(msgspec.Struct):
    """Where time went since the start.

    `seconds` are the workers' over all steps, `forward` the part of them inside the model, `deciding` those in which
    the scheduler decided.
    """

    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    forward: float = 0.0
    decisions: int = 0
    deciding: float = 0.0
    changes: int = 0  # of the plan
    paused: float = 0.0  # seconds that rows waited for changes of plan, the longest wait of each change
    workers_lost: int = 0
