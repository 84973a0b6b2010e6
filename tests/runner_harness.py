"""A model runner with its own request table and K/V pool, and steps for it."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import torch

from dilaserve import models
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import Packed, PackedSpan, SpanGroup
from dilaserve.models.spec import Shard
from dilaserve.models.transformer import Model
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import PAGE, Decoding, Span
from dilaserve.worker.graph_steps import ReuseSteps
from dilaserve.worker.model_runner import Runner
from dilaserve.worker.step_buffers import WIDTH

RULES = (dict(rule="threshold", confidence_threshold=0.5), dict(rule="steps"), dict(rule="factor", factor=1.0))
TOKENS, ROWS = 4096, 20
CPU = torch.device("cpu")
WHOLE = Shard()


def weights_on(device, directory, dtype, shard=WHOLE):
    checkpoint = Checkpoint(directory)
    spec = models.describe(checkpoint)
    return spec, models.load(spec, checkpoint.tensors(), device, dtype, lambda nbytes: None, shard)


class Harness:
    """A runner with its own table and pool, with and without static steps."""

    def __init__(self, directory, static, device=CPU, dtype=torch.float32, *, eager=False, tokens=TOKENS, rows=ROWS):
        self.spec, weights = weights_on(device, directory, dtype)
        self.model = Model(self.spec, weights)
        flat = torch.zeros((tokens + PAGE) * self.spec.kv_elements, dtype=dtype, device=device)
        self.pool, self.table = KVPool(self.spec, Shard(), flat), RequestTable(rows, self.spec.max_length)
        self.reuse = ReuseSteps(self.spec, self.model, self.pool, rows, eager) if static else None
        self.runner = Runner(self.spec, self.model, self.pool, self.table, (), reuse=self.reuse)

    def spans(self, shapes, refresh):
        spans, kv_start = [], 0
        for row, (prompt, block, length) in enumerate(shapes):
            canvas = prompt + length
            start, queries = (0, canvas) if refresh else (prompt, block)
            quota = 3 if row % 3 == 1 else 0
            generation = int(self.table.generation[row])
            spans.append(Span(row, generation, kv_start, start, queries, canvas, prompt, prompt + block, quota, 0))
            kv_start += -(-canvas // PAGE) * PAGE
        return spans

    def fill(self, shapes):
        rng = np.random.default_rng(0)
        for row, (prompt, _, length) in enumerate(shapes):
            ids = rng.integers(0, 256, prompt).astype(np.int32)
            self.table.fill(row, ids, prompt + length, self.spec.mask_id, Decoding(**RULES[row % 3]))


def logits_of(spec, weights, ids, size=1):
    """Logits of ranks that run one after the other, as threads that meet at each sum."""
    barrier, given = Barrier(size), {}

    def ranked(rank):
        def reduce(x):
            given[rank] = x
            barrier.wait()
            total = sum(given[one] for one in range(size))
            barrier.wait()
            return total

        shard = Shard(rank, size)
        model = Model(spec, weights, shard, reduce)
        pool = KVPool(spec, shard, torch.zeros((len(ids) + PAGE) * spec.kv_elements // size))
        places = torch.arange(len(ids))
        spans = [SpanGroup(PackedSpan(0, len(ids), 0, len(ids)), 1, None, None)]
        return model.logits(model.hidden(Packed(torch.tensor(ids), places, places, spans, None, []), pool))

    with ThreadPoolExecutor(size) as threads:
        return torch.cat(list(threads.map(ranked, range(size))), 1)


def shapes_of(count):
    """Prompt, block and answer of each row; blocks of all lengths up to a page."""
    return [(20 + 13 * (i % 8), (WIDTH, 7, 16, 1)[i % 4], WIDTH + 5) for i in range(count)]
