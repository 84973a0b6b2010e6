"""What /v1/messages writes: Anthropic's message object, and its events as the anthropic packages read them."""

import secrets
from collections.abc import Iterator, Sequence

from dilaserve.engine.engine import Chunk, Completion
from dilaserve.engine.stream import AnswerStream
from dilaserve.errors import DilaserveError
from dilaserve.server.messages_api import Json, failure
from dilaserve.server.responses import ResponseFormat, cost
from dilaserve.types import FinishReason

EMPTY = {"type": "text", "text": ""}


class MessagesFormat:
    """Writes one answer. `chat` knows the model and the warnings."""

    ending = b""  # there is no mark behind the last event
    named = True

    def __init__(self, chat: ResponseFormat, request_id: str) -> None:
        self.chat, self.request_id = chat, request_id
        self.id = f"msg_{secrets.token_hex(12)}"
        self.last = Chunk("")

    def begin(self, streams: Sequence[AnswerStream]) -> None:
        self.chat.begin(streams)

    def answer(self, completions: Sequence[Completion], echoes: Sequence[str], prompt_tokens: int) -> Json:
        (one,) = completions
        counted = usage(prompt_tokens, one.completion_tokens, one.usage.cached_prompt_tokens)
        return {
            **self.message([{"type": "text", "text": one.text}], counted),
            **stopped(one.finish_reason, one.stop),
            "dilaserve": cost([one.usage]),
            **self.chat.warned,
        }

    def message(self, content: list[Json], counted: Json) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.chat.engine.model.name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": counted,
        }

    def started(self, choices: int, echoes: Sequence[str], prompt_tokens: int) -> Iterator[Json]:
        yield {"type": "message_start", "message": self.message([], usage(prompt_tokens, 0, 0))}
        yield {"type": "content_block_start", "index": 0, "content_block": EMPTY}

    def more(self, index: int, chunk: Chunk) -> Iterator[Json]:
        if chunk.text:
            delta = {"type": "text_delta", "text": chunk.text}
            yield {"type": "content_block_delta", "index": 0, "delta": delta}
        if chunk.finish_reason:
            self.last = chunk

    def done(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Iterator[Json]:
        yield {"type": "content_block_stop", "index": 0}
        yield {
            "type": "message_delta",
            "delta": stopped(self.last.finish_reason, self.last.stop),
            "usage": usage(prompt_tokens, completion_tokens, cached_tokens),
            "dilaserve": cost([self.last.usage] if self.last.usage else []),
            **self.chat.warned,
        }
        yield {"type": "message_stop"}

    def failed(self, error: DilaserveError) -> Iterator[Json]:
        yield failure(error, self.request_id)


def stopped(reason: FinishReason | None, stop: str | None) -> Json:
    """Why the answer ended; `stop`: the string that ended it."""
    word = "max_tokens" if reason == "length" else "end_turn" if stop is None else "stop_sequence"
    return {"stop_reason": word, "stop_sequence": stop}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    """Tokens whose K/V came from other requests are counted apart, as Anthropic does."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": completion_tokens,
    }
