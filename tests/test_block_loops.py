"""The block loops against runs of the authors' own code, and their model against transformers' layers."""

import block_checkpoints
import pytest
import torch
from block_loops import block_causal, open_at
from block_models import Masked
from block_parity import FIXTURES, arguments, cases, expected

FOLDERS = ("dream", "sdar", "nemotron")


@pytest.mark.parametrize(("folder", "case"), [(folder, case) for folder in FOLDERS for case in cases(folder)])
def test_a_loop_gives_the_authors_tokens(folder, case):
    model = Masked(FIXTURES / folder)
    model.rope = model.rope | case.get("rope_override", {})
    loop, asked = arguments(case)
    tokens, passes = expected(model, loop, **asked)
    assert tokens == case["expected"]
    assert passes == case.get("nfe", passes)


@pytest.mark.parametrize("architecture", list(block_checkpoints.FAMILIES))
def test_the_reference_model_has_the_logits_of_transformers(architecture, tmp_path):
    directory = block_checkpoints.make(tmp_path, architecture)
    ids = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    for visible in (block_causal(150, 8), open_at(150, 140), torch.ones(150, 150).bool()):
        expected = block_checkpoints.transformers_logits(directory, ids, visible)
        torch.testing.assert_close(Masked(directory).logits(ids, visible), expected, rtol=1e-4, atol=2e-4)
