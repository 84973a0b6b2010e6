"""The decoding loops that the families' authors publish, at temperature 0, one prompt at a time, with their caches.

Each takes a `Plain` model, a prompt [tokens], how many tokens are wanted, and its settings; it returns the answer and
the forward passes. As published, no loop stops inside its last block. A mask is never a prediction: the loops of
untrained weights would not end.
"""

import math

import torch

from families.layers import KV, Plain

FLOAT64 = torch.float64  # of the softmax in LLaDA's and Fast-dLLM's loops; most others stay in the model's type


def guesses(model: Plain, logits: torch.Tensor, masked: torch.Tensor, dtype: torch.dtype | None = None):
    """The best token of each position and its confidence, [positions]; -inf where nothing is masked."""
    probability = logits.softmax(-1, dtype)
    logits[:, model.mask_id] = -torch.inf
    token = logits.argmax(-1)
    return token, probability.gather(1, token[:, None])[:, 0].masked_fill(~masked, -torch.inf)


def best(confidence: torch.Tensor, count: int) -> torch.Tensor:
    """Which positions are the `count` most confident, bool [positions]."""
    found = torch.zeros_like(confidence, dtype=torch.bool)
    found[confidence.topk(count).indices] = True
    return found


def unmask(x: torch.Tensor, start: int, chosen: torch.Tensor, token: torch.Tensor) -> None:
    part = x[start : start + len(chosen)]
    x[start : start + len(chosen)] = torch.where(chosen, token, part)


def by_threshold(
    model: Plain, x: torch.Tensor, start: int, logits: torch.Tensor, threshold: float, strict: bool = False, dtype=None
) -> None:
    """Unmask what reaches (or `strict`: exceeds) the threshold, and the best, among the positions of the logits."""
    masked = x[start : start + len(logits)] == model.mask_id
    token, confidence = guesses(model, logits, masked, dtype)
    above = confidence > threshold if strict else confidence >= threshold
    unmask(x, start, masked & (above | best(confidence, 1)), token)


def canvas(model: Plain, prompt: torch.Tensor, total: int) -> torch.Tensor:
    return torch.cat((prompt, torch.full((total - len(prompt),), model.mask_id)))


def is_masked(model: Plain, x: torch.Tensor, start: int, end: int) -> bool:
    return bool((x[start:end] == model.mask_id).any())


@torch.inference_mode()
def fast_dllm_v1(model: Plain, prompt: torch.Tensor, answer: int, block: int, threshold: float, dual: bool):
    """Fast-dLLM v1 (arXiv 2505.22618) for LLaDA: without a cache (LLaDA's own generate.py by threshold) or dual."""
    x, passes = canvas(model, prompt, len(prompt) + answer), 0
    for start in range(len(prompt), len(x), block):
        end, past = start + block, None
        while is_masked(model, x, start, end):
            if dual and past is not None:
                logits, past = model.forward(x[start:end], start, past)
            else:
                logits, past = model.forward(x)
                logits = logits[start:end]
            by_threshold(model, x, start, logits, threshold, dtype=FLOAT64)
            passes += 1
    return x[len(prompt) :].tolist(), passes


def shares(masks: int, steps: int):
    """Tokens that dllm's MDLM sampler unmasks at each step, on a linear schedule in float32, rounded half to even."""
    for i in range(steps):
        now, then = (torch.tensor(part / steps) for part in (steps - i, steps - i - 1))
        count = min(masks, round(masks * (1 - float((1 - (1 - then)) / (1 - (1 - now))))))
        masks -= count
        if count:
            yield count


@torch.inference_mode()
def mdlm(model: Plain, prompt: torch.Tensor, answer: int, block: int, steps: int):
    """dllm's MDLMSampler: `steps` for the answer, the whole canvas in each."""
    x, passes = canvas(model, prompt, len(prompt) + answer), 0
    for start in range(len(prompt), len(x), block):
        for count in shares(block, math.ceil(steps / math.ceil(answer / block))):
            masked = x[start : start + block] == model.mask_id
            logits = model.forward(x)[0][start : start + block]
            token, confidence = guesses(model, logits, masked, FLOAT64)  # else several confidences may be 1
            unmask(x, start, best(confidence, count), token)
            passes += 1
    return x[len(prompt) :].tolist(), passes


@torch.inference_mode()
def dream(model: Plain, prompt: torch.Tensor, answer: int, steps: int):
    """Dream's diffusion_generate with alg="entropy": no blocks; logits are of the next token."""
    first = len(prompt)
    x, passes = canvas(model, prompt, first + answer), 0
    times = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        logits = model.forward(x)[0][first - 1 : -1]
        masked = x[first:] == model.mask_id
        token, _ = guesses(model, logits.clone(), masked)
        odds = logits.softmax(-1)
        order = (odds * torch.log(odds + 1e-10)).sum(-1).masked_fill(~masked, -torch.inf)
        left = masked.sum()
        count = int(left * (1 - times[i + 1] / times[i])) if i < steps - 1 else int(left)
        unmask(x, first, best(order, count), token)
        passes += 1
    return x[first:].tolist(), passes


