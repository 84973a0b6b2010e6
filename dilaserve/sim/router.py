"""What a router remembers: the last report of each node, and what it has sent. It has no clock and no nodes."""

from collections import deque
from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from dilaserve.scheduler.request_state import RequestState
from dilaserve.sim.routing import RULES, Known


class NodeReport(NamedTuple):
    """A node's unfinished requests at one instant: see `Known`."""

    at: float
    backlog: float
    demand: float


class Sent(NamedTuple):
    """A request on its way to a node: when it gets there, and what it adds to the node's backlog and demand."""

    arrives_at: float
    backlog: float
    demand: float


class Router:
    """`choose` by the rule of this name, then `sent`; `reported` and `ended` as news come in."""

    def __init__(self, devices: Sequence[int], rule: str, seed: int = 0) -> None:
        self.rule, self.random = RULES[rule], Random(seed)
        count = len(devices)
        self.known = Known(np.array(devices, dtype=np.float64), np.zeros(count), np.zeros(count), np.zeros(count))
        self.unreported: list[deque[Sent]] = [deque() for _ in devices]  # by node, what no report has counted

    def choose(self) -> tuple[int, ...]:
        """The nodes that remain: one, or several whose quotes decide."""
        return self.rule(self.known, self.random)

    def sent(self, node: int, sent: Sent) -> None:
        self.unreported[node].append(sent)
        self.known.in_flight[node] += 1
        self.known.backlog[node] += sent.backlog
        self.known.demand[node] += sent.demand

    def reported(self, node: int, report: NodeReport) -> None:
        """Believe the report, and add what had not arrived when it was made."""
        line = self.unreported[node]
        while line and line[0].arrives_at <= report.at:
            line.popleft()
        self.known.backlog[node] = report.backlog + sum(sent.backlog for sent in line)
        self.known.demand[node] = report.demand + sum(sent.demand for sent in line)

    def ended(self, node: int) -> None:
        """The answer of one request has come back, or its refusal."""
        self.known.in_flight[node] -= 1


def node_report(requests: Iterable[RequestState], now: float) -> NodeReport:
    """The report of a node with these unfinished requests.

    A request still takes the seconds that were expected of it alone when it came, times the share of its answer that
    is not unmasked yet.
    """
    backlog = demand = 0.0
    for state in requests:
        request = state.request
        seconds = state.seconds * max(0.0, 1.0 - state.unmasked / (request.canvas_tokens - request.prompt_tokens))
        backlog += seconds
        if state.has_deadline:
            demand += density(seconds, state.left(now))
    return NodeReport(now, backlog, demand)


def density(seconds: float, left: float) -> float:
    """The share of one device that a request needs until its deadline."""
    return seconds / left if seconds < left else 1.0
