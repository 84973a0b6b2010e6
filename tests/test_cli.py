"""The command line: flags, their sources, and one sentence for each mistake."""

import argparse
import json
import math
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from command_line import ask, failed, run
from forked_python import Python

from dilaserve import config
from dilaserve.errors import ConfigError
from dilaserve.flag_values import folder
from dilaserve.models.checkpoint import locate
from dilaserve.profile import profile_file
from dilaserve.setting_types import takes_numbers

DONE = "all of them"


def test_emulate_serves_filler_on_pretended_devices_and_a_model_without_chats_completes(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((locate("dilaserve-tiny") / "tokenizer.json").read_bytes())
    templates = {"chat_template": [{"name": "tools", "template": "{{ messages }}"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(templates))
    process = Python("-m", "dilaserve", "emulate", "--port", "0", "--sim-devices", "2", "--model", tmp_path)
    try:
        line = process.stdout.readline()
        address = re.search(r"on (http://\S+)", line)[1]
        command = line[line.index("curl") :]
        assert "/v1/completions" in command
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
        assert done.stdout.rstrip().endswith("data: [DONE]"), done
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], prompt=None)
        assert refused.value.code == 400
        assert "templates are tools and none is the default" in refused.value.read().decode()
        answer = json.load(ask(address, slo={"deadline_ms": 60_000}))
        assert answer["choices"][0]["text"] == "aaaaaaaa"
        assert answer["dilaserve"]["deadline_met"] is True
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_help_lists_every_setting(run_main):
    code, out, _ = run_main("--help-all")
    assert code == 0
    assert all(setting.flag in out for setting in config.settings().values())


def test_what_needs_no_tensors_does_not_import_torch():
    """It takes seconds, and these commands are done in tenths of one."""
    code = f"""
import sys
from dilaserve.cli import main
for words in (["--help"], ["models"], ["--prot", "1"], ["--revision", "1"], ["simulate", "--help"]):
    try:
        main(words)
    except SystemExit:
        pass
    assert "torch" not in sys.modules, words
print({DONE!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [DONE], done.stderr


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--prot", "1"], "unknown flag --prot; did you mean --port?"),
        (["--port", "eighty"], "--port 'eighty': Expected `int`"),
        (["--port", "70000"], "--port '70000'"),
        (["--cache", "triple"], "--cache 'triple'"),
        (["--cache", "triple"], "one of none, prefix, dual"),
        (["--accuracy-budget", "some"], "--accuracy-budget 'some': a number from 0 to 100, or off"),
        (["--accuracy-budget", "-1"], "--accuracy-budget '-1': a number from 0 to 100, or off"),
        (["--accuracy-budget", "nan"], "--accuracy-budget 'nan': a number from 0 to 100, or off"),
        (["--host", ""], "--host ''"),
        (["--api-key", ""], "--api-key ''"),
        (["--profile", ""], "--profile ''"),
        (["--max-num-seqs", "0"], "--max-num-seqs '0'"),
        (["--max-queue", "9" * 30], "--max-queue"),
        (["--cpu-threads", "100000"], "--cpu-threads"),
        (["--grace-period", "nan"], "--grace-period 'nan'"),
        (["--model", "a" * 300], f"model directory {Path.cwd()}/aaa"),
        (["--profile", "a" * 300], "the profile aaa"),
        (["calibrate", "--profile", "a" * 300], "the profile cannot be written to aaa"),
        (["dance"], "unknown command 'dance'"),
        (["--config", "/nowhere.toml"], "cannot read the configuration file /nowhere.toml"),
    ],
)
def test_a_wrong_argument_gives_one_sentence_and_exit_code_2(words, pattern, run_main):
    assert pattern in failed(*run_main(*words))


def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path):
    profile_file.check_writable(tmp_path / "profile.json")
    assert not list(tmp_path.iterdir())
    for place in (tmp_path, tmp_path / "nowhere" / "profile.json", Path("/proc/profile.json")):
        with pytest.raises(ConfigError, match=f"cannot be written to {place}: "):
            profile_file.check_writable(place)
    assert folder(str(tmp_path / "new" / "one")).is_dir()
    with pytest.raises(argparse.ArgumentTypeError, match="cannot write to /proc: "):
        folder("/proc")


def test_without_a_writable_home_the_profile_is_stored_beside_the_model(tmp_path, monkeypatch):
    model = locate("dilaserve-tiny")
    assert profile_file.find(model, None) is not None
    monkeypatch.setenv("XDG_CACHE_HOME", "a" * 300)  # an error at every look, as where it may not be looked at
    assert profile_file.find(model, None) is not None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert profile_file.find(model, None) is not None
    (tmp_path / "model").mkdir()
    written = profile_file.write(profile_file.find(model, None), tmp_path / "model")
    assert profile_file.find(tmp_path / "model", None) is not None
    assert written.parent == tmp_path / "model"


@pytest.mark.parametrize("wrong", ["inf", "nan", "-inf", "1e300", math.inf, math.nan, -math.inf])
def test_no_setting_accepts_infinity_or_nan(wrong):
    numbers = [setting for setting in config.settings().values() if takes_numbers(setting.type)]
    assert {"step_timeout", "grace_period", "accuracy_budget"} < {setting.name for setting in numbers}
    for setting in numbers:
        with pytest.raises(ConfigError, match=f"^{setting.flag} "):
            config.build({setting.name: wrong})


def test_flags_go_before_the_environment_before_the_file(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("port = 1\nhost = 'file'\ncache = 'none'\n")
    found = config.load({"port": "3"}, {"DILASERVE_PORT": "2", "DILASERVE_HOST": "environment"}, file)
    assert (found.server.port, found.server.host, found.decode.cache) == (3, "environment", "none")
    with pytest.raises(ConfigError, match=r"--port 'many' \(in the environment, as DILASERVE_PORT\)"):
        config.load({}, {"DILASERVE_PORT": "many"})
    file.write_text("host = ['127.0.0.1', '::1']")
    assert config.load({}, {}, file).server.host == "127.0.0.1,::1"
    with pytest.raises(ConfigError, match=r"--port 'eighty': "):
        config.load({"port": "eighty"}, {"DILASERVE_PORT": "80"})
    with pytest.raises(ConfigError, match="unknown setting 'prot'"):
        config.load({"prot": 1}, {})
    file.write_text("port = = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load({}, {}, file)


def test_variables_of_a_kubernetes_service_named_dilaserve_are_ignored():
    injected = {
        "DILASERVE_PORT": "tcp://10.0.0.7:8000",
        "DILASERVE_SERVICE_HOST": "10.0.0.7",
        "DILASERVE_SERVICE_PORT": "8000",
        "DILASERVE_SERVICE_PORT_HTTP": "8000",
        "DILASERVE_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "DILASERVE_PORT_8000_TCP_ADDR": "10.0.0.7",
    }
    assert config.load({}, injected) == config.load({}, {})
    assert config.linked(injected) == ["DILASERVE_PORT"]
    assert config.load({}, injected | {"DILASERVE_PORT": "80"}).server.port == 80
    assert config.linked({"DILASERVE_PORT": "80"}) == []


def test_a_model_that_is_not_there_and_an_address_that_cannot_be_had(random_model, run_main):
    done = run("--model", "/nowhere")
    assert "there is no model directory /nowhere" in failed(done.returncode, done.stdout, done.stderr)
    flags = ("--model", str(random_model), "--devices", "cpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = failed(*run_main(*flags, "--port", port))
        assert told.startswith(f"dilaserve: cannot listen on 127.0.0.1:{port}")
        assert told.rstrip().endswith("; choose another --port")
    told = failed(*run_main(*flags, "--host", "999.1.1.1"))
    assert told.startswith("dilaserve: cannot listen on 999.1.1.1:")
    assert told.rstrip().endswith("; is --host an address of this machine?")


def test_a_bench_that_is_terminated_leaves_no_checkpoint_behind():
    paths = [str(Path(__file__).parent.parent / "bench"), str(Path(__file__).parent.parent)]
    code = f"""
import sys, time
sys.path[:0] = {paths}
import gpu
with gpu.room(None, 1.0) as place:
    print(place, flush=True)
    time.sleep(60)
"""
    with Python("-c", code) as one:
        place = Path(one.stdout.readline().strip())
        assert place.is_dir()
        one.send_signal(signal.SIGTERM)
        assert one.wait(60) == 128 + signal.SIGTERM
    assert not place.exists()
