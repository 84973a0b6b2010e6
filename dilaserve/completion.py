"""Shell completion of every command and flag, by shtab."""

import argparse
from collections.abc import Mapping

from dilaserve.errors import ConfigError


def script(shell: str, commands: Mapping[str, tuple[str, argparse.ArgumentParser]]) -> str:
    """The completion script of `shell`, one of shtab's. `commands` has a line and a parser for each.

    Raises `ConfigError` where shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ConfigError("completions need shtab: pip install 'dilaserve[completion]'") from error
    whole = argparse.ArgumentParser(prog="dilaserve")
    below = whole.add_subparsers()
    for name, (about, parser) in commands.items():
        below.add_parser(name, help=about, parents=[parser], add_help=False, conflict_handler="resolve")
    return str(shtab.complete(whole, shell=shell))
