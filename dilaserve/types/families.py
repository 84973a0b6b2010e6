"""What the scheduler has to know of a model's family: how its attention, blocks and K/V behave. Values only."""

from typing import Literal

import msgspec

DecodeRule = Literal["threshold", "steps", "factor", "dynamic", "sequential", "entropy", "margin", "entropy-bound"]
Schedule = Literal["even", "block", "mdlm", "dream"]
CONFIDENCE_RULES: tuple[DecodeRule, ...] = ("threshold", "steps", "factor", "dynamic")


class FamilyTraits(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The defaults are those of LLaDA.

    `attention`: `full` (each position sees the whole canvas, so K/V are approximate once a token has changed), `block`
    (each sees its own block and those before it) or `causal` (each sees those before it; the open block sees all of
    itself too). In the last two K/V of finished blocks are exact and never computed again.

    `grid`: blocks are counted from the end of the prompt, or from position 0, so that the first one may begin inside
    the prompt. `block_length`: the one that the model was trained with, which requests get that ask for no other.

    `logit_shift`: 1 where the logits of a position are those of the token after it. `first_token`: the first token of
    a block comes from the logits of the position before, in the pass that writes the K/V of what lies before the block.
    `part_length`: tokens are unmasked in parts of a block of so many positions, one after the other; None: in whole
    blocks.

    `exceeds`: a confidence must be above the threshold, not only reach it. `schedule`: how the steps rule divides a
    block's tokens among its steps. `steps_per_block`: `num_denoising_steps` counts for each block, not for the answer.
    `noise_steps`: above 0 the open block has no masks; it begins as random tokens, all of which are judged anew in each
    step, and is written when the worker finds it finished, after so many steps at most. A block is never cut short.
    `edits`: unmasked tokens may be replaced until their block is done. `rules` are those that the family's authors use,
    `confidence_threshold` their default.
    """

    attention: Literal["full", "block", "causal"] = "full"
    grid: Literal["prompt", "start"] = "prompt"
    block_length: int | None = None
    logit_shift: int = 0
    first_token: bool = False
    part_length: int | None = None
    exceeds: bool = False
    schedule: Schedule = "even"
    steps_per_block: bool = False
    edits: bool = False
    noise_steps: int = 0
    rules: tuple[DecodeRule, ...] = ("threshold", "steps", "factor")
    confidence_threshold: float = 0.9

    @property
    def exact(self) -> bool:
        """Whether K/V of finished blocks are exact."""
        return self.attention != "full"
