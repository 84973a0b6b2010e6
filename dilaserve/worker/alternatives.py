"""The most probable tokens of positions that are unmasked, for rows that want to know more than the one chosen."""

from typing import Any, NamedTuple

import numpy as np
import torch

from dilaserve.types import Alternatives

LEAST = -103.0  # log probability of what float32 rounds to nothing


class Likeliest(NamedTuple):
    """Of each position, [positions, k], the best first; `where` they lie, flat in [rows, width]."""

    where: np.ndarray[Any, Any]
    token: np.ndarray[Any, Any]
    logprob: np.ndarray[Any, Any]


def likeliest(logits: torch.Tensor, mask_id: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and log probabilities of the `k` most probable tokens of each row of logits [positions, vocab], the
    best first, [positions, k] each.

    The first of equal logits goes first, as in torch.argmax; the mask token counts in the softmax and is never listed.
    """
    logits = logits.float().clone()
    total = logits.logsumexp(1, keepdim=True)
    logits[:, mask_id] = -torch.inf
    tokens, values = [], []
    for _ in range(min(k, logits.shape[1] - 1)):
        token = logits.argmax(1, keepdim=True)
        tokens.append(token)
        values.append(logits.gather(1, token) - total)
        logits.scatter_(1, token, -torch.inf)
    return torch.cat(tokens, 1), torch.cat(values, 1).nan_to_num(nan=LEAST, posinf=0.0).clamp(LEAST, 0.0)


def by_row(
    found: Likeliest, wanted: np.ndarray[Any, Any], written: np.ndarray[Any, Any], positions: np.ndarray[Any, Any]
) -> list[tuple[Alternatives, ...]]:
    """The alternatives of what was `written` [rows, width] in each row, so many as it has `wanted` [rows]."""
    rows: list[list[Alternatives]] = [[] for _ in wanted]
    width = written.shape[1]
    for place, tokens, logprobs in zip(*(part.tolist() for part in found), strict=True):
        row, column = divmod(place, width)
        if written[row, column]:
            k = int(wanted[row])
            rows[row].append(Alternatives(int(positions[row, column]), tuple(tokens[:k]), tuple(logprobs[:k])))
    return [tuple(one) for one in rows]
