"""The blocks of an instance's rows that began as noise, between two steps: what the table does not hold.

A block that is not known, because its row comes from another instance or a worker was lost, starts again. Its draws are
those that it had, so its answer is the same.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from dilaserve.models.spec import ModelSpec
from dilaserve.models.transformer import Model
from dilaserve.transport.request_table import RequestTable
from dilaserve.worker.graph_steps import MAX_LOGITS
from dilaserve.worker.noise_sampler import (
    Judged,
    OpenBlock,
    advanced,
    begun,
    finished,
    fresh,
    judged,
    summary,
    temperature,
)
from dilaserve.worker.step_arrays import Blocks, Columns
from dilaserve.worker.tp_group import TPGroup


class Held(NamedTuple):
    """A row's block, and which block of which request it is."""

    generation: int
    start: int
    block: OpenBlock


class OpenBlocks:
    """All ranks of an instance hold the same; `held` is by row, the one that stepped last at the end.

    Nobody says that a row has left. `most` blocks are held, so that those of rows that have do not pile up: as many as
    an instance has rows at once, or more.
    """

    def __init__(
        self, spec: ModelSpec, model: Model, table: RequestTable, group: TPGroup, device: torch.device, most: int
    ) -> None:
        assert spec.noise is not None
        self.most = most
        self.spec, self.model, self.table, self.group, self.device = spec, model, table, group, device
        self.schedule = spec.noise
        self.held: dict[int, Held] = {}

    def begin(self, columns: Columns) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
        """The tokens of the batch's open blocks, [tokens], and what they are told, [tokens, hidden]."""
        blocks = [self.of(*one) for one in self.rows(columns)]
        while len(self.held) > self.most:
            del self.held[next(iter(self.held))]
        zeros = self.model.weights.norm.new_zeros
        nothing = zeros(0, self.spec.hidden)
        told = [zeros(len(one.ids), self.spec.hidden) if one.expected is None else one.expected for one in blocks]
        ids = [one.ids.numpy(force=True) for one in blocks]
        return np.concatenate([np.zeros(0, np.int64), *ids]), torch.cat([nothing, *told])

    def rows(self, columns: Columns) -> list[tuple[int, int, int, int]]:
        """Row, generation, start and end of each open block; a part of a prompt has none."""
        fields = (columns.row, columns.generation, columns.block_start, columns.block_end)
        found = zip(*(field.tolist() for field in fields), strict=True)
        return [(row, generation, start, end) for row, generation, start, end in found if end > start]

    def of(self, row: int, generation: int, start: int, end: int) -> OpenBlock:
        held = self.held.pop(row, None)
        if held is None or (held.generation, held.start) != (generation, start):
            block = begun(int(self.table.seed[row]), self.positions(start, end), self.spec.vocab_size)
            held = Held(generation, start, block)
        self.held[row] = held
        return held.block

    def positions(self, start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end, device=self.device)

    def advance(
        self, columns: Columns, blocks: Blocks, hidden: torch.Tensor
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Take in a step: tokens of finished blocks, else -1, and their probabilities; [rows, width] both."""
        tokens = np.full(blocks.positions.shape, -1, dtype=np.int64)
        sure, first = np.zeros(tokens.shape, dtype=np.float32), 0
        for place, (row, generation, start, end) in enumerate(
            zip(
                *(x.tolist() for x in (columns.row, columns.generation, columns.block_start, columns.block_end)),
                strict=True,
            )
        ):
            if end == start:
                continue
            part, first = hidden[first : first + end - start], first + end - start
            found = self.step(row, generation, start, end, part)
            if found is not None:
                tokens[place, : end - start] = found.best.numpy(force=True)
                sure[place, : end - start] = found.probability.numpy(force=True)
        return tokens, sure

    def step(self, row: int, generation: int, start: int, end: int, hidden: torch.Tensor) -> Judged | None:
        """One row's step: what was found if the block is finished."""
        block, seed = self.held[row].block, int(self.table.seed[row])
        steps, positions = int(self.table.num_denoising_steps[row]), self.positions(start, end)
        size, parts = max(1, MAX_LOGITS // self.spec.vocab_size), []
        for some, where in zip(torch.split(hidden, size), torch.split(positions, size), strict=True):
            logits = self.model.logits(some).div_(temperature(self.schedule, block.step, steps))
            mine = summary(logits, self.model.vocabulary.start, seed, block.step, where)
            found = judged(self.group.all_gather(mine))
            chances = (logits - found.normaliser[:, None].float()).exp()
            parts.append((found, self.model.expected_embedding(chances)))
        found = Judged(*(torch.cat(fields) for fields in zip(*(one for one, _ in parts), strict=True)))
        if finished(block, found, self.schedule, steps):
            del self.held[row]
            return found
        noise = fresh(seed, block.step, positions, self.spec.vocab_size)
        after = advanced(block, found, noise, torch.cat([told for _, told in parts]), self.schedule)
        self.held[row] = Held(generation, start, after)
        return None
