"""The two deployments of Ray Serve: the door, which speaks HTTP, and the nodes, each with one engine."""

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from typing import Any

import ray.exceptions as failures
from ray import serve
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from dilaserve.config import Config
from dilaserve.engine.likelihood import Likelihood, Sampling
from dilaserve.errors import Overloaded
from dilaserve.models import hub
from dilaserve.ray.cluster_backend import ClusterBackend
from dilaserve.ray.node import Node
from dilaserve.ray.node_calls import Call, Failure, NodeCard, Piece
from dilaserve.ray.resumed_stream import NodeLost
from dilaserve.server.asgi import AsgiApp
from dilaserve.server.service import Service
from dilaserve.system import logs
from dilaserve.tokenizer.tokenizer import Text

Json = dict[str, Any]
GONE = (  # what a call raises when its replica is lost
    failures.RayActorError,
    failures.TaskCancelledError,
    failures.NodeDiedError,
    failures.ObjectLostError,
    ReplicaUnavailableError,
    DeploymentUnavailableError,
    RequestCancelledError,
)
ALL_WITHIN = 5.0  # seconds for all nodes to report


class NodeReplica(Node):
    """A node as Ray makes, asks and ends it."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]
        prepare(config)
        super().__init__(serve.get_replica_context().replica_id.unique_id, config)
        await self.start()

    async def __del__(self) -> None:
        if hasattr(self, "engine"):
            await self.stop()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self.load()


class RayNodes:
    """The replicas of the node deployment, as the door asks them."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle, self.streams = handle, handle.options(stream=True)

    async def answer(self, call: Call) -> AsyncGenerator[Piece, None]:
        pieces = self.streams.answer.remote(call)
        try:
            async for piece in pieces:
                yield piece
        except BackPressureError:
            yield Failure.of(Overloaded("all nodes are full; try again later", retry_after=1.0))
        except GONE as error:
            raise NodeLost(first_line(error)) from error
        finally:
            pieces.cancel()

    async def estimate(self, ids: list[int], sampling: Sampling, call: Call) -> Likelihood | Failure:
        try:
            found: Likelihood | Failure = await self.handle.estimate.remote(ids, sampling, call)
        except GONE as error:
            raise NodeLost(first_line(error)) from error
        return found

    async def all(self, method: str, *given: Any) -> list[Any]:
        called = self.handle.broadcast(method, *given)
        try:
            found = await called.results_async(timeout_s=ALL_WITHIN, return_exceptions=True)
        except (TimeoutError, *GONE):
            return []
        return [one for one in found if not isinstance(one, BaseException)]


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@serve.ingress()
class Door:
    """Speaks HTTP for all nodes."""

    async def __init__(self, nodes: DeploymentHandle, config: Config) -> None:  # type: ignore[misc]
        prepare(config)
        text = await asyncio.to_thread(tokenizer, config)
        card: NodeCard = await nodes.card.remote()
        self.service = Service(ClusterBackend(RayNodes(nodes), card, config, text), config)

    def __serve_build_asgi_app__(self) -> AsgiApp:
        return AsgiApp(self.service, names_requests=False)  # Ray's proxy does


def prepare(config: Config) -> None:
    logs.configure(config.server.log_level, config.server.log_format)
    tempfile.tempdir = "/tmp"  # Ray's own is too long a path for Unix sockets


def tokenizer(config: Config) -> Text:
    """Of the model that the nodes serve, which must be found here as well. Raises `CheckpointError`."""
    text = Text(hub.directory_of(config.model.model, config.model.revision), config.model.chat_template)
    text.load_template()
    return text
