"""TP groups among processes, the parts of the vocabulary put together, and shards that are views."""

import tempfile
import threading
import time

import checkpoints
import pytest
import torch
import torch.multiprocessing as mp
from sampling_settings import sampling

from dilaserve import models
from dilaserve.models import load, transformer
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spec import Shard
from dilaserve.transport.collectives_memory import Exchange
from dilaserve.worker.sampler import best_candidates, part_candidates
from dilaserve.worker.tp_group import Abandoned, Alone, Groups, SharedMemory

MANY = 40  # instances
SLOT = 4096  # bytes, so that larger tensors pass in pieces


def inputs(rank, dtype):
    source = torch.Generator().manual_seed(rank)
    return [torch.randn(size, generator=source).to(dtype) for size in ((1,), (0, 7), (3, 5), (40, 100))]


def member(rank, exchange, store, answers):
    """Meets its peers in several groups, through both backends."""
    torch.set_num_threads(1)
    backends = {name: Groups(name, exchange, rank, store) for name in ("shm", "gloo")}
    for number, ranks in enumerate(((0, 1), (0, 1, 2), (1, 2), (0, 1))):
        if rank not in ranks:
            continue
        for name, groups in backends.items():
            group = groups.join(number, ranks, [1] * len(ranks))
            for dtype in (torch.float32, torch.bfloat16):
                for i, x in enumerate(inputs(rank, dtype)):
                    key = number, name, str(dtype), i
                    answers.put((rank, key, group.all_gather(x).tolist(), group.all_reduce(x.clone()).tolist()))
    answers.put(None)
    answers.close()
    answers.join_thread()


def test_shared_memory_and_gloo_agree_in_any_group_at_any_time():
    context = mp.get_context("spawn")
    answers, exchange = context.Queue(), Exchange(3, SLOT)
    with tempfile.TemporaryDirectory() as place:
        processes = [
            context.Process(target=member, args=(rank, exchange, f"{place}/store", answers)) for rank in range(3)
        ]
        for process in processes:
            process.start()
        found, left = {}, 3
        while left:
            if (answer := answers.get(timeout=300)) is None:
                left -= 1
            else:
                rank, key, gathered, summed = answer
                found[rank, *key] = gathered, summed
        for process in processes:
            process.join()
    assert len(found) == (2 + 3 + 2 + 2) * 2 * 2 * 4
    for (_, number, name, dtype, i), (gathered, summed) in found.items():
        ranks = ((0, 1), (0, 1, 2), (1, 2), (0, 1))[number]
        parts = [inputs(peer, getattr(torch, dtype.removeprefix("torch.")))[i] for peer in ranks]
        assert gathered == torch.stack(parts).tolist()
        total = sum(part.float() for part in parts)
        tolerance = 1e-6 if dtype == "torch.float32" else 0.05
        assert torch.allclose(torch.tensor(summed).view(total.shape), total, atol=tolerance)
        if name == "shm":  # the same bits everywhere
            assert summed == found[ranks[0], number, name, dtype, i][1]


def test_a_rank_leaves_its_peers_when_it_is_told_that_they_are_gone():
    exchange = Exchange(2, SLOT)
    group = SharedMemory(exchange, 5, (0, 1), 0)
    exchange.abandon(0, 5)
    with pytest.raises(Abandoned):
        group.all_reduce(torch.ones(3))
    later = SharedMemory(exchange, 6, (0, 1), 0)
    assert not exchange.abandoned(0, 6)
    SharedMemory(exchange, 7, (1,), 0)  # the peer has moved on to another instance
    exchange.counters[1] = exchange.counters[1] + (1 << 40)
    with pytest.raises(Abandoned):
        later.all_gather(torch.ones(3))
    assert exchange.behind((0, 1)) == (0,)


