"""Token ids in answers, as vLLM has them: of completions in each choice, of chats the prompt's beside the choices."""

from collections.abc import Sequence
from typing import Any

from dilaserve.engine.stream import AnswerStream

Json = dict[str, Any]


class TokenIds:
    """What the choices of one answer carry. `wanted`: the client has asked for ids (`return_token_ids`)."""

    def __init__(self, chat: bool, wanted: bool) -> None:
        self.chat, self.wanted = chat, wanted
        self.prompts: dict[int, list[int]] = {}  # by choice, those that have not been sent

    def begin(self, streams: Sequence[AnswerStream]) -> None:
        if self.wanted:
            self.prompts = {index: stream.prompt_ids.tolist() for index, stream in enumerate(streams)}

    def prompt(self, index: int) -> Json:
        """The prompt's, for the first that is written of a choice; nothing after that."""
        ids = self.prompts.pop(index, None)
        return {} if ids is None else {"prompt_token_ids": ids}

    def of(self, ids: Sequence[int]) -> Json:
        return {"token_ids": list(ids)} if self.wanted else {}
