"""Checkpoints that cannot be served: one clear sentence each, before a worker is started."""

import contextlib
import json
from pathlib import Path

import checkpoints
import family_checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from dilaserve import Config, models
from dilaserve.engine.assembly import ends, named, real
from dilaserve.errors import CheckpointError, ConfigError
from dilaserve.models.checkpoint import Checkpoint, locate
from dilaserve.models.spec import ModelSpec, Shard
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.transport.devices import listed
from dilaserve.transport.request_table import RequestTable
from dilaserve.worker import memory


@pytest.fixture
def model(tmp_path):
    return checkpoints.make(tmp_path / "model")


def refuse(model, pattern):
    with pytest.raises(CheckpointError, match=pattern):
        models.describe(Checkpoint(model))


def change(model, **fields):
    config = json.loads((model / "config.json").read_text()) | fields
    (model / "config.json").write_text(json.dumps(config))


def test_the_bundled_model_is_found_by_its_name():
    spec = models.describe(Checkpoint(locate("dilaserve-tiny")))
    assert spec.max_length == 512
    assert spec.parameters < 8_000_000


def test_the_published_configuration_is_understood(tmp_path):
    """LLaDA-8B's fields, with headers in place of 16 GB of weights."""
    fields = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "mlp_ratio": 4,
        "vocab_size": 126464,
        "embedding_size": 126464,
        "max_sequence_length": 4096,
        "rope": True,
        "rope_theta": 500000.0,
        "rope_full_precision": True,
        "rms_norm_eps": 1e-05,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "activation_type": "silu",
        "block_type": "llama",
        "block_group_size": 1,
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "weight_tying": False,
        "alibi": False,
        "multi_query_attention": None,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    spec = models.llada.describe(Checkpoint(tmp_path))
    assert (spec.layers, spec.hidden, spec.head_dim, spec.groups, spec.mlp) == (32, 4096, 128, 8, 12288)
    assert (spec.mask_id, spec.stop_ids, spec.kv_elements) == (126336, (126081,), 262144)
    shapes = models.tensor_names.tensors(spec, models.llada.NAMES)
    assert len(shapes) == 3 + 32 * 9
    assert shapes["model.transformer.blocks.31.ff_out.weight"] == (4096, 12288)
    assert shapes["model.transformer.ff_out.weight"] == (126464, 4096)


