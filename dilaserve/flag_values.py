"""What flags take that are no settings: numbers, folders. Errors are argparse's."""

import argparse
import math
import tempfile
from pathlib import Path

MOST = 1_000_000  # of whatever a flag counts
MOST_DEVICES = 4096  # that a plan is made for
MOST_NODES = 1024  # behind one router
LONGEST_DELAY = 10_000.0  # milliseconds to a node


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= (number := int(text)) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MOST}")
    return number


def tokens(text: str) -> int:
    return 0 if text == "0" else positive(text)


def devices(text: str) -> int:
    if (number := positive(text)) > MOST_DEVICES:
        raise argparse.ArgumentTypeError(f"{number} devices are too many to plan for; at most {MOST_DEVICES}")
    return number


def device_counts(text: str) -> tuple[int, ...]:
    return tuple(devices(part) for part in text.split(","))


def nodes(text: str) -> int:
    if not text.isdecimal() or not 1 <= (number := int(text)) <= MOST_NODES:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MOST_NODES}")
    return number


def delay(text: str) -> float:
    """Milliseconds."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number <= LONGEST_DELAY:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of milliseconds from 0 to {LONGEST_DELAY:g}")
    return number


def amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def folder(text: str) -> Path:
    """A directory to write to, made if it is missing: before hours of work, not after."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=text):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {error.strerror}") from error
    return Path(text)
