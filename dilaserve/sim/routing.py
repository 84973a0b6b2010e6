"""Rules by which a router chooses the node for a request. They judge what the router knows; they wait for nothing.

A rule returns the nodes that remain: of one the request goes there, of several each is asked for a quote first
(`best_quote`). All count what the router has sent itself; `p2c` and `quote` need no report of a node.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from dilaserve.types import Quote

QUOTED = 2  # nodes that are asked for a quote; each costs an arrival test there
TIE = 1e-9  # weight of requests in flight where deadlines need equally much of two nodes
Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


class Known(NamedTuple):
    """What the router knows of its nodes, [nodes] each.

    `in_flight`: requests that it has sent and whose answers have not come back. `backlog`: seconds that unfinished
    requests still take, each alone on one device. `demand`: devices that deadlines need, the sum over requests of the
    seconds that one still takes divided by the seconds left to it, 1 at most. The last two are those of the last
    report, and of what was sent since.
    """

    devices: Array
    in_flight: Array
    backlog: Array
    demand: Array


Rule: TypeAlias = Callable[[Known, Random], tuple[int, ...]]


def p2c(known: Known, rng: Random) -> tuple[int, ...]:
    """Power of two choices: of two random nodes the one with fewer requests in flight, as in Ray Serve and Envoy."""
    return (min(pair(known, rng), key=known.in_flight.__getitem__),)


def p2c_weighted(known: Known, rng: Random) -> tuple[int, ...]:
    """Of two random nodes the one with fewer requests in flight per device, as gateways do that are given weights."""
    return (min(pair(known, rng), key=(known.in_flight / known.devices).__getitem__),)


def least_backlog(known: Known, rng: Random) -> tuple[int, ...]:
    """Of all nodes the one with the fewest seconds of unfinished work per device."""
    return (int(np.argmin(known.backlog / known.devices)),)


def most_slack(known: Known, rng: Random) -> tuple[int, ...]:
    """Of all nodes the one whose deadlines need the smallest share of its devices (the density of real-time theory).

    Where no deadlines come, that with the fewest requests in flight per device.
    """
    return (int(np.argmin((known.demand + TIE * known.in_flight) / known.devices)),)


def quoted(known: Known, rng: Random) -> tuple[int, ...]:
    """Two random nodes, which are asked for quotes."""
    return pair(known, rng)


RULES: dict[str, Rule] = {
    "p2c": p2c,
    "p2c-weighted": p2c_weighted,
    "least-backlog": least_backlog,
    "slack": most_slack,
    "quote": quoted,
}


def pair(known: Known, rng: Random) -> tuple[int, ...]:
    """Two random nodes, or the only one."""
    return tuple(rng.sample(range(len(known.devices)), min(QUOTED, len(known.devices))))


def best_quote(known: Known, nodes: Sequence[int], quotes: Sequence[Quote | None]) -> int:
    """The node that meets the deadline at the highest threshold, and of those the one with most slack.

    Where none meets it, or nothing was tested, the one with fewer requests in flight per device.
    """

    def worth(place: int) -> tuple[float, ...]:
        node, told = nodes[place], quotes[place]
        crowd = -float(known.in_flight[node] / known.devices[node])
        return (1.0, told.threshold or 0.0, told.slack or 0.0, crowd) if told and told.met else (0.0, 0.0, 0.0, crowd)

    return nodes[max(range(len(nodes)), key=worth)]
