"""The reference loops against runs of the authors' own code."""

import json
from pathlib import Path

import pytest
from reference import Llada, decode

FIXTURE = Path(__file__).parent / "fixtures" / "llada"
CASES = json.loads((FIXTURE / "cases.json").read_text())
CACHES = {"generate_with_prefix_cache": "prefix", "generate_with_dual_cache": "dual"}


@pytest.fixture(scope="module")
def model():
    return Llada(FIXTURE)


def label(case):
    return f"{case['decoder']}-{case['steps']}-{case['block_length']}-{case.get('threshold')}"


def cache_of(case):
    return CACHES.get(case["decoder"].split(".")[-1], "none")


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_loop_gives_the_authors_tokens(model, case):
    threshold = case.get("threshold")
    tokens, forwards = decode(
        model,
        case["prompt"],
        case["gen_length"],
        case["block_length"],
        cache_of(case),
        steps=None if threshold else case["steps"],
        threshold=threshold,
    )
    assert tokens == case["expected"]
    assert forwards == case.get("nfe_reference", forwards)
