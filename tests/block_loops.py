"""The authors' decoding loops of Dream, SDAR, Nemotron-Labs-Diffusion and Fast-dLLM v2, at temperature 0.

Each pass computes everything again under an explicit mask: nothing is kept between passes, so that it is plain which
token sees which. A pass over a cache is one over old and new tokens together, in which the old ones do not see the new.

Each loop returns (tokens, passes): the passes are those whose logits unmask a token while one of the wanted tokens is
masked. What lies behind them in the last block is not wanted. `limit` cuts the last block, in tokens of the canvas; the
authors' code has no such limit.
"""

import itertools

import torch


def block_causal(length: int, block: int) -> torch.Tensor:
    number = torch.arange(length) // block
    return number[:, None] >= number[None, :]


def open_at(length: int, start: int) -> torch.Tensor:
    """Causal; what lies from `start` on sees everything."""
    visible = torch.ones(length, length).tril().bool()
    visible[start:] = True
    return visible


def even(total: int, steps: int) -> list[int]:
    return [total // steps + (i < total % steps) for i in range(steps)]


def ranked(rows: dict[int, torch.Tensor], score=lambda p: p.max()) -> list[tuple[float, int, int]]:
    """(score, position, token) of logits by position, the largest score first, then the leftmost."""
    found = [(float(score(row.softmax(-1))), p, int(row.argmax())) for p, row in rows.items()]
    return sorted(found, key=lambda one: (-one[0], one[1]))


def at_least_one(found, passes) -> list:
    """Those whose confidence passes; the first always."""
    return [one for i, one in enumerate(found) if i == 0 or passes(one[0])]


def put(x: list[int], found) -> None:
    for _, position, token in found:
        x[position] = token


SCORES = {
    "maskgit_plus": lambda p: p.max(),
    "topk_margin": lambda p: p.topk(2).values[0] - p.topk(2).values[1],
    "entropy": lambda p: (p * torch.log(p + 1e-10)).sum(),
}


def shares(masks: int, steps: int, first: int = 0, eps: float = 1e-3):
    """How many tokens Dream unmasks at each step from number `first` on; in float32, rounded down, all at the last."""
    times = torch.linspace(1, eps, steps + 1)
    for i in range(first, steps):
        count = int(torch.tensor(float(masks)) * (1 - times[i + 1] / times[i])) if i < steps - 1 else masks
        masks -= count
        yield count


def dream(model, prompt, gen_length, steps, alg, eps=1e-3):
    """Dream's diffusion_generate: no blocks; the token at a position comes from the logits before it."""
    x = list(prompt) + [model.mask_id] * gen_length
    visible, masked, passes = torch.ones(len(x), len(x)).bool(), set(range(len(prompt), len(x))), 0
    for count in shares(gen_length, steps, eps=eps):
        if not count:
            continue  # the canvas would be the same after it
        logits = model.logits(x, visible)
        chosen = ranked({p: logits[p - 1] for p in sorted(masked)}, SCORES[alg])[:count]
        put(x, chosen)
        masked -= {p for _, p, _ in chosen}
        passes += 1
    return x[len(prompt) :], passes


def over_cache(model, old, new, begin, cached):
    """Logits of `new`, which lies at position `begin`, over the K/V that a pass over `old` has left of `cached`."""
    size, added = len(old), len(new)
    visible = torch.zeros(size + added, size + added).bool()
    visible[:size, :size] = True
    visible[size:, cached] = True
    visible[size:, size:] = True
    return model.logits(old + new, visible, [*range(size), *range(begin, begin + added)])[size:]


def dream_blocks(model, prompt, gen_length, block_length, cache, threshold=None, steps=None, alg="entropy"):
    """Fast-dLLM's block sampler for Dream with a prefix or a dual cache; by threshold, or `steps` for the answer."""
    x, total, passes = list(prompt) + [model.mask_id] * gen_length, len(prompt) + gen_length, 0
    blocks = -(-gen_length // block_length)
    for start in range(len(prompt), total, block_length):
        end = min(start + block_length, total)
        old, last = list(x), end if cache == "dual" else total
        x[start] = int(model.logits(old, torch.ones(total, total).bool())[start - 1].argmax())
        passes += 1
        cached = [*range(start), *(range(last, total) if cache == "dual" else ())]
        masked = set(range(start + 1, end))
        counts = shares(len(masked), steps // blocks, first=1) if steps else itertools.repeat(1)
        for count in counts:
            if not masked:
                break
            if not count:
                continue
            logits = over_cache(model, old, x[start:last], start, cached)
            rows = {p: logits[p - 1 - start] for p in sorted(masked)}
            if steps:
                chosen = ranked(rows, SCORES[alg])[:count]
            else:
                chosen = at_least_one(ranked(rows), lambda confidence: confidence >= threshold)
            put(x, chosen)
            masked -= {p for _, p, _ in chosen}
            passes += 1
    return x[len(prompt) :], passes


def sdar(model, prompt, gen_length, block_length, strategy, denoising_steps, threshold=None, stop_ids=(), limit=10**9):
    """SDAR's generate.py, greedy as its evaluation code is, and with prompt tokens protected as there."""
    begin, b, passes = len(prompt), block_length, 0
    end = min(-(-(begin + gen_length) // b) * b, limit)
    x, wanted = list(prompt) + [model.mask_id] * (end - begin), begin + gen_length
    for start in range(begin // b * b, end, b):
        stop = min(start + b, end)
        masked, visible = set(range(max(start, begin), stop)), block_causal(stop, b)
        for quota in even(stop - start, denoising_steps):
            if not masked:
                break
            passes += min(masked) < wanted
            logits = model.logits(x[:stop], visible)
            found = ranked({p: logits[p] for p in sorted(masked)})
            above = [one for one in found if threshold is not None and one[0] > threshold]
            if strategy == "sequential":
                chosen = sorted(found, key=lambda one: one[1])[:quota]
            elif strategy == "low_confidence_dynamic" and len(above) >= quota:
                chosen = above
            else:
                chosen = found[:quota]
            put(x, chosen)
            masked -= {p for _, p, _ in chosen}
        if set(stop_ids) & set(x[begin:stop]):
            end = stop
            break
    return x[begin:end][:gen_length], passes


def nemotron(model, prompt, gen_length, block_length, threshold=None, steps=None, eos=None, limit=10**9):
    """Nemotron's generate with causal context; `steps` are those of a block, by default as many as its tokens."""
    x, wanted, passes = list(prompt), len(prompt) + gen_length, 0
    for _ in range(-(-gen_length // block_length)):
        start = len(x)
        x.append(int(model.logits(x, open_at(start, start))[-1].argmax()))
        x += [model.mask_id] * (min(start + block_length, limit) - len(x))
        masked, quotas = set(range(start + 1, len(x))), even(len(x) - start - 1, steps or block_length)
        passes += 1
        for quota in quotas:
            if not masked:
                break
            passes += min(masked) < wanted
            logits = model.logits(x, open_at(len(x), start))
            found = ranked({p: logits[p] for p in sorted(masked)})
            chosen = found[:quota] if threshold is None else at_least_one(found, lambda c: c >= threshold)
            put(x, chosen)
            masked -= {p for _, p, _ in chosen}
            if eos in x[start:] and min(masked, default=len(x)) > start + x[start:].index(eos):
                break
        if eos in x[len(prompt) :]:
            return x[len(prompt) : x.index(eos, len(prompt)) + 1], passes
    return x[len(prompt) :], passes


def fast_dllm(model, prompt, gen_length, threshold=1.0, part=8, block_length=32, stop=None, limit=10**9):
    """Fast-dLLM v2's generate, with a prompt of exactly one block prefilled too; as many blocks as the answer needs."""
    x, begin, wanted, passes = list(prompt), len(prompt), len(prompt) + gen_length, 0

    def next_token():
        return int(model.logits(x, block_causal(len(x), block_length))[-1].argmax())

    def ended(masked):
        return stop in x[begin:] and min(masked, default=len(x)) > x.index(stop, begin)

    if begin % block_length == 0:
        x.append(next_token())
        passes += 1
    while len(x) < wanted and stop not in x[begin:]:
        start = len(x) // block_length * block_length
        masked = set(range(len(x), min(start + block_length, limit)))
        x += [model.mask_id] * len(masked)
        visible = block_causal(len(x), block_length)
        for first in range(start, start + block_length, part):
            while (mine := masked & set(range(first, first + part))) and not ended(masked):
                passes += min(masked) < wanted
                logits = model.logits(x, visible)
                found = ranked({p: logits[p - 1] for p in sorted(mine)})
                chosen = at_least_one(found, lambda confidence: confidence > threshold)
                put(x, chosen)
                masked -= {p for _, p, _ in chosen}
        if ended(masked):
            break
        if len(x) < wanted:
            x.append(next_token())
            passes += 1
    answer = x[begin:][:gen_length]
    return answer[: answer.index(stop) + 1] if stop in answer else answer, passes
