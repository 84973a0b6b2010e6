"""Changing the plan keeps the quality: likelihoods in bfloat16 at every degree, against float32 on one device."""

import threading

import numpy as np
import pytest
import torch

from dilaserve import models
from dilaserve.models import load, transformer
from dilaserve.models.checkpoint import Checkpoint, locate
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spec import Shard
from dilaserve.profile.problems import TASKS, held_out
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import PAGE, Decoding, Span
from dilaserve.worker.model_runner import Runner
from dilaserve.worker.step_arrays import columns_of
from dilaserve.worker.tp_group import add

BLOCK, ROOM, PER_TASK = 32, 512, 3
CIRCUIT = (1, 2, 4, 1, 4, 2, 1)  # every degree is followed by every other
TINY = "dilaserve-tiny"


@pytest.fixture(scope="module")
def canvases():
    """Prompts of held-out problems, and the block of the true answer behind each."""
    text = Text(locate(TINY))
    text.load_template()
    end = text.stop_ids()[0]
    found = []
    for task in TASKS:
        for problem in held_out(task, PER_TASK):
            prompt = text.encode_chat([{"role": "user", "content": problem.prompt}])
            answer = [*text.tokenizer.encode(problem.answer, add_special_tokens=False).ids, end, end][:BLOCK]
            found.append((prompt, answer))
    return found


class Harness:
    """The same devices in one group after another: what each keeps in memory is viewed anew, never copied."""

    def __init__(self, dtype, canvases):
        self.checkpoint = Checkpoint(locate(TINY))
        self.spec, self.canvases = models.describe(self.checkpoint), canvases
        arguments = self.spec, self.checkpoint.tensors(), torch.device("cpu"), dtype, lambda nbytes: None
        self.weights = load(*arguments)
        tokens = sum(-(-len(prompt + answer) // PAGE) * PAGE for prompt, answer in canvases)
        self.flats = [torch.zeros(tokens * self.spec.kv_elements, dtype=dtype) for _ in range(max(self.spec.degrees))]
        self.table = RequestTable(len(canvases), ROOM)
        self.generations = [
            self.table.fill(row, np.array(prompt, dtype=np.int32), len(prompt + answer), self.spec.mask_id, Decoding())
            for row, (prompt, answer) in enumerate(canvases)
        ]

    def commit(self, share):
        """Fill this share of each answer with what is true; the rest is masked."""
        for row, (prompt, answer) in enumerate(self.canvases):
            known = int(share * len(answer))
            self.table.canvas[row, len(prompt) : len(prompt) + known] = answer[:known]
            self.table.canvas[row, len(prompt) + known : len(prompt) + len(answer)] = self.spec.mask_id

    def loss(self, degree, refresh):
        """Mean negative log-likelihood of the masked tokens in nats, after one step of all rows at this degree."""
        spans, kv_start = [], 0
        for row, (prompt, answer) in enumerate(self.canvases):
            end = len(prompt) + len(answer)
            start, length = (0, end) if refresh else (len(prompt), len(answer))
            place = kv_start, start, length, end, len(prompt), end
            spans.append(Span(row, self.generations[row], *place, 0, 0))
            kv_start += -(-end // PAGE) * PAGE
        columns = columns_of(spans)
        parts = together(degree, lambda rank, reduce: self.logits(columns, Shard(rank, degree), reduce))
        blocks = [self.table.canvas[row, len(p) : len(p) + len(a)] for row, (p, a) in enumerate(self.canvases)]
        masked = torch.from_numpy(np.concatenate(blocks) == self.spec.mask_id)
        truth = torch.tensor([token for _, answer in self.canvases for token in answer])
        return torch.nn.functional.cross_entropy(torch.cat(parts, 1)[masked].float(), truth[masked]).item()

    @torch.inference_mode()
    def logits(self, columns, shard, reduce):
        """Of one rank, [tokens of all blocks, its part of the vocabulary]."""
        model = transformer.Model(self.spec, self.weights, shard, reduce)
        pool = KVPool(self.spec, shard, self.flats[shard.rank])
        runner = Runner(self.spec, model, pool, self.table, ())
        return model.logits(model.hidden(runner.pack(columns)[0], pool))


def together(size, work):
    """What `work` returns on each of `size` ranks, which are threads; their sums are those of the workers."""
    barrier, given, found = threading.Barrier(size, timeout=60), [None] * size, [None] * size

    def rank(mine):
        def reduce(x):
            given[mine] = x
            barrier.wait()
            total = torch.empty_like(x)
            add(given, total)
            barrier.wait()
            return total

        found[mine] = work(mine, reduce if size > 1 else transformer.alone)

    threads = [threading.Thread(target=rank, args=(mine,)) for mine in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_bfloat16_at_any_degree_and_after_a_reshard_is_as_likely_to_be_right_as_float32(canvases):
    exact, short = Harness(torch.float32, canvases), Harness(torch.bfloat16, canvases)
    assert short.spec.degrees == tuple(sorted(set(CIRCUIT)))
    for share in (0.0, 0.5):
        for harness in (exact, short):
            harness.commit(share)
        expected = exact.loss(1, refresh=True), exact.loss(1, refresh=False)
        for degree in CIRCUIT:  # the first step behind a reshard refreshes, whatever the pool holds
            found = short.loss(degree, refresh=True), short.loss(degree, refresh=False)
            assert found == pytest.approx(expected, rel=1e-2), (share, degree)
