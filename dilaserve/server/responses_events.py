"""What /v1/responses writes: OpenAI's response object, and its events as the openai packages read them."""

import secrets
import time
from collections.abc import Iterator, Sequence
from itertools import count

from dilaserve.engine.engine import Chunk, Completion
from dilaserve.engine.stream import AnswerStream
from dilaserve.errors import DilaserveError
from dilaserve.server.responses import Json, ResponseFormat, cost, failure
from dilaserve.types import FinishReason, Usage


class ResponsesFormat:
    """Writes one answer. `chat` knows its tokens' log probabilities and warnings; `repeated` are fields of the request
    that the response repeats.
    """

    ending = b""  # there is no mark behind the last event
    named = True

    def __init__(self, chat: ResponseFormat, repeated: Json) -> None:
        self.chat, self.repeated = chat, repeated
        self.id, self.item_id = f"resp_{secrets.token_hex(24)}", f"msg_{secrets.token_hex(24)}"
        self.created = int(time.time())
        self.numbers = count()
        self.text: list[str] = []
        self.logprobs: list[Json] = []
        self.last = Chunk("")

    # whole answers

    def begin(self, streams: Sequence[AnswerStream]) -> None:
        self.chat.begin(streams)

    def answer(self, completions: Sequence[Completion], echoes: Sequence[str], prompt_tokens: int) -> Json:
        (one,) = completions
        item = self.item(self.part(one.text, self.probabilities(one)), status(one.finish_reason))
        spent = usage(prompt_tokens, one.completion_tokens, one.usage.cached_prompt_tokens)
        return self.finished(item, one.finish_reason, one.usage, spent)

    def finished(self, item: Json, reason: FinishReason | None, spent: Usage | None, counted: Json) -> Json:
        cut = {"reason": "max_output_tokens"} if reason == "length" else None
        return self.response(status(reason)) | {
            "output": [item],
            "incomplete_details": cut,
            "completed_at": None if cut else int(time.time()),
            "usage": counted,
            "dilaserve": cost([spent] if spent else []),
            **self.chat.warned,
        }

    def response(self, state: str, error: Json | None = None) -> Json:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": state,
            "error": error,
            "incomplete_details": None,
            "model": self.chat.engine.model.name,
            "output": [],
            "usage": None,
            **self.repeated,
        }

    def item(self, part: Json | None, state: str) -> Json:
        content = [part] if part else []
        return {"id": self.item_id, "type": "message", "status": state, "role": "assistant", "content": content}

    def part(self, text: str, logprobs: list[Json]) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def probabilities(self, answer: Chunk | Completion) -> list[Json]:
        found = self.chat.probabilities(0, self.chat.tokens(0, answer))
        return found["content"] if found else []

    # streams

    def started(self, choices: int, echoes: Sequence[str], prompt_tokens: int) -> Iterator[Json]:
        for kind in ("created", "in_progress"):
            yield self.event(f"response.{kind}", response=self.response("in_progress"))
        yield self.event("response.output_item.added", output_index=0, item=self.item(None, "in_progress"))
        yield self.at("response.content_part.added", part=self.part("", []))

    def more(self, index: int, chunk: Chunk) -> Iterator[Json]:
        logprobs = self.probabilities(chunk)
        self.text.append(chunk.text)
        self.logprobs += logprobs
        if chunk.text or logprobs:
            yield self.at("response.output_text.delta", delta=chunk.text, logprobs=logprobs)
        if chunk.finish_reason:
            self.last = chunk

    def done(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Iterator[Json]:
        text, reason = "".join(self.text), self.last.finish_reason
        part = self.part(text, self.logprobs)
        item = self.item(part, status(reason))
        yield self.at("response.output_text.done", text=text, logprobs=self.logprobs)
        yield self.at("response.content_part.done", part=part)
        yield self.event("response.output_item.done", output_index=0, item=item)
        spent = usage(prompt_tokens, completion_tokens, cached_tokens)
        whole = self.finished(item, reason, self.last.usage, spent)
        yield self.event(f"response.{whole['status']}", response=whole)

    def failed(self, error: DilaserveError) -> Iterator[Json]:
        """The event `error` has its fields twice: as documented, and where the Python client looks for them."""
        about = {"code": "server_error", "message": error.message}
        yield self.event("response.failed", response=self.response("failed", about))
        flat = {"code": error.code, "message": error.message, "param": error.param}
        yield self.event("error", **flat, **failure(error))

    def at(self, kind: str, **fields: object) -> Json:
        """An event of the one part of the one item."""
        return self.event(kind, item_id=self.item_id, output_index=0, content_index=0, **fields)

    def event(self, kind: str, **fields: object) -> Json:
        return {"type": kind, "sequence_number": next(self.numbers), **fields}


def status(reason: FinishReason | None) -> str:
    return "incomplete" if reason == "length" else "completed"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + completion_tokens,
    }
