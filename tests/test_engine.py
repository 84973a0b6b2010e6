"""The engine embedded in a program, with real workers that are killed."""

import asyncio
import os
import random
import signal
import textwrap
import threading

import checkpoints
import forked_python
import pytest
import pytest_asyncio
from worker_waits import children, until

from dilaserve import BadRequest, Config, ConfigError, Engine, Options, Overloaded, Unavailable
from dilaserve.engine.delivery import missed
from dilaserve.executor import worker_processes
from dilaserve.types import Usage


def on(model, **settings):
    return Config.of(model=str(model), devices=settings.pop("devices", "cpu"), **settings)


PROMPTS = [[random.Random(i).randrange(256) for _ in range(5 + i)] for i in range(32)]
WISH = Options(max_tokens=64, block_length=16, confidence_threshold=0.8)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(random_model):
    """For tests that leave nothing behind."""
    async with Engine(on(random_model)) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def engine(shared):
    """Idle before the test; all its rows are free after it, and it takes requests again."""
    yield shared
    await shared.drain(30)
    shared.draining = False
    assert not shared.scheduler.requests
    assert len(shared.consumer.free) == shared.table.rows


async def test_an_answer_whole_and_in_pieces_is_the_same(random_model):
    before = children()
    async with Engine(on(random_model)) as engine:
        whole = await engine.generate(PROMPTS[5], WISH)
        chunks = [chunk async for chunk in engine.stream(PROMPTS[5], WISH)]
        assert engine.ready
        assert len(children() - before) == 1
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert sum((chunk.token_ids for chunk in chunks), ()) == whole.token_ids
    assert len(chunks) > 4
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (whole.finish_reason, whole.completion_tokens, whole.prompt_tokens) == ("length", 64, 10)
    assert len(whole.confidences) == 64
    assert all(0 < confidence <= 1 for confidence in whole.confidences)
    assert whole.usage.refreshes == 4
    assert not engine.ready
    assert children() == before


async def test_two_engines_in_one_process_and_64_clients_each_get_their_own_answer(random_model, tmp_path):
    other_model = checkpoints.make(tmp_path / "other", seed=3)
    async with Engine(on(random_model)) as one, Engine(on(other_model)) as other:
        known = [[(await engine.generate(p, WISH)).token_ids for p in PROMPTS] for engine in (one, other)]
        crowd = await asyncio.gather(*(engine.generate(p, WISH) for p in PROMPTS for engine in (one, other)))
    assert [answer.token_ids for answer in crowd[0::2]] == known[0]
    assert [answer.token_ids for answer in crowd[1::2]] == known[1]
    assert known[0] != known[1]


async def test_a_stream_that_is_left_frees_its_row(random_model):
    async with Engine(on(random_model, max_queue=1)) as engine:
        async with await engine.submit(PROMPTS[0], Options(max_tokens=200, block_length=4)) as stream:
            await anext(stream)
            with pytest.raises(Overloaded) as caught:
                await engine.submit(PROMPTS[1], WISH)
            assert caught.value.retry_after
        await engine.drain(30)
        assert list(engine.consumer.free) == [0]
        assert not engine.scheduler.requests
        engine.draining = False
        assert (await engine.generate(PROMPTS[1], WISH)).finish_reason == "length"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_stop_string_ends_the_answer_and_does_not_leak(engine):
    whole = (await engine.generate(PROMPTS[7], WISH)).text
    stop = next(whole[i : i + 3] for i in range(20, 40) if whole[i : i + 3].isprintable())
    answer = await engine.generate(
        PROMPTS[7], Options(max_tokens=64, block_length=16, confidence_threshold=0.8, stop=(stop,))
    )
    await engine.drain(30)
    assert engine.consumer.free
    assert not engine.scheduler.requests
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


