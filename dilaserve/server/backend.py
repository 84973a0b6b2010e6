"""What answers the requests of a service: an engine of this process, or several elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dilaserve.config import Config
from dilaserve.engine import likelihood
from dilaserve.engine.assembly import ModelCard
from dilaserve.engine.engine import Engine
from dilaserve.engine.likelihood import Likelihood, Sampling
from dilaserve.engine.offload import Offload
from dilaserve.engine.prompts import Prompt
from dilaserve.engine.stream import AnswerStream
from dilaserve.engine.submit import Options
from dilaserve.errors import BadRequest, DilaserveError, Unavailable
from dilaserve.server import plan_api, stats
from dilaserve.server.plan_api import PlanRequest
from dilaserve.server.telemetry import Telemetry
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.types import Quote

Json = dict[str, Any]


class Backend(Protocol):
    """Requests are checked and answered as `Engine` does; the rest is what routes tell of the server."""

    model: ModelCard
    config: Config
    text: Text
    off_loop: Offload

    @property
    def draining(self) -> bool:
        """No new requests are taken, and never will be again."""
        ...

    async def tokenize(self, prompt: Prompt, limit: int | None = None) -> list[int]: ...

    def detokenize(self, ids: Sequence[int]) -> str: ...

    async def submit(self, prompt: Prompt, options: Options, *, id: str) -> AnswerStream: ...

    async def estimate(self, ids: list[int], sampling: Sampling, options: Options, id: str) -> Likelihood: ...

    async def quote(self, prompt_tokens: int, options: Options) -> Quote: ...

    def traced(self, ids: Sequence[str], headers: Mapping[str, str]) -> Callable[[], object]:
        """Requests of these ids belong to the trace of the headers; to be called when they are answered."""
        ...

    async def check_alive(self) -> None:
        """Raises `DilaserveError` when nothing will be answered any more."""
        ...

    async def check_ready(self) -> None:
        """Raises `Unavailable` while no requests are taken."""
        ...

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Hears of each HTTP request; `route` is its pattern."""
        ...

    async def metrics(self) -> bytes: ...

    async def stats(self, since: float, now: float) -> Json: ...

    async def plan(self) -> Json: ...

    async def replan(self, asked: PlanRequest) -> Json: ...

    def close(self) -> None:
        """Stop watching; may block for seconds."""
        ...


class LocalBackend:
    """An engine of this process, and what watches it."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self.engine, self.telemetry = engine, Telemetry(engine, config)
        self.model, self.config, self.text, self.off_loop = engine.model, engine.config, engine.text, engine.off_loop
        self.tokenize, self.detokenize, self.submit = engine.tokenize, engine.detokenize, engine.submit
        self.answered = self.telemetry.http.answered

    @property
    def draining(self) -> bool:
        return self.engine.draining

    async def estimate(self, ids: list[int], sampling: Sampling, options: Options, id: str) -> Likelihood:
        return await likelihood.estimate(self.engine, ids, sampling, options, id)

    async def quote(self, prompt_tokens: int, options: Options) -> Quote:
        return self.engine.quote(prompt_tokens, options)

    def traced(self, ids: Sequence[str], headers: Mapping[str, str]) -> Callable[[], object]:
        if (tracing := self.telemetry.tracing) is None:
            return lambda: None
        tracing.begin(ids, headers)
        return lambda: tracing.answered(ids)

    async def check_alive(self) -> None:
        if not self.engine.alive:
            raise DilaserveError("the engine has stopped")

    async def check_ready(self) -> None:
        if not self.engine.ready:
            raise Unavailable(
                "the server is draining" if self.engine.draining else "no worker is ready", retry_after=1.0
            )

    async def metrics(self) -> bytes:
        return self.telemetry.text()

    async def stats(self, since: float, now: float) -> Json:
        return stats.shown(self.engine, self.telemetry.history, since, now)

    async def plan(self) -> Json:
        return plan_api.shown(self.engine)

    async def replan(self, asked: PlanRequest) -> Json:
        if asked.node is not None:
            raise BadRequest("there is one node here; leave out node", param="node")
        change = await self.engine.replan(plan_api.wanted(asked), plan_api.because(asked))
        return plan_api.as_json(self.engine, change)

    def close(self) -> None:
        self.telemetry.close()
