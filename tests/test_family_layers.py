"""Layers of families with exact K/V, here with full attention, against transformers' own."""

import json

import checkpoints
import pytest
import torch
from family_checkpoints import BLOCKWISE, backbone_of, open_logits, published
from runner_harness import CPU, logits_of
from safetensors.torch import load_file

from dilaserve import models
from dilaserve.errors import CheckpointError
from dilaserve.models import blocks, sdar, tensor_names
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.spec import Shard
from dilaserve.models.transformer import Model

ARCHITECTURES = list(BLOCKWISE)
IDS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist() + [checkpoints.MASK] * 8


def read(directory, shard=Shard(), dtype=torch.float32):  # noqa: B008 - a frozen value
    checkpoint = Checkpoint(directory)
    spec = models.describe(checkpoint)
    return spec, models.load(spec, checkpoint.tensors(), CPU, dtype, lambda nbytes: None, shard)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_have_the_logits_of_transformers_whole_and_on_two_ranks(architecture, tmp_path):
    directory = published(tmp_path / "model", architecture)
    expected = open_logits(backbone_of(architecture), IDS)
    spec, loaded = read(directory)
    assert (spec.degrees, spec.mask_id) == ((1, 2), checkpoints.MASK)
    assert set(tensor_names.tensors(spec, models.FAMILIES[architecture].names)) == set(
        load_file(directory / "model.safetensors")
    )
    for size in (1, 2):
        torch.testing.assert_close(logits_of(spec, loaded, IDS, size), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_worker_with_a_part_of_the_weights_has_the_shards_of_that_part(architecture, tmp_path):
    directory = published(tmp_path / "model", architecture)
    spec, whole = read(directory)
    assert spec.shard_parameters(1) == spec.parameters
    for rank in range(2):
        _, half = read(directory, Shard(rank, 2))
        held = sum(tensor.numel() for block in half.blocks for tensor in block.tensors())
        assert half.embedding.numel() + half.norm.numel() + half.head.numel() + held == spec.shard_parameters(2)
        one, other = Model(spec, whole, Shard(rank, 2)), Model(spec, half, Shard(rank, 2))
        for mine, theirs in zip(one.blocks, other.blocks, strict=True):
            assert all(map(torch.equal, mine.tensors(), theirs.tensors()))


def test_a_router_bias_stays_in_float32(tmp_path):
    directory = published(tmp_path / "model", "LLaDA2MoeModelLM")
    _, loaded = read(directory, dtype=torch.bfloat16)
    expected = load_file(directory / "model.safetensors")["model.layers.1.mlp.gate.expert_bias"]
    assert torch.equal(loaded.blocks[1].experts.bias, expected)
    assert loaded.blocks[1].experts.router.dtype == torch.bfloat16


def test_only_the_first_dimensions_of_a_head_are_rotated():
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(2))
    turns = blocks.rotary_table(5, 6, 1e4, CPU)
    found = blocks.rotate(x, turns)
    assert torch.equal(found[..., 6:], x[..., 6:])
    assert torch.equal(found[..., :6], blocks.rotate(x[..., :6].contiguous(), turns))
    rows = torch.arange(32.0).view(32, 1)
    assert blocks.interleaved(rows, 16, 6)[:8, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 7]
    assert blocks.interleaved(rows, 16, 6)[16:24, 0].tolist() == [16, 19, 17, 20, 18, 21, 22, 23]


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("LLaDA2MoeModelLM", {"n_group": 3}, "n_group 3, topk_group 2, num_experts_per_tok 4 do not go together"),
        ("LLaDA2MoeModelLM", {"topk_group": 5}, "topk_group 5, num_experts_per_tok 4 do not go together"),
        ("LLaDA2MoeModelLM", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 do not go together"),
        ("LLaDA2MoeModelLM", {"score_function": "softmax"}, "score_function 'softmax' is not supported"),
        ("LLaDA2MoeModelLM", {"norm_topk_prob": False}, "norm_topk_prob False is not supported"),
        ("LLaDA2MoeModelLM", {"use_qkv_bias": True}, "use_qkv_bias True is not supported"),
        ("LLaDA2MoeModelLM", {"partial_rotary_factor": 0.2}, "partial_rotary_factor 0.2 of head_dim 16"),
        ("LLaDA2MoeModelLM", {"partial_rotary_factor": 0.0}, "partial_rotary_factor 0.0 of head_dim 16"),
        ("SDARMoeForCausalLM", {"mlp_only_layers": [2]}, "mlp_only_layers must be numbers of layers, not"),
        ("SDARMoeForCausalLM", {"norm_topk_prob": None}, "norm_topk_prob must be bool, not None"),
        ("SDARMoeForCausalLM", {"decoder_sparse_step": 0}, "decoder_sparse_step 0 does not lie between"),
        ("SDARForCausalLM", {"mask_token_id": 272}, "the mask token 272 does not lie between 0 and 271"),
    ],
)
def test_a_configuration_that_would_change_the_arithmetic_is_named(architecture, fields, words, tmp_path):
    directory = published(tmp_path / "model", architecture)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(CheckpointError, match=words):
        models.describe(Checkpoint(directory))


def test_layers_with_a_dense_mlp_are_those_that_the_configuration_says(tmp_path):
    directory = published(tmp_path / "model", "SDARMoeForCausalLM")
    config = json.loads((directory / "config.json").read_text())
    for fields, dense in (
        ({"mlp_only_layers": []}, ()),
        ({"mlp_only_layers": None, "decoder_sparse_step": 2}, (0,)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (0, 1)),
    ):
        (directory / "config.json").write_text(json.dumps(config | fields))
        assert sdar.describe(Checkpoint(directory)).experts.dense == dense