@torch.inference_mode()
def dream_dual(model: Plain, prompt: torch.Tensor, answer: int, block: int, threshold: float):
    """Fast-dLLM v1 for Dream with the dual cache: a block's first token comes from its whole pass, alone."""
    x, passes = canvas(model, prompt, len(prompt) + answer), 0
    for start in range(len(prompt), len(x), block):
        end = start + block
        logits, past = model.forward(x)
        x[start] = guesses(model, logits[start - 1 : start], torch.ones(1, dtype=torch.bool))[0][0]
        passes += 1
        while is_masked(model, x, start, end):
            logits, past = model.forward(x[start:end], start, past)
            by_threshold(model, x, start + 1, logits[:-1], threshold)
            passes += 1
    return x[len(prompt) :].tolist(), passes


def grains(first: int, end: int, block: int) -> torch.Tensor:
    """Block-causal visibility of positions [first, end) over [0, end)."""
    number = torch.arange(end) // block
    return number[first:, None] >= number[None]


@torch.inference_mode()
def sdar(model: Plain, prompt: torch.Tensor, answer: int, block: int, threshold: float):
    """SDAR's generate.py, low_confidence_dynamic: whole blocks of the prompt first, then each block, then its K/V."""
    first, wanted = len(prompt) // block * block, len(prompt) + answer
    x, past, passes = canvas(model, prompt, math.ceil(wanted / block) * block), None, 0
    if first:
        past, passes = model.forward(x[:first], 0, None, grains(0, first, block))[1], 1
    for start in range(first, len(x), block):
        end = start + block
        while is_masked(model, x, start, end):
            logits = model.forward(x[start:end], start, past)[0]
            by_threshold(model, x, start, logits, threshold, strict=True)
            passes += 1
        past, passes = model.forward(x[start:end], start, past)[1], passes + 1
    return x[len(prompt) : wanted].tolist(), passes


@torch.inference_mode()
def llada2(model: Plain, prompt: torch.Tensor, answer: int, block: int, threshold: float):
    """LLaDA2.0's generate(): each step computes everything up to the block's end again."""
    wanted = len(prompt) + answer
    x, passes = canvas(model, prompt, math.ceil(wanted / block) * block), 0
    for start in range(len(prompt) // block * block, len(x), block):
        end = start + block
        while is_masked(model, x, start, end):
            logits = model.forward(x[:end], 0, None, grains(0, end, block))[0]
            by_threshold(model, x, start, logits[start:], threshold, strict=True)
            passes += 1
    return x[len(prompt) : wanted].tolist(), passes


@torch.inference_mode()
def nemotron(model: Plain, prompt: torch.Tensor, answer: int, block: int, threshold: float):
    """Nemotron-Labs-Diffusion's generate() with causal context: finished blocks are computed again causally."""

    def causal(start: int, past: KV | None) -> tuple[int, KV]:
        visible = torch.ones(len(x) - start, len(x), dtype=torch.bool).tril(start)
        logits, kept = model.forward(x[start:], start, past, visible)
        return int(guesses(model, logits[-1:], torch.ones(1, dtype=torch.bool))[0]), kept

    x = prompt
    seed, past = causal(0, None)
    passes = 1
    for start in range(len(prompt), len(prompt) + answer, block):
        x = canvas(model, torch.cat((x, torch.tensor([seed]))), start + block)
        while is_masked(model, x, start, len(x)):
            by_threshold(model, x, start, model.forward(x[start:], start, past)[0], threshold)
            passes += 1
        seed, past = causal(start, past)
        passes += 1
    return x[len(prompt) :].tolist(), passes


@torch.inference_mode()
def fast_dllm_v2(model: Plain, prompt: torch.Tensor, answer: int, block: int, part: int, threshold: float):
    """Fast-dLLM v2's generate(), use_block_cache=False: parts of a block in turn; logits are of the next token."""
    first, wanted = len(prompt) // block * block, len(prompt) + answer
    x, past, passes = prompt, None, 0

    def next_token(logits: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, guesses(model, logits[-1:], torch.ones(1, dtype=torch.bool))[0]))

    if first:
        logits, past = model.forward(x[:first], 0, None, grains(0, first, block))
        passes += 1
        if first == len(x):
            x = next_token(logits)
    for start in range(first, wanted, block):
        x = canvas(model, x, start + block)
        for begin in range(start, start + block, part):
            while is_masked(model, x, begin, begin + part):
                logits = model.forward(x[start:], start, past)[0].roll(1, 0)
                low = max(begin, start + 1)  # the first token of a block is there already, or is the prompt's
                by_threshold(model, x, low, logits[low - start : begin + part - start], threshold, strict=True)
                passes += 1
        logits, past = model.forward(x[start:], start, past)
        x, passes = next_token(logits), passes + 1
    return x[len(prompt) : wanted].tolist(), passes
