"""How a block that began as noise goes on after each step, and when it is finished (DiffusionGemma).

Source: transformers 5.23, models/diffusion_gemma/generation_diffusion_gemma.py: EntropyBoundSampler and
StableAndConfidentStoppingCriteria. One step:

1. Logits are divided by the step's temperature, which falls from step to step.
2. Each position gets its best token, a drawn one, and the entropy of its distribution.
3. Drawn tokens are kept, those of the least entropy first, until the entropies before exceed a bound; one at least.
   All others become fresh noise. None is frozen: the next step judges every position anew.
4. The block is finished when the best tokens have not changed and the mean entropy is low, or after the last step. Its
   tokens are the best ones of that step, not the drawn ones.

Draws come from counters of seed, step and position, so a block that starts again repeats them, in any batch and on any
number of ranks.
"""

from typing import NamedTuple

import torch

from dilaserve.models.spec import NoiseSchedule
from dilaserve.worker.sampler import gumbel, mixed

FRESH = -1  # in the place of a token id in the counter: the draw is of noise
DRAWN_BITS = 2**53 - 1


class Judged(NamedTuple):
    """What a step finds at each position of a block, all [positions]; under the logits over the temperature."""

    best: torch.Tensor  # int64
    drawn: torch.Tensor  # int64
    probability: torch.Tensor  # of the best, float64
    entropy: torch.Tensor  # nats, float64
    normaliser: torch.Tensor  # log Σ exp(logit), float64


class OpenBlock(NamedTuple):
    """A block between two steps: its next step, from 1 on, its tokens, and what that step is told.

    `history` are the best tokens of the last steps, the latest last.
    """

    step: int
    ids: torch.Tensor  # int64 [positions]
    expected: torch.Tensor | None  # [positions, hidden]; None before the first step
    history: tuple[torch.Tensor, ...] = ()


def begun(seed: int, positions: torch.Tensor, vocab: int) -> OpenBlock:
    """A block of noise at these positions of the canvas."""
    return OpenBlock(1, fresh(seed, 0, positions, vocab), None)


def fresh(seed: int, step: int, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Random token ids, int64 [positions]; step 0 is the block's beginning."""
    stream = mixed(mixed(mixed(torch.full_like(positions, seed)) ^ step) ^ positions)
    return (mixed(stream ^ FRESH) & DRAWN_BITS) % vocab


def temperature(schedule: NoiseSchedule, step: int, steps: int) -> float:
    """What the logits of a step are divided by, the first of `steps` by the highest."""
    return schedule.coldest + (schedule.hottest - schedule.coldest) * ((steps - step + 1) / steps)


def summary(logits: torch.Tensor, first: int, seed: int, step: int, positions: torch.Tensor) -> torch.Tensor:
    """What the other ranks must know of a rank's logits over the temperature, float32 [positions, part].

    float64 [6, positions]: the largest logit and its id, Σ exp(l - largest), Σ (l - largest) exp(l - largest), the
    highest score of the draw and its id. `first` is the id of the first column.
    """
    largest, best = logits.max(1)
    below = logits - largest[:, None]
    weights = below.exp()
    seeds, steps = torch.full_like(positions, seed), torch.full_like(positions, step)
    score, drawn = (logits + gumbel(seeds, steps, positions, logits.shape[1], first)).max(1)
    parts = (largest, best + first, weights.sum(1), (below * weights).sum(1), score, drawn + first)
    return torch.stack([part.double() for part in parts])


def judged(parts: torch.Tensor) -> Judged:
    """The ranks' summaries, [ranks, 6, positions], taken together; of equals the lower id wins."""
    largest, best, total, weighted, score, drawn = parts.unbind(1)
    top, winner = largest.max(0, keepdim=True)
    behind = largest - top
    shares = behind.exp()
    sums = (total * shares).sum(0)
    means = ((weighted + behind * total) * shares).sum(0) / sums
    chosen = drawn.gather(0, score.argmax(0, keepdim=True))
    found = best.gather(0, winner)[0].long(), chosen[0].long()
    return Judged(*found, 1.0 / sums, sums.log() - means, top[0] + sums.log())


def kept(entropy: torch.Tensor, bound: float) -> torch.Tensor:
    """Which drawn tokens stay, bool [positions]: the surest, while the entropies before them are within the bound."""
    ordered, order = entropy.sort(stable=True)
    before = ordered.cumsum(0) - ordered
    return torch.zeros_like(order, dtype=torch.bool).index_copy_(0, order, before <= bound)


def renoised(found: Judged, noise: torch.Tensor, bound: float) -> torch.Tensor:
    """The tokens of the next step, [positions]: what stays of the drawn ones, and `noise`."""
    return torch.where(kept(found.entropy, bound), found.drawn, noise)


def finished(block: OpenBlock, found: Judged, schedule: NoiseSchedule, steps: int) -> bool:
    """Whether the step of `block` that found this was its last."""
    if block.step >= steps:
        return True
    stable, wanted = block.history[-schedule.stable_steps :] if schedule.stable_steps else (), schedule.stable_steps
    same = len(stable) == wanted and all(torch.equal(one, found.best) for one in stable)
    return same and float(found.entropy.mean()) < schedule.mean_entropy


def advanced(
    block: OpenBlock, found: Judged, noise: torch.Tensor, expected: torch.Tensor, schedule: NoiseSchedule
) -> OpenBlock:
    """The block before its next step."""
    history = (*block.history, found.best)[-schedule.stable_steps :] if schedule.stable_steps else ()
    return OpenBlock(block.step + 1, renoised(found, noise, schedule.entropy_bound), expected, history)
