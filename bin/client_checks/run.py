"""Runs each check against a server, and prints a table: the client, its version, whether it works, else why not.

A check is a script of its own that is given OPENAI_BASE_URL, ANTHROPIC_BASE_URL and a key, asks the bundled model for
the reverse of a word, whole and as a stream where the client has both, and prints what it got. Those whose client makes
up its prompts look at its report instead and print `answered`. The exit code is 0 if all work that are expected to.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODEL, ANSWER = "dilaserve-tiny", "umal"
TOKENIZER = ROOT / "dilaserve" / "bundled" / MODEL
TIMEOUT = 300  # seconds of one client
CANNOT = {  # clients that are known not to work, with the reason
    "instructor": "needs JSON mode or tools, which are refused",
}
PACKAGES = {"agents": "openai-agents", "langchain": "langchain-openai", "llama_index": "llama-index-llms-openai-like"}
PACKAGES |= {"pydantic_ai": "pydantic-ai-slim", "openai_responses": "openai"}
PACKAGES |= {"litellm_proxy": "litellm", "lm_eval": "lm-eval", "inference_perf": "inference-perf"}
MODULES = {"promptfoo": "promptfoo", "openai_js": "openai", "ai_sdk": "ai", "ai_sdk_responses": "ai"}  # of npm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, help="the Python that has the server")
    parser.add_argument("words", nargs="*", metavar="URL NAME", help="a server, and the clients to try")
    given = parser.parse_args()
    urls = [word for word in given.words if word.startswith("http")]
    names = [word for word in given.words if not word.startswith("http")]
    with contextlib.nullcontext(urls[0].rstrip("/")) if urls else started(given.server) as url:
        rows = [(name, *tried(name, url)) for name in names or all_names()]
    print("\n| client | version | works |\n|---|---|---|")
    for name, version, reason in rows:
        print(f"| {name} | {version} | {reason or 'yes'} |")
    return any(reason and name not in CANNOT for name, _, reason in rows)


def all_names() -> list[str]:
    scripts = [file for file in HERE.iterdir() if file.suffix in (".py", ".mjs") and file.name != "run.py"]
    return sorted(file.stem for file in scripts)


@contextlib.contextmanager
def started(python: str) -> Iterator[str]:
    """A server with the bundled model, until the block is left."""
    words = [python, "-m", "dilaserve", "--port", "0", "--log-level", "warning"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            line = server.stdout.readline()
            found = re.search(r"http://\S+", line)
            if not found:
                sys.exit(f"the server did not start: {line}")
            yield found[0]
        finally:
            server.terminate()


def tried(name: str, url: str) -> tuple[str, str]:
    """The client's version, and why it does not work; empty if it does."""
    file = next(HERE.glob(f"{name}.*"))
    command = [str(python_of(name)) if file.suffix == ".py" else node_of(name), str(file)]
    if not command[0]:
        return "", "node is not installed"
    keys = {"OPENAI_API_KEY": "none", "ANTHROPIC_API_KEY": "none", "MODEL": MODEL}
    addresses = {"OPENAI_BASE_URL": f"{url}/v1", "ANTHROPIC_BASE_URL": url}
    places = {"TOKENIZER": str(TOKENIZER), "NODE_PATH": str(home_of(name) / "node_modules")}
    environment = {**os.environ, **keys, **addresses, **places}
    if file.suffix == ".mjs":  # modules are looked for beside the script
        file = Path(shutil.copy(file, home_of(name)))
        command[1] = str(file)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return version_of(name), f"no answer within {TIMEOUT} s"
    print(f"{name}: {' '.join(done.stdout.split())}", flush=True)
    said = done.stdout.split()
    if done.returncode == 0 and set(said) in ({ANSWER}, {"answered"}):
        return version_of(name), ""
    last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1][:160]
    return version_of(name), CANNOT.get(name, f"no: {last}")


def home_of(name: str) -> Path:
    """The environment of this client: its own, or the one that most share."""
    own = Path(sys.prefix) / name
    return own if own.exists() else Path(sys.prefix)


def python_of(name: str) -> Path:
    return home_of(name) / "bin" / "python"


def node_of(name: str) -> str:
    """The Node that npm has installed beside the client, or else the system's; empty if there is none."""
    own = home_of(name) / "node_modules" / ".bin" / "node"
    return str(own) if own.exists() else shutil.which("node") or ""


def version_of(name: str) -> str:
    if name in MODULES:
        file = home_of(name) / "node_modules" / MODULES[name] / "package.json"
        return f"{json.loads(file.read_text())['version']} (npm)" if file.exists() else ""
    folders = [str(folder) for folder in home_of(name).glob("lib/python*/site-packages")]
    wanted = PACKAGES.get(name, name.split("_")[0])
    return next((one.version for one in importlib.metadata.distributions(name=wanted, path=folders)), "")


if __name__ == "__main__":
    sys.exit(main())
