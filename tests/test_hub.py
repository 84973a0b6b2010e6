"""Models by their name on the hub: downloaded once, only what is served from, and one sentence where that fails."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import fake_hub
import pytest
from command_line import ask, failed
from fake_hub import SHA
from huggingface_hub import close_session, constants, get_session

from dilaserve.errors import CheckpointError, ConfigError, DilaserveError
from dilaserve.models import hub


@pytest.fixture
def find(monkeypatch, tmp_path):
    """What becomes of each model and revision, and the seconds that it takes. Of its variables the library reads most
    once, when it is imported; a test with a server of its own sets the variables themselves.
    """

    def found(model, revision=None):
        began = time.monotonic()
        try:
            return str(hub.directory_of(model, revision)), time.monotonic() - began
        except DilaserveError as error:
            return f"{type(error).__name__}: {error.message}", time.monotonic() - began

    def find_all(*asked, address, offline=False):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        close_session()  # it keeps whether it is offline
        return [found(*([one] if isinstance(one, str) else one)) for one in asked]

    yield find_all
    close_session()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model as it is published, beside files that nobody here reads."""
    directory = checkpoints.make(tmp_path_factory.mktemp("hub") / "model", shards=2)
    for name in ("adapter/model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "modeling_x.py", "a.md"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"x")
    return directory


@pytest.fixture
def served(published):
    with fake_hub.serving({"org/tiny": published, "org/gated": published}, gated=("org/gated",), token="secret") as it:
        yield it


def test_a_model_is_downloaded_once_and_only_what_is_served_from(find, served, published, tmp_path):
    (first, _), (again, _) = find("org/tiny", "org/tiny", address=served.address)
    assert first == again == str(tmp_path / "hub" / "models--org--tiny" / "snapshots" / SHA)
    expected = {file.name for file in published.glob("*") if file.suffix in (".json", ".safetensors")}
    assert {str(file.relative_to(first)) for file in Path(first).rglob("*")} == expected - {"consolidated.safetensors"}
    assert sum(path.endswith("config.json") for path in served.asked) <= 4  # one of config.json, one of the tokenizer's
    many = len(served.asked)
    found = find(
        "org/tiny",
        "org/tiny@main",
        ("org/tiny", SHA),
        "org/tiny@v2",
        address=served.address,
        offline=True,
    )
    assert [one for one, _ in found[:3]] == [first] * 3
    assert f"HF_HUB_OFFLINE is set, and the cache {tmp_path}/hub does not hold it whole" in found[3][0]
    assert "run `hf download org/tiny --local-dir DIR`" in found[3][0]
    assert len(served.asked) == many


def test_a_download_that_was_cut_short_is_made_whole(find, served, tmp_path):
    ((first, _),) = find("org/tiny@v1", address=served.address)
    lost = Path(first) / "model-00002-of-00002.safetensors"
    lost.resolve().unlink()
    lost.unlink()
    ((offline, _),) = find("org/tiny@v1", address=served.address, offline=True)
    assert "does not hold it whole" in offline
    ((again, _),) = find(("org/tiny", "v1"), address=served.address)
    assert (again, lost.exists()) == (first, True)


def test_models_that_cannot_be_had_are_one_sentence_each_and_soon(find, served, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 1.0)
    unknown, revision, odd, gated, silent = find(
        "org/nothing",
        "org/tiny@v9",
        "org/a--b",
        "org/gated",
        "org/silent",
        address=served.address,
    )
    assert unknown[0] == (
        f"CheckpointError: there is no model directory org/nothing, and {served.address} has no model of that name, or "
        "a private one: check the name, or set HF_TOKEN"
    )
    assert "has no revision 'v9'" in revision[0]
    assert "has no model of that name" in odd[0]
    assert f"org/gated is gated: accept its terms at {served.address}/org/gated, and set HF_TOKEN" in gated[0]
    assert "could not be downloaded" in silent[0]
    assert "run `hf download org/silent --local-dir DIR` where the hub can be reached" in silent[0]
    for found, seconds in (unknown, revision, odd, gated, silent):
        assert len(found.splitlines()) == 1
        assert len(found) < 600
        assert seconds < 30
    monkeypatch.setenv("HF_TOKEN", "secret")
    ((got, _),) = find("org/gated", address=served.address)
    assert Path(got).is_dir()


def test_a_hub_that_falls_silent_later_is_given_up_too(find, served, published, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    served.models["org/stalled"] = published
    hooks = dict(get_session().event_hooks)
    ((found, seconds),) = find("org/stalled", address=served.address)
    assert "could not be downloaded from" in found
    assert seconds < 20
    assert get_session().event_hooks == hooks


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_hub_that_cannot_be_reached_is_said_once_with_what_to_do(find, run_main):
    address = f"http://127.0.0.1:{closed_port()}"
    assert find("org/tiny", address=address)[0][1] < 30
    err = failed(*run_main("--model", "org/tiny", "--port", "0"))
    assert f"it could not be downloaded from {address} (ConnectError: " in err
    assert "start with --model DIR" in err
    find(address=address, offline=True)
    assert "HF_HUB_OFFLINE is set" in failed(*run_main("calibrate", "--model", "org/tiny"))


def test_a_local_directory_of_that_name_wins(find, served, published, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(published)
    monkeypatch.chdir(tmp_path)
    ((found, _),) = find("org/tiny", address=served.address)
    assert (found, served.asked) == (str(tmp_path / "org" / "tiny"), [])


def test_a_revision_goes_with_a_model_of_the_hub(tmp_path):
    for model in ("dilaserve-tiny", str(tmp_path), "one-word"):
        with pytest.raises(ConfigError, match="--revision v1 goes with the name of a model on the hub") as caught:
            hub.directory_of(model, "v1")
        assert caught.value.param == "revision"
    with pytest.raises(ConfigError, match=r"--model org/tiny@v1 and --revision v2 differ; give one of them"):
        hub.directory_of("org/tiny@v1", "v2")
    assert not hub.directory_of("./nowhere/model").exists()  # no name, but a path


def test_the_simulator_imports_nothing_of_the_hub():
    code = (
        "import sys; import dilaserve.sim.command; print([name for name in sys.modules if 'huggingface_hub' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["[]"], done.stderr


def test_a_server_fetches_its_model_and_calls_it_by_its_name(served, tmp_path):
    environ = os.environ | {"HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path)}
    words = ["--port", "0", "--devices", "cpu", "--model", "org/tiny", "--revision", "v1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dilaserve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("ready: org/tiny on "), (line, process.stderr.read() if not line else "")
        answer = json.load(ask(re.search(r"on (http://\S+)", line)[1], ignore_eos=True))
        assert (answer["model"], answer["usage"]["completion_tokens"]) == ("org/tiny", 8)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_snapshot_is_whole_with_its_weights_and_either_kind_of_tokenizer(tmp_path):
    model = checkpoints.make(tmp_path / "model")
    assert hub.whole(model)
    (model / "tokenizer.json").rename(model / "vocab.json")
    assert not hub.whole(model)
    (model / "merges.txt").write_text("")
    assert hub.whole(model)
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert not hub.whole(model)
    with pytest.raises(CheckpointError):
        hub.shards(model)