async def test_bad_requests_change_no_state(random_model):
    async with Engine(on(random_model, kv_cache_tokens=128)) as engine:
        free = len(engine.consumer.free)
        bad = [("", None), ([], None), ([999], None), ([True], None), ([1] * 256, None), ([1], Options(max_tokens=0))]
        for prompt, options in [*bad, ([1], Options(max_tokens=200))]:
            with pytest.raises(BadRequest):
                await engine.submit(prompt, options)
        with pytest.raises(BadRequest, match="K/V pool of 128; shorten the prompt or raise"):
            await engine.submit([1] * 127, Options(max_tokens=1))  # in a block of 32
        with pytest.raises(BadRequest, match="K/V pool of 128; lower max_tokens or raise"):
            await engine.submit([1], Options(max_tokens=200))
        assert len(engine.consumer.free) == free
        assert (await engine.generate("a", WISH)).completion_tokens == 64


@pytest.mark.asyncio(loop_scope="module")
async def test_long_prompts_are_encoded_outside_the_event_loop(engine, monkeypatch):
    loops: list[bool] = []

    def work():
        loops.append(threading.current_thread() is threading.main_thread())
        return []

    monkeypatch.setattr(engine.text, "encode", lambda prompt, limit: work())
    monkeypatch.setattr(engine.text, "ids", lambda text, limit, special: work())
    message = {"role": "user", "content": "a" * 64}
    for prompt in ("hello", "a" * 4096, [message], [message] * 64, [message | {"content": "a" * 4096}]):
        await engine.tokenize(prompt)
    assert loops == [True, False, True, False, False]
    assert await engine.tokenize([65] * 5000) == [65] * 5000
    with pytest.raises(BadRequest, match="whole numbers"):
        await engine.tokenize([65] * 5000 + [-1])


@pytest.mark.asyncio(loop_scope="module")
async def test_the_id_of_a_running_request_is_refused(engine):
    free = len(engine.consumer.free)
    async with await engine.submit(PROMPTS[0], Options(max_tokens=200, block_length=4), id="mine") as stream:
        with pytest.raises(BadRequest, match="'mine' is running"):
            await engine.submit(PROMPTS[1], WISH, id="mine")
        await anext(stream)
    await engine.drain(30)
    engine.draining = False
    async with await engine.submit(PROMPTS[1], WISH, id="mine") as stream:
        assert stream.id == "mine"
    await engine.drain(30)
    assert (engine.alive, len(engine.consumer.free)) == (True, free)


async def test_leaving_the_engine_ends_what_runs(random_model):
    async with Engine(on(random_model)) as engine:
        stream = await engine.submit(PROMPTS[0], Options(max_tokens=200, block_length=4))
    with pytest.raises(Unavailable):
        async for _ in stream:
            pass
    with pytest.raises(Unavailable):
        await engine.submit(PROMPTS[0])


async def test_an_engine_that_was_never_entered_says_so(random_model):
    with pytest.raises(Unavailable, match="async with"):
        await Engine(on(random_model)).generate("hello")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_cancelled_during_admission_frees_its_row(engine):
    wish = Options(max_tokens=200, block_length=4, deadline_ms=3.6e6, on_miss="reject")
    task = asyncio.create_task(engine.submit(PROMPTS[0], wish))
    while not engine.streams:  # noqa: ASYNC110
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.drain(30)
    assert not engine.scheduler.requests
    assert len(engine.consumer.free) == engine.table.rows


def test_only_a_deadline_feasible_on_an_idle_instance_may_be_retried():
    usage = Usage(steps=0, refreshes=0, queued=0.0, served=0.0, mean_confidence=None, deadline=1.0)
    late = [
        missed(usage, retry, never_feasible) for retry, never_feasible in ((1.0, True), (1.0, False), (None, False))
    ]
    assert [(error.status, error.retry_after, error.never_feasible) for error in late] == [
        (429, None, True),
        (429, 1.0, False),
        (504, None, False),
    ]