def test_shards_are_views_of_the_weights_and_of_one_pool(random_model):
    checkpoint = Checkpoint(random_model)
    spec = models.describe(checkpoint)
    weights = load(spec, checkpoint.tensors(), torch.device("cpu"), torch.float32, lambda nbytes: None)
    flat = torch.zeros(64 * spec.kv_elements)

    def inside(part, whole):
        same = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        return same and whole.data_ptr() <= part.data_ptr() < whole.data_ptr() + whole.nbytes

    assert spec.degrees == (1, 2, 4)
    for degree in spec.degrees:
        heads = []
        for rank in range(degree):
            model = transformer.Model(spec, weights, Shard(rank, degree))
            for block, whole in zip(model.blocks, weights.blocks, strict=True):
                for name in ("qkv", "attn_out", "gate_up", "down"):
                    part, full = getattr(block, name), getattr(whole, name)
                    assert inside(part, full)
                    assert part.numel() * degree == full.numel()
            assert inside(model.head, weights.head)
            heads.append(model.head)
            pool = KVPool(spec, Shard(rank, degree), flat)
            assert pool.tokens == 64 * degree
            assert inside(pool.keys[0], flat)
            assert pool.keys[0].shape == (64 * degree, spec.kv_heads // degree, spec.head_dim)
        assert torch.equal(torch.cat(heads), weights.head)


class Rank:
    """One rank of a group whose ranks are run one after the other: it finds what they all have given."""

    def __init__(self, rank, size, given):
        self.rank, self.size, self.given, self.calls = rank, size, given, 0

    def all_gather(self, x):
        if len(self.given) <= self.calls:
            self.given.append({})
        self.given[self.calls][self.rank] = x.clone()
        self.calls += 1
        known = self.given[self.calls - 1]
        return torch.stack([known.get(rank, x) for rank in range(self.size)])


def across(logits, size, mask_id, sampling):
    """What rank 0 knows after all have spoken."""
    given, vocab = [], logits.shape[1]
    for rank in (*range(size), 0):
        mine = Shard(rank, size).slice(vocab)
        found = part_candidates(logits[:, mine].clone(), Rank(rank, size, given), mine, vocab, mask_id, sampling)
    return found


@pytest.mark.parametrize("size", [2, 4, 8])
def test_parts_of_the_vocabulary_give_what_the_whole_gives(size):
    logits = torch.randn(60, 43, generator=torch.Generator().manual_seed(1)) * 5
    logits[0, [3, 30]] = 40.0  # equals: the first wins
    logits[1, 7] = 80.0  # the mask
    logits[2] = torch.nan
    counts = torch.arange(60)
    heat = torch.where(counts % 3 == 0, 0.0, 0.9)
    heat[4] = 1e-40  # as good as cold
    hot = dict(temperature=heat, seed=counts, step=counts * 7, position=counts + 1)
    narrow = dict(top_p=torch.where(counts % 2 == 0, 0.8, 1.0), top_k=counts % 4 * 3, min_p=(counts % 5 == 0) * 0.1)
    never = torch.where(counts[:, None] % 6 == 0, logits.nan_to_num().topk(3).indices, -1)
    for mask_id in (7, 42):
        for sampled in (
            None,
            sampling(60, **hot),
            sampling(60, **hot, **narrow),
            sampling(60, never, **hot, **narrow),
            sampling(60, never, temperature=0.0),
        ):
            whole, found = best_candidates(logits.clone(), mask_id, sampled), across(logits, size, mask_id, sampled)
            broken = logits.isnan().any(1)
            assert torch.equal(found.token[~broken], whole.token[~broken])
            assert torch.allclose(found.odds, whole.odds, rtol=1e-4)


def test_a_vocabulary_shard_of_only_the_mask_token_works():
    logits = torch.tensor([[1.0, 2.0, 9.0, 0.5]])
    whole, found = best_candidates(logits.clone(), 2), across(logits, 4, 2, None)
    assert (found.token.item(), found.odds.item()) == (whole.token.item(), pytest.approx(whole.odds.item()))
    assert Alone().all_gather(logits).shape == (1, 1, 4)


def test_a_worker_with_a_part_of_the_weights_has_the_shards_of_that_part(random_model):
    checkpoint = Checkpoint(random_model)
    spec = models.describe(checkpoint)
    arguments = spec, checkpoint.tensors(), torch.device("cpu"), torch.float32, lambda nbytes: None
    whole, half = load(*arguments), load(*arguments, Shard(1, 2))
    held = sum(tensor.numel() for block in half.blocks for tensor in block.tensors())
    assert half.embedding.numel() + half.norm.numel() + half.head.numel() + held == spec.shard_parameters(2)
    assert spec.shard_parameters(1) == spec.parameters
    for shard in (Shard(1, 2), Shard(2, 4), Shard(3, 4)):
        one, other = transformer.Model(spec, whole, shard), transformer.Model(spec, half, shard)
        assert torch.equal(one.head, other.head)
        for mine, theirs in zip(one.blocks, other.blocks, strict=True):
            pairs = zip(mine, theirs, strict=True)
            assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_heads_decide_which_degrees_there_are(tmp_path):
    directory = checkpoints.make(tmp_path / "grouped", width=48, heads=6, kv_heads=2)
    assert models.describe(Checkpoint(directory)).degrees == (1, 2)


def test_a_guard_ends_with_its_instance_and_aborts_no_group_of_a_later_one(monkeypatch):
    class Peers:
        aborted = False

        def abort(self):
            self.aborted = True

    monkeypatch.setattr("dilaserve.worker.tp_group.made", lambda *args: Peers())
    exchange, before = Exchange(4), threading.active_count()
    joined = Groups("nccl", exchange, 0, "")
    for instance in range(MANY):
        ranks = range(2) if instance % 2 else range(4)
        group = joined.join(instance, ranks, [1] * len(ranks))
    exchange.abandon(0, MANY - 2)  # an old one, of the four
    fours = joined.join(MANY, range(4), [1] * 4)
    while threading.active_count() > before + 1:
        time.sleep(0.01)
    assert not fours.group.aborted
    exchange.abandon(0, MANY)
    while threading.active_count() > before:
        time.sleep(0.01)
    assert fours.group.aborted
    assert not group.group.aborted
    assert joined.join(MANY + 1, range(4), [1] * 4).group is not fours.group
