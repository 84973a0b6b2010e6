"""The command line. Flags are generated from the configuration's leaves; heavy imports wait until they are parsed."""

import argparse
import asyncio
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from dilaserve import __version__, config, setting_names
from dilaserve.command_flags import (
    bench_flags,
    calibration_flags,
    chat_flags,
    completion_flags,
    config_flags,
    listing_flags,
    no_flags,
    pretending_flags,
    ray_flags,
    simulation_flags,
)
from dilaserve.config import Config, Setting
from dilaserve.errors import ConfigError, DilaserveError
from dilaserve.help_text import ShowAll, epilog, is_usual
from dilaserve.server.listening import bound
from dilaserve.setting_types import literals
from dilaserve.system import logs, signals
from dilaserve.system.descriptors import ensure_standard_streams, lead_nowhere

if TYPE_CHECKING:
    from dilaserve.engine.assembly import Assemble

USAGE_ERROR, FAILED, INTERRUPTED = 2, 1, 130
log = logging.getLogger(__name__)
DESCRIPTORS = 65536  # open files, so also connections, that a server asks for
KEYS_SHOWN = (
    "every user of this machine sees the key in the list of processes; "
    "give it as DILASERVE_API_KEY or DILASERVE_ADMIN_KEY, or in the file of --api-key-file"
)


