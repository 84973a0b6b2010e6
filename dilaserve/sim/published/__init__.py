"""Models with published figures: a folder each, with fields of its config.json and what is known of its decoding."""

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(file.parent.name for file in FOLDER.glob("*/decoding.json")))
