"""Python programs as processes of their own, forked from one that has imported what they take seconds to import.

Such a process has its own streams, signals, environment and exit code like one of `subprocess`; only what an import
does cannot be tested with it.
"""

import atexit
import functools
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from types import ModuleType

from dilaserve.system import child_processes, fork_server

IMPORTED = (
    *("dilaserve.cli", "dilaserve.server.app", "dilaserve.engine.assembly", "dilaserve.worker.main", "uvloop"),
    *("dilaserve.calibrate.calibrate", "dilaserve.planner.process", "dilaserve.display", "tokenizers", "transformers"),
)


@functools.cache
def server():
    return child_processes.ForkServers().current([__name__, *IMPORTED])


def live(words, streams, directory):
    """What the fork does: as `python *words` would."""
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(directory)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    code = 0
    try:
        execute(words)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except BaseException:
        code = 1
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.exit(code)


def execute(words):
    if words[:2] == ("-m", "dilaserve"):
        sys.argv = list(words[1:])
        runpy.run_module("dilaserve", run_name="__main__", alter_sys=True)
        return
    child_processes.fork_servers.divide(["dilaserve.worker.main"])  # an engine in a program starts one that imports
    if words[0] != "-c":
        sys.argv, sys.path[0] = list(words), os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")
        return
    sys.argv, main = ["-c", *words[2:]], ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(words[1], "<string>", "exec"), vars(main))


class Python:
    """`python *words`, with pipes as its standard streams; the methods are those of `subprocess.Popen`."""

    def __init__(self, *words, env=None, cwd=None):
        pipes = [os.pipe() for _ in range(3)]
        (theirs_in, ours_in), (ours_out, theirs_out), (ours_err, theirs_err) = pipes
        self.stdin, self.stdout, self.stderr = os.fdopen(ours_in, "w"), os.fdopen(ours_out), os.fdopen(ours_err)
        streams = theirs_in, theirs_out, theirs_err
        environment = dict(os.environ if env is None else env)
        arguments = tuple(map(str, words)), streams, str(cwd or os.getcwd())
        how = "python", live, arguments, streams, environment, child_processes.absolute_path()
        self.child = fork_server.ask(server().control, *how)
        self.args = ["python", *words]
        for fd in streams:
            os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stdin.close()
        self.wait()
        self.stdout.close()
        self.stderr.close()

    @property
    def pid(self):
        return self.child.pid

    @property
    def returncode(self):
        return self.child.returncode

    def poll(self):
        return self.child.poll()

    def wait(self, timeout=None):
        return self.child.wait(timeout)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.child.kill()

    def communicate(self, timeout=None):
        """What it has written to both streams, once it has ended."""
        written = {}
        readers = [
            threading.Thread(target=lambda name=name: written.update({name: getattr(self, name).read()}))
            for name in ("stdout", "stderr")
        ]
        self.stdin.close()
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for reader in readers:
                reader.join()
        return written["stdout"], written["stderr"]


def run(*words, env=None, cwd=None, timeout=120):
    """Run `python *words` to its end."""
    with Python(*words, env=env, cwd=cwd) as process:
        out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
