"""The façade for scripts and notebooks: real workers behind a thread, and callers of all kinds."""

import asyncio
import collections
import concurrent.futures
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import forked_python
import pytest

from dilaserve import BadRequest, Config, ConfigError, DilaServe, Engine, Options, Unavailable
from dilaserve.engine import synchronous

WISH = Options(max_tokens=32, block_length=8, confidence_threshold=0.8)
LONG = Options(max_tokens=200, block_length=8)  # left long before its end
PROMPTS = [[random.Random(i).randrange(256) for _ in range(5 + i)] for i in range(6)]


@pytest.fixture(scope="module")
def served(random_model):
    with DilaServe(model=str(random_model), devices="cpu", max_queue=16) as served:
        yield served


def idle(served):
    """Wait until nothing runs any more."""
    engine = served._engine
    future = asyncio.run_coroutine_threadsafe(engine.idle.wait(), served._loop)
    future.result(30)
    return not engine.scheduler.requests and len(engine.consumer.free) == 16


def test_an_answer_whole_and_in_pieces_is_the_engines(served, random_model):
    async def by_engine():
        async with Engine(Config.of(model=str(random_model), devices="cpu")) as engine:
            return await engine.generate(PROMPTS[5], WISH)

    whole = served.generate(PROMPTS[5], WISH)
    chunks = list(served.stream(PROMPTS[5], WISH))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].finish_reason == whole.finish_reason
    assert len(chunks) > 3
    assert asyncio.run(by_engine()).token_ids == whole.token_ids
    assert (served.model.max_model_len, served.detokenize(served.tokenize("hello"))) == (256, "hello")
    quote = served.quote(5, Options(max_tokens=8))
    assert (quote.admitted, quote.running, quote.waiting) == (True, 0, 0)


def test_errors_are_raised_to_the_caller(served):
    for call in (served.generate, served.stream):
        with pytest.raises(BadRequest, match="cache must be one of"):
            call("hello", Options(cache="foo"))
        with pytest.raises(BadRequest, match="the prompt is empty"):
            call("", WISH)
    with pytest.raises(BadRequest):
        served.tokenize(3)
    with pytest.raises(BadRequest):
        served.detokenize("x")


@pytest.mark.parametrize("leave", ["break", "close", "with", "drop", "unread"])
def test_an_iterator_that_is_left_half_way_cancels_its_request(served, leave):
    before = served._engine.scheduler.totals.fates["cancelled"]
    chunks = served.stream(PROMPTS[0], LONG)
    if leave != "unread":
        next(chunks)
    if leave == "break":
        for _ in chunks:
            break
    if leave == "close":
        chunks.close()
        assert list(chunks) == []
    if leave == "with":
        with chunks:
            next(chunks)
    del chunks
    assert idle(served)
    assert served._engine.scheduler.totals.fates["cancelled"] == before + 1


def test_several_threads_each_get_their_own_answer(served):
    alone = [served.generate(prompt, WISH).token_ids for prompt in PROMPTS]

    def streamed(prompt):
        return sum((chunk.token_ids for chunk in served.stream(prompt, WISH)), ())

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        assert [answer.token_ids for answer in threads.map(lambda one: served.generate(one, WISH), PROMPTS)] == alone
        assert list(threads.map(streamed, PROMPTS)) == alone


def test_one_iterator_may_be_read_by_several_threads(served):
    whole, chunks = served.generate(PROMPTS[3], WISH).token_ids, served.stream(PROMPTS[3], WISH)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        parts = [chunk for part in threads.map(lambda _: list(chunks), range(3)) for chunk in part]
    assert sorted(token for chunk in parts for token in chunk.token_ids) == sorted(whole)


async def test_the_synchronous_api_works_inside_a_running_loop(served):
    assert len(served.generate(PROMPTS[1], WISH).token_ids) == 32
    assert list(served.stream(PROMPTS[1], WISH))


