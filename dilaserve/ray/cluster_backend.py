"""Answers the door's requests with nodes: tokenizes here, denoises there, and tells of all nodes as of one server."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import generate_latest

from dilaserve.config import Config
from dilaserve.engine.likelihood import Likelihood, Sampling
from dilaserve.engine.offload import Offload
from dilaserve.engine.prompts import Prompt
from dilaserve.engine.submit import Options, validated
from dilaserve.engine.tokenization import Tokenization
from dilaserve.errors import BadRequest, Unavailable, quoted
from dilaserve.ray import cluster_view
from dilaserve.ray.node_calls import Call, Failure, NodeCard, Piece
from dilaserve.ray.resumed_stream import NodeLost, ResumedStream
from dilaserve.server.http_metrics import HttpMetrics
from dilaserve.server.plan_api import PlanRequest
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.types import Quote

Json = dict[str, Any]
CARRIED = ("traceparent", "tracestate")  # headers that nodes get


class Nodes(Protocol):
    """The nodes, wherever they are. What a lost node was asked raises `NodeLost`."""

    def answer(self, call: Call) -> AsyncGenerator[Piece, None]:
        """Ask one of them."""
        ...

    async def estimate(self, ids: list[int], sampling: Sampling, call: Call) -> Likelihood | Failure: ...

    async def all(self, method: str, *given: Any) -> list[Any]:
        """What this method gives on each node that answers within a few seconds."""
        ...


class ClusterBackend:
    """A `Backend`; `card` is that of any node, for all serve one model."""

    draining = False  # Ray sends nothing to a door that it stops

    def __init__(self, nodes: Nodes, card: NodeCard, config: Config, text: Text) -> None:
        self.nodes, self.model, self.config, self.text = nodes, card.model, config, text
        self.off_loop = Offload()
        tokenization = Tokenization(text, card.vocab_size, self.off_loop)
        self.tokenize, self.detokenize = tokenization.tokenize, tokenization.detokenize
        self.http = HttpMetrics()
        self.answered = self.http.answered
        self.carried: dict[str, Mapping[str, str]] = {}  # headers by request id

    async def submit(self, prompt: Prompt, options: Options, *, id: str) -> ResumedStream:
        checked = validated(options)
        ids = await self.tokenize(prompt, self.model.max_model_len)
        call = Call(ids, checked, id, self.carried.get(id, {}))
        return await ResumedStream(self.nodes.answer, call).begin()

    async def estimate(self, ids: list[int], sampling: Sampling, options: Options, id: str) -> Likelihood:
        try:
            found = await self.nodes.estimate(ids, sampling, Call((), options, id))
        except NodeLost as error:
            raise Unavailable("the node that estimated was lost; try again", retry_after=1.0) from error
        if isinstance(found, Failure):
            raise found.error()
        return found

    async def quote(self, prompt_tokens: int, options: Options) -> Quote:
        """That of the node which would do best; which one gets a request is not known before."""
        found = [quote for _, quote in await self.reports("quote", prompt_tokens, options)]
        if failed := next((one for one in found if isinstance(one, Failure)), None):
            raise failed.error()
        return cluster_view.best(found)

    def traced(self, ids: Sequence[str], headers: Mapping[str, str]) -> Callable[[], object]:
        known = {name: headers[name] for name in CARRIED if name in headers}
        if not known:
            return lambda: None
        self.carried |= dict.fromkeys(ids, known)
        return lambda: [self.carried.pop(id, None) for id in ids]

    async def check_alive(self) -> None:
        """The door itself is alive; nodes that are not are made anew."""

    async def check_ready(self) -> None:
        if not await self.nodes.all("card"):
            raise Unavailable("no node is up", retry_after=1.0)

    async def metrics(self) -> bytes:
        return cluster_view.metrics(await self.nodes.all("metrics")) + generate_latest(self.http.registry)

    async def stats(self, since: float, now: float) -> Json:
        return cluster_view.stats(await self.reports("stats", since, now))

    async def plan(self) -> Json:
        return cluster_view.plans(await self.reports("plan"))

    async def replan(self, asked: PlanRequest) -> Json:
        """Change the plan of one node, or of all."""
        known = [node for node, _ in await self.reports("plan")]
        if asked.node is not None and asked.node not in known:
            raise BadRequest(f"there is no node {quoted(asked.node)}, only {', '.join(known)}", param="node")
        changes = dict(await self.reports("replan", asked))
        failed = next((one for one in changes.values() if isinstance(one, Failure)), None)
        if failed:
            raise failed.error()
        return {"nodes": {node: change for node, change in sorted(changes.items()) if change is not None}}

    async def reports(self, method: str, *given: Any) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = await self.nodes.all(method, *given)
        if not found:
            raise Unavailable("no node is up", retry_after=1.0)
        return sorted(found, key=lambda report: report[0])

    def close(self) -> None:
        self.off_loop.close()
