"""Prompts as token ids and token ids as text, off the event loop where they are long."""

from collections.abc import Sequence

from dilaserve.engine.offload import Offload
from dilaserve.engine.prompts import Prompt, conversation, is_conversation, listed, token_ids
from dilaserve.tokenizer.tokenizer import MARKS, Text


class Tokenization:
    """Of one model: its tokenizer and chat template, and how many ids it has."""

    def __init__(self, text: Text, vocab_size: int, off_loop: Offload) -> None:
        self.text, self.vocab_size, self.off_loop = text, vocab_size, off_loop

    async def tokenize(self, prompt: Prompt, limit: int | None = None) -> list[int]:
        """Token ids of a text, of a conversation (with the mark that opens the answer), or of checked token ids.

        Raises `BadRequest`, also for a text that has more than `limit` tokens for sure.
        """
        held = listed(prompt)
        if isinstance(held, str):
            return await self.off_loop(len(held), lambda: self.text.encode(held, limit))
        if is_conversation(held):
            messages = await self.off_loop(MARKS * len(held), lambda: conversation(held, self.text))
            text = await self.text.rendered(messages, limit)
            return await self.off_loop(len(text), lambda: self.text.ids(text, limit, special=False))
        return await self.off_loop(len(held), lambda: token_ids(held, self.vocab_size))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Raises `BadRequest`."""
        return self.text.decode(token_ids(ids, self.vocab_size, "ids"))
