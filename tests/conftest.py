"""What several test files need: checkpoints made once, and engines on them."""

import shutil
from pathlib import Path

import checkpoints
import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """A tiny random checkpoint that never ends by itself."""
    return checkpoints.make(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="session")
def author_model(tmp_path_factory) -> Path:
    """The authors' fixture weights, with a tokenizer that fits their ids."""
    directory = tmp_path_factory.mktemp("models") / "author"
    shutil.copytree(FIXTURES / "llada", directory)
    specials = ("<|endoftext|>", *(f"<|extra{i}|>" for i in range(491, 500)), "<|mdm_mask|>")
    checkpoints.write_tokenizer(directory, first_special=490, specials=specials)
    return directory
