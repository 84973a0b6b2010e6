"""DiffusionGemma's layers against transformers' own and against the fixture's recorded logits."""

import random

import pytest
import torch
from gemma_passes import Passes, cases, doubled, reference

CLOSE = dict(rtol=1e-4, atol=2e-4)


@pytest.fixture(scope="module", params=[1, 2])
def passes(request, tmp_path_factory):
    directory = doubled(tmp_path_factory.mktemp("gemma") / "doubled")
    return Passes(directory, request.param)


@pytest.fixture(scope="module")
def original():
    return reference()


def temperature(case):
    left = torch.tensor(case["step"], dtype=torch.int32) / case["max_steps"]
    return case["t_min"] + (case["t_max"] - case["t_min"]) * left


@pytest.mark.parametrize("case", cases("dg_logits"))
def test_the_logits_are_those_that_transformers_had(passes, case):
    rows, ids = torch.tensor(case["rows"])[:, None], torch.tensor(case["ids"])
    first = passes.denoise(case["prompt"], 0, case["canvas"])
    torch.testing.assert_close(first[rows, ids], torch.tensor(case["logits"]), **CLOSE)
    assert first.argmax(-1).tolist() == case["argmax"]
    told = passes.expected(first / temperature(case))
    second = passes.denoise(case["prompt"], len(case["prompt"]), case["canvas2"], told)
    torch.testing.assert_close(second[rows, ids], torch.tensor(case["logits2"]), **CLOSE)
    assert second.argmax(-1).tolist() == case["argmax2"]


@pytest.mark.parametrize("cuts", [(), (12, 13, 24)])
def test_chunks_of_a_prompt_and_a_block_in_one_pass_give_the_logits_of_transformers(passes, original, cuts):
    rng = random.Random(len(cuts))
    prompt, block = ([rng.randrange(384) for _ in range(count)] for count in (37, 16))
    start = 0
    for cut in cuts:
        passes.encode(prompt[start:cut], start)
        start = cut
    found = passes.denoise(prompt, start, block)
    with torch.inference_mode():
        cache = original.model.encoder(input_ids=torch.tensor([prompt])).past_key_values
        expected = original(decoder_input_ids=torch.tensor([block]), past_key_values=cache).logits[0]
        torch.testing.assert_close(found, expected, **CLOSE)
        told = expected * 1.5
        again = original(
            decoder_input_ids=torch.tensor([block]), past_key_values=cache, self_conditioning_logits=told[None]
        ).logits[0]
    torch.testing.assert_close(passes.denoise(prompt, len(prompt), block, passes.expected(told)), again, **CLOSE)
