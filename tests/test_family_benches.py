"""The benches of the families on tiny checkpoints, and the loops that they time beside the references."""

import argparse
import json
from pathlib import Path

import block_loops
import forked_python
import pytest
import reference_loops
import throughput
import torch
from block_models import Masked
from families import checkpoints, rounds
from families.cases import CASES
from families.layers import Plain
from family_checkpoints import LlamaLike

ROOT = Path(__file__).parent.parent
ANSWER = 32
DUAL = dict(block_length=32, threshold=0.9, cache="dual")
REFERENCES = {  # by family: for each of its cases the reference's model and loop, and the loop's arguments
    "llada": [(reference_loops.Llada, reference_loops.decode, DUAL | how) for how in (dict(cache="none"), {})],
    "llada-moe": [(LlamaLike, reference_loops.decode, DUAL | how) for how in (dict(cache="none"), {})],
    "dream": [
        (Masked, block_loops.dream, dict(steps=8, alg="entropy")),
        (Masked, block_loops.dream_blocks, DUAL),
    ],
    "sdar": [
        (
            Masked,
            block_loops.sdar,
            dict(block_length=4, strategy="low_confidence_dynamic", denoising_steps=4, threshold=0.95),
        )
    ],
    "nemotron": [(Masked, block_loops.nemotron, dict(block_length=32, threshold=0.9))],
    "fast-dllm-v2": [(Masked, block_loops.fast_dllm, dict(block_length=32, threshold=0.9))],
}


@pytest.mark.parametrize("family", REFERENCES)
def test_a_loop_that_is_timed_gives_the_tokens_of_the_reference(family, tmp_path):
    directory = checkpoints.make(tmp_path, family, "tiny")
    plain, prompts = Plain(directory), rounds.prompts_for(3)
    for case, (model, loop, how) in zip(CASES[family], REFERENCES[family], strict=True):
        reference = model(directory)
        reference.mask_id = plain.mask_id
        for prompt in prompts:
            tokens, passes = case.loop(plain, torch.tensor(prompt), ANSWER)
            assert tokens == loop(reference, prompt=prompt, gen_length=ANSWER, **how)[0], case.name
            assert passes < 2 * ANSWER, case.name  # confidences spread


@pytest.mark.parametrize("family", checkpoints.ARCHITECTURES)
async def test_the_engine_gives_the_tokens_of_every_loop(family):
    rows = await rounds.measured(family, "tiny", requests=3, answer=ANSWER, rounds=1)
    assert [row.loop for row in rows] == [case.name for case in CASES[family]]
    for row in rows:
        assert (row.family, row.same, row.answers) == (family, 3, 3)
        assert row.loop_speed > 0
        assert all(row.engine_speeds[concurrent] > 0 for concurrent in rounds.CONCURRENT)
        assert row.tokens_per_pass > 0.5


def test_a_report_has_a_line_for_each_loop(capsys):
    rows = [rounds.Row("sdar", "SDAR, block cache", 2, 1.5, 100.0, {1: 110.0, 16: 350.0}, 3, 3)]
    throughput.report_families(rows, argparse.Namespace(size="tiny", requests=3, tokens=32, rounds=1))
    told = " ".join(capsys.readouterr().out.split())
    assert "│ sdar │ SDAR, block cache │ 2 │ 1.50 │ 100 │ 110 │ 1.10 │ 350 │ 3.50 │ 3 of 3 │" in told


def test_the_bench_of_prefix_reuse_can_be_run(tmp_path):
    """A system prompt that another request had is reused whole, and one that is new not at all."""
    file = tmp_path / "figures.json"
    words = ["--size", "tiny", "--system", "64", "--rounds", "1", "--json", str(file)]
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); import prefix; prefix.main()"
    done = forked_python.run("-c", code, *words, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [(row["family"], row["block"], row["cached_tokens"]) for row in json.loads(file.read_text())]
    assert rows == [("sdar", 4, 64), ("nemotron", 32, 64), ("nemotron", 8, 64)]
    assert done.stdout.count("│") == 3 * 9
