"""The command line. Flags are generated from the configuration's leaves; heavy imports wait until they are parsed."""

import argparse
import asyncio
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from dilaserve import __version__, config
from dilaserve.config import Config, Setting
from dilaserve.errors import ConfigError

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """Errors are one sentence and exit code 2, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"dilaserve: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and not words[0].startswith("-") else "serve"
    if name not in COMMANDS:
        print(f"dilaserve: unknown command {name!r}; commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE_ERROR
    try:
        return COMMANDS[name](parsed(words))
    except ConfigError as error:
        print(f"dilaserve: {error.message}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 0


def parsed(words: list[str]) -> Config:
    """The configuration from the flags, the environment and the file they name."""
    parser = flags()
    found, unknown = parser.parse_known_args(words)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        parser.error(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    given = vars(found)
    file = given.pop("config", None)
    return config.load(given, file=file)


def flags() -> Parser:
    parser = Parser(
        prog="dilaserve",
        usage="dilaserve [serve] [flags]",
        description="Serve a diffusion language model over OpenAI-compatible HTTP.",
        epilog="Every flag can also be set as DILASERVE_NAME in the environment, or in the file of --config.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dilaserve {__version__}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    groups: dict[str, Any] = {}
    for setting in config.settings().values():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.heading)
        groups[setting.group].add_argument(
            setting.flag, dest=setting.name, metavar=shape(setting), help=described(setting)
        )
    return parser


def shape(setting: Setting) -> str:
    """What stands behind the flag in the help: the choices, or the kind of value."""
    choices = literals(setting.type)
    return "{" + ",".join(choices) + "}" if choices else setting.name.split("_")[-1].upper()


def literals(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [choice for part in get_args(hint) for choice in literals(part)]


def described(setting: Setting) -> str:
    default = "" if setting.default is None else f" (default: {setting.default})"
    return (setting.description + default).replace("%", "%%")


def serve(settings: Config) -> int:
    """Load the model, then listen until told to stop."""
    quiet()
    logging.basicConfig(
        level=settings.server.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    import uvloop

    from dilaserve.display import loading
    from dilaserve.server.app import serve as listen

    with loading() as progress, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(listen(settings, progress, announce))


def quiet() -> None:
    """Third parties' advice is not for our users; their errors still are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def announce(address: str, model: str, key: bool) -> None:
    """The ready line, with a command to paste."""
    header = " -H 'authorization: Bearer YOUR-KEY'" if key else ""
    body = '{"messages": [{"role": "user", "content": "Reverse: lamu"}], "stream": true}'
    print(
        f"ready: {model} on {address}   try: curl -N {address}/v1/chat/completions{header}"
        f" -H 'content-type: application/json' -d '{body}'",
        flush=True,
    )


COMMANDS: dict[str, Callable[[Config], int]] = {"serve": serve}
