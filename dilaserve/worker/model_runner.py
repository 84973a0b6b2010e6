"""One step on one device: rows from the table, one forward pass over their spans, unmasked tokens back to the table."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from msgspec.structs import replace

from dilaserve.models.attention import grouped, varlen_for, windowed
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import NoisyTokens, Packed
from dilaserve.models.spec import ModelSpec
from dilaserve.models.transformer import Model
from dilaserve.transport.request_table import NO_TOKEN, RULES, RequestTable
from dilaserve.types import Copy, RowResult, Span
from dilaserve.worker.alternatives import Likeliest, by_row, likeliest
from dilaserve.worker.attention_runs import joined, packed_spans, run_arrays, split_by_kind
from dilaserve.worker.candidates import Candidates
from dilaserve.worker.forward_graphs import ForwardGraphs
from dilaserve.worker.graph_steps import MAX_LOGITS, ReuseSteps
from dilaserve.worker.multi_step import Courses
from dilaserve.worker.open_blocks import OpenBlocks
from dilaserve.worker.sampler import (
    BY_CONFIDENCE,
    Edits,
    Rules,
    Sampling,
    best_candidates,
    decided,
    gathered,
    part_candidates,
    scores,
)
from dilaserve.worker.staging import Staging
from dilaserve.worker.step_arrays import (
    Array,
    Blocks,
    Columns,
    active_blocks,
    columns_of,
    kept_tokens,
    ranges,
)
from dilaserve.worker.step_buffers import DEPTH
from dilaserve.worker.tp_group import Alone, TPGroup

RULE_KNOBS = len(Rules._fields)


class LaunchResult(NamedTuple):
    """What a step did, and the seconds it took; `last`: none of the same launch follows."""

    results: list[RowResult]
    seconds: float
    forward: float
    last: bool = True


def never() -> bool:
    """Nobody waits."""
    return False


class Runner:
    """Runs an instance's batches as one rank of its TP group, with one model and one K/V pool.

    All ranks read the same rows and have read them before the last collective of a step; behind it rank 0 alone judges
    and writes. Batches that `reuse` takes go through it; the others are laid out anew, and computed by `forward` if it
    takes them. A launch does not go on into a step of more than `max_tokens` (None: no limit).
    """

    def __init__(
        self,
        spec: ModelSpec,
        model: Model,
        pool: KVPool,
        table: RequestTable,
        stop_ids: tuple[int, ...],
        group: TPGroup = Alone(),  # noqa: B008 - has no state
        reuse: ReuseSteps | None = None,
        max_tokens: int | None = None,
        forward: ForwardGraphs | None = None,
        max_rows: int = 64,
    ) -> None:
        self.spec, self.model, self.pool, self.table, self.group = spec, model, pool, table, group
        self.reuse, self.forward, self.max_tokens = reuse, forward, max_tokens
        self.device = pool.keys[0].device
        known = varlen_for(self.device, pool.keys[0].dtype, spec.head_dim) is not None
        self.varlen = known and spec.window is None
        self.noise = (
            OpenBlocks(spec, model, table, group, self.device, 2 * group.size * max_rows) if spec.noise else None
        )
        self.staging = Staging(self.device)
        self.stop_ids = np.array(stop_ids, dtype=np.int32)

    @torch.inference_mode()
    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy K/V within the pool, one after the other."""
        for one in copies:
            self.pool.copy(*one)

    def steps(
        self,
        spans: Sequence[Span],
        most: int,
        then: Sequence[Sequence[Span]] = (),
        stops_early: Callable[[], bool] = never,
    ) -> Iterator[LaunchResult]:
        """Up to `most` steps as `types.Batch` tells; none begins once somebody is `stops_early`.

        Ranks other than 0 take one and say nothing. Raises `Abandoned`.
        """
        courses = Courses(spans, then)
        count, last = 0, False
        while not last:
            columns = columns_of(courses.spans, courses.stages)
            stretch: Iterable[LaunchResult]
            if self.reuse is not None and self.reuse.takes(columns, self.table):
                stretch = self.pipelined(self.reuse, columns, most - count if courses.repeat else 1, stops_early)
            elif (outcome := self.step(columns)) is not None:
                stretch = [outcome]
            else:
                return
            for outcome in stretch:
                count += 1
                if outcome.last:
                    over = count == most or answered(outcome.results) or stops_early()
                    last = over or not courses.follow(outcome.results) or not self.fits(courses.spans)
                yield outcome._replace(last=last)

    def fits(self, spans: Sequence[Span]) -> bool:
        """Whether what follows is within the largest step; one row alone always is."""
        tokens = sum(span.length for span in spans)
        return self.max_tokens is None or tokens <= self.max_tokens or len(spans) == 1

    def pipelined(
        self, reuse: ReuseSteps, columns: Columns, most: int, stops_early: Callable[[], bool]
    ) -> Iterator[LaunchResult]:
        """Steps alike until a block or an answer is done; the next is begun before the last is read, unless that has
        probably finished all rows.
        """
        mark = time.perf_counter()
        blocks = active_blocks(columns)
        with torch.inference_mode():
            reuse.load(columns, blocks, self.table)
        entered = time.perf_counter()
        launched = read = 0
        masks = (self.table.canvas[columns.row[:, None], blocks.positions] == self.spec.mask_id) & blocks.valid
        ahead, over, last = bool((masks.sum(1) > columns.quota.clip(min=1)).any()), False, False
        while not last:
            with torch.inference_mode():
                while launched < most and launched - read < DEPTH and not over and (ahead or launched == read):
                    reuse.launch()
                    launched += 1
            token, confidence = reuse.read()
            arrived = time.perf_counter()
            read += 1
            written, spent = self.write(columns, blocks, token >= 0, token, confidence)
            results = self.results(columns, blocks, written, spent, overlapped=read > 1)
            over = over or any(not one.masks_left for one in results) or answered(results) or stops_early()
            ahead = any(result.masks_left > result.unmasked for result in results)
            last = read == launched and (over or launched == most)
            now = time.perf_counter()
            yield LaunchResult(results, now - mark, arrived - entered, last)
            mark, entered = now, arrived if launched > read else now  # a step that is under way has gone on meanwhile

    @torch.inference_mode()
    def step(self, columns: Columns) -> LaunchResult | None:
        """Denoise once. Results come in the order of the spans; ranks other than 0 have none.

        Raises `Abandoned` when a peer is gone.
        """
        if self.noise is not None:
            return self.noise_step(columns, self.noise)
        began = time.perf_counter()
        blocks = active_blocks(columns)
        canvas = self.table.canvas[columns.row[:, None], blocks.positions]
        masked = self.masks(canvas) & blocks.valid
        editing = self.table.editing_threshold[columns.row]
        edits = [masked, canvas.astype(np.int64), editing] if not np.isinf(editing).all() else []
        open = masked | (blocks.valid & ~np.isinf(editing)[:, None])  # what a token is computed for
        wanted, where = np.flatnonzero(open[blocks.valid]), np.flatnonzero(open)
        others = [wanted, where, *self.rules(columns), *edits, *self.sampling(columns, blocks, open, canvas)]
        forward, (kept, places, *knobs) = self.prepared(columns, others)
        entered = time.perf_counter()
        hidden = forward()[kept]
        rules, rest = Rules(*knobs[:RULE_KNOBS]), knobs[RULE_KNOBS + len(edits) :]
        edited = Edits(*knobs[RULE_KNOBS : RULE_KNOBS + len(edits)]) if edits else None
        score = None
        if rules.rule is not None and (self.table.rule[columns.row] > BY_CONFIDENCE).any():
            score = self.scores(hidden, rules.rule[torch.div(places, masked.shape[1], rounding_mode="floor")])
        likeliest = self.likeliest(hidden, columns, where, masked.shape[1])
        best = self.candidates(hidden, Sampling(*rest) if rest else None)
        if self.group.rank:
            return None
        found = decided(best, places, masked.shape, rules, score, edited).cpu().numpy()
        left = time.perf_counter()
        self.group.check()
        token, sure = found[:, 0], found[:, 1].view(np.float32)
        taken = token >= 0
        if self.table.resumed[columns.row].any():
            token = np.where(canvas < 0, ~canvas, token)
        written, confidence = self.write(columns, blocks, taken, token, sure)
        results = self.results(columns, blocks, written, confidence, edited=(written & ~masked).sum(1))
        if likeliest is not None:
            lists = by_row(likeliest, self.table.top_logprobs[columns.row], written, blocks.positions)
            results = [replace(one, alternatives=found) for one, found in zip(results, lists, strict=True)]
        return LaunchResult(results, time.perf_counter() - began, left - entered)

    def masks(self, canvas: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which positions are masked, those of known tokens included."""
        return np.asarray((canvas == self.spec.mask_id) | (canvas < 0))

    def noise_step(self, columns: Columns, noise: OpenBlocks) -> LaunchResult | None:
        """The same where blocks begin as noise: nothing is written before a block is finished."""
        began = time.perf_counter()
        blocks = active_blocks(columns)
        ids, expected = noise.begin(columns)
        packed, (noisy,) = self.pack(columns, [ids])
        places = torch.arange(len(packed.ids), device=self.device) if packed.kept is None else packed.kept
        packed.ids[places] = noisy
        spans = windowed(packed_spans(columns.length, columns), self.spec.window or self.spec.max_length)
        entered = time.perf_counter()
        packed = packed._replace(windows=grouped(spans, self.device), noisy=NoisyTokens(places, expected))
        token, sure = noise.advance(columns, blocks, self.model.hidden(packed, self.pool))
        left = time.perf_counter()
        if self.group.rank:
            return None
        self.group.check()
        masked = self.table.canvas[columns.row[:, None], blocks.positions] == self.spec.mask_id
        written, confidence = self.write(columns, blocks, (token >= 0) & masked, token, sure)
        results = self.results(columns, blocks, written, confidence)
        return LaunchResult(results, time.perf_counter() - began, left - entered)

    def candidates(self, hidden: torch.Tensor, sampling: Sampling | None) -> Candidates:
        """The candidate of each masked position, [masks], from its hidden state; a slice of the logits at a time."""
        size = max(1, MAX_LOGITS // self.spec.vocab_size)
        if len(hidden) <= size:
            return self.slice_candidates(hidden, sampling)
        pieces = []
        for first in range(0, len(hidden), size):
            part = sampling and sampling.of(slice(first, first + size))
            pieces.append(self.slice_candidates(hidden[first : first + size], part))
        return Candidates(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    def scores(self, hidden: torch.Tensor, rule: torch.Tensor) -> torch.Tensor:
        """See `sampler.scores`: of each masked position, [masks], a slice of the logits at a time."""
        size, pieces = max(1, MAX_LOGITS // self.spec.vocab_size), []
        for part, rules in zip(torch.split(hidden, size), torch.split(rule, size), strict=True):
            logits = self.model.logits(part)
            whole = logits if self.group.size == 1 else gathered(logits, self.group, self.spec.vocab_size)
            pieces.append(scores(whole, rules))
        return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)

    def likeliest(self, hidden: torch.Tensor, columns: Columns, where: Array, width: int) -> Likeliest | None:
        """The most probable tokens of the masks at the places `where`, of rows that ask for them; None if none does."""
        wanted = self.table.top_logprobs[columns.row]
        if not wanted.any() or not len(masks := np.flatnonzero(wanted[where // width])):
            return None
        size, pieces = max(1, MAX_LOGITS // self.spec.vocab_size), []
        for part in torch.split(hidden[torch.from_numpy(masks).to(self.device)], size):
            logits = self.model.logits(part)
            whole = logits if self.group.size == 1 else gathered(logits, self.group, self.spec.vocab_size)
            pieces.append(likeliest(whole, self.spec.mask_id, int(wanted.max())))
        token, logprob = (torch.cat(parts).cpu().numpy() for parts in zip(*pieces, strict=True))
        return Likeliest(where[masks], token, logprob)

    def slice_candidates(self, hidden: torch.Tensor, sampling: Sampling | None) -> Candidates:
        logits, mask_id = self.model.logits(hidden), self.spec.mask_id
        if self.group.size == 1:
            return best_candidates(logits, mask_id, sampling)
        return part_candidates(logits, self.group, self.model.vocabulary, self.spec.vocab_size, mask_id, sampling)

    def prepared(
        self, columns: Columns, others: Sequence[np.ndarray[Any, Any] | None]
    ) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
        """The forward pass, ready to be run, and other arrays on the device. It gives the hidden states of the active
        blocks; the first of the others, which are indices into these, is made to fit what it gives.
        """
        if self.forward is None or not self.forward.takes(columns):
            packed, rest = self.pack(columns, others)
            return partial(self.model.hidden, packed, self.pool), rest
        wanted, *others = others
        tokens = kept_tokens(columns)[wanted]
        longs, ints, *rest = self.staging.send(
            [*self.forward.laid_out(*self.tokens(columns), columns), tokens, *others]
        )
        return partial(self.forward.hidden, longs, ints), rest

    def tokens(self, columns: Columns) -> tuple[Array, Array, Array]:
        """Id, position and pool token of each of the spans' tokens, one after the other."""
        positions = ranges(columns.start, columns.length)
        ids = self.table.canvas[np.repeat(columns.row, columns.length), positions]
        if (self.table.known[columns.row] | self.table.resumed[columns.row]).any():
            ids = np.where(ids < 0, self.spec.mask_id, ids)
        return ids.astype(np.int64), positions, positions + np.repeat(columns.kv_start, columns.length)

    def pack(
        self, columns: Columns, others: Sequence[np.ndarray[Any, Any] | None] = ()
    ) -> tuple[Packed, list[torch.Tensor]]:
        """Lay the spans' tokens one after the other, and say which of them the last layer must finish; other arrays
        come along.
        """
        kept, widths = None, columns.block_end - columns.block_start
        if bool((widths < columns.length).any() or columns.shift.any()):
            kept = kept_tokens(columns)
        if not self.varlen:
            tokens, places, targets, there, *rest = self.staging.send([*self.tokens(columns), kept, *others])
            groups = grouped(packed_spans(columns.length, columns), self.device)
            open_spans = columns._replace(grain=np.zeros_like(columns.grain))  # what is kept sees all keys
            kept_groups = grouped(packed_spans(widths, open_spans), self.device) if kept is not None else []
            return Packed(tokens, places, targets, groups, there, kept_groups), rest
        parts, of_kept = split_by_kind(columns), run_arrays(widths, columns.kv_start, columns.keys)
        of_all = [array for part in parts for array in part.sent]
        arrays = [*self.tokens(columns), kept, *of_kept.sent, *of_all, *others]
        tokens, places, targets, there, *sent = self.staging.send(arrays)
        kept_runs, sent = of_kept.runs(sent[: len(of_kept.sent)]), sent[len(of_kept.sent) :]
        runs, rest = joined(parts, sent[: len(of_all)]), sent[len(of_all) :]
        return Packed(tokens, places, targets, runs, there, kept_runs), rest

    def sampling(
        self, columns: Columns, blocks: Blocks, masked: np.ndarray[Any, Any], canvas: np.ndarray[Any, Any]
    ) -> list[np.ndarray[Any, Any]]:
        """The knobs of `sampler.Sampling` of each mask; none when every row is greedy, may end anywhere
        and has no known tokens.
        """
        table, row = self.table, columns.row
        early = blocks.positions < table.may_end_at[row, None]
        if not (table.temperature[row].any() or table.known[row].any() or (early & masked).any()):
            return []
        masks = masked.sum(1)
        knobs = (table.temperature, table.top_p, table.top_k, table.min_p, table.seed)
        each = [np.repeat(knob, masks) for knob in (*(knob[row] for knob in knobs), columns.step)]
        ends = np.repeat(self.ends(row), masks, axis=0)
        never = np.where(early[masked][:, None], ends, NO_TOKEN)
        hidden = np.where(table.known[row, None], canvas, 0)[masked].astype(np.int64)
        return [*each, blocks.positions[masked], never.astype(np.int64), np.where(hidden < 0, ~hidden, -1)]

    def ends(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The tokens that end each row's answer, [rows, ids], filled up with `NO_TOKEN`."""
        models = np.where(self.table.ignore_eos[row, None], NO_TOKEN, self.stop_ids)
        own = self.table.stop_ids[row]
        return np.concatenate([models, own[:, (own != NO_TOKEN).any(0)]], axis=1)

    def rules(self, columns: Columns) -> list[np.ndarray[Any, Any] | None]:
        """The knobs of `sampler.Rules` of each row."""
        table, row = self.table, columns.row
        rule = table.rule[row]
        factor = table.factor[row] if (rule == RULES["factor"]).any() else None
        by_threshold = not rule.any()
        return [None if by_threshold else rule, table.threshold[row], factor, columns.quota]

    def write(
        self,
        columns: Columns,
        blocks: Blocks,
        taken: np.ndarray[Any, Any],
        token: np.ndarray[Any, Any],
        confidence: np.ndarray[Any, Any],
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Put accepted tokens, all [rows, width], on their canvases.

        Returns which were written, [rows, width], and the confidence spent on these per row, [rows].
        """
        written = self.table.unmask(columns.row, columns.generation, blocks.positions, taken, token, confidence)
        return written, np.asarray(np.where(written, confidence, 0.0).sum(1))

    def results(
        self,
        columns: Columns,
        blocks: Blocks,
        written: np.ndarray[Any, Any],
        confidence: np.ndarray[Any, Any],
        overlapped: bool = False,
        edited: np.ndarray[Any, Any] | None = None,
    ) -> list[RowResult]:
        """What a step did, by row. `overlapped`: it was begun before the last one was read, so that blocks may have
        been done already. Those of other steps may be too, where a worker died before it could report; such a row has
        taken part, and goes on with its next block.
        """
        canvas = self.table.canvas[columns.row[:, None], blocks.positions]
        masked = self.masks(canvas) & blocks.valid
        may_end = blocks.valid & (blocks.positions >= self.table.may_end_at[columns.row, None])
        stops = (canvas[..., None] == self.ends(columns.row)[:, None]).any(-1) & may_end
        prefix = np.where(masked.any(1), columns.block_start + masked.argmax(1), columns.block_end)
        stop_at = np.where(stops.any(1), columns.block_start + stops.argmax(1), -1)
        unmasked, left = written.sum(1), masked.sum(1)
        rested = (unmasked + left == 0) & overlapped
        edited = np.zeros_like(unmasked) if edited is None else edited
        counts = (unmasked, left, prefix, stop_at, confidence)
        fields = (columns.row, columns.generation, *counts, columns.stage, rested, edited)
        return [RowResult(*values) for values in zip(*(field.tolist() for field in fields), strict=True)]


def answered(results: list[RowResult]) -> bool:
    """Whether a row has no mask before a stop token."""
    return any(0 <= result.stop_at < result.prefix for result in results)
