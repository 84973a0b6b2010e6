"""Text of an answer as it grows: what was given out once never changes."""

from collections.abc import Iterable

from tokenizers.decoders import DecodeStream

from dilaserve.tokenizer.tokenizer import Text


class Detokenizer:
    """Text of a growing list of ids.

    Part of a character is held back until the rest has come. `DecodeStream` cannot give that up at the end, so `flush`
    decodes what it holds behind the ids of the last piece, on which spaces and the like may depend.
    """

    def __init__(self, text: Text) -> None:
        self.text = text
        self.stream = DecodeStream(skip_special_tokens=True)
        self.shown: list[int] = []  # ids of the last piece
        self.held: list[int] = []  # ids after it

    def push(self, ids: Iterable[int]) -> str:
        """The text that is final now; "" while it ends within a character. Raises `RequestFailed`."""
        added = list(ids)
        if not added:
            return ""
        self.held += added
        piece = self.text.decode_more(self.stream, added)
        if piece is None:
            return self.push_singly() if len(added) > 1 else ""
        self.shown, self.held = self.held, []
        return piece

    def push_singly(self) -> str:
        """The text of what is held up to the character that is not whole, so that what is shown of some ids does not
        depend on how many come together.
        """
        self.stream, held, self.held = DecodeStream(skip_special_tokens=True), self.held, []
        if self.shown:
            self.text.decode_more(self.stream, self.shown)
        return "".join([self.push([id]) for id in held])

    def flush(self) -> str:
        """What is held back, when no more ids will come."""
        if not self.held:
            return ""
        before, after = self.text.decode(self.shown), self.text.decode(self.shown + self.held)
        self.shown, self.held = self.held, []
        return after[len(before) :]