class Parser(argparse.ArgumentParser):
    """Errors are one sentence and exit code 2, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"dilaserve: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    ensure_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and not words[0].startswith("-") else "serve"
    if name not in COMMANDS:
        print(f"dilaserve: unknown command {name!r}; commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE_ERROR
    try:
        settings, extras = parsed(words, name)
        return COMMANDS[name].run(settings, extras)
    except ConfigError as error:
        print(f"dilaserve: {error.message}", file=sys.stderr)
        return USAGE_ERROR
    except DilaserveError as error:
        print(f"dilaserve: {error.message}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 0 if COMMANDS[name].endless else INTERRUPTED


def parsed(words: list[str], command: str) -> tuple[Config, argparse.Namespace]:
    """The configuration from the flags, the environment and the file they name; and the command's own flags."""
    parser = flags(command)
    found, unknown = parser.parse_known_args(words)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        parser.error(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    given = vars(found)
    if not COMMANDS[command].settings:
        return Config(), found
    shown = "api_key" in given or "admin_key" in given
    file = given.pop("config", None)
    own = {name: given.pop(name) for name in list(given) if name not in config.settings()}
    for slip in setting_names.slips(os.environ, config.ENVIRONMENT, config.settings()):
        print(f"dilaserve: {slip}", file=sys.stderr)
    values, sources = config.gathered(given, file=file)
    own["sources"] = dict.fromkeys(given, "flag") | sources
    settings = config.build(values, sources)
    if shown:
        print(f"dilaserve: {KEYS_SHOWN}", file=sys.stderr)
    return settings, argparse.Namespace(**own)


def flags(command: str = "serve", everything: bool = False) -> Parser:
    """The parser of a command; its help has the usual settings, or `everything`."""
    parser = Parser(
        prog="dilaserve",
        usage=f"dilaserve {'[serve]' if command == 'serve' else command} [flags]",
        description=COMMANDS[command].about,
        epilog=epilog(command, {name: one.about for name, one in COMMANDS.items()}, COMMANDS[command].settings),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dilaserve {__version__}")
    if COMMANDS[command].settings:
        parser.add_argument(
            "--help-all", action=ShowAll, whole=lambda: flags(command, True), help="show every setting and exit"
        )
        parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    COMMANDS[command].flags(parser)
    groups: dict[str, Any] = {}
    for setting in config.settings().values() if COMMANDS[command].settings else ():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.heading)
        several = {"action": "extend", "nargs": "+"} if setting.name in config.REPEATABLE else {}
        text = described(setting) if everything or is_usual(setting.name) else argparse.SUPPRESS
        groups[setting.group].add_argument(
            setting.flag, dest=setting.name, metavar=shape(setting), help=text, **several
        )
    return parser


def shape(setting: Setting) -> str:
    """What stands behind the flag in the help: the choices, or the kind of value."""
    choices = literals(setting.type)
    return "{" + ",".join(choices) + "}" if choices else setting.name.split("_")[-1].upper()


def described(setting: Setting) -> str:
    default = "" if setting.default is None else f" (default: {setting.default})"
    return (setting.description + default).replace("%", "%%")


def serve(settings: Config, extras: argparse.Namespace) -> int:
    """Load the model, then listen until it is stopped."""

    def assemble() -> "Assemble":
        from dilaserve.models import hub

        hub.directory_of(settings.model.model, settings.model.revision)  # before any other progress is shown
        from dilaserve.engine.assembly import real
        from dilaserve.system.child_processes import fork_servers

        fork_servers.divide(["dilaserve.worker.main"])
        return real

    return listen(settings, assemble)


def emulate(settings: Config, extras: argparse.Namespace) -> int:
    """Listen like `serve`, with pretended devices that take the time a profile says and write filler."""

    def assemble() -> "Assemble":
        from dilaserve.sim.command import assembly

        return assembly(settings, extras)

    return listen(settings, assemble)


def listen(settings: Config, assemble: "Callable[[], Assemble]") -> int:
    """The server, until it is stopped. `assemble` is called, and imports what takes long, once the addresses are bound,
    so that a port in use is reported at once.
    """
    quiet()
    logs.configure(settings.server.log_level, settings.server.log_format)
    for name in config.linked():
        log.warning("%s=%s is ignored: it is the address of a service and no port", name, os.environ[name][:100])
    allow_connections()
    with bound(settings.server.host, settings.server.port) as sockets:
        made = assemble()
        import uvloop

        from dilaserve.display import loading
        from dilaserve.server import heap
        from dilaserve.server.app import serve as run

        heap.keep_small()  # of this process alone, and not of the workers
        with loading() as progress, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(run(settings, progress, announce, made, sockets))
            signals.leave_soon(code)
            return code


def cluster(settings: Config, extras: argparse.Namespace) -> int:
    """Serve on many nodes with Ray, until it is stopped."""
    quiet()
    try:
        from dilaserve.ray.command import run
    except ImportError as error:
        raise ConfigError(f"`dilaserve ray` needs the extra ray: pip install 'dilaserve[ray]' ({error})") from error
    return run(settings, extras, announce)


def allow_connections() -> None:
    """Each takes a file descriptor, and what a process may have at first is often 1024 or fewer."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        log.warning("more than %d open files are not allowed (%s): connections past that wait", soft, error)


def quiet() -> None:
    """Third parties' advice is not for our users; their errors still are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def announce(address: str, model: str, key: bool, chats: bool) -> None:
    """The ready line, with a command to paste."""
    header = " -H 'authorization: Bearer YOUR-KEY'" if key else ""
    route = "chat/completions" if chats else "completions"
    asked = '"messages": [{"role": "user", "content": "Reverse: lamu"}]' if chats else '"prompt": "Reverse: lamu"'
    first = address.split()[0]
    say(
        f"ready: {model} on {address}   try: curl -N {first}/v1/{route}{header}"
        f" -H 'content-type: application/json' -d '{{{asked}, \"stream\": true}}'"
    )


def say(line: str) -> None:
    """Print a line; a server goes on where nobody reads it, or its file is full."""
    try:
        print(line, flush=True)
    except OSError as error:
        log.warning("standard output cannot be written to: %s", error.strerror)
        lead_nowhere(1)


def calibrate(settings: Config, extras: argparse.Namespace) -> int:
    """Measure the model, write its profile (to --profile, if that is given), draw it."""
    quiet()
    from dilaserve.calibrate.command import calibrate as run

    signals.raise_keyboard_interrupt()
    run(settings, extras)
    return 0


def simulate(settings: Config, extras: argparse.Namespace) -> int:
    """Run made-up traffic through the real engine on a virtual clock."""
    from dilaserve.display import counting
    from dilaserve.sim.command import simulate as run

    signals.raise_keyboard_interrupt()
    with counting() as seen:
        for line in run(settings, extras, seen):
            print(line)
    return 0


def list_models(settings: Config, extras: argparse.Namespace) -> int:
    """Print what can be served, and from where."""
    quiet()
    import msgspec

    from dilaserve.models.catalogue import catalogue, lines

    found = catalogue()
    print(msgspec.json.format(msgspec.json.encode(found)).decode() if extras.json else "\n".join(lines(found)))
    return 0


def show_config(settings: Config, extras: argparse.Namespace) -> int:
    """Print every setting with its value and where that comes from; keys are masked."""
    from dilaserve import config_report

    lines = config_report.as_toml if extras.toml else config_report.as_table
    for line in lines(config_report.entries(settings, extras.sources)):
        say(line)
    return 0


def complete(settings: Config, extras: argparse.Namespace) -> int:
    """Print a completion script."""
    from dilaserve import completion

    say(
        completion.script(
            extras.shell, {name: (one.about, flags(name, everything=True)) for name, one in COMMANDS.items()}
        )
    )
    return 0


def chat(settings: Config, extras: argparse.Namespace) -> int:
    """Talk to a server from the terminal."""
    from dilaserve.client import chat_command

    signals.raise_system_exit()
    chat_command.run(extras)
    return 0


def bench(settings: Config, extras: argparse.Namespace) -> int:
    """Put load on an endpoint and say how it did; also how it did until Ctrl-C."""
    from dilaserve.client.bench_command import bench as run
    from dilaserve.display import counting

    signals.raise_keyboard_interrupt()
    with counting() as seen:
        done = run(extras, seen)
    for line in done.lines:
        say(line)
    return INTERRUPTED if done.interrupted else 0


class Command(NamedTuple):
    run: Callable[[Config, argparse.Namespace], int]
    flags: Callable[[argparse.ArgumentParser], None]
    about: str
    endless: bool = False  # being interrupted is how it ends
    settings: bool = True  # whether it takes the settings


COMMANDS: dict[str, Command] = {
    "serve": Command(serve, no_flags, "Serve a diffusion language model over OpenAI-compatible HTTP.", True),
    "ray": Command(cluster, ray_flags, "Serve on many nodes behind one address, with Ray Serve.", True),
    "simulate": Command(simulate, simulation_flags, "Plan capacity: the same engine on pretended devices."),
    "emulate": Command(
        emulate, pretending_flags, "Serve with pretended devices: the real server, filler for text.", True
    ),
    "calibrate": Command(calibrate, calibration_flags, "Measure step costs and the price of lower thresholds."),
    "models": Command(
        list_models,
        listing_flags,
        "List the models that can be served: bundled, in the hub's cache, on the hub.",
        settings=False,
    ),
    "chat": Command(chat, chat_flags, "Talk to a server from the terminal; answers denoise live.", settings=False),
    "bench": Command(bench, bench_flags, "Put load with deadlines on any OpenAI endpoint.", settings=False),
    "config": Command(show_config, config_flags, "Print every setting, its value and its source."),
    "completion": Command(complete, completion_flags, "Print completions for bash, zsh or fish.", settings=False),
}
