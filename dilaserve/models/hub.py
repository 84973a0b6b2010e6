"""Models by their name on Hugging Face's hub: found in its cache, or downloaded. Imports its library when it is needed.

The library reads HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dilaserve.errors import CheckpointError, ConfigError
from dilaserve.models.checkpoint import GENERATION, INDEX, SINGLE, locate, shards

log = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # org/name
TIMEOUT = 10.0  # seconds that the hub may be silent
PATTERNS = [  # what is served from; of weights in other formats nothing is downloaded
    "config.json",
    GENERATION,
    "model*.safetensors",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
FOLDERS = ["*/*"]  # adapters and the like, of which nothing is downloaded either
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
MOST_REASON = 200  # characters of what the library says


def directory_of(model: str, revision: str | None = None) -> Path:
    """The directory of a model: a bundled one, a local one, or a snapshot in the hub's cache, downloaded if need be.

    `model` may be `org/name` or `org/name@revision`. A local directory of that name wins, and a snapshot that is whole
    in the cache is used without asking the hub whether there is a newer one. Blocks; a download takes its time.
    Raises `CheckpointError`, and `ConfigError` for a revision that goes with no model of the hub.
    """
    local = locate(model)
    name, _, wanted = model.partition("@")
    if is_there(local) or not NAME.fullmatch(name):
        if revision:
            raise ConfigError(
                f"--revision {revision} goes with the name of a model on the hub, and {model} is none", param="revision"
            )
        return local
    if revision and wanted and revision != wanted:
        raise ConfigError(f"--model {model} and --revision {revision} differ; give one of them", param="revision")
    return snapshot(name, wanted or revision)


def is_there(directory: Path) -> bool:
    try:
        return directory.exists()
    except OSError:  # the checkpoint says what is wrong with it
        return True


def snapshot(name: str, revision: str | None) -> Path:
    """The snapshot of a model in the hub's cache, downloaded if it is not whole there; a bar on the terminal shows how
    far. Raises `CheckpointError`.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    if found := cached(name, revision):
        return found
    try:
        with bounded():
            HfApi().model_info(name, revision=revision, timeout=TIMEOUT)  # raises at once, where a download tries again
            log.info("downloading %s from %s", name, constants.ENDPOINT)
            return Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=PATTERNS, ignore_patterns=FOLDERS, tqdm_class=bar()
                )
            )
    except Exception as error:  # of the HTTP library, the hub's or the file system
        raise CheckpointError(f"there is no model directory {name}, and {reason(error, name, revision)}") from error


def bar() -> Any:
    """The class of the library's progress bars, on standard error, and nothing where nobody watches."""
    from huggingface_hub.utils.tqdm import tqdm

    shown: Any = tqdm

    class Silent(shown):  # type: ignore[misc]
        def __init__(self, *words: Any, **more: Any) -> None:
            super().__init__(*words, **more | {"disable": True})

    return shown if sys.stderr.isatty() else Silent


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No request of the library waits for ever: those without a limit, as for the list of files, get `TIMEOUT`."""
    from huggingface_hub import get_session

    def limit(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {kind: seconds or TIMEOUT for kind, seconds in limits.items()}

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks["request"], limit]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def cached(name: str, revision: str | None) -> Path | None:
    """The snapshot in the hub's cache, if all is there that is served from."""
    from huggingface_hub import snapshot_download

    try:
        found = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=PATTERNS, ignore_patterns=FOLDERS, local_files_only=True
            )
        )
    except (OSError, ValueError):  # not there or not whole; or no such name can be
        return None
    return found if whole(found) else None


def cache() -> Path:
    """The directory of the hub's cache, which need not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshots(cache: Path) -> list[tuple[str, Path]]:
    """The snapshots of models in the cache, each under the name that --model takes."""
    return [
        (name if revision == "main" else f"{name}@{revision}", snapshot)
        for snapshot in sorted(cache.glob("models--*/snapshots/*"))
        if (name := repository(snapshot))
        for revision in revisions(snapshot)
    ]


def revisions(snapshot: Path) -> list[str]:
    """The branches and tags that a snapshot is of, `main` alone if it is one of them; its commit if there are none."""
    refs = snapshot.parent.parent / "refs"
    found = [
        str(file.relative_to(refs))
        for file in sorted(refs.rglob("*"))
        if file.is_file() and file.read_text(errors="replace").strip() == snapshot.name
    ]
    return ["main"] if "main" in found else found or [snapshot.name]


def repository(directory: Path) -> str | None:
    """`org/name` of a snapshot in a cache of the hub; None for other directories."""
    folder = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    return folder.removeprefix("models--").replace("--", "/")


def whole(snapshot: Path) -> bool:
    """Whether a snapshot holds a configuration, a tokenizer and all its weights: a download may have been cut short."""
    try:
        weights = [snapshot / SINGLE] if (snapshot / SINGLE).exists() else list(shards(snapshot).values())
    except CheckpointError:
        return False
    tokenizers = [[snapshot / name for name in names] for names in TOKENIZERS]
    return (
        (snapshot / "config.json").exists()
        and all(file.exists() for file in weights)
        and any(all(file.exists() for file in files) for files in tokenizers)
    )


def reason(error: Exception, name: str, revision: str | None) -> str:
    """Why a model cannot be had from the hub, and what to do about it."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    by_hand = f"run `hf download {name} --local-dir DIR` where the hub can be reached, and start with --model DIR"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {endpoint}/{name}, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} on {endpoint} has no revision {revision!r}; see {endpoint}/{name}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return f"{endpoint} has no model of that name, or a private one: check the name, or set HF_TOKEN"
    if is_offline(error):
        return f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not hold it whole: {by_hand}"
    said = " ".join(str(error).split())[:MOST_REASON]
    return f"it could not be downloaded from {endpoint} ({type(error).__name__}: {said}): {by_hand}"


def is_offline(error: BaseException | None) -> bool:
    """Whether the library was told not to use the network; it may say so in another error's cause."""
    from huggingface_hub import errors

    seen: Any = error
    while seen is not None and not isinstance(seen, errors.OfflineModeIsEnabled):
        seen = seen.__cause__
    return seen is not None
