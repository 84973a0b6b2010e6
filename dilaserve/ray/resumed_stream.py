"""An answer that goes on at another node when its own is lost.

1. The request goes to a node. Its tokens pass through as they come, and are remembered.
2. If the node is lost, the request goes to another with `resume_token_ids`: that one gives what comes behind them.
3. A node that refuses a request that it has not begun is believed, unless it is shutting down.

Nothing is sent twice, and the deadline counts from the first arrival.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from typing import Self

import msgspec
import numpy as np

from dilaserve.engine.stream import Chunk
from dilaserve.engine.submit import Options
from dilaserve.errors import DilaserveError, Unavailable
from dilaserve.ray.node_calls import Call, Failure, Piece, Started

log = logging.getLogger(__name__)
START_WITHIN = 60.0  # seconds until some node has taken a request; a node that is made anew takes a while
TRIES = 8  # nodes that are asked in turn while no new token comes
PAUSE = 0.05  # seconds before the second of them; twice as many before each further one, up to LONGEST_PAUSE
LONGEST_PAUSE = 1.0  # seconds

Open = Callable[[Call], AsyncGenerator[Piece, None]]


class NodeLost(Exception):
    """The node that answers is gone, or does not answer any more."""


class ResumedStream:
    """One request's chunks, from as many nodes as it takes. `begin` before anything else.

    `open` asks some node; what it gives raises `NodeLost` when that node is lost. An `AnswerStream`.
    """

    def __init__(self, open: Open, call: Call) -> None:
        self.open, self.call = open, seeded(call)
        self.loop = asyncio.get_running_loop()
        self.began_at = self.loop.time()
        self.sent: list[int] = []  # tokens that have been passed on
        self.lost = 0  # nodes
        self.tries = 0  # since the last new token
        self.over = False
        self.pieces: AsyncGenerator[Piece, None] | None = None
        self.prompt_ids = np.array(call.prompt, dtype=np.int32)
        self.resumed_ids = np.array(call.options.resume_token_ids, dtype=np.int32)
        self.resumed_characters = 0  # known once a node has taken the request

    @property
    def prompt_tokens(self) -> int:
        return len(self.call.prompt)

    async def begin(self) -> Self:
        """Wait until a node has taken the request. Raises its refusal, or `Unavailable` if there is none."""
        try:
            await self.connect()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def connect(self) -> None:
        """Ask nodes in turn until one has taken what is left of the request."""
        while True:
            self.tries += 1
            try:
                async with asyncio.timeout(START_WITHIN):
                    self.pieces = self.open(self.rest())
                    first = await anext(self.pieces)
            except TimeoutError as error:
                raise Unavailable(
                    f"no node has taken the request within {START_WITHIN:g} s", retry_after=5.0
                ) from error
            except (NodeLost, StopAsyncIteration) as error:
                await self.again(Unavailable("the nodes are being replaced; try again", retry_after=5.0), error)
                continue
            if isinstance(first, Started):
                if not self.lost:
                    self.resumed_characters = first.resumed_characters
                return
            assert isinstance(first, Failure)
            if first.status != Unavailable.status:
                raise first.error()
            await self.again(first.error(), None)

    async def again(self, error: DilaserveError, cause: BaseException | None) -> None:
        """Wait a moment before the next node; raises the error once too many have been asked."""
        await self.release()
        if self.tries >= TRIES:
            raise error from cause
        await asyncio.sleep(min(LONGEST_PAUSE, PAUSE * 2 ** (self.tries - 1)))

    def rest(self) -> Call:
        """The request as the next node gets it: with what has been sent, and the time that has passed."""
        options = self.call.options
        if not self.tries or (not self.sent and self.tries == 1):
            return self.call
        elapsed = options.elapsed_ms + 1000.0 * (self.loop.time() - self.began_at)
        given = (*options.resume_token_ids, *self.sent)
        options = msgspec.structs.replace(options, resume_token_ids=given, elapsed_ms=elapsed)
        id = f"{self.call.id}-{secrets.token_hex(3)}"  # the node may be one that still has the request
        return msgspec.structs.replace(self.call, options=options, id=id)

    # the reader's side

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self.over:
            assert self.pieces
            try:
                piece = await anext(self.pieces)
            except (NodeLost, StopAsyncIteration) as error:
                await self.go_on(error)
                continue
            if isinstance(piece, Failure):
                if piece.status != Unavailable.status:
                    self.over = True
                    raise piece.error()
                await self.go_on(piece.error())
                continue
            assert isinstance(piece, Chunk)
            return self.passed_on(piece)
        raise StopAsyncIteration

    async def go_on(self, why: BaseException) -> None:
        """Have another node go on."""
        self.lost += 1
        log.warning("request %s goes on elsewhere behind %d tokens: %s", self.call.id, len(self.sent), why)
        await self.release()
        await self.connect()

    def passed_on(self, chunk: Chunk) -> Chunk:
        if chunk.token_ids:
            self.sent += chunk.token_ids
            self.tries = 0
        if chunk.finish_reason is None:
            return chunk
        self.over = True
        if self.lost and chunk.usage:
            known = {"restarts": chunk.usage.restarts + self.lost, "resumed_tokens": len(self.resumed_ids)}
            usage = msgspec.structs.replace(chunk.usage, **known)
            chunk = msgspec.structs.replace(chunk, usage=usage)
        return chunk

    async def whole(self) -> list[Chunk]:
        return [chunk async for chunk in self]

    async def release(self) -> None:
        """Tell the node that nobody reads any more."""
        pieces, self.pieces = self.pieces, None
        if pieces:
            with contextlib.suppress(NodeLost):
                await pieces.aclose()

    async def aclose(self) -> None:
        self.over = True
        await self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()


def seeded(call: Call) -> Call:
    """With a seed, so that another node draws as the first would have."""
    if call.options.seed is not None:
        return call
    options: Options = msgspec.structs.replace(call.options, seed=secrets.randbits(63))
    return msgspec.structs.replace(call, options=options)
