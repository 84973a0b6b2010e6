"""The command line, as processes: what a user types, and what comes back."""

import argparse
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dilaserve import config
from dilaserve.calibrate.answers import questions_from
from dilaserve.cli import folder, main
from dilaserve.errors import ConfigError
from dilaserve.models.checkpoint import locate
from dilaserve.profile import profile_file


def run(*words, **environ):
    return subprocess.run(
        [sys.executable, "-m", "dilaserve", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environ,
    )


def failed(code, out, err):
    """Exit code 2 and one sentence, no traceback; gives the sentence."""
    assert (code, out) == (2, "")
    assert err.startswith("dilaserve: ")
    assert len(err.splitlines()) == 1, err
    return err


@pytest.fixture
def here(capsys):
    """Runs a command in this process, which saves its imports; gives its exit code and what it wrote."""

    def run_here(*words):
        try:
            code = main(words)
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run_here


@pytest.fixture
def served(random_model):
    """A server process, after its ready line; gives the process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dilaserve", "--model", str(random_model), "--port", "0", "--devices", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    address = re.search(r"on (http://\S+)", line)
    assert address, line + process.stderr.read()
    yield process, address[1], line
    process.kill()
    process.communicate()


def ask(address, path="/v1/completions", **more):
    body = json.dumps({"prompt": "hello", "max_tokens": 8, **more}).encode()
    request = urllib.request.Request(address + path, body, {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def test_emulate_serves_filler_on_pretended_devices_and_a_model_without_chats_completes(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((locate("dilaserve-tiny") / "tokenizer.json").read_bytes())
    templates = {"chat_template": [{"name": "tools", "template": "{{ messages }}"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(templates))
    process = subprocess.Popen(
        [sys.executable, "-m", "dilaserve", "emulate", "--port", "0", "--sim-devices", "2", "--model", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
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


def no_children(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).returncode == 1


def test_help_lists_every_setting_without_loading_anything_heavy():
    code = "import sys; from dilaserve.cli import flags; print(flags().format_help(), 'torch' in sys.modules)"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert all(setting.flag in text for setting in config.settings().values())
    assert text.rstrip().endswith("False")


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
def test_a_wrong_word_is_one_sentence_and_exit_code_2(words, pattern, here):
    assert pattern in failed(*here(*words))


def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path):
    profile_file.check_writable(tmp_path / "profile.json")
    assert not list(tmp_path.iterdir())
    for place in (tmp_path, tmp_path / "nowhere" / "profile.json", Path("/proc/profile.json")):
        with pytest.raises(ConfigError, match=f"cannot be written to {place}: "):
            profile_file.check_writable(place)
    assert folder(str(tmp_path / "new" / "one")).is_dir()
    with pytest.raises(argparse.ArgumentTypeError, match="cannot write to /proc: "):
        folder("/proc")


def test_a_home_that_is_not_there_or_not_ours_leaves_the_profile_beside_the_model(tmp_path, monkeypatch):
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
def test_no_setting_takes_what_is_endless_or_no_number(wrong):
    numbers = [setting for setting in config.settings().values() if config.takes_numbers(setting.type)]
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
    file.write_text("[server]\nport = 1")
    with pytest.raises(ConfigError, match=rf"unknown setting 'server' \(in {file}\)"):
        config.load({}, {}, file)
    file.write_text("port = = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load({}, {}, file)


def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting():
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


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_standard_streams_that_are_closed_or_full_do_not_matter(closed, tmp_path):
    """Each number below 3 is taken, so that nothing else gets it, and what is printed goes nowhere."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, logging\n"
        "from dilaserve import cli\n"
        "from dilaserve.system.descriptors import ensure_standard_streams\n"
        "from dilaserve.display import counting, loading\n"
        "ensure_standard_streams()\n"
        "logging.basicConfig(stream=sys.stderr)\n"
        "cli.announce('http://127.0.0.1:1', 'model', False, True)\n"
        "cli.announce('http://127.0.0.1:1', 'model', False, True)\n"
        "with loading() as show: show('cpu', 0, 1)\n"
        "with counting() as show: show('cpu', 0, 1)\n"
        "free = os.open('/dev/null', os.O_RDONLY)\n"
        f"open({str(tmp_path / 'found')!r}, 'w').write(str(free))\n"
    )
    done = subprocess.run(f"{sys.executable} {script} {closed}", shell=True, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "found").read_text()) > 2


