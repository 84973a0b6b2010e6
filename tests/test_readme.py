"""What the READMEs say that a machine can check."""

import re
import subprocess
import sys
from pathlib import Path

from dilaserve import cli
from dilaserve.server import schema, unsupported

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "",
    "dilaserve",
    *(f"dilaserve/{name}" for name in ("server", "scheduler", "planner", "profile", "sim")),
    "bench",
    "tests",
)
PAGES = {folder: (ROOT / folder / "README.md").read_text() for folder in FOLDERS}
README = "\n".join(PAGES.values())


def test_the_embedding_example_runs_as_it_stands():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (example,) = [block for block in blocks if "Engine(" in block]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    whole, streamed = done.stdout.splitlines()
    assert re.fullmatch(r"\S+ (stop|length) \d+", whole)
    assert streamed


def test_every_flag_that_is_named_exists():
    flags = {
        flag for command in cli.COMMANDS for action in cli.flags(command)._actions for flag in action.option_strings
    }
    of_others = {"--local-dir"}  # hf download
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= flags | of_others


def test_every_field_that_is_named_is_known():
    rows = re.findall(r"^\| (?:honoured|our own|refused[^|]*) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 3
    known = {*schema.ChatRequest.__struct_fields__, *schema.CompletionRequest.__struct_fields__}
    refused = {*unsupported.CHAT, *unsupported.COMPLETIONS}
    named = {name for row in rows for name in re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", row))}
    assert named <= known | refused


def test_every_link_leads_to_a_file_and_a_heading():
    for folder, page in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", page):
            path, _, heading = link.partition("#")
            file = ROOT / folder / path
            assert file.exists(), (folder, link)
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if heading else []
            assert not heading or heading in {one.lower().replace(" ", "-") for one in headings}, (folder, link)


def test_the_front_page_is_short():
    assert len(PAGES[""].splitlines()) <= 150
