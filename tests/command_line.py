"""The command line as processes and in this process."""

import json
import os
import subprocess
import urllib.error
import urllib.request

import forked_python


def run(*words, **environ):
    return forked_python.run("-m", "dilaserve", *words, env=os.environ | environ, timeout=300)


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
