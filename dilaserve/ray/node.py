"""A node: the engine of one box, as the door asks for it. Knows nothing of Ray."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from dilaserve.config import Config
from dilaserve.engine.assembly import Assemble, real
from dilaserve.engine.engine import Engine
from dilaserve.engine.likelihood import Likelihood, Sampling
from dilaserve.engine.request_views import under_way
from dilaserve.engine.submit import Options
from dilaserve.errors import DilaserveError
from dilaserve.ray.node_calls import Call, Failure, NodeCard, Piece, Started
from dilaserve.server.backend import LocalBackend
from dilaserve.server.plan_api import PlanRequest
from dilaserve.types import Quote

log = logging.getLogger(__name__)
Json = dict[str, Any]


class Node:
    """Between `start` and `stop`. `name` tells nodes apart in metrics, statistics and plans."""

    def __init__(self, name: str, config: Config, assemble: Assemble = real) -> None:
        self.name, self.config = name, config
        self.engine = Engine(config, assemble=assemble)

    async def start(self) -> None:
        """Load the model. Raises `ConfigError`."""
        await self.engine.__aenter__()
        self.backend = LocalBackend(self.engine, self.config)
        log.info("node %s serves %s", self.name, self.engine.model.name)

    async def stop(self) -> None:
        """Let what runs end within --grace-period, then leave."""
        if self.engine.main is None:
            return
        await self.engine.drain(self.config.server.grace_period)
        await asyncio.to_thread(self.backend.close)
        await self.engine.__aexit__(None, None, None)

    def card(self) -> NodeCard:
        engine = self.engine
        return NodeCard(engine.model, engine.vocab_size, engine.text.template is not None)

    async def answer(self, call: Call) -> AsyncGenerator[Piece, None]:
        """`Started`, then the chunks; or a `Failure`, at any place, as the last."""
        done = self.backend.traced([call.id], call.headers)
        try:
            async with await self.engine.submit(list(call.prompt), call.options, id=call.id) as stream:
                yield Started(self.name, stream.resumed_characters)
                async for chunk in stream:
                    yield chunk
        except DilaserveError as error:
            yield Failure.of(error)
        finally:
            done()

    async def estimate(self, ids: list[int], sampling: Sampling, call: Call) -> Likelihood | Failure:
        try:
            return await self.backend.estimate(ids, sampling, call.options, call.id)
        except DilaserveError as error:
            return Failure.of(error)

    # what is asked of all nodes

    async def quote(self, prompt_tokens: int, options: Options) -> tuple[str, Quote | Failure]:
        try:
            return self.name, self.engine.quote(prompt_tokens, options)
        except DilaserveError as error:
            return self.name, Failure.of(error)

    async def metrics(self) -> tuple[str, bytes]:
        return self.name, await self.backend.metrics()

    async def stats(self, since: float, now: float) -> tuple[str, Json]:
        return self.name, await self.backend.stats(since, now)

    async def plan(self) -> tuple[str, Json]:
        return self.name, await self.backend.plan()

    async def replan(self, asked: PlanRequest) -> tuple[str, Json | Failure | None]:
        """None where another node is meant."""
        if asked.node not in (None, self.name):
            return self.name, None
        try:
            return self.name, await self.backend.replan(msgspec.structs.replace(asked, node=None))
        except DilaserveError as error:
            return self.name, Failure.of(error)

    # what the supervisor asks

    async def check_health(self) -> None:
        """Raises `DilaserveError` once the engine has broken; the node is then made anew."""
        await self.backend.check_alive()

    def load(self) -> dict[str, float]:
        """For scaling: seconds of work that is not done, for each instance; and requests."""
        backlog, now = self.engine.scheduler.placement.backlog, under_way(self.engine.scheduler)
        instances = max(1, len(self.engine.consumer.capacity))
        seconds = (backlog.timed + backlog.best_effort) / instances
        return {"backlog": seconds, "running": float(now.running), "waiting": float(now.waiting)}
