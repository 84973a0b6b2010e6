"""Receives request bodies: within a bound on their bytes in total, and without holding up the event loop.

It knows bytes and encodings, and nothing of what a body says.
"""

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from dilaserve.errors import Unavailable
from dilaserve.server import heap, json_shape
from dilaserve.server.http import JSON, HttpError, HttpRequest
from dilaserve.server.json_shape import Buffer
from dilaserve.server.loop_share import LoopShare

T = TypeVar("T")
BODY_WITHIN = 30.0  # seconds to receive a request body
SMALL = 2**14  # bytes of a body that always finds room
PIECE = 2**17  # bytes that are counted at once, in a millisecond or two
RESERVE = 8  # a share of the bytes in flight that bodies above SMALL leave to smaller ones: one in so many
TRIM_ABOVE = 2**20  # bytes in flight after which free memory is given back: what decoding leaves is many times as much
TRIM_AFTER = 2.0  # seconds until that, so that it is done once for many bodies
WINDOWS = {"identity": None, "gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's name of each content-encoding


class Intake:
    """All bodies in flight, at most `most_each` bytes each and `most` together."""

    def __init__(self, most_each: int, most: int) -> None:
        self.most_each, self.most = most_each, most
        self.held = self.peak = 0  # bytes in flight; the most since memory was last given back
        self.pace = LoopShare()
        self.opening = asyncio.Lock()  # one large body is inflated and looked through at a time
        self.thread = ThreadPoolExecutor(1, "dilaserve-bodies")
        self.trimming: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self.trimming:
            self.trimming.cancel()
        self.thread.shutdown(wait=False, cancel_futures=True)

    async def read(self, request: HttpRequest, *decoders: Callable[[Buffer], Any]) -> list[Any]:
        """What each of the decoders makes of the body.

        Raises `BadRequest` for one that holds too much, `Unavailable` while too many bytes are in flight, and
        `HttpError` for one that cannot be read.
        """
        window = window_of(request)
        async with self.claimed() as claim:
            body = await self.opened(await received(request, claim), window, claim)
            return [await self.pace.run(partial(decode, body)) for decode in decoders]

    async def opened(self, body: Buffer, window: int | None, claim: "Claim") -> Buffer:
        """Inflated and counted; of large bodies one at a time."""
        if window is None and len(body) <= PIECE:
            await self.count(body)
            return body
        async with self.opening:
            if window is not None:
                claim.grow(self.most_each)
                body = await self.off_loop(partial(inflated, body, window, self.most_each))
                claim.shrink(len(body))
            await self.count(body)
        return body

    async def count(self, body: Buffer) -> None:
        """On the loop, a piece at a time: a thread would hold the interpreter's lock when the loop needs it."""
        counter = json_shape.Counter()
        for start in range(0, len(body), PIECE):
            await self.pace.run(partial(counter.add, body[start : start + PIECE]))

    async def off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)

    @contextlib.asynccontextmanager
    async def claimed(self) -> AsyncIterator["Claim"]:
        claim = Claim(self)
        try:
            yield claim
        finally:
            claim.shrink(0)
            self.trim_later()

    def trim_later(self) -> None:
        """Give memory back soon after large bodies have come."""
        if self.peak < TRIM_ABOVE or self.trimming:
            return
        self.trimming = asyncio.get_running_loop().call_later(TRIM_AFTER, self.trim)

    def trim(self) -> None:
        self.trimming = None
        self.peak = self.held
        self.thread.submit(heap.trim)


class Claim:
    """The bytes of one body."""

    def __init__(self, intake: Intake) -> None:
        self.intake, self.held = intake, 0

    def grow(self, more: int) -> None:
        """Raises `Unavailable` when all bodies together would be too large."""
        intake = self.intake
        reserve = intake.most // RESERVE if self.held + more > SMALL else 0
        if intake.held + more > intake.most - min(reserve, intake.most - intake.most_each):
            raise Unavailable(
                f"request bodies of {intake.held} bytes are being received, of {intake.most} (--max-inflight-bytes); "
                "try again later",
                retry_after=1.0,
            )
        self.held += more
        intake.held += more
        intake.peak = max(intake.peak, intake.held)

    def shrink(self, to: int) -> None:
        self.intake.held -= max(0, self.held - to)
        self.held = min(self.held, to)


def window_of(request: HttpRequest) -> int | None:
    """How the body is inflated, if it must be."""
    if request.media_type != JSON:
        raise HttpError(415, "send the body with content-type: application/json")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in WINDOWS:
        raise HttpError(415, "send the body as it is, or with content-encoding: gzip")
    return WINDOWS[encoding]


async def received(request: HttpRequest, claim: Claim) -> Buffer:
    most, body = claim.intake.most_each, bytearray()
    if (request.body.length or 0) > most:
        raise too_large(most)
    try:
        async with asyncio.timeout(BODY_WITHIN):
            async for piece in request.body:
                if len(body) + len(piece) > most:
                    raise too_large(most)
                claim.grow(len(piece))
                body += piece
    except TimeoutError as error:
        raise HttpError(408, f"the body did not arrive within {BODY_WITHIN:g} seconds") from error
    return body


def too_large(most: int) -> HttpError:
    return HttpError(413, f"the body exceeds {most} bytes (--max-body-bytes)")


def inflated(body: Buffer, window: int, most: int) -> Buffer:
    """What a compressed body holds; no more than `most` bytes are made of it."""
    inflater = zlib.decompressobj(window)
    try:
        found = inflater.decompress(body, most + 1)
    except zlib.error as error:
        raise HttpError(400, f"the body cannot be read by its content-encoding: {error}", closes=True) from error
    if len(found) > most:
        raise too_large(most)
    if not inflater.eof or inflater.unused_data:
        raise HttpError(400, "the body does not end where its content-encoding does", closes=True)
    return found
