"""Lessons from the net's own decoding: each step learns from all masks of the block, then unmasks what is sure.

What is unmasked is chosen by the net's confidence at a random threshold, and filled with the truth. So the net learns
the states that decoding really shows, and its confidence there becomes its accuracy.
"""

import torch

from recipe.lessons import ENDS, FAR, SHORT, Canvas
from recipe.sizes import BLOCK
from recipe.vocabulary import MASK

FRONTIER = 16  # masked tokens from the left that count in full
LOWEST, HIGHEST = 0.55, 0.97  # thresholds


class Rollout:
    """The rows of a batch while they are decoded; a row whose text is complete begins its block anew."""

    def __init__(self, canvas: Canvas) -> None:
        self.noisy, self.clean, first, self.end = canvas
        self.rows, self.length = self.noisy.shape
        device = self.noisy.device
        self.places = torch.arange(self.length, device=device).repeat(self.rows, 1)
        self.inside = first + torch.arange(BLOCK, device=device)  # [rows, block]
        self.wanted = (torch.arange(self.rows, device=device)[:, None] * self.length + self.inside).flatten()
        self.truth = self.clean.gather(1, self.inside)
        self.thresholds = self.drawn()
        self.masked = torch.ones_like(self.inside, dtype=torch.bool)

    def drawn(self) -> torch.Tensor:
        return LOWEST + (HIGHEST - LOWEST) * torch.rand(self.rows, 1, device=self.noisy.device)

    def weight(self) -> torch.Tensor:
        """Of each mask of the block, [rows, block]; what is visible has none."""
        found = torch.where(self.masked.cumsum(1) <= FRONTIER, 1.0, FAR)
        found = torch.where(self.inside >= self.end, ENDS, found) * self.masked
        return found / found.sum(1, keepdim=True) ** SHORT

    @torch.no_grad()
    def advance(self, logits: torch.Tensor) -> None:
        """Unmask by the logits of the block, [rows · block, vocab]."""
        logits = logits.clone()
        logits[:, MASK] = -torch.inf
        confidence = logits.softmax(1).amax(1).view(self.rows, BLOCK).masked_fill(~self.masked, -1.0)
        sure = (confidence >= self.thresholds) | (confidence == confidence.amax(1, keepdim=True))
        masked = self.masked & ~sure
        text_done = ~(masked & (self.inside < self.end)).any(1, keepdim=True)
        self.masked = masked | text_done
        self.thresholds = torch.where(text_done, self.drawn(), self.thresholds)
        self.noisy = self.noisy.scatter(1, self.inside, torch.where(self.masked, MASK, self.truth))