def test_a_missing_directory_file_or_shard_is_named(tmp_path, model):
    with pytest.raises(CheckpointError, match="there is no model directory"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", r"cannot read .*config\.json")
    (model / "model.safetensors").unlink()
    refuse(model, "holds neither")


def test_a_missing_shard_is_named(tmp_path):
    model = checkpoints.make(tmp_path / "sharded", shards=3)
    assert models.describe(Checkpoint(model)).layers == 2
    (model / "model-00002-of-00003.safetensors").unlink()
    refuse(model, "the shard .*00002-of-00003.* is missing")


def test_a_file_that_was_cut_short_is_named(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    refuse(model, "not a whole safetensors file")
    (model / "model.safetensors").write_bytes(b"<html>not found</html>" * 9)
    refuse(model, "not a whole safetensors file")


@pytest.mark.parametrize(
    "table", [[], 5, {"x": 1}, {"x": {"dtype": "F32"}}, {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}]
)
def test_a_file_with_an_odd_table_is_named(model, table):
    data = json.dumps(table).encode()
    (model / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(8))
    refuse(model, "is not a whole safetensors file|holds no tensors")


def test_a_file_whose_table_does_not_fit_its_bytes_is_named(model):
    file = model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data + bytes(8))
    refuse(model, r"model\.safetensors is not a whole safetensors file .*not fully covered")
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    first = min((entry for name, entry in table.items() if name != "__metadata__"), key=lambda one: one["data_offsets"])
    first["data_offsets"][0] += 1
    odd = json.dumps(table).encode()
    file.write_bytes(len(odd).to_bytes(8, "little") + odd + data[8 + size :])
    refuse(model, r"model\.safetensors is not a whole safetensors file .*invalid offset")


def test_a_path_that_cannot_be_looked_at_is_named():
    with pytest.raises(CheckpointError, match="model directory aaa"):
        Checkpoint(Path("a" * 300))


def test_a_directory_is_told_from_a_bundled_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("dilaserve-tiny").is_dir()
    assert [locate(name).resolve() for name in (".", "..")] == [tmp_path, tmp_path.parent]
    with pytest.raises(CheckpointError, match="there is no model directory ~nobody-here"):
        locate("~nobody-here/model")


def test_another_models_tokenizer_and_a_broken_template_are_named(model):
    checkpoints.write_tokenizer(model, first_special=300)
    with pytest.raises(CheckpointError, match=r"has ids up to 305, but the model knows 272 tokens"):
        real(Config.of(model=str(model), devices="cpu"), lambda device, done, total: None)
    (model / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"chat template in .* cannot be read"):
        Text(model).load_template()


def test_missing_and_misshapen_tensors_are_named(model):
    tensors = load_file(model / "model.safetensors")
    name = "model.transformer.blocks.1.up_proj.weight"
    save_file({**tensors, name: torch.zeros(3, 3)}, model / "model.safetensors")
    refuse(model, r"the tensor .*up_proj.* of shape \[3, 3\], where config\.json asks for \[64, 32\]")
    del tensors[name]
    save_file(tensors, model / "model.safetensors")
    refuse(model, "lacks the tensor .*up_proj")


def test_all_tensors_that_do_not_fit_are_named_and_the_first_ten_of_each_kind(tmp_path):
    model = checkpoints.make(tmp_path / "model", layers=14)
    tensors = load_file(model / "model.safetensors")
    layer = "model.transformer.blocks.{}."
    lacking = sorted(name for name in tensors if "k_proj" in name)
    more = {layer.format(i) + "q_norm.weight": torch.ones(8) for i in range(2)} | {
        "model.transformer.ln_f.bias": torch.ones(32),
        layer.format(3) + "up_proj.weight": torch.zeros(3, 3),
        layer.format(4) + "up_proj.weight": torch.zeros(64, 32, dtype=torch.int8),
        "model.value_head.weight": torch.zeros(2, dtype=torch.int64),
    }
    save_file({name: tensors[name] for name in tensors if name not in lacking} | more, model / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        models.describe(Checkpoint(model))
    message = caught.value.message
    assert "lacks 14 tensors: " in message
    assert sum(name in message for name in lacking) == 10
    assert " and 4 more; is a shard or its index missing?" in message
    assert f"holds the tensor {layer.format(3)}up_proj.weight of shape [3, 3], where config.json asks for" in message
    assert f"holds the tensor {layer.format(4)}up_proj.weight of the type I8" in message
    assert "holds 3 tensors: " in message
    assert all(name in message for name in (*(layer.format(i) + "q_norm" for i in range(2)), "ln_f.bias"))
    assert message.endswith(" that LLaDAModelLM with this config.json does not have")
    assert "value_head" not in message
    assert len(message.splitlines()) == 1


def test_tensors_beside_the_model_are_left_alone_and_named_in_the_log(model, caplog):
    tensors, whole = load_file(model / "model.safetensors"), models.describe(Checkpoint(model))
    buffers = {"model.transformer.blocks.0.rotary_emb.inv_freq": torch.ones(4)}
    heads = {"value_head.weight": torch.zeros(2, dtype=torch.int64)}
    save_file(tensors | buffers | heads, model / "model.safetensors")
    assert models.describe(Checkpoint(model)) == whole
    real(Config.of(model=str(model), devices="cpu"), lambda device, done, total: None)
    assert f"{model} holds the tensor value_head.weight that the model has no part for" in caplog.text
    assert "inv_freq" not in caplog.text


def test_a_layer_more_than_config_json_says_is_an_error(model):
    change(model, n_layers=1)
    refuse(model, r"holds 9 tensors: model\.transformer\.blocks\.1\.\S+, .* does not have")


def test_a_head_that_is_stored_although_it_is_tied_is_not_read(tmp_path):
    model = family_checkpoints.make(tmp_path / "tied", "ILLaDAForCausalLM")
    tensors, whole = load_file(model / "model.safetensors"), models.describe(Checkpoint(model))
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": torch.zeros(7)}, model / "model.safetensors")
    found = Checkpoint(model)
    assert models.describe(found) == whole
    assert found.unused == []


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architecture 'LlamaForCausalLM'; this version serves LLaDAModelLM"),
        ({"architectures": None}, "names no architectures"),
        ({"n_heads": 5}, "do not go together"),
        ({"d_model": "big"}, "d_model must be int"),
        ({"mask_token_id": None}, "mask_token_id must be int"),
        ({"include_bias": True}, "include_bias True is not supported"),
        ({"activation_type": "gelu"}, "activation_type 'gelu' is not supported"),
        ({"mask_token_id": 272}, "mask_token_id 272 does not lie between 0 and 271"),
        ({"eos_token_id": -1}, "eos_token_id -1 does not lie"),
        ({"n_layers": 0}, "n_layers 0 does not lie"),
        ({"n_layers": 10**9}, "n_layers 1000000000 does not lie"),
        ({"max_sequence_length": 0}, "max_sequence_length 0 does not lie"),
        ({"max_sequence_length": 10**15}, "max_sequence_length 1000000000000000 does not lie"),
    ],
)
def test_fields_that_cannot_be_served_are_named(model, fields, pattern):
    change(model, **fields)
    refuse(model, pattern)


