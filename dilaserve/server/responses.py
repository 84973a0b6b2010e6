"""What goes out: OpenAI's answer objects and stream chunks, built from the engine's chunks."""

import math
import secrets
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from dilaserve import __version__
from dilaserve.engine.assembly import ModelCard
from dilaserve.engine.canvas import Canvas
from dilaserve.engine.engine import Chunk, Completion
from dilaserve.engine.stream import AnswerStream, TopLogprob
from dilaserve.errors import DilaserveError
from dilaserve.server.schema import StreamOptions
from dilaserve.server.token_ids import TokenIds
from dilaserve.tokenizer.detokenizer import Detokenizer
from dilaserve.tokenizer.tokenizer import UNFINISHED, Text
from dilaserve.types import Usage

Json = dict[str, Any]
FINGERPRINT = f"dilaserve-{__version__}"


class Token(NamedTuple):
    id: int
    confidence: float
    top: tuple[TopLogprob, ...] = ()  # the most probable ones in its place


class Candidate(NamedTuple):
    text: str
    logprob: float


class ModelText(Protocol):
    """What writing an answer needs of a server: the model's name, and its tokenizer."""

    model: ModelCard
    text: Text

    def detokenize(self, ids: Sequence[int]) -> str: ...


class ResponseFormat:
    """OpenAI's way of writing answers; `chat` or plain completions. `stops`: their text may be cut. `warnings` go
    into the answer, or into the last chunk of each choice. `wanted` says where a stream counts its tokens, and `ids`
    whether answers carry token ids.
    """

    named = False
    ending = b"data: [DONE]\n\n"

    def __init__(
        self,
        engine: ModelText,
        chat: bool,
        logprobs: bool,
        stops: bool = False,
        warnings: Sequence[str] = (),
        wanted: StreamOptions | None = None,
        ids: bool | None = False,
    ) -> None:
        self.wanted, self.ids = wanted or StreamOptions(), TokenIds(chat, bool(ids))
        self.prompt_tokens = self.streamed = 0  # tokens of all prompts, and of what has been written of all choices
        self.warned: Json = {"warnings": list(warnings)} if warnings else {}
        self.engine, self.chat, self.logprobs, self.stops = engine, chat, logprobs, stops
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.written: Counter[int] = Counter()  # characters by choice, for text_offset
        self.spoken: defaultdict[int, Detokenizer] = defaultdict(lambda: Detokenizer(engine.text))  # likewise
        self.held_back: defaultdict[int, HeldBackTokens] = defaultdict(lambda: HeldBackTokens(engine.text))  # by choice

    def head(self, streamed: bool) -> Json:
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if streamed else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.engine.model.name,
            "system_fingerprint": FINGERPRINT,
        }

    def begin(self, streams: Sequence[AnswerStream]) -> None:
        """Learn of the choices before anything of them is written: their prompts, and the text that their clients have
        of answers that go on.
        """
        self.ids.begin(streams)
        for index, stream in enumerate(streams):
            if len(stream.resumed_ids):
                ids, shown = stream.resumed_ids.tolist(), stream.resumed_characters
                self.written[index] = len(self.spoken[index].push(ids)) - shown
                self.held_back[index].resume(ids, shown)

    # streams

    def started(self, choices: int, echoes: Sequence[str], prompt_tokens: int) -> Iterator[Json]:
        self.prompt_tokens = prompt_tokens
        if self.chat:
            yield from map(self.opening, range(choices))
        yield from (self.echo(index, echo) for index, echo in enumerate(echoes) if echo)

    def more(self, index: int, chunk: Chunk) -> Iterator[Json]:
        self.streamed += len(chunk.token_ids)
        if chunk.canvas:
            yield self.canvas(index, chunk.canvas)
        if delta := self.delta(index, chunk):
            yield delta
        if chunk.finish_reason:
            yield self.closing(index, chunk)

    def done(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Iterator[Json]:
        if self.wanted.include_usage:
            yield self.counted(prompt_tokens, completion_tokens, cached_tokens)

    def failed(self, error: DilaserveError) -> Iterator[Json]:
        yield failure(error)

    def opening(self, index: int) -> Json:
        return self.piece({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def delta(self, index: int, chunk: Chunk) -> Json | None:
        """None if there are no new tokens. Those of no text, such as special ones, are said too, as vLLM does."""
        tokens = self.tokens(index, chunk)
        if not (chunk.text or tokens or chunk.token_ids):
            return None
        said: Json = {"delta": {"content": chunk.text}} if self.chat else {"text": chunk.text}
        logprobs = self.probabilities(index, tokens)
        choice: Json = {"index": index, **said, "logprobs": logprobs, "finish_reason": None}
        return self.piece(choice | self.ids.of(chunk.token_ids))

    def echo(self, index: int, text: str) -> Json:
        self.written[index] += len(text)
        return self.piece({"index": index, "text": text, "logprobs": None, "finish_reason": None})

    def closing(self, index: int, chunk: Chunk) -> Json:
        silent: Json = {"delta": {}} if self.chat else {"text": ""}
        return self.piece({"index": index, **silent, "finish_reason": chunk.finish_reason}) | {
            "dilaserve": cost([chunk.usage] if chunk.usage else []),
            **self.warned,
        }

    def canvas(self, index: int, canvas: Canvas) -> Json:
        """The open block of a choice, in our own object beside an empty delta."""
        silent: Json = {"delta": {}} if self.chat else {"text": "", "logprobs": None}
        piece = self.piece({"index": index, **silent, "finish_reason": None})
        return piece | {"dilaserve": {"canvas": msgspec.structs.asdict(canvas) | {"masked": canvas.masked}}}

    def counted(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
        return self.head(True) | {"choices": [], "usage": usage(prompt_tokens, completion_tokens, cached_tokens)}

    def piece(self, choice: Json) -> Json:
        used = {"usage": usage(self.prompt_tokens, self.streamed)} if self.wanted.continuous_usage_stats else {}
        prompt = self.ids.prompt(choice["index"])
        if self.chat:
            return self.head(True) | {"choices": [choice]} | prompt | used
        return self.head(True) | {"choices": [choice | prompt]} | used

    # whole answers

    def answer(self, completions: Sequence[Completion], echoes: Sequence[str], prompt_tokens: int) -> Json:
        choices = [self.choice(i, completion, echoes[i]) for i, completion in enumerate(completions)]
        spent = sum(completion.completion_tokens for completion in completions)
        prompt = self.ids.prompt(0) if self.chat else {}
        return self.head(False) | {
            "choices": choices,
            **prompt,
            "usage": usage(prompt_tokens, spent, cached(completion.usage for completion in completions)),
            "dilaserve": cost([completion.usage for completion in completions]),
            **self.warned,
        }

    def choice(self, index: int, completion: Completion, echo: str) -> Json:
        choice: Json = {"index": index, "finish_reason": completion.finish_reason} | self.ids.of(completion.token_ids)
        self.written[index] += len(echo)
        choice["logprobs"] = self.probabilities(index, self.tokens(index, completion))
        if self.chat:
            return choice | {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
        return choice | {"text": echo + completion.text} | self.ids.prompt(index)

    def tokens(self, index: int, answer: Chunk | Completion) -> list[Token]:
        """The tokens whose probabilities this chunk carries."""
        if not self.logprobs:
            return []
        tops = answer.top_logprobs or [()] * len(answer.token_ids)
        tokens = [Token(*one) for one in zip(answer.token_ids, answer.confidences, tops, strict=True)]
        return (
            self.held_back[index].shown(tokens, answer.text, answer.finish_reason is not None) if self.stops else tokens
        )

    def probabilities(self, index: int, listed: Sequence[Token]) -> Json | None:
        """Log probabilities of the chosen tokens and of the most probable ones, when they were unmasked. Plain
        completions list a chosen token that is none of these beside them, as OpenAI does.

        Part of a character has no text of its own, and the tokenizer does not give its bytes; all its parts begin
        where it does.
        """
        if not self.logprobs:
            return None
        tokens = [self.engine.detokenize([token.id]) for token in listed]
        logs = [math.log(max(token.confidence, 1e-45)) for token in listed]
        tops = [self.top(one, log) for one, log in zip(listed, logs, strict=True)]
        if self.chat:
            rows = zip(tokens, logs, tops, strict=True)
            return {"content": [named(t, p) | {"top_logprobs": [named(*one) for one in top]} for t, p, top in rows]}
        offsets = []
        for token, alone in zip(listed, tokens, strict=True):
            start, more = self.written[index], self.spoken[index].push([token.id])
            self.written[index] += len(more)
            offsets.append(self.written[index] - len(alone) if alone and more.endswith(alone) else start)
        return {
            "tokens": tokens,
            "token_logprobs": logs,
            "top_logprobs": [chosen_too(*row) for row in zip(tokens, logs, tops, strict=True)] if any(tops) else None,
            "text_offset": offsets,
        }

    def top(self, token: Token, log: float) -> list[Candidate]:
        """The most probable tokens; the chosen one has the same value as where it stands alone."""
        return [
            Candidate(self.engine.detokenize([one.token_id]), log if one.token_id == token.id else one.logprob)
            for one in token.top
        ]


class HeldBackTokens:
    """Holds back the tokens of a text that may be cut, until some of their text is shown."""

    def __init__(self, text: Text) -> None:
        self.detokenizer = Detokenizer(text)
        self.waiting: deque[tuple[int, Token]] = deque()  # with the character at which they begin
        self.length = self.seen = 0  # characters of all tokens, and of those what is shown

    def resume(self, ids: Sequence[int], characters: int) -> None:
        """Take in tokens that are not listed, and how much of their text the client has."""
        self.length, self.seen = len(self.detokenizer.push(ids)), characters

    def shown(self, tokens: Sequence[Token], text: str, ends: bool) -> list[Token]:
        """The tokens that `text`, which is shown after what was, begins to show. What it `ends` with is not cut, unless
        the tokens have more text.
        """
        for token in tokens:
            self.waiting.append((self.length, token))
            self.length += len(self.detokenizer.push([token.id]))
        self.seen += len(text)
        whole = ends and self.length + len(self.detokenizer.flush()) <= self.seen
        found = []
        while self.waiting and (whole or self.waiting[0][0] < self.seen):
            found.append(self.waiting.popleft()[1])
        return found


def named(token: str, logprob: float) -> Json:
    return {"token": token, "logprob": logprob, "bytes": spelled(token)}


def chosen_too(token: str, logprob: float, top: Sequence[Candidate]) -> dict[str, float]:
    """Log probabilities by text; of several tokens with one text, such as parts of characters, the best one's."""
    found: dict[str, float] = {}
    for text, value in [*top, (token, logprob)]:
        found.setdefault(text, value)
    return found


def spelled(token: str) -> list[int] | None:
    return None if UNFINISHED in token else list(token.encode())


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> Json:
    """`cached_tokens` None: not known yet."""
    known = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    known["total_tokens"] = prompt_tokens + completion_tokens
    return known if cached_tokens is None else known | {"prompt_tokens_details": {"cached_tokens": cached_tokens}}


def cached(usages: Iterable[Usage]) -> int:
    """Prompt tokens whose K/V came from other requests. A prompt with several answers counts them once, as its own."""
    return max((usage.cached_prompt_tokens for usage in usages), default=0)


def cost(usages: Sequence[Usage]) -> Json:
    """Our own object: steps and refreshes over all choices; the longest wait, service and deadline in seconds; what the
    thresholds were, the points of accuracy that they are expected to cost, and the tokens that the client had before.
    """
    timed = [usage for usage in usages if usage.deadline_met is not None]
    fate = {
        "steps": sum(usage.steps for usage in usages),
        "refreshes": sum(usage.refreshes for usage in usages),
        "queued": max((usage.queued for usage in usages), default=0.0),
        "served": max((usage.served for usage in usages), default=0.0),
        "mean_confidence": mean([usage.mean_confidence for usage in usages]),
        "deadline_met": all(usage.deadline_met for usage in timed) if timed else None,
        "deadline": max((usage.deadline or 0.0 for usage in timed), default=None),
        "min_threshold": min(
            (usage.min_threshold for usage in usages if usage.min_threshold is not None), default=None
        ),
        "mean_threshold": mean([usage.mean_threshold for usage in usages]),
        "expected_accuracy_drop": mean([usage.expected_accuracy_drop for usage in usages]),
        "resumed_tokens": sum(usage.resumed_tokens for usage in usages),
    }
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in fate.items()}


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def failure(error: DilaserveError) -> Json:
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}