@pytest.mark.asyncio(loop_scope="module")
async def test_requests_that_outlive_the_grace_period_end_with_an_error(engine):
    async with await engine.submit(PROMPTS[0], Options(max_tokens=200, block_length=4)) as stream:
        await anext(stream)
        await engine.drain(0.0)
        with pytest.raises(Unavailable, match="shut down before"):
            async for _ in stream:
                pass
    await asyncio.wait_for(engine.idle.wait(), 30)
    assert not engine.scheduler.requests
    assert len(engine.consumer.free) == engine.table.rows


async def test_killed_workers_cost_a_pause_and_no_answer(random_model):
    async with Engine(on(random_model, devices="cpu,cpu")) as engine:
        known = [(await engine.generate(p, WISH)).token_ids for p in PROMPTS]
        exact = Options(max_tokens=64, block_length=16, confidence_threshold=0.8, cache="none")
        expected = [(await engine.generate(p, exact)).token_ids for p in PROMPTS]
        running = [asyncio.create_task(engine.generate(p, exact)) for p in PROMPTS]
        begun = engine.profile.steps + 4
        await until(lambda: engine.profile.steps >= begun)
        os.kill(min(handle.process.pid for handle in engine.executor.workers.values()), signal.SIGKILL)
        answers = await asyncio.gather(*running)
        await until(lambda: len(engine.consumer.capacity) == 2)
        again = await asyncio.gather(*(engine.generate(p, WISH) for p in PROMPTS))
    assert [answer.token_ids for answer in answers] == expected
    assert [answer.token_ids for answer in again] == known


@pytest.mark.asyncio(loop_scope="module")
async def test_the_only_worker_comes_back(engine):
    known = await engine.generate(PROMPTS[3], WISH)
    (handle,) = engine.executor.workers.values()
    os.kill(handle.process.pid, signal.SIGKILL)
    assert (await engine.generate(PROMPTS[3], WISH)).token_ids == known.token_ids


async def test_a_model_that_cannot_be_loaded_raises_before_anything_runs(tmp_path, random_model):
    with pytest.raises(ConfigError, match="there is no model directory"):
        async with Engine(on(tmp_path / "nowhere")):
            pass
    with pytest.raises(ConfigError, match="exceeds the model's 256"):
        async with Engine(on(random_model, max_model_len=1000)):
            pass


async def test_loading_can_be_interrupted(random_model):
    before = children()
    task = asyncio.create_task(Engine(on(random_model)).__aenter__())
    await until(lambda: children() - before)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == before


def test_an_embedding_script_needs_no_main_guard(random_model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio
        from dilaserve import Config, Engine, Options

        async def main():
            async with Engine(Config.of(model={str(random_model)!r}, devices="cpu")) as engine:
                print((await engine.generate("hello", Options(max_tokens=8))).completion_tokens)

        asyncio.run(main())
        """)
    )
    done = forked_python.run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


def test_a_failed_start_prints_nothing_at_exit(random_model, tmp_path):
    """The workers that were not at fault are dismissed by then."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio
        from dilaserve import Config, ConfigError, Engine

        async def main():
            async with Engine(Config.of(model={str(random_model)!r}, devices="cpu,cpu,cpu", kv_cache_tokens=10**9)):
                pass

        try:
            asyncio.run(main())
        except ConfigError as error:
            print(error)
        """)
    )
    done = forked_python.run(script)
    assert (done.returncode, done.stderr) == (0, "")
    assert "lower it" in done.stdout


async def test_a_worker_that_cannot_restart_ends_the_engine_and_fails_its_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_processes, "RESPAWN_PAUSE", 0.0)
    model = checkpoints.make(tmp_path / "vanishing")
    async with Engine(on(model)) as engine:
        stream = await engine.submit(PROMPTS[0], Options(max_tokens=200, block_length=4))
        (model / "model.safetensors").unlink()
        (handle,) = engine.executor.workers.values()
        os.kill(handle.process.pid, signal.SIGKILL)
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
        await engine.ended()
        assert "does not come back" in str(engine.failure)
        assert not engine.alive
        with pytest.raises(Unavailable):
            await engine.submit(PROMPTS[0])
