"""Mixture-of-experts layers: routers, grouped matrix products beside the loop, shards, and graphs on a fake GPU."""

import json

import family_checkpoints
import msgspec
import numpy as np
import pytest
import torch
from cuda_harness import GPU, Harness, fresh_device_caches  # noqa: F401 - a fixture
from fake_cuda import fake_gpus
from family_checkpoints import LlamaLike
from runner_harness import CPU, logits_of, shapes_of, weights_on
from safetensors.torch import load_file, save_file

from dilaserve.models import experts
from dilaserve.models.blocks import gated
from dilaserve.models.spec import Experts, Shard
from dilaserve.models.transformer import Model
from dilaserve.worker import memory
from dilaserve.worker.forward_graphs import ForwardGraphs

ARCHITECTURE = "LLaDAMoEModelLM"
SPEC = Experts(count=16, chosen=4, width=24, router="softmax")
GROUPS = msgspec.structs.replace(SPEC, router="sigmoid-groups", groups=4, kept_groups=2, scale=2.5, float32_sum=True)


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def some_weights(spec, hidden=32, bias=None):
    gate_up, down = random(spec.count, 2 * spec.width, hidden, seed=2), random(spec.count, hidden, spec.width, seed=3)
    return experts.ExpertWeights(random(spec.count, hidden, seed=1), gate_up * 0.2, down * 0.2, bias)


def part_of(weights, first, end):
    return weights._replace(gate_up=weights.gate_up[first:end], down=weights.down[first:end])


def token_by_token(x, weights, chosen):
    """`chosen` are the experts of each token with their weights."""
    out = torch.zeros_like(x)
    for token, pairs in enumerate(chosen):
        for expert, weight in sorted(pairs):
            gate, up = (weights.gate_up[expert] @ x[token]).chunk(2)
            out[token] += weight * (weights.down[expert] @ (gate * gate.sigmoid() * up))
    return out


def by_softmax(x, weights, spec, renormalised):
    found = []
    for odds in (x @ weights.router.T).softmax(-1).tolist():
        best = sorted(range(spec.count), key=lambda expert, odds=odds: -odds[expert])[: spec.chosen]
        whole = sum(odds[expert] for expert in best) if renormalised else 1.0
        found.append([(expert, odds[expert] / whole) for expert in best])
    return found


def by_groups(x, weights, spec):
    found, size = [], spec.count // spec.groups
    for scores in (x @ weights.router.T).sigmoid().tolist():
        ranked = [score + bias for score, bias in zip(scores, weights.bias.tolist(), strict=True)]
        groups = [range(group * size, (group + 1) * size) for group in range(spec.groups)]
        groups.sort(key=lambda group: -sum(sorted((ranked[expert] for expert in group), reverse=True)[:2]))
        kept = [expert for group in groups[: spec.kept_groups] for expert in group]
        best = sorted(kept, key=lambda expert: -ranked[expert])[: spec.chosen]
        whole = sum(scores[expert] for expert in best) + 1e-20
        found.append([(expert, scores[expert] / whole * spec.scale) for expert in best])
    return found


