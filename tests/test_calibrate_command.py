"""`dilaserve calibrate`: the profile that it writes, and what it refuses."""

import shutil
from pathlib import Path

import pytest
from command_line import failed, run

from dilaserve.calibrate.answers import questions_from
from dilaserve.errors import ConfigError
from dilaserve.profile import profile_file


def calibrating(model):
    return ("--model", str(model), "--devices", "cpu", "--max-num-seqs", "4", "--max-num-batched-tokens", "300")


@pytest.fixture
def model(random_model, tmp_path):
    """A copy, beside which a profile may be written."""
    return Path(shutil.copytree(random_model, tmp_path / "model"))


def test_calibrate_writes_a_profile_that_the_server_loads(model, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "hello"}\n{"prompt": "What is 1+1?", "answer": "2", "task": "sums"}\n')
    flags = ("--problems", str(problems), "--plots", str(tmp_path / "plots"))
    done = run("calibrate", *calibrating(model), *flags)
    assert done.returncode == 0, done.stderr
    assert "mean error on those held out" in done.stdout
    profile = profile_file.find(model, None)
    assert set(profile.quality.tasks) == {"any", "prompts", "sums"}
    assert profile.costs["cpu x1"].samples > 20
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"step-cost.png", "quality.png"}


def test_calibrate_refuses_problems_that_cannot_be_asked_or_read(model, tmp_path, run_main):
    problems = tmp_path / "problems.jsonl"
    flags = ("calibrate", *calibrating(model), "--problems")
    problems.write_text('{"prompt": "%s"}\n' % ("long " * 500))
    assert "cannot be asked" in failed(*run_main(*flags, str(problems)))
    for broken in (b'{"prompt": 5}', b"{", b'{"prompt": "\xff"}'):
        problems.write_bytes(broken)
        with pytest.raises(ConfigError, match="is not JSON lines"):
            questions_from(problems, 1)
    assert "holds no problems" in failed(*run_main(*flags, "/dev/null"))


def test_a_damaged_profile_stops_the_server_and_is_replaced_by_calibrate(model, tmp_path, run_main):
    (model / profile_file.FILE).write_text("[]")
    flags = calibrating(model)
    assert "damaged" in failed(*run_main(*flags, "--port", "0"))
    assert "cannot be written" in failed(*run_main("calibrate", *flags, "--profile", str(tmp_path)))
    elsewhere, problems = tmp_path / "elsewhere.json", tmp_path / "problems.jsonl"
    elsewhere.write_text("[]")
    problems.write_text('{"prompt": "hello"}\n')
    code, _, told = run_main("calibrate", *flags, "--problems", str(problems), "--profile", str(elsewhere))
    assert (code, "the old profile is replaced" in told) == (0, True), told
    assert profile_file.read(elsewhere).costs.keys() == {"cpu x1"}
    assert (model / profile_file.FILE).read_text() == "[]"
