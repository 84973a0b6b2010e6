"""The application for Ray Serve: `serve run dilaserve.ray.app:app nodes=2 model=…`, or the `import_path` of a config.

The arguments are those of `Layout`, and every setting of the server by its name.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from dilaserve import config
from dilaserve.config import Config
from dilaserve.errors import ConfigError
from dilaserve.ray.deployments import Door, NodeReplica
from dilaserve.ray.scaling import BacklogPolicy

NODE, DOOR = "node", "door"
SPARE = 64  # calls beside requests that a replica takes: reports, health
UP_AFTER, DOWN_AFTER = 5.0, 60.0  # seconds for which more, or fewer, nodes must be wanted
LOOK_BACK = 15.0  # seconds over which the backlog is averaged
ONE_LOOP = {  # ours is Ray's own: each piece of an answer would else go through two threads more
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """`nodes`: how many, or `LEAST:MOST` to follow the backlog, of `target_backlog` seconds for each instance;
    more come when that is so for `up_after` seconds, and fewer after `down_after`. Each has `gpus` and `cpus` of Ray's;
    `doors` speak HTTP.
    """

    nodes: str = "1"
    gpus: float = 0.0
    cpus: float = 1.0
    doors: int = 1
    target_backlog: Annotated[float, msgspec.Meta(gt=0.0)] = 8.0
    up_after: float = UP_AFTER
    down_after: float = DOWN_AFTER

    def bounds(self) -> tuple[int, int]:
        """The least and the most nodes. Raises `ConfigError`."""
        least, colon, most = self.nodes.partition(":")
        try:
            found = int(least), int(most if colon else least)
        except ValueError:
            found = (0, 0)
        if not 1 <= found[0] <= found[1]:
            raise ConfigError(f"nodes {self.nodes!r}: write a number such as 2, or a range such as 1:4", param="nodes")
        return found


def app(args: Mapping[str, Any]) -> Application:
    """Raises `ConfigError` for what cannot be."""
    known = dict(args)
    own = {name: known.pop(name) for name in Layout.__struct_fields__ if name in known}
    try:
        layout = msgspec.convert(own | {"nodes": str(own.get("nodes", 1))}, Layout, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the layout cannot be used: {error}") from error
    return application(config.load(known), layout)


def application(settings: Config, layout: Layout) -> Application:
    places = settings.scheduler.max_queue + SPARE
    stopping = settings.server.grace_period + 5.0
    environment: dict[str, Any] = {"runtime_env": {"env_vars": ONE_LOOP}}
    least, most = layout.bounds()
    size: dict[str, Any] = {"num_replicas": least}
    if most > least:
        size = {"autoscaling_config": scaled(least, most, layout)}
    node = serve.deployment(NodeReplica).options(
        name=NODE,
        max_ongoing_requests=places,
        ray_actor_options={"num_cpus": layout.cpus, "num_gpus": layout.gpus} | environment,
        graceful_shutdown_timeout_s=stopping,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        **size,
    )
    door = serve.deployment(Door).options(
        name=DOOR,
        num_replicas=layout.doors,
        max_ongoing_requests=places * most,
        ray_actor_options={"num_cpus": 0.1} | environment,
        graceful_shutdown_timeout_s=stopping,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return door.bind(node.bind(settings), settings)


def scaled(least: int, most: int, layout: Layout) -> AutoscalingConfig:
    rule = {"target": layout.target_backlog, "least": least, "most": most}
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        upscale_delay_s=layout.up_after,
        downscale_delay_s=layout.down_after,
        look_back_period_s=LOOK_BACK,
        policy=AutoscalingPolicy(policy_function=BacklogPolicy, policy_kwargs=rule),
    )
