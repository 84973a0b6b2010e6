"""A model's chat template: where it is read from, and its rendering in a process of its own."""

import asyncio
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, models

from dilaserve.errors import CheckpointError, Unavailable, shortened
from dilaserve.system import child_processes, files
from dilaserve.tokenizer import template_process
from dilaserve.tokenizer.template_process import TOO_SLOW, Reply, Source

READ = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")  # by transformers
TOKENIZER = "tokenizer.json"
FOLDER, FILE, DEFAULT = "additional_chat_templates", "chat_template.jinja", "default"
MARKS = {"{", "}", "\n"}  # what makes a template of what could be the name of a file
PATIENCE = 30.0  # seconds of the clock that a rendering gets; a busy machine may give its process little of them
ATTEMPTS = 2  # a process that was killed from outside is no fault of the template


def find(directory: Path, given: str | Path | None) -> Source | str:
    """The template of a directory, or the `given` one in its place (see `read_given`); or why there is none.

    Takes a second, because transformers is imported here, which knows all the places where a template may be.
    Raises `CheckpointError`.
    """
    try:
        check_sizes(directory)
        tokenizer = loaded(directory)
        own = tokenizer.chat_template
        named = own if isinstance(own, dict) else {}
        template = read_given(given, named) if given else named.get(DEFAULT) if named else own
    except (OSError, ValueError) as error:  # ValueError: no text, or no file has such a name
        reason = f"{getattr(error, 'filename', None) or shown(given)}: {getattr(error, 'strerror', error)}"
        raise CheckpointError(f"the chat template cannot be read from {reason}") from error
    if named and template is None:
        return f"its chat templates are {', '.join(named)} and none is the default; choose one with --chat-template"
    if not template:
        return "it has no chat template; give it one with --chat-template"
    if not isinstance(template, str):
        raise CheckpointError(f"the chat template in {directory} is no text, but {type(template).__name__}")
    return Source(template, {name: plain(token) for name, token in tokenizer.special_tokens_map.items()})


def read_given(given: str | Path, named: Mapping[str, Any]) -> Any:
    """The template that --chat-template means: that of a file, the model's own of that name, or the text itself.

    In a text, which has braces or several lines, escapes such as \\n count, as shells pass none. Raises `OSError` and
    `ValueError`.
    """
    is_text = bool(MARKS.intersection(str(given)))
    if not is_text and not files.present(Path(given)) and given in named:
        return named[str(given)]
    if is_text and not is_file(Path(given)):
        return str(given).encode("latin-1", "backslashreplace").decode("unicode_escape")
    return files.read(Path(given), files.MOST_TEMPLATE).decode()


def shown(given: str | Path | None) -> str:
    """What --chat-template says, as an error repeats it: the name of a file whole, and the beginning of a text."""
    text = str(given)
    return shortened(text) if MARKS.intersection(text) else text


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long to be a name, for one
        return False


def plain(token: Any) -> str | list[str]:
    """The text of a special token, or of several."""
    return list(map(str, token)) if isinstance(token, list | tuple) else str(token)


def check_sizes(directory: Path) -> None:
    """Raises `OSError` for a file that transformers would read and that is too large, or is none."""
    templates = [directory / FILE, *(directory / FOLDER).glob("*.jinja")]
    bounds = {directory / name: files.MOST_JSON for name in READ} | dict.fromkeys(templates, files.MOST_TEMPLATE)
    for file, most in bounds.items():
        if files.present(file):
            files.size(file, most)


def loaded(directory: Path) -> Any:
    """The tokenizer as transformers reads it; without tokenizer.json its template and special tokens alone."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    try:
        stand_in = {} if files.present(directory / TOKENIZER) else {"tokenizer_object": Tokenizer(models.BPE())}
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True, **stand_in)
    except Exception as error:  # whatever a damaged tokenizer_config.json leads to
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the chat template in {directory} cannot be read: {reason}") from error


class ChatTemplate:
    """Renders conversations, one at a time, in a child process that is ended when one takes too long.

    A new process takes its place at the next rendering. Safe from several threads.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.turn = threading.Lock()
        self.thread = ThreadPoolExecutor(1, "dilaserve chat template")  # so that waiting renderings hold up no others
        self.process: subprocess.Popen[bytes] | None = None
        self.closed = False

    async def rendered(self, messages: Sequence[Mapping[str, Any]]) -> Reply:
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.render, messages)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Reply:
        """Blocking. Raises `Unavailable` where no process can be had, or it is killed again and again."""
        request = msgspec.msgpack.encode([without_nulls(message) for message in messages])
        with self.turn:
            for _ in range(ATTEMPTS):
                try:
                    return self.asked(request)
                except (OSError, EOFError) as error:
                    lost: Exception = error
                    if self.end() == -TOO_SLOW:
                        return Reply(reason=f"it takes more than {self.source.seconds:g} seconds of CPU time")
        raise Unavailable(f"the process that renders the chat template is gone: {lost}", retry_after=1.0) from lost

    def asked(self, request: bytes) -> Reply:
        """Raises `OSError` or `EOFError` when the process is gone, does not answer, or cannot be started."""
        if self.process is None:
            self.start()
        self.line.send_bytes(request)
        if not self.line.poll(PATIENCE):
            raise TimeoutError(f"no answer in {PATIENCE:g} seconds")
        return msgspec.msgpack.decode(self.line.recv_bytes(), type=Reply)

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        self.line: Connection[bytes, bytes] = Connection(ours.detach())
        with Connection(child_processes.heritable(theirs.detach())) as end:
            arguments = (end.fileno(), self.source)
            self.process = child_processes.start(
                "dilaserve chat template", template_process.main, arguments, self.line, [end.fileno()]
            )
        if self.closed:
            raise EOFError("the engine has stopped")

    def end(self) -> int | None:
        """Kill the process, if it still runs; returns how it ended."""
        process, self.process = self.process, None
        if process is None:
            return None
        self.line.close()
        child_processes.end(process)
        return process.returncode

    def close(self) -> None:
        """End the process, whatever it does."""
        self.closed = True
        if process := self.process:
            process.kill()  # a rendering that is under way holds the turn
        with self.turn:
            self.end()
        self.thread.shutdown(wait=False)


def without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates are written for keys that are missing, as transformers hands them on."""
    return {key: value for key, value in message.items() if value is not None}
