"""`dilaserve serve --model DIR` with a checkpoint of each family: a process, its ready line, an answer, its end."""

import json
import re
import signal

import block_checkpoints
import checkpoints
import family_checkpoints
import gemma_passes
import pytest
from command_line import ask
from forked_python import Python

from dilaserve.models import FAMILIES

GEMMA = "DiffusionGemmaForBlockDiffusion"


def written(architecture, directory):
    """A tiny checkpoint of the family, in its published format."""
    if architecture == "LLaDAModelLM":
        return checkpoints.make(directory)
    if architecture == GEMMA:
        gemma_passes.doubled(directory)
        checkpoints.write_tokenizer(directory)
        return directory
    if architecture in block_checkpoints.FAMILIES:
        return block_checkpoints.make(directory, architecture)
    return family_checkpoints.published(directory, architecture)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_server_answers_with_a_model_of_each_family(architecture, tmp_path):
    model = written(architecture, tmp_path / "model")
    with Python("-m", "dilaserve", "serve", "--model", model, "--port", "0", "--devices", "cpu") as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("ready: "), server.stderr.read()
            answer = json.load(ask(re.search(r"on (http://\S+)", line)[1], ignore_eos=True))
            assert answer["usage"]["completion_tokens"] == 8
            assert answer["choices"][0]["finish_reason"] == "length"
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0
        finally:
            server.kill()
        assert "Traceback" not in server.stderr.read()
