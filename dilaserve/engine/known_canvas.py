"""A canvas whose masked tokens are known: the text of which somebody asks how probable the model finds it."""

from typing import Any, NamedTuple

import numpy as np

from dilaserve.engine.submit import Options

Ids = np.ndarray[Any, np.dtype[np.int32]]  # [tokens]


class KnownCanvas(NamedTuple):
    """`tokens` [tokens] of the whole canvas, and the places of those that are masked, [places], in order; never 0."""

    tokens: Ids
    masked: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def prompt(self) -> Ids:
        """What lies before the first mask."""
        return self.tokens[: self.masked[0]]

    @property
    def answer(self) -> Ids:
        """What lies from there on, as the request table has it: ~token where one is masked."""
        canvas = self.tokens.copy()
        canvas[self.masked] = ~canvas[self.masked]
        return canvas[self.masked[0] :]

    def decoded(self, options: Options) -> Options:
        """The options by which all masks go in one step, with the best token of each."""
        length = len(self.tokens) - int(self.masked[0])
        return Options(
            max_tokens=length,
            block_length=length,
            decode="steps",
            num_denoising_steps=1,
            cache="none",
            ignore_eos=True,
            top_logprobs=1,
            priority=options.priority,
            user=options.user,
            accuracy_budget=options.accuracy_budget,
        )