def test_tokens_get_the_weighted_sum_of_the_experts_that_each_router_chooses():
    x = random(20, 32, seed=9)
    for renormalised, router in ((False, "softmax"), (True, "softmax-renormalised")):
        spec, weights = msgspec.structs.replace(SPEC, router=router), some_weights(SPEC)
        expected = token_by_token(x, weights, by_softmax(x, weights, spec, renormalised))
        found = experts.feed_forward(x, weights, spec, 0, gated, None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = some_weights(GROUPS, bias=random(16, seed=5))
    expected = token_by_token(x, weights, by_groups(x, weights, GROUPS))
    torch.testing.assert_close(experts.feed_forward(x, weights, GROUPS, 0, gated, None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [SPEC, GROUPS])
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_ranks_add_up_to_the_whole_and_grouped_products_agree_with_the_loop(spec, tokens):
    """torch's grouped product runs on a CPU too; what it leaves in rows of other ranks must not matter."""
    x, weights = random(tokens, 32, seed=7), some_weights(spec, bias=random(16, seed=5))
    multiply = experts.multiplier()

    def broken(rows, matrices, ends):
        out = multiply(rows, matrices, ends)
        out[ends[-1] :] = torch.nan
        return out

    whole = experts.feed_forward(x, weights, spec, 0, gated, None)
    torch.testing.assert_close(experts.feed_forward(x, weights, spec, 0, gated, multiply), whole, rtol=1e-5, atol=1e-6)
    for size in (2, 4):
        shares = [(rank * 16 // size, (rank + 1) * 16 // size) for rank in range(size)]
        for way in (None, broken):
            parts = [experts.feed_forward(x, part_of(weights, *at), spec, at[0], gated, way) for at in shares]
            torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-5)


def test_the_sum_in_bfloat16_is_rounded_at_each_expert_in_ascending_order_as_index_add_does():
    spec, weights = SPEC, some_weights(SPEC)
    weights = weights._replace(**{name: getattr(weights, name).bfloat16() for name in ("router", "gate_up", "down")})
    x = random(30, 32, seed=8).bfloat16()
    odds, chosen = (x @ weights.router.T).softmax(-1, dtype=torch.float32).topk(spec.chosen)
    expected = torch.zeros_like(x)
    for expert in range(spec.count):
        token, place = torch.where(chosen == expert)
        fused = x[token] @ weights.gate_up[expert].T
        one = gated(fused.view(len(token), 1, 2, -1)) @ weights.down[expert].T
        expected.index_add_(0, token, one * odds[token, place, None].to(x.dtype))
    assert torch.equal(experts.feed_forward(x, weights, spec, 0, gated, None), expected)


def optional_parts(tmp_path):
    """A checkpoint whose router has a bias and whose layers have a shared expert."""
    directory = family_checkpoints.make(tmp_path / "optional", ARCHITECTURE)
    file, config = directory / "config.json", json.loads((directory / "config.json").read_text())
    changed = dict(moe_router_enable_expert_bias=True, shared_expert_intermediate_size=16, moe_layer_freq=[1, 1])
    file.write_text(json.dumps(config | changed))
    tensors = load_file(directory / "model.safetensors")
    layer = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.0.mlp.")}
    tensors |= {name.replace("layers.1.", "layers.0."): tensor for name, tensor in layer.items() if "mlp." in name}
    for i in range(2):
        tensors[f"model.layers.{i}.mlp.expert_bias"] = random(8, seed=i, scale=0.1)
        shapes = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
        for part, shape in shapes.items():
            tensors[f"model.layers.{i}.shared_expert.{part}.weight"] = random(*shape, seed=i + 4, scale=0.3)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def test_a_router_bias_and_a_shared_expert_are_taken_into_account_on_any_number_of_ranks(tmp_path):
    directory = optional_parts(tmp_path)
    spec, weights = weights_on(CPU, directory, torch.float32)
    ids = torch.randint(0, 256, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = LlamaLike(directory).forward(ids)[0]
    assert (spec.experts.shared, spec.experts.bias, spec.experts.dense, spec.mlp) == (16, True, (), 0)
    for size in spec.degrees:
        torch.testing.assert_close(logits_of(spec, weights, ids, size), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optional", [False, True])
def test_a_worker_with_a_part_of_the_weights_has_the_experts_of_that_part(optional, tmp_path):
    directory = optional_parts(tmp_path) if optional else family_checkpoints.make(tmp_path / "m", ARCHITECTURE)
    spec, whole = weights_on(CPU, directory, torch.float32)
    assert (spec.degrees, spec.shard_parameters(1)) == ((1, 2), spec.parameters)
    for rank in range(2):
        _, half = weights_on(CPU, directory, torch.float32, Shard(rank, 2))
        held = sum(tensor.numel() for block in half.blocks for tensor in block.tensors())
        assert half.embedding.numel() + half.norm.numel() + half.head.numel() + held == spec.shard_parameters(2)
        one, other = Model(spec, whole, Shard(rank, 2)), Model(spec, half, Shard(rank, 2))
        for mine, theirs in zip(one.blocks, other.blocks, strict=True):
            assert all(map(torch.equal, mine.tensors(), theirs.tensors()))
            assert len(mine.tensors()) == len(theirs.tensors())


def test_steps_of_experts_are_recorded_as_graphs_on_a_gpu_with_grouped_products(tmp_path):
    directory, shapes = family_checkpoints.make(tmp_path, ARCHITECTURE), shapes_of(3)
    with fake_gpus():
        graphs, eager = (Harness(directory, GPU, eager=way) for way in (False, True))
        for harness in (graphs, eager):
            assert not harness.model.waits
            harness.runner.forward = ForwardGraphs(harness.spec, harness.model, harness.pool, 256, harness is eager)
        assert np.array_equal(graphs.denoised(shapes), eager.denoised(shapes))
        assert graphs.reuse.graphs
        assert graphs.runner.forward.graphs
        older = Model(graphs.spec, graphs.model.weights)
        older.multiply = None
        assert older.waits


def test_grouped_products_are_used_where_torch_has_kernels_of_them(monkeypatch):
    assert experts.grouped_for(CPU, torch.bfloat16, 32, 32) is None
    for capability, dtype, width, there in (
        ((9, 0), torch.bfloat16, 1024, True),
        ((10, 0), torch.bfloat16, 1024, True),
        ((8, 0), torch.bfloat16, 1024, False),  # there torch's function is a loop that waits
        ((12, 0), torch.bfloat16, 1024, False),
        ((9, 0), torch.float16, 1024, False),
        ((9, 0), torch.bfloat16, 1020, False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (experts.grouped_for(GPU, dtype, 2048, width) is not None) == there


def test_older_names_of_the_grouped_product_are_found(monkeypatch):
    for public, private, there in ((None, torch._grouped_mm, True), (None, None, False)):
        experts.multiplier.cache_clear()
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", public)
        monkeypatch.setattr(torch, "_grouped_mm", private)
        multiply = experts.multiplier()
        assert (multiply is not None) == there
        if multiply is not None:
            ends = torch.tensor([2, 2, 5], dtype=torch.int32)
            rows, matrices = random(5, 8), random(3, 8, 16)
            torch.testing.assert_close(multiply(rows, matrices, ends)[2:], rows[2:] @ matrices[2])
    experts.multiplier.cache_clear()


def test_steps_of_experts_are_known_to_need_more_memory(tmp_path):
    spec, _ = weights_on(CPU, family_checkpoints.make(tmp_path, ARCHITECTURE), torch.float32)
    dense = msgspec.structs.replace(spec, experts=None)
    sizes = [memory.activation_bytes(one, torch.float32, 64) for one in (spec, dense)]
    assert sizes[0] - sizes[1] == 64 * 3 * (4 * 32 + 3 * 24) * 4 + 64 * 16 * 8
