"""The block loops against runs of the authors' own code, and their model against transformers' layers."""

import pytest
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