def test_broken_json_is_named(model):
    (model / "config.json").write_text("{")
    refuse(model, r"config\.json is not valid JSON")


def test_too_little_memory_is_said_with_both_figures():
    fields = dict.fromkeys(ModelSpec.__struct_fields__, 1) | {
        "architecture": "x",
        "stop_ids": (),
        "tied": False,
        "experts": None,
    }
    spec = ModelSpec(**fields | {"parameters": 10**15})
    with pytest.raises(CheckpointError, match=r"needs 3725290\.3 GiB .* in float32 and cpu has .* GiB"):
        memory.check_weights(spec, torch.device("cpu"), torch.float32, memory.Claim())


def test_a_pool_or_a_table_that_does_not_fit_is_said_with_its_flag():
    fields = dict.fromkeys(ModelSpec.__struct_fields__, 1) | {
        "architecture": "x",
        "stop_ids": (),
        "tied": False,
        "experts": None,
        "full": None,
    }
    for tokens, pattern in ((10**15, r"takes 7450580\.6 GiB and cpu has .* lower it"), (1, "less than a page")):
        with pytest.raises(CheckpointError, match=f"--kv-cache-tokens {tokens} {pattern}|{pattern}"):
            memory.check_pool(ModelSpec(**fields), torch.device("cpu"), torch.float32, memory.Claim(), tokens)
    with pytest.raises(ConfigError, match="lower --max-queue or --max-model-len"):
        RequestTable(2**31 - 1, 2**20)


@pytest.mark.parametrize("devices", ["gpu", "cuda", "cpu,", "cuda:99", ""])
def test_unknown_devices_are_named(devices):
    with pytest.raises(ConfigError, match=r"unknown device|there is no cuda:99"):
        listed(devices)


def test_a_shard_of_any_degree_is_a_view_of_the_full_weights(model):
    """Two ranks' parts sum to the whole layer, and none is a copy."""
    checkpoint, cpu = Checkpoint(model), torch.device("cpu")
    spec = models.describe(checkpoint)
    weights = models.load(spec, checkpoint.tensors(), cpu, torch.float32, lambda nbytes: None)
    block, x = weights.blocks[0], torch.randn(5, spec.hidden)
    whole = models.transformer.Model(spec, weights)
    for size in (2, 4):
        parts = [models.transformer.Model(spec, weights, Shard(rank, size)) for rank in range(size)]
        split = [part.project(part.blocks[0], x) for part in parts]
        assert torch.allclose(torch.cat(split, 1), whole.project(block, x), atol=1e-5)
        summed = sum(part.feed_forward(0, x) for part in parts)
        assert torch.allclose(summed, whole.feed_forward(0, x), atol=1e-4)
        storages = {part.blocks[0].qkv.untyped_storage().data_ptr() for part in parts}
        assert storages == {block.qkv.untyped_storage().data_ptr()}


