"""The text of an answer as its tokens become final: characters that are not whole, and stop strings, are held back."""

from collections.abc import Sequence
from typing import NamedTuple

from dilaserve.engine.submit import Options
from dilaserve.tokenizer.detokenizer import Detokenizer
from dilaserve.tokenizer.stop_strings import StopStrings
from dilaserve.tokenizer.tokenizer import Text


class Cut(NamedTuple):
    """Where the text ends: at one of the strings `stop`, once the answer has more than `min_tokens` tokens. `shown`:
    what stops it, a string or a token, is part of the text.
    """

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    shown: bool = False


class AnswerText:
    """What is shown of some tokens does not depend on how many of them come together."""

    def __init__(self, text: Text, cut: Cut) -> None:
        self.cut, self.tokens = cut, 0  # tokens that have been taken in
        self.characters = 0  # that have been shown
        self.detokenizer, self.stops = Detokenizer(text), StopStrings(cut.stop, cut.shown)

    def push(self, ids: Sequence[int]) -> str:
        """The text of the next tokens, up to where it is cut. No stop string ends within the first `min_tokens` tokens;
        those go one by one, so that their text does not depend on how many come together.
        """
        early = max(0, self.cut.min_tokens - self.tokens) if self.stops.stops else 0
        self.tokens += len(ids)
        first = [self.stops.pass_over(self.detokenizer.push([id])) for id in ids[:early]]
        return self.counted("".join(first) + self.stops.push(self.detokenizer.push(ids[early:])))

    def finish(self) -> str:
        """What was held back, when no more tokens will come."""
        return self.counted(self.stops.push(self.detokenizer.flush()) + self.stops.flush())

    def counted(self, shown: str) -> str:
        self.characters += len(shown)
        return shown


def cutting(options: Options) -> Cut:
    return Cut(options.stop, options.min_tokens, options.include_stop_str_in_output)
