"""The nodes that the flags of `simulate` ask for, and the way to them."""

import argparse
from typing import NamedTuple

from dilaserve.errors import ConfigError
from dilaserve.sim.nodes import ROUTING_DELAY

FLAGS = {"routing": "--routing", "routing_delay_ms": "--routing-delay-ms", "node_devices": "--node-devices"}


class Layout(NamedTuple):
    """Devices by node, the routing rule, and the seconds of one way between router and node."""

    devices: tuple[int, ...]
    rule: str
    delay: float


def layout(extras: argparse.Namespace) -> Layout | None:
    """None without --nodes: then there is one engine, and no router. Raises `ConfigError`."""
    if extras.nodes is None:
        for name, flag in FLAGS.items():
            if getattr(extras, name) is not None:
                raise ConfigError(f"{flag} is about several nodes; say how many by --nodes, or leave it out")
        return None
    sizes = extras.node_devices or (extras.sim_devices,)
    if len(sizes) > extras.nodes:
        raise ConfigError(
            f"--node-devices names {len(sizes)} nodes and --nodes is {extras.nodes}; raise --nodes or name fewer"
        )
    delay = ROUTING_DELAY if extras.routing_delay_ms is None else extras.routing_delay_ms / 1000
    return Layout(tuple(sizes[node % len(sizes)] for node in range(extras.nodes)), extras.routing or "p2c", delay)
