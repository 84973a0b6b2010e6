"""The engine for programs without an event loop of their own: scripts, notebooks, threads.

The engine runs on a loop in a thread of its own. Calls block the calling thread and no other, also in a notebook, whose
main thread has a loop that is running.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Self, TypeVar, Unpack

from dilaserve.config import Config
from dilaserve.engine.engine import Engine, ModelCard
from dilaserve.engine.prompts import Prompt
from dilaserve.engine.stream import Chunk, Completion, Stream
from dilaserve.engine.submit import Options
from dilaserve.errors import ConfigError, Unavailable
from dilaserve.keywords import Keywords
from dilaserve.types import Quote

T = TypeVar("T")
LAST_CALLS = 5.0  # seconds that calls of other threads get to end, once the engine has stopped


class DilaServe:
    """Serves one model to the threads of a program: `with DilaServe(devices="cpu") as d: d.generate("Sort: 3 1 2")`.

    Takes the settings as keywords, or a `Config`. `open` and `close` do what the `with` block does, for notebooks.
    Opening loads the model and raises `ConfigError` when that cannot work; calls raise the errors of `Engine`. They are
    safe from several threads at once. Ctrl-C, and whatever else interrupts a call, cancels its request.
    """

    def __init__(self, config: Config | None = None, **settings: Unpack[Keywords]) -> None:
        if config is not None and settings:
            raise ConfigError(f"give a Config or settings ({', '.join(settings)}), not both")
        self._config = Config.of(**settings) if config is None else config
        self._lock = threading.RLock()  # around `_accepts`, so that no call comes after the loop's last work
        self._accepts = False
        self._thread: threading.Thread | None = None
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self) -> Self:
        """Load the model. Raises `ConfigError`."""
        with self._lock:
            if self._thread:
                raise Unavailable("it is open already")
            self._engine = Engine(self._config)
            self._loop, self._ends = asyncio.new_event_loop(), asyncio.Event()
            self._owner, started = os.getpid(), Future[None]()
            self._thread = threading.Thread(target=self._run, args=(started,), name="dilaserve", daemon=True)
            self._thread.start()
        atexit.register(self.close)
        try:
            started.result()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End what still runs, and the workers; calls of other threads raise `Unavailable`."""
        with self._lock:
            self._accepts, thread = False, self._thread
            if thread is None or os.getpid() != self._owner:
                return
            if not self._loop.is_closed():  # the engine may have ended by itself
                self._loop.call_soon_threadsafe(self._ends.set)
        thread.join()
        with self._lock:
            self._thread = None
        atexit.unregister(self.close)

    @property
    def model(self) -> ModelCard:
        """The model's name, length and size."""
        self._check_open()
        return self._engine.model

    def generate(self, prompt: Prompt, options: Options | None = None) -> Completion:
        """The whole answer."""
        return self._call(lambda: self._engine.generate(prompt, options))

    def stream(self, prompt: Prompt, options: Options | None = None) -> "Chunks":
        """The answer piece by piece, as it becomes final."""
        future = self._begin(lambda: self._engine.submit(prompt, options))
        try:
            return Chunks(self, result(future))
        except BaseException:
            future.add_done_callback(self._forsake)
            raise

    def quote(self, prompt_tokens: int, options: Options | None = None) -> Quote:
        """What would become of a request now, with a prompt of so many tokens; nothing is changed by asking."""

        async def asked() -> Quote:
            return self._engine.quote(prompt_tokens, options)

        return self._call(asked)

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of a conversation with the mark that opens the answer."""
        return self._call(lambda: self._engine.tokenize(prompt))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        self._check_open()
        return self._engine.detokenize(ids)

    # calls

    def _call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run on the loop, and wait for the result; what interrupts the wait cancels the work."""
        return result(self._begin(work))

    def _begin(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        with self._lock:
            self._check_open()
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def _check_open(self) -> None:
        if not self._accepts:
            raise Unavailable("it is not open; use it in `with DilaServe(...) as d:`, or call open()")
        if os.getpid() != self._owner:
            raise Unavailable("this process is a fork of the one that opened it; open another one here")

    def _forsake(self, future: Future[Stream]) -> None:
        """Nobody reads the stream of a call that was interrupted."""
        if not future.cancelled() and future.exception() is None:
            self._leave(future.result())

    def _leave(self, stream: Stream) -> None:
        """Cancel a stream's request without waiting; safe from wherever Python collects garbage."""
        with self._lock:
            if self._accepts and os.getpid() == self._owner:
                asyncio.run_coroutine_threadsafe(stream.aclose(), self._loop)

    # the thread

    def _run(self, started: Future[None]) -> None:
        try:
            self._loop.run_until_complete(self._live(started))
        finally:
            with self._lock:
                self._loop.close()

    async def _live(self, started: Future[None]) -> None:
        """Run the engine until it is closed, and then the last calls."""
        life = asyncio.create_task(self._serve(started))
        ends = asyncio.create_task(self._ends.wait())
        await asyncio.wait([life, ends], return_when=asyncio.FIRST_COMPLETED)
        life.cancel()
        ends.cancel()
        await asyncio.wait([life, ends])
        with self._lock:
            self._accepts = False
        if calls := asyncio.all_tasks() - {asyncio.current_task()}:
            _, late = await asyncio.wait(calls, timeout=LAST_CALLS)
            for call in late:
                call.cancel()
            await asyncio.wait(calls)
        life.result()

    async def _serve(self, started: Future[None]) -> None:
        try:
            async with self._engine:
                with self._lock:
                    self._accepts = True
                started.set_result(None)
                await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            if not started.done():
                started.set_exception(Unavailable("it was closed before it was open"))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)


class Chunks(Iterator[Chunk]):
    """The chunks of one answer. Leaving it early (`close`, the `with` block, or dropping it) cancels its request."""

    def __init__(self, owner: DilaServe, stream: Stream) -> None:
        self._owner, self._stream = owner, stream
        self._turn = threading.Lock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        with self._turn:
            if self._stream.read:
                raise StopIteration
            try:
                chunk = self._owner._call(lambda: following(self._stream))
            except BaseException:
                self.close()
                raise
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Cancel the request, unless it is over."""
        if not self._stream.over:
            self._owner._leave(self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


async def following(stream: Stream) -> Chunk | None:
    """The next chunk; None behind the last."""
    async for chunk in stream:
        return chunk
    return None


def result(future: Future[T]) -> T:
    """Wait for it; raises its error."""
    try:
        return future.result()
    except CancelledError as error:
        raise Unavailable("the engine has stopped") from error
    except BaseException:
        future.cancel()
        raise
