"""The server as a process: its streams, its signals, and an address that cannot be had."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from command_line import ask, no_children
from forked_python import Python
from worker_waits import workers_of


@pytest.fixture
def served(random_model):
    """A server process, after its ready line; gives the process and its address."""
    process = Python("-m", "dilaserve", "--model", random_model, "--port", "0", "--devices", "cpu")
    line = process.stdout.readline()
    address = re.search(r"on (http://\S+)", line)
    assert address, line + process.stderr.read()
    yield process, address[1], line
    process.kill()
    process.communicate()


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
    loading = Python("-m", "dilaserve", "--model", random_model, "--port", "0")
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
