"""The command line as processes and in this process."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request


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


def ask(address, path="/v1/completions", **more):
    body = json.dumps({"prompt": "hello", "max_tokens": 8, **more}).encode()
    request = urllib.request.Request(address + path, body, {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def no_children(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).returncode == 1
