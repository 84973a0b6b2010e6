"""Odd numbers, endless files and odd tables in a checkpoint: served, or refused in one sentence."""

import json
import math
import os
import re
import tracemalloc
from pathlib import Path

import checkpoints
import pytest
import slow_bpe
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilaserve import models
from dilaserve.engine.assembly import ends
from dilaserve.errors import CheckpointError, ConfigError
from dilaserve.models.blocks import rms_norm, rotary_table
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.profile import profile_file
from dilaserve.tokenizer.chat_template import find
from dilaserve.tokenizer.tokenizer import Text


@pytest.fixture
def model(tmp_path):
    return checkpoints.make(tmp_path / "model")


def change(model, **fields):
    config = json.loads((model / "config.json").read_text()) | fields
    (model / "config.json").write_text(json.dumps(config))


ODD = (
    math.nan,
    math.inf,
    -math.inf,
    0,
    0.0,
    -1,
    -1e-5,
    1e-300,
    1e300,
    10**30,
    -(10**30),
    True,
    False,
    "8",
    [8],
    {},
    0.5,
)
BORNE = [["mlp_ratio", 0.5], ["eos_token_id", 0], ["eos_token_id", [8]], ["mask_token_id", 0], ["rms_norm_eps", 0.5]]
NUMBERS = (
    "d_model",
    "n_heads",
    "n_kv_heads",
    "mlp_hidden_size",
    "mlp_ratio",
    "vocab_size",
    "embedding_size",
    "n_layers",
    "max_sequence_length",
    "mask_token_id",
    "eos_token_id",
    "rope_theta",
    "rms_norm_eps",
)


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_of_the_configuration_is_served_that_the_arithmetic_does_not_bear(model, name):
    """Whatever is accepted gives finite positions and norms, also of a row of zeros."""
    for odd in ODD:
        change(model, **{name: odd})
        spec = served_or_refused(model, name)
        if spec is None:
            continue
        assert [name, odd] in BORNE
        table = rotary_table(spec.max_length, spec.head_dim, spec.rope_theta, torch.device("cpu"))
        assert torch.isfinite(torch.view_as_real(table)).all()
        assert torch.isfinite(rms_norm(torch.zeros(2, 8), torch.ones(8), spec.norm_eps)).all()


def served_or_refused(model, pattern):
    """The spec, or None after one sentence that matches."""
    try:
        return models.describe(Checkpoint(model))
    except CheckpointError as refused:
        told = refused.message
    assert re.search(pattern, told)
    assert len(told.splitlines()) == 1
    assert len(told) < 400
    return None


@given(theta=st.floats(), eps=st.floats())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fractions_are_served_or_refused_in_one_sentence(model, theta, eps):
    change(model, rope_theta=theta, rms_norm_eps=eps)
    spec = served_or_refused(model, "rope_theta|rms_norm_eps")
    if spec is not None:
        assert (spec.rope_theta, spec.norm_eps) == (theta, eps)
        assert torch.isfinite(torch.view_as_real(rotary_table(64, 64, theta, torch.device("cpu")))).all()
        assert torch.isfinite(rms_norm(torch.zeros(2, 8), torch.ones(8), eps)).all()


FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "dilaserve-profile.json",
    "vocab.json",
    "merges.txt",
)


def everything_read_from(model):
    checkpoint = Checkpoint(model)
    ends(models.describe(checkpoint), Text(model), model)
    profile_file.find(model, None)
    find(model, None)


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_read_that_has_no_end_or_is_larger_than_any_can_be(model, name, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(model / "cache"))
    if name in ("vocab.json", "merges.txt"):
        slow_bpe.make(model)
    everything_read_from(model)  # what would be imported is
    if "index" in name:
        (model / "model.safetensors").unlink()
    file = model / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    tracemalloc.start()
    try:
        with file.open("wb") as stream:
            stream.write((2**33).to_bytes(8, "little"))
            stream.truncate(6 * 2**30)
        with pytest.raises(ConfigError, match=re.escape(str(file))):
            everything_read_from(model)
        file.unlink()
        for make in (os.mkfifo, lambda file: file.symlink_to("/dev/zero"), Path.mkdir):
            make(file)
            with pytest.raises(ConfigError, match=re.escape(str(file))):
                everything_read_from(model)
            file.rmdir() if file.is_dir() else file.unlink()
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