def asked_for_ever(served, call):
    """An answer may be done before the signal comes."""
    while True:
        if call == "generate":
            served.generate(PROMPTS[0], LONG)
        else:
            collections.deque(served.stream(PROMPTS[0], LONG), maxlen=0)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where a shell has started the tests with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_ctrl_c_reaches_the_caller_and_cancels_the_request(served, interruptible, call):
    before = served._engine.scheduler.totals.fates["cancelled"]

    def interrupt():
        while not served._engine.scheduler.requests:
            time.sleep(0.001)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        asked_for_ever(served, call)
    thread.join()
    assert idle(served)
    assert served._engine.scheduler.totals.fates["cancelled"] in (before, before + 1)
    assert len(served.generate(PROMPTS[1], WISH).token_ids) == 32


def test_what_cannot_be_loaded_is_raised_by_opening(tmp_path):
    with pytest.raises(ConfigError, match="there is no model directory"), DilaServe(model=str(tmp_path / "nowhere")):
        pass
    with pytest.raises(ConfigError, match="unknown setting 'prot'"):
        DilaServe(prot=1)
    with pytest.raises(ConfigError, match="not both"):
        DilaServe(Config.of(devices="cpu"), devices="cpu")
    with pytest.raises(ConfigError, match=r"config must be a dilaserve\.Config, not dict"):
        DilaServe({"devices": "cpu"}).open()


def test_an_error_of_opening_is_raised_also_where_the_loop_has_ended_before_it_is_heard(tmp_path, monkeypatch):
    served = DilaServe(model=str(tmp_path / "nowhere"))

    class Late(synchronous.Future):
        def result(self, timeout=None):
            served._thread.join()
            return super().result(timeout)

    monkeypatch.setattr(synchronous, "Future", Late)
    with pytest.raises(ConfigError, match="there is no model directory"):
        served.open()


def test_closing_ends_all_running_requests_with_an_error(random_model):
    served = DilaServe(model=str(random_model), devices="cpu")
    with pytest.raises(Unavailable, match="not open"):
        served.generate("hello")
    with served:
        with pytest.raises(Unavailable, match="open already"):
            served.open()
        thread = served._thread
        pid = next(iter(served._engine.executor.workers.values())).process.pid
        chunks = served.stream(PROMPTS[0], LONG)
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            waits = threads.submit(served.generate, PROMPTS[1], Options(max_tokens=240, block_length=1))
            while served._engine.scheduler.totals.received < 2:
                time.sleep(0.001)
            served.close()
            with pytest.raises(Unavailable):
                waits.result()
    for call in (lambda: next(chunks), lambda: served.generate("hello"), lambda: served.model):
        with pytest.raises(Unavailable):
            call()
    served.close()
    assert not os.path.exists(f"/proc/{pid}")
    assert not thread.is_alive()


SCRIPTS = {
    "left open": ("served.open(); print(served.generate('hello', Options(max_tokens=8)).completion_tokens)", 0, "8\n"),
    "left in a stream": ("served.open(); chunks = served.stream('hello'); print(bool(next(chunks)))", 0, "True\n"),
    "an error inside": ("with served: print(1); raise SystemExit(3)", 3, "1\n"),
}


@pytest.mark.parametrize("how", SCRIPTS)
def test_a_script_ends_cleanly_however_it_ends(random_model, how):
    body, code, said = SCRIPTS[how]
    head = f"from dilaserve import DilaServe, Options; served = DilaServe(model={str(random_model)!r}, devices='cpu')"
    done = forked_python.run("-c", f"{head}\n{body}")
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


def test_ctrl_c_while_it_opens_leaves_no_worker(random_model, interruptible):
    script = textwrap.dedent(f"""
        import _thread, os, subprocess, threading, time
        from dilaserve import DilaServe
        from dilaserve.system import child_processes

        def interrupt():
            while not child_processes.running:
                time.sleep(0.001)
            _thread.interrupt_main()

        threading.Thread(target=interrupt).start()
        try:
            DilaServe(model={str(random_model)!r}, devices="cpu").open()
        except KeyboardInterrupt:
            print("interrupted", len(child_processes.running))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted 0\n", "")
