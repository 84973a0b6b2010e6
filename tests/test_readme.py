"""What the READMEs say and a machine can check."""

import re
from pathlib import Path

import forked_python
import pytest

from dilaserve import cli, config
from dilaserve.server import schema, unsupported

ROOT = Path(__file__).parent.parent
PLACES = ("README.md", "bench/README.md", "tests/README.md", "dilaserve/README.md", "dilaserve/*/README.md")
PAGES = [page for place in PLACES for page in sorted(ROOT.glob(place))]
README = "\n".join(page.read_text() for page in PAGES)
OTHERS = {"--local-dir", "--family", "--size", "--rounds", "--requests", "--quick"}  # of hf, benches and bin/test


def test_the_embedding_example_runs_as_it_stands():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (example,) = [block for block in blocks if "Engine(" in block]
    done = forked_python.run("-c", example)
    assert (done.returncode, done.stderr) == (0, "")
    whole, streamed = done.stdout.splitlines()
    assert re.fullmatch(r"\S+ (stop|length) \d+", whole)
    assert streamed


def test_every_flag_that_is_named_exists():
    flags = {
        flag for command in cli.COMMANDS for action in cli.flags(command)._actions for flag in action.option_strings
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - OTHERS <= flags


def test_every_setting_of_the_server_is_mentioned_on_its_page():
    page = (ROOT / "dilaserve/server/README.md").read_text()
    flags = [setting.flag for setting in config.settings().values() if setting.group == "server"]
    assert [flag for flag in flags if not re.search(rf"{flag}\b(?!-)", page)] == []


def test_every_field_that_is_named_is_known():
    rows = re.findall(r"^\| (?:honoured|our own|refused[^|]*) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 3
    known = {*schema.ChatRequest.__struct_fields__, *schema.CompletionRequest.__struct_fields__}
    refused = {*unsupported.CHAT, *unsupported.COMPLETIONS}
    named = {name for row in rows for name in re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", row))}
    assert named <= known | refused


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