def test_a_server_without_standard_streams_serves(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f"exec {sys.executable} -m dilaserve emulate --port {port} --sim-devices 1 <&- >&- 2>&-"
    with subprocess.Popen(command, shell=True, env=os.environ | {"DILASERVE_PORT": "tcp://10.0.0.7:8000"}) as process:
        try:
            until = time.monotonic() + 100
            while process.poll() is None and time.monotonic() < until:
                try:
                    assert ask(f"http://127.0.0.1:{port}").status == 200
                    break
                except OSError:
                    time.sleep(0.1)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_model_that_is_not_there_and_an_address_that_cannot_be_had(random_model, here):
    done = run("--model", "/nowhere")
    assert "there is no model directory /nowhere" in failed(done.returncode, done.stdout, done.stderr)
    flags = ("--model", str(random_model), "--devices", "cpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = failed(*here(*flags, "--port", port))
        assert told.startswith(f"dilaserve: cannot listen on 127.0.0.1:{port}")
        assert told.rstrip().endswith("; choose another --port")
    told = failed(*here(*flags, "--host", "999.1.1.1"))
    assert told.startswith("dilaserve: cannot listen on 999.1.1.1:")
    assert told.rstrip().endswith("; is --host an address of this machine?")


def test_an_address_that_cannot_be_had_is_told_before_anything_heavy_is_imported():
    code = (
        "import sys; from dilaserve.cli import main; "
        "print(main(['--host', '999.1.1.1']), sys.modules.keys() & {'torch', 'numpy', 'transformers'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2 set()\n", done.stderr


def test_a_server_may_have_as_many_connections_as_the_system_allows():
    script = """
import resource
from dilaserve import cli
for hard, soft in ((90, 64), (90, 90)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    cli.allow_connections()
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines(), done.stderr) == (["(90, 90)", "(90, 90)"], "")


def test_the_ready_line_has_a_curl_that_works_and_sigterm_finishes_what_runs(served):
    process, address, line = served
    command = line[line.index("curl") :]
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("data: [DONE]"), done
    with ask(address, max_tokens=200, block_length=4, stream=True) as response:
        response.readline()
        process.send_signal(signal.SIGTERM)
        rest = response.read().decode()
    assert '"finish_reason":"length"' in rest
    assert rest.rstrip().endswith("data: [DONE]")
    assert process.wait(30) == 0
    assert "Traceback" not in process.stderr.read()
    assert no_children(process.pid)


def test_ctrl_c_ends_a_serving_and_a_loading_server_quietly(served, random_model):
    process, address, _ = served
    with ask(address) as response:
        assert response.status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert "Traceback" not in process.stderr.read()
    loading = subprocess.Popen(
        [sys.executable, "-m", "dilaserve", "--model", str(random_model), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while no_children(loading.pid):  # until a worker loads
        time.sleep(0.01)
    loading.send_signal(signal.SIGINT)
    assert loading.wait(60) == 0
    assert "Traceback" not in loading.stderr.read()


SIGNALLED = """
import os, signal, sys
from dilaserve import __main__

_, module, number, *words = sys.argv

class Signalling:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.Signals[number])

sys.meta_path.insert(0, Signalling())
sys.argv = ["dilaserve", *words]
__main__.run()
"""


@pytest.mark.parametrize("module", ["dilaserve.cli", "msgspec", "torch", "uvloop", "transformers"])
def test_a_signal_during_any_import_ends_the_start_quietly(random_model, module):
    for number, words, code in (
        ("SIGTERM", ["--model", str(random_model), "--port", "0", "--devices", "cpu"], 0),
        ("SIGINT", ["calibrate", "--model", str(random_model), "--devices", "cpu"], 130),
    ):
        if words[0] == "calibrate" and module in ("uvloop", "transformers"):
            continue  # which it does not import, or behind the point where it tidies up
        line = [sys.executable, "-c", SIGNALLED, module, number, *words]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def workers_of(pid):
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "dilaserve worker"], capture_output=True, text=True)
    return list(map(int, found.stdout.split()))


def gone(pid):
    """Ended, whether or not somebody has asked how."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] == "Z"
    except FileNotFoundError:
        return True


def test_a_second_ctrl_c_ends_the_workers_too_whatever_they_do(served):
    process, address, _ = served
    workers = workers_of(process.pid)
    assert workers
    with ask(address, max_tokens=200, block_length=4, stream=True):
        try:
            for worker in workers:
                os.kill(worker, signal.SIGSTOP)
            process.send_signal(signal.SIGINT)
            while "stopping: " not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 1
            until = time.monotonic() + 30
            while not all(map(gone, workers)) and time.monotonic() < until:
                time.sleep(0.01)
            assert all(map(gone, workers))
        finally:
            for worker in workers:
                if not gone(worker):
                    os.kill(worker, signal.SIGKILL)


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


def test_calibrate_refuses_problems_that_cannot_be_asked_or_read(model, tmp_path, here):
    problems = tmp_path / "problems.jsonl"
    flags = ("calibrate", *calibrating(model), "--problems")
    problems.write_text('{"prompt": "%s"}\n' % ("long " * 500))
    assert "cannot be asked" in failed(*here(*flags, str(problems)))
    for broken in (b'{"prompt": 5}', b"{", b'{"prompt": "\xff"}'):
        problems.write_bytes(broken)
        with pytest.raises(ConfigError, match="is not JSON lines"):
            questions_from(problems, 1)
    assert "holds no problems" in failed(*here(*flags, "/dev/null"))


def test_a_damaged_profile_stops_the_server_and_is_replaced_by_calibrate(model, tmp_path, here):
    (model / profile_file.FILE).write_text("[]")
    flags = calibrating(model)
    assert "damaged" in failed(*here(*flags, "--port", "0"))
    assert "cannot be written" in failed(*here("calibrate", *flags, "--profile", str(tmp_path)))
    elsewhere, problems = tmp_path / "elsewhere.json", tmp_path / "problems.jsonl"
    elsewhere.write_text("[]")
    problems.write_text('{"prompt": "hello"}\n')
    code, _, told = here("calibrate", *flags, "--problems", str(problems), "--profile", str(elsewhere))
    assert (code, "the old profile is replaced" in told) == (0, True), told
    assert profile_file.read(elsewhere).costs.keys() == {"cpu x1"}
    assert (model / profile_file.FILE).read_text() == "[]"


def test_a_bench_that_is_terminated_leaves_no_checkpoint_behind():
    code = "import gpu, time\nwith gpu.room(None, 1.0) as place: print(place, flush=True); time.sleep(60)"
    bench = Path(__file__).parent.parent / "bench"
    path = {"PYTHONPATH": os.pathsep.join(map(str, (bench, bench.parent)))}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | path
    ) as one:
        place = Path(one.stdout.readline().strip())
        assert place.is_dir()
        one.send_signal(signal.SIGTERM)
        assert one.wait(60) == 128 + signal.SIGTERM
    assert not place.exists()
