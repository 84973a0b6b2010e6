"""Which of the authors' loops a family is compared with, and the options that ask the engine for the same."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from dilaserve import Options
from families import loops

PER_STEP = 4  # tokens, in the mean, of loops that go by a number of steps
Loop = Callable[..., tuple[list[int], int]]


class Case(NamedTuple):
    """`name` says whose loop it is; `loop(model, prompt, answer)` gives tokens and passes; `options(answer)` are the
    engine's.
    """

    name: str
    loop: Loop
    options: Callable[[int], Options]


def by_threshold(name: str, loop: Loop, threshold: float, block: int, cache: str, **how: Any) -> Case:
    def options(answer: int) -> Options:
        rule = dict(confidence_threshold=threshold, block_length=block, cache=cache)
        return Options(max_tokens=answer, ignore_eos=True, **rule)

    return Case(name, partial(loop, threshold=threshold, block=block, **how), options)


def dream_steps(model: Any, prompt: Any, answer: int) -> tuple[list[int], int]:
    return loops.dream(model, prompt, answer, answer // PER_STEP)


def dream_options(answer: int) -> Options:
    steps = dict(decode="entropy", num_denoising_steps=answer // PER_STEP)
    return Options(max_tokens=answer, ignore_eos=True, cache="none", block_length=answer, **steps)


def mdlm_steps(model: Any, prompt: Any, answer: int) -> tuple[list[int], int]:
    return loops.mdlm(model, prompt, answer, 32, answer // PER_STEP)


def mdlm_options(answer: int) -> Options:
    steps = answer // PER_STEP
    return Options(max_tokens=answer, ignore_eos=True, cache="none", block_length=32, num_denoising_steps=steps)


LLADA = (
    by_threshold("LLaDA, no cache", loops.fast_dllm_v1, 0.9, 32, "none", dual=False),
    by_threshold("Fast-dLLM v1, dual cache", loops.fast_dllm_v1, 0.9, 32, "dual", dual=True),
)
SDAR = (by_threshold("SDAR, block cache", loops.sdar, 0.95, 4, "exact"),)
CASES: dict[str, tuple[Case, ...]] = {  # by the keys of `checkpoints.ARCHITECTURES`; the authors' own settings
    "llada": LLADA,
    "llada-moe": LLADA,
    "dream": (
        Case("Dream, no cache", dream_steps, dream_options),
        by_threshold("Fast-dLLM v1, dual cache", loops.dream_dual, 0.9, 32, "dual"),
    ),
    "sdar": SDAR,
    "sdar-moe": SDAR,
    "nemotron": (by_threshold("Nemotron, causal cache", loops.nemotron, 0.9, 32, "exact"),),
    "fast-dllm-v2": (by_threshold("Fast-dLLM v2, block cache", loops.fast_dllm_v2, 0.9, 32, "exact", part=8),),
    "llada2": (
        by_threshold("LLaDA2.0, recomputed", loops.llada2, 0.95, 32, "exact"),
        by_threshold("the same with a block cache", loops.sdar, 0.95, 32, "exact"),
    ),
    "a2d": (Case("dllm's MDLM sampler, no cache", mdlm_steps, mdlm_options),),
}
