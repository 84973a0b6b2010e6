"""Pretended devices: an executor whose steps take the seconds of a cost law and unmask what a profile says."""

import asyncio
import random
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate

from dilaserve.executor.executor import Post
from dilaserve.profile.decode_speed import QualityProfile, chances, part_of
from dilaserve.profile.forecast import Forecast
from dilaserve.profile.step_cost import StepCost, derived
from dilaserve.scheduler.estimates import batch_features
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import Batch, Instance, InstanceLost, InstanceReady, Moves, RowResult, Span, StepDone, WorkerUp

DELAY = 0.02  # seconds in which an instance is formed
FILLER = ord("a")  # the token that a pretended model writes


class SimMachine:
    """`devices` pretended devices on the running loop's time, virtual or real; forming an instance takes `delay`.

    `laws` are step costs by tensor-parallel degree; a degree without one takes the guess that the scheduler makes too.
    A row's task is its prompt's first token, an index into `tasks`. `jitter` is the relative spread of step times.
    """

    def __init__(
        self,
        table: RequestTable,
        devices: int,
        laws: Mapping[int, StepCost],
        quality: QualityProfile,
        kv_tokens: int,
        mask_id: int,
        seed: int = 0,
        jitter: float = 0.02,
        delay: float = DELAY,
    ) -> None:
        self.table, self.devices, self.kv_tokens, self.delay = table, devices, kv_tokens, delay
        self.laws = dict(laws)
        self.instances: dict[int, Instance] = {}
        self.forecast, self.tasks = Forecast(quality), list(quality.tasks)
        self.mask_id = mask_id
        self.random = random.Random(seed)
        self.jitter, self.spread = jitter, quality.spread
        self.rows: dict[int, SimRow] = {}
        self.odds: dict[tuple[str, int, int, int], list[float]] = {}

    async def run(self, post: Post, started: asyncio.Future[None]) -> None:
        self.post, self.loop = post, asyncio.get_running_loop()
        for device in range(self.devices):
            post(WorkerUp(device, self.kv_tokens))
        started.set_result(None)
        await self.loop.create_future()

    def launch(self, batch: Batch) -> None:
        masks = 0
        for span in batch.spans:
            masks += self.row(span).masks
        law = self.law(len(self.instances[batch.instance].ranks))
        seconds = law.seconds(batch_features(batch.spans, masks))
        seconds *= self.random.lognormvariate(0.0, self.jitter)
        self.loop.call_later(seconds, self.finish, batch, seconds)

    def stop_early(self, batch: Batch) -> None:
        """Pretended batches are of one step."""

    def law(self, degree: int) -> StepCost:
        if degree not in self.laws:
            least = min(self.laws)
            self.laws[degree] = derived(self.laws[least], degree // least)
        return self.laws[degree]

    def reshard(self, moves: Moves) -> None:
        for id in moves.ends:
            self.instances.pop(id, None)
        for instance in moves.begins:
            self.instances[instance.id] = instance
            self.loop.call_later(self.delay, self.formed, instance)

    def formed(self, instance: Instance) -> None:
        if instance.id in self.instances:  # it may have been lost meanwhile
            self.post(InstanceReady(instance))

    def kill(self, instance: int, reason: str) -> None:
        """Pretended steps do not hang; where one is said to, its instance is gone."""
        del self.instances[instance]
        self.post(InstanceLost(instance, reason))

    def finish(self, batch: Batch, seconds: float) -> None:
        if batch.instance not in self.instances:
            return
        results = tuple([self.unmask(span) for span in batch.spans])
        self.post(StepDone(batch.instance, batch.id, results, seconds, seconds))

    def row(self, span: Span) -> "SimRow":
        known = self.rows.get(span.row)
        if known is None or known.generation != span.generation:
            slowness = self.random.lognormvariate(0.0, self.spread)
            task = self.tasks[int(self.table.canvas[span.row, 0]) % len(self.tasks)]
            kind = self.forecast.kind(task, span.block_start)
            known = self.rows[span.row] = SimRow(span, kind, slowness)
        known.go_to(span)
        return known

    def unmask(self, span: Span) -> RowResult:
        row = self.rows[span.row]
        if span.block_end == span.block_start:  # a chunk of the prompt
            return RowResult(span.row, span.generation, 0, 0, span.block_start, -1, 0.0)
        threshold = float(self.table.threshold[span.row])
        level = self.forecast.level_of(threshold)
        masks = row.masks
        drawn = self.draw(row.kind, level, part_of(row.block), masks)
        ended = drawn == 0
        count = masks if ended else min(masks, self.slowed(drawn, row.slowness))
        row.masks = row.part_masks = masks - count
        prefix = span.block_end - row.masks
        self.table.canvas[span.row, span.block_start : prefix] = FILLER
        return RowResult(
            row=span.row,
            generation=span.generation,
            unmasked=count,
            masks_left=row.masks,
            prefix=prefix,
            stop_at=self.stop_at(span, prefix) if ended else -1,
            confidence=count * (1 + threshold) / 2,
        )

    def stop_at(self, span: Span, prefix: int) -> int:
        """Where the answer ends, -1 if the request does not let it."""
        last = max(span.block_start, prefix - 1)
        return -1 if self.table.ignore_eos[span.row] or last < self.table.may_end_at[span.row] else last

    def slowed(self, drawn: int, slowness: float) -> int:
        exact = drawn / slowness
        whole = int(exact)
        return max(1, whole + (self.random.random() < exact - whole))

    def draw(self, kind: str, level: int, part: int, masks: int) -> int:
        key = (kind, level, part, masks)
        sums = self.odds.get(key)
        if sums is None:
            odds = chances(self.forecast.laws_of(kind, level, part), masks)
            sums = self.odds[key] = list(accumulate(odds))
        return min(bisect_right(sums, self.random.random() * sums[-1]), masks)


class SimRow:
    """What the machine keeps of a row in work."""

    def __init__(self, span: Span, kind: str, slowness: float) -> None:
        self.generation, self.kind, self.slowness = span.generation, kind, slowness
        self.block = self.part_start = -1
        self.masks = self.part_masks = 0

    def go_to(self, span: Span) -> None:
        """`masks` are those of the step. The first step of a block computes what lies before it, too."""
        chunk = span.block_end == span.block_start
        if not chunk and self.part_start != span.block_start:
            self.block += span.grain > 0 or span.start == 0
            self.part_start = span.block_start
            self.part_masks = span.block_end - span.block_start
        self.masks = 0 if chunk else self.part_masks