def test_a_directory_that_was_saved_twice_is_read_as_transformers_reads_it(tmp_path):
    model = checkpoints.make(tmp_path / "model", shards=3)
    checkpoints.make(model, seed=1)
    assert set(Checkpoint(model).files.values()) == {model / "model.safetensors"}
    (model / "model-00002-of-00003.safetensors").unlink()
    assert models.describe(Checkpoint(model)).layers == 2


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "special", "expected"),
    [
        ({"eos_token_id": 7}, None, {}, None, {7}),
        ({"eos_token_id": [7, 9]}, None, {}, None, {7, 9}),
        ({"eos_token_id": None}, {"eos_token_id": 8}, {}, None, {8}),
        ({"eos_token_id": None}, {"eos_token_id": [8, 8, 9]}, {}, None, {8, 9}),
        ({"eos_token_id": None}, {}, {"eos_token": "A"}, None, {"A"}),
        ({"eos_token_id": None}, {}, {"eos_token": {"__type": "AddedToken", "content": "A"}}, None, {"A"}),
        ({"eos_token_id": None}, {}, {"eos_token": None}, {"eos_token": "B"}, {"B"}),
        ({"eos_token_id": None}, {}, {}, {"eos_token": {"content": "B", "lstrip": False}}, {"B"}),
        ({"eos_token_id": 7}, {"eos_token_id": [8]}, {"eos_token": "A"}, {"eos_token": "B"}, {7, 8, "A", "B"}),
        ({"eos_token_id": 7}, None, {"eos_token": "not in the vocabulary"}, None, {7}),
        ({"eos_token_id": []}, {"eos_token_id": None}, {}, {}, set()),
    ],
)
def test_answers_end_with_every_token_that_any_file_names(model, config, generation, tokenizer, special, expected):
    change(model, **config)
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name, fields in (("generation_config.json", generation), ("special_tokens_map.json", special)):
        if fields is not None:
            (model / name).write_text(json.dumps(fields))
    text = Text(model)
    always = {checkpoints.EOS, checkpoints.EOT}  # known of many models by their names
    expected = {text.tokenizer.token_to_id(end) if isinstance(end, str) else end for end in expected}
    assert set(ends(models.describe(Checkpoint(model)), text, model)) == expected | always


@pytest.mark.parametrize(
    ("name", "fields", "pattern"),
    [
        ("config.json", {"eos_token_id": "7"}, r"config\.json: eos_token_id must be a token id or a list of them"),
        ("config.json", {"eos_token_id": [True]}, "must be a token id or a list of them"),
        ("config.json", {"eos_token_id": [7, -1]}, "eos_token_id -1 does not lie between 0 and 271"),
        ("config.json", {"eos_token_id": checkpoints.MASK}, "the mask token 258 .* also named as a token that ends"),
        ("generation_config.json", {"eos_token_id": 272}, r"generation_config\.json: eos_token_id 272 does not lie"),
        ("generation_config.json", {"eos_token_id": 7.0}, r"generation_config\.json: eos_token_id must be"),
        ("generation_config.json", [], r"generation_config\.json must hold a JSON object"),
        ("tokenizer_config.json", {"eos_token": 5}, r"tokenizer_config\.json: eos_token must be a token's text"),
        ("special_tokens_map.json", {"eos_token": {"content": None}}, None),
        ("special_tokens_map.json", {"eos_token": ["A"]}, r"special_tokens_map\.json: eos_token must be"),
    ],
)
def test_end_tokens_that_cannot_be_are_named(model, name, fields, pattern):
    known = json.loads((model / name).read_text()) if (model / name).exists() else {}
    (model / name).write_text(json.dumps(known | fields if isinstance(fields, dict) else fields))
    with contextlib.nullcontext() if pattern is None else pytest.raises(CheckpointError, match=pattern):
        ends(models.describe(Checkpoint(model)), Text(model), model)


async def test_a_model_is_called_as_it_was_given(tmp_path):
    snapshot = tmp_path / "models--GSAI-ML--LLaDA-8B" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (tmp_path / "llada").symlink_to(snapshot)
    assert named(tmp_path / "llada") == "llada"
    assert named(tmp_path / "llada" / "") == "llada"
    assert named(snapshot) == "GSAI-ML/LLaDA-8B"
    assert named(Path("tests/..")) == Path.cwd().name
