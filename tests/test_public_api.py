"""What a program that imports dilaserve sees, and what a type checker sees of it."""

import inspect
import pydoc
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

import dilaserve
from dilaserve import config, errors
from dilaserve.keywords import Keywords
from dilaserve.types import Usage

ROOT = Path(__file__).parent.parent
ERRORS = {
    *("BadRequest", "ConfigError", "DeadlineMissed", "DilaserveError", "Overloaded", "RequestFailed", "Unavailable"),
}
ENGINE = {
    *("alive", "detokenize", "drain", "ended", "generate", "plan", "quote", "ready", "replan", "stream", "submit"),
    *("tokenize", "wanted_plan"),
}


def test_every_public_name_is_there_and_documented():
    assert {*ERRORS, "Usage", "Plan", "Options", "Engine", "DilaServe", "Config"} <= set(dilaserve.__all__)
    for name in dilaserve.__all__:
        value = getattr(dilaserve, name)
        assert name in dir(dilaserve)
        if inspect.isclass(value):
            assert (value.__doc__ or "").strip(), name
            assert not value.__doc__.startswith(f"{name}("), name
    for name in ERRORS:
        assert issubclass(getattr(dilaserve, name), dilaserve.DilaserveError)
        assert getattr(dilaserve, name) is getattr(errors, name)
        assert f"`{name}" in dilaserve.__doc__
    with pytest.raises(AttributeError, match="'prot'"):
        _ = dilaserve.prot


def test_help_shows_the_public_surface_of_the_engine_and_nothing_else():
    public = {name for name in vars(dilaserve.Engine) if not name.startswith("_")}
    assert public == ENGINE
    shown = pydoc.plain(pydoc.render_doc(dilaserve.Engine))
    for name in public:
        assert name in shown
        assert (getattr(dilaserve.Engine, name).__doc__ or "").strip(), name
    assert " _" not in shown.replace(" __", "")


def test_an_old_name_of_a_cost_is_read_with_a_warning():
    usage = Usage(steps=1, refreshes=1, queued=0.0, served=1.0, mean_confidence=None, expected_accuracy_drop=0.5)
    with pytest.warns(DeprecationWarning, match="read expected_accuracy_drop") as warned:
        assert usage.expected_drop == 0.5
    assert warned[0].filename == __file__


def test_the_keywords_are_the_settings_with_their_types():
    def bare(hint):
        """A type as a keyword has it: without its limits, and with choices spelled out."""
        if hasattr(hint, "__metadata__"):
            return bare(hint.__origin__)
        if get_origin(hint) is None or not get_args(hint) or str(hint).startswith("typing.Literal"):
            return frozenset(get_args(hint) or [hint])
        return frozenset().union(*(bare(part) for part in get_args(hint)))

    known, hints = config.settings(), get_type_hints(Keywords)
    assert list(hints) == list(known)
    for name, setting in known.items():
        assert bare(hints[name]) == bare(setting.type), name


PROGRAM = """
    from dilaserve import BadRequest, Chunk, Completion, Config, DilaServe, Engine, Options, Plan, Usage

    async def serve(config: Config) -> Completion:
        async with Engine(config) as engine:
            async for chunk in engine.stream("hello", Options(max_tokens=8)):
                reveal_type(chunk)
            await engine.submit([1, 2], Options(user="u", deadline_ms=300))
            await engine.submit([{"role": "user", "content": "hi"}])
            await engine.replan(Plan(((0, 1),)))
            return await engine.generate("hello")

    def ask() -> Usage | None:
        with DilaServe(devices="cpu", port=0, accuracy_budget="off") as served:
            reveal_type(served.generate("hello"))
            for chunk in served.stream("hello", Options(stop=("x",))):
                reveal_type(chunk.usage)
            return None

    Config.of(devices="cpu", max_num_seqs=4)
    Config.of(prot=1)
    Config.of(port="eighty")
    DilaServe(prot=1)
    Options(max_tokns=3)
    from dilaserve import Nothing
"""
FOUND = [
    'Revealed type is "dilaserve.engine.stream.Chunk"',
    'Revealed type is "dilaserve.engine.stream.Completion"',
    'Revealed type is "dilaserve.types.requests.Usage | None"',
    'Unexpected keyword argument "prot" for "of" of "Config"',
    'Argument "port" to "of" of "Config" has incompatible type "str"; expected "int"',
    'Unexpected keyword argument "prot" for "DilaServe"',
    'Unexpected keyword argument "max_tokns" for "Options"',
    'Module "dilaserve" has no attribute "Nothing"',
    "Found 5 errors in 1 file",
]


def is_installed_from_here() -> bool:
    """Whether the environment is the one that bin/prepare has made of this checkout."""
    try:
        origin = metadata.distribution("dilaserve").read_text("direct_url.json") or ""
    except metadata.PackageNotFoundError:
        return False
    return f'file://{ROOT}"' in origin


def test_a_type_checker_sees_the_package(tmp_path):
    """With the cache of the check of the package itself, so that it takes seconds."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM).lstrip("\n"))
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    environment = {"PATH": "/usr/bin:/bin"} | ({} if is_installed_from_here() else {"MYPYPATH": str(ROOT)})
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    for text in FOUND:
        assert text in done.stdout, done.stdout + done.stderr
