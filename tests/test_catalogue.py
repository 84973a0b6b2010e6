"""`dilaserve models`: what is bundled, what is in the hub's cache, and what could be."""

import json

import checkpoints
import family_checkpoints
import pytest
from huggingface_hub import constants

from dilaserve import models
from dilaserve.models.catalogue import catalogue, counted

SHAS = "0" * 40, "1" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with two snapshots of a model, one of a damaged model, and things that are not served."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub"
    family_checkpoints.make(root / "models--org--qwen" / "snapshots" / SHAS[0], "A2DQwen3LMHeadModel")
    family_checkpoints.make(root / "models--org--qwen" / "snapshots" / SHAS[1], "A2DQwen3LMHeadModel")
    refs = root / "models--org--qwen" / "refs"
    (refs / "pr").mkdir(parents=True)
    (refs / "main").write_text(SHAS[0])
    (refs / "pr" / "7").write_text(SHAS[1])
    damaged = checkpoints.make(root / "models--org--damaged" / "snapshots" / SHAS[0])
    (damaged / "model.safetensors").unlink()
    other = checkpoints.make(root / "models--org--other" / "snapshots" / SHAS[0])
    (other / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (root / "models--org--empty" / "snapshots" / SHAS[0]).mkdir(parents=True)
    (root / "datasets--org--data" / "snapshots" / SHAS[0]).mkdir(parents=True)
    (root / ".locks").mkdir()
    return root


def test_bundled_and_cached_models_are_described_under_the_name_that_model_takes(cache):
    found = catalogue()
    (tiny,) = found.bundled
    assert (tiny.name, tiny.family, tiny.dtype, tiny.problem) == ("dilaserve-tiny", "LLaDA", "bfloat16", None)
    assert {model.name: (model.family, model.dtype, model.parameters) for model in found.cached} == {
        f"org/damaged@{SHAS[0]}": ("LLaDA", None, None),
        "org/qwen": ("A2D", "float32", found.cached[1].parameters),
        "org/qwen@pr/7": ("A2D", "float32", found.cached[1].parameters),
    }
    assert "holds neither model.safetensors nor" in found.cached[0].problem
    assert found.cached[1].path == str(cache / "models--org--qwen" / "snapshots" / SHAS[0])


def test_every_architecture_is_in_one_family_that_has_a_title_and_examples():
    families = catalogue().families
    listed = [architecture for family in families for architecture in family.architectures]
    assert sorted(listed) == sorted(models.FAMILIES)
    assert all(family.title for family in models.FAMILIES.values())
    for family in families:
        assert family.examples
        assert family.caches
        assert all(models.hub.NAME.fullmatch(example) for example in family.examples)


def test_the_command_prints_them_as_text_and_as_json(cache, run_main):
    code, out, err = run_main("models")
    assert (code, err) == (0, "")
    assert "  dilaserve-tiny  LLaDA  2.36 M parameters  bfloat16  /" in out
    assert "  org/qwen  A2D  " in out
    assert f"  org/damaged@{SHAS[0]}  LLaDA  cannot be served: {cache}" in out
    assert "LLaDA: LLaDAModelLM; none, prefix, dual\n    --model GSAI-ML/LLaDA-8B-Instruct" in out
    code, out, err = run_main("models", "--json")
    assert (code, err, json.loads(out)["cached"][1]["name"]) == (0, "", "org/qwen")
    assert run_main("models", "--port", "1")[0] == 2  # it has no settings


def test_without_a_cache_there_is_nothing_cached(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert catalogue().cached == []
    assert f"in the hub's cache, {tmp_path}/nowhere\n  none of these families\n" in run_main("models")[1]


@pytest.mark.parametrize(
    ("parameters", "text"), [(0, "0"), (999, "999"), (2_361_408, "2.36 M"), (596_000_000, "596 M"), (8.02e9, "8.02 B")]
)
def test_a_count_of_parameters_has_three_digits(parameters, text):
    assert counted(parameters) == text
