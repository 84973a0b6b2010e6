"""The reference loops against runs of the authors' own code."""

import pytest
from reference_loops import CASES, FIXTURE, Llada, cache_of, decode


@pytest.fixture(scope="module")
def model():
    return Llada(FIXTURE)


def label(case):
    return f"{case['decoder']}-{case['steps']}-{case['block_length']}-{case.get('threshold')}"


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
