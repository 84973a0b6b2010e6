"""The stream of one answer: tokens become final, text comes out, once and in order."""

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import chain
from typing import NamedTuple, Protocol, Self

import msgspec

from dilaserve.engine.canvas import Canvas, Snapshot, drawn
from dilaserve.engine.doorbell import Bell
from dilaserve.engine.prefix_hashes import PrefixHasher
from dilaserve.engine.resume import Ids, Resumed
from dilaserve.errors import DilaserveError, Unavailable
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.types import Alternatives, Cancel, Event, FinishReason, Request, Usage


class TopLogprob(NamedTuple):
    token_id: int
    logprob: float


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """What has become final since the last one. The last chunk carries why it ended and what it cost.

    `confidences` are the probabilities of the tokens when they were unmasked. Text may lag behind the tokens, by part
    of a character or of a stop string. `stop` is the stop string at which the text ends, if one has ended it.

    `top_logprobs` are the most probable tokens in place of each token, the best first, if they were asked for; none for
    tokens whose step was lost with its worker. A chunk with a `canvas` has nothing else.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    top_logprobs: tuple[tuple[TopLogprob, ...], ...] = ()
    stop: str | None = None
    canvas: Canvas | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer. `stop` is the stop string at which its text ends, if one has ended it."""

    text: str
    token_ids: tuple[int, ...]
    confidences: tuple[float, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    usage: Usage
    top_logprobs: tuple[tuple[TopLogprob, ...], ...] = ()
    stop: str | None = None


class AnswerStream(Protocol):
    """One answer, chunk by chunk. Leaving it early cancels its request.

    `prompt_ids` are the prompt's tokens; `resumed_ids` those of the answer that its client had before, with so many
    `resumed_characters` of its text.
    """

    prompt_ids: Ids
    resumed_ids: Ids
    resumed_characters: int

    @property
    def prompt_tokens(self) -> int: ...

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    async def whole(self) -> list[Chunk]: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exception: object) -> None: ...


class Stream:
    """An async iterator of chunks. Leaving it early (`aclose`, or the `async with` block) cancels the request.

    `prompt_ids` are the prompt's tokens, and `before` those of the answer that its client has.
    """

    def __init__(
        self,
        request: Request,
        prompt_ids: Ids,
        before: Resumed,
        text: Text,
        post: Callable[[Event], None],
        mask_id: int,
        hasher: PrefixHasher | None = None,
    ) -> None:
        self.request, self.post, self.hasher = request, post, hasher
        self.prompt_ids, self.resumed_ids, self.said = prompt_ids, before.tokens, before.text
        self.text, self.mask_id = text, mask_id
        self.position = self.final = request.begin  # canvas positions before it: pushed; final
        self.first_at: float | None = None  # when the first tokens became final, and the last that have; if observed
        self.last_at: float | None = None
        self.resumed_characters = before.text.characters  # of the answer's text that the client had before
        self.alternatives: dict[int, tuple[TopLogprob, ...]] = {}  # by canvas position
        self.chunks: deque[Chunk | DilaserveError | None] = deque()
        self.snapshots: dict[int, Snapshot] = {}  # by block, the latest of each that has not been read
        self.news = Bell()  # rings for the reader: a chunk has come, or only the last, as `patient` says
        self.patient = False
        self.seen = Bell()  # rings when the scheduler has seen the request
        self.over = False  # no more chunks will come
        self.read = False  # the reader has left

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt_tokens(self) -> int:
        return self.request.prompt_tokens

    @property
    def stopped(self) -> bool:
        """A stop string has come."""
        return self.said.stops.found

    @property
    def shows_stop_token(self) -> bool:
        """The token that ends the answer belongs to its text; no stop string has ended it before."""
        return self.said.cut.shown and not self.stopped

    @property
    def waits(self) -> bool:
        """Nobody would notice if all came at the end."""
        return self.patient and not self.said.stops.stops

    async def admitted(self) -> None:
        """Wait until the scheduler has admitted the request; raises the reason if it declines."""
        await self.seen.wait()
        if self.over and isinstance(error := self.chunks[0], DilaserveError):
            self.read = True
            raise error

    # the engine's side

    def push(self, ids: list[int], confidences: list[float]) -> None:
        """Raises what the tokenizer raises; the stream then has no text any more."""
        text = self.said.push(ids)
        top = self.top_of(range(self.position, self.position + len(ids)))
        self.position += len(ids)
        self.chunks.append(Chunk(text, tuple(ids), tuple(confidences), top_logprobs=top))
        if not self.patient:
            self.news.ring()

    def learn(self, found: Iterable[Alternatives]) -> None:
        """Remember what else might have stood at positions that are not pushed yet."""
        for one in found:
            pairs = zip(one.token_ids, one.logprobs, strict=True)
            self.alternatives[one.position] = tuple(TopLogprob(*pair) for pair in pairs)

    def top_of(self, positions: Iterable[int]) -> tuple[tuple[TopLogprob, ...], ...]:
        if not self.request.decoding.top_logprobs:
            return ()
        return tuple(self.alternatives.pop(position, ()) for position in positions)

    def show(self, taken: Snapshot) -> None:
        """The block after a step; it takes the place of what the reader has not seen of the same block."""
        self.snapshots[taken.about.block] = taken
        self.news.ring()

    def finish(self, reason: FinishReason, usage: Usage) -> None:
        if reason == "cancelled":
            self.end(None)
            return
        rest = self.said.finish()
        reason = "stop" if self.stopped else reason
        self.end(Chunk(rest, finish_reason=reason, usage=usage, stop=self.said.stops.stop))

    def fail(self, error: DilaserveError) -> None:
        self.end(error)

    def end(self, last: Chunk | DilaserveError | None) -> None:
        self.over = True
        self.chunks.append(last)
        self.seen.ring()
        self.news.ring()

    # the reader's side

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self.read:
            raise StopAsyncIteration
        while not self.chunks and not self.snapshots:
            await self.news.wait()
        if self.snapshots:
            return self.seen_canvas()
        chunk = self.chunks.popleft()
        self.read = not isinstance(chunk, Chunk) or chunk.finish_reason is not None
        if isinstance(chunk, DilaserveError):
            raise chunk
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def seen_canvas(self) -> Chunk:
        """The earliest block that has not been read. Raises what the tokenizer raises."""
        return Chunk("", canvas=drawn(self.snapshots.pop(next(iter(self.snapshots))), self.text, self.mask_id))

    async def whole(self) -> list[Chunk]:
        """All chunks, once the last has come."""
        self.patient = True
        while not self.over:
            await self.news.wait()
        return [chunk async for chunk in self]

    async def aclose(self) -> None:
        """Cancel the request unless it is over; its row is free after the step in flight."""
        self.read = True
        if not self.over:
            self.post(Cancel(self.id, "cancelled"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()


async def collect(stream: AnswerStream) -> Completion:
    """Read a stream to its end; raises the stream's error, and `Unavailable` if it was cancelled from elsewhere."""
    chunks = await stream.whole()
    if not chunks or (last := chunks[-1]).finish_reason is None or last.usage is None:
        raise Unavailable("the request was cancelled")
    ids = tuple(chain.from_iterable([chunk.token_ids for chunk in chunks]))
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=ids,
        confidences=tuple(chain.from_iterable([chunk.confidences for chunk in chunks])),
        finish_reason=last.finish_reason,
        prompt_tokens=stream.prompt_tokens,
        completion_tokens=len(ids),
        usage=last.usage,
        top_logprobs=tuple(chain.from_iterable([chunk.top_logprobs for chunk in chunks])),
        stop=last.stop,
    )
