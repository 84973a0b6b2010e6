"""`dilaserve calibrate`: the profile that it writes, how it is interrupted and gone on with, and what it refuses."""

import contextlib
import io
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from command_line import failed

from dilaserve.calibrate.answers import questions_from
from dilaserve.cli import main
from dilaserve.errors import ConfigError
from dilaserve.profile import profile_file
from dilaserve.profile.decode_speed import LEVELS

QUESTIONS = '{"prompt": "hello"}\n{"prompt": "What is 1+1?", "answer": "2", "task": "sums"}\n'
SOON = 60  # seconds, more than enough


def calibrating(model):
    limits = ("--max-num-seqs", "6", "--max-num-batched-tokens", "200", "--max-model-len", "96")
    return ("--model", str(model), "--devices", "cpu", *limits)


def written(*words):
    """Exit code and both outputs of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def model(random_model, tmp_path):
    """A copy, beside which a profile may be written."""
    return Path(shutil.copytree(random_model, tmp_path / "model"))


def interrupted_at(file, lines):
    """Press Ctrl-C once the file has so many lines."""
    until = time.monotonic() + SOON
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            if file.read_bytes().count(b"\n") >= lines:
                return signal.raise_signal(signal.SIGINT)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def twice(random_model, tmp_path_factory):
    """A calibration that Ctrl-C ends, and one with the same arguments after it: (first, kept, second, folder).

    A damaged profile lies beside the model.
    """
    folder = tmp_path_factory.mktemp("calibrated")
    model = Path(shutil.copytree(random_model, folder / "model"))
    (model / profile_file.FILE).write_text("[]")
    (folder / "problems.jsonl").write_text(QUESTIONS)
    flags = ("--problems", str(folder / "problems.jsonl"), "--plots", str(folder / "plots"))
    words = ("calibrate", *calibrating(model), *flags)
    partial = model / (profile_file.FILE + ".partial")
    presses = threading.Thread(target=interrupted_at, args=(partial, 4))
    presses.start()
    first = written(*words)
    presses.join()
    kept = partial.read_bytes().splitlines(keepends=True)
    return first, kept, written(*words), folder


def test_ctrl_c_says_that_the_same_command_goes_on(twice):
    (code, out, err), kept, _, folder = twice
    assert (code, out) == (130, "")
    partial = folder / "model" / (profile_file.FILE + ".partial")
    told = f"dilaserve: the same command goes on from what has been measured, which is kept in {partial}\n"
    assert err.endswith(told)
    assert len(kept) >= 4
    assert all(line.endswith(b"}\n") for line in kept)


def test_calibrate_goes_on_from_what_was_kept(twice):
    _, kept, (code, _, err), folder = twice
    assert code == 0, err
    answers = sum(b'"type":"answer"' in line for line in kept)
    assert f"going on from {answers} answers and {len(kept) - 1 - answers} timings of steps in" in err
    missing = 2 * len(LEVELS) - answers
    assert (f"{missing} answers will take" in err) == (missing > 0)
    assert not list((folder / "model").glob("*.partial"))


def test_calibrate_writes_a_profile_that_the_server_loads(twice):
    _, _, (_, out, _), folder = twice
    assert "mean error on those held out" in out
    profile = profile_file.find(folder / "model", None)
    assert set(profile.quality.tasks) == {"any", "prompts", "sums"}
    assert profile.costs["cpu x1"].samples > 10
    assert {file.name for file in (folder / "plots").iterdir()} == {"step-cost.png", "quality.png"}


def test_calibrate_refuses_problems_that_cannot_be_asked_or_read(model, tmp_path, run_main):
    problems = tmp_path / "problems.jsonl"
    flags = ("calibrate", *calibrating(model), "--problems")
    problems.write_text('{"prompt": "%s"}\n' % ("long " * 500))
    assert "cannot be asked" in failed(*run_main(*flags, str(problems)))
    assert not list(model.glob("*.partial")), "nothing has been measured"
    for broken in (b'{"prompt": 5}', b"{", b'{"prompt": "\xff"}'):
        problems.write_bytes(broken)
        with pytest.raises(ConfigError, match="is not JSON lines"):
            questions_from(problems, 1)
    assert "holds no problems" in failed(*run_main(*flags, "/dev/null"))


def test_a_damaged_profile_stops_the_server_and_is_replaced_by_calibrate(twice, model, run_main):
    _, _, (_, _, err), folder = twice
    assert "the old profile is replaced" in err
    (model / profile_file.FILE).write_text("[]")
    assert "damaged" in failed(*run_main(*calibrating(model), "--port", "0"))
    profile = profile_file.read(folder / "model" / profile_file.FILE)
    assert profile.costs.keys() == {"cpu x1"}


def test_a_profile_is_written_to_the_file_that_is_given(twice, model, tmp_path, run_main):
    *_, folder = twice
    profile = profile_file.read(folder / "model" / profile_file.FILE)
    elsewhere = tmp_path / "elsewhere.json"
    assert profile_file.write(profile, model, str(elsewhere)) == elsewhere
    assert profile_file.read(elsewhere) == profile
    assert not (model / profile_file.FILE).exists()
    assert "cannot be written" in failed(*run_main("calibrate", *calibrating(model), "--profile", str(tmp_path)))
