"""What happens to worker processes from outside, and to the program that embeds them."""

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import textwrap
from pathlib import Path
from types import SimpleNamespace

import forked_python
import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from worker_waits import until

from dilaserve import Config, Engine, Options
from dilaserve.engine.stall_detector import LATE, PERIOD, StallDetector
from dilaserve.engine.stream import collect
from dilaserve.errors import CheckpointError, DilaserveError
from dilaserve.executor import worker_handle, worker_processes
from dilaserve.executor.worker_handle import Ended, WorkerExit, exit_reason
from dilaserve.executor.worker_processes import MAX_FAILURES, ProcessExecutor, refusal
from dilaserve.sim.clock import VirtualLoop
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended
from dilaserve.system import child_processes

PROMPT, WISH = [5, 6, 7], Options(max_tokens=32, block_length=8, ignore_eos=True)
POOL = 2**21  # tokens of K/V, far more than any test here uses
HOME = Path(__file__).parent.parent


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(random_model, tmp_path_factory):
    """Two workers of a model that was named by a relative path, through a link that is gone, in a directory that is."""
    start, place = os.getcwd(), tmp_path_factory.mktemp("place") / "deep"
    place.mkdir()
    (place / "model").symlink_to(random_model)
    os.chdir(place)
    try:
        async with Engine(Config.of(model="model", devices="cpu,cpu", kv_cache_tokens=POOL, max_queue=64)) as engine:
            (place / "model").unlink()
            place.rmdir()
            yield engine
    finally:
        os.chdir(start)


def pids():
    return {child.pid for child in list(child_processes.running) if child.args[-1].startswith("dilaserve worker")}


def rss(pid):
    with open(f"/proc/{pid}/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def strike(pid, number=signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_kv_pool_takes_memory_only_as_rows_use_it(engine):
    await engine.generate(PROMPT, WISH)
    for handle in engine.executor.workers.values():
        assert handle.ready.pool >= 2**30
        assert rss(handle.process.pid) < handle.ready.pool / 2
    there, *taken = engine.executor.taken()
    assert " GiB for each CPU worker: 2 of them share 90 % of the " in there
    assert taken == ["cpu 0.00 GiB of weights, 1.00 GiB of K/V (2097152 tokens)"] * 2


@pytest.mark.asyncio(loop_scope="module")
async def test_workers_that_are_killed_while_they_load_cost_time_alone(engine, monkeypatch):
    monkeypatch.setattr(worker_processes, "RESPAWN_PAUSE", 0.001)
    known = await engine.generate(PROMPT, WISH)
    waiting = asyncio.create_task(engine.generate(PROMPT, WISH))
    struck = set()
    while len(struck) < 2 * (MAX_FAILURES + 3):
        struck |= (alive := pids())
        for i, pid in enumerate(alive):
            strike(pid, (signal.SIGKILL, signal.SIGHUP, 40)[(len(struck) + i) % 3])
        await until(lambda: pids() - struck)  # noqa: B023 - one that loads, unless this process was kept waiting
        assert engine.alive
    assert engine.executor.failures == [0, 0]
    assert (await waiting).token_ids == known.token_ids
    await until(lambda: len(engine.consumer.capacity) == 2)
    assert len(pids()) == 2


@pytest.mark.asyncio(loop_scope="module")
async def test_a_worker_that_is_killed_during_the_first_start_is_started_again(random_model, monkeypatch):
    monkeypatch.setattr(worker_processes, "RESPAWN_PAUSE", 0.001)
    others = pids()
    starting = asyncio.create_task(Engine(Config.of(model=str(random_model), devices="cpu")).__aenter__())
    await until(lambda: pids() - others)
    (first,) = pids() - others
    strike(first)
    engine = await starting
    assert first not in pids()
    assert (await engine.generate(PROMPT, WISH)).completion_tokens == 32
    await engine._leave()
    assert pids() == others


@pytest.mark.asyncio(loop_scope="module")
async def test_a_replacement_that_the_system_has_nothing_for_is_tried_again(engine, monkeypatch, caplog):
    monkeypatch.setattr(worker_processes, "RESPAWN_PAUSE", 0.05)
    known, (soft, hard) = await engine.generate(PROMPT, WISH), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        for pid in pids():
            strike(pid)
        await until(lambda: caplog.text.count("no process could be started: [Errno 24] Too many open files") >= 4)
        assert engine.alive
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (await engine.generate(PROMPT, WISH)).token_ids == known.token_ids


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("whole", [False, True], ids=["block", "answer"])
async def test_a_worker_that_dies_after_it_wrote_and_before_it_reported_costs_nothing(engine, cache, whole):
    """The canvas is ahead of what the engine knows: by the rest of the active block, or by all of the answer."""
    await until(lambda: len(engine.consumer.capacity) == 2)
    wish = Options(max_tokens=64, block_length=8, ignore_eos=True, cache=cache)
    async with await engine.submit(PROMPT, wish) as stream:
        await until(lambda: (known := engine.scheduler.requests.get(stream.id)) and known.replica and known.steps)
        progress = engine.scheduler.requests[stream.id]
        (rank,) = progress.replica.instance.ranks
        process = engine.executor.workers[rank].process
        strike(process.pid, signal.SIGSTOP)
        await asyncio.sleep(0.05)  # what it has reported by then is known
        row, canvas = progress.request.row, engine.table.canvas
        part = slice(progress.part.start, len(PROMPT) + 64 if whole else progress.part.end)
        canvas[row, part] = np.where(canvas[row, part] == engine.mask_id, 9, canvas[row, part])
        wrote = tuple(canvas[row, part].tolist())
        strike(process.pid)
        answer = await collect(stream)
    assert answer.completion_tokens == 64
    assert answer.token_ids[part.start - len(PROMPT) : part.stop - len(PROMPT)] == wrote


@pytest.mark.asyncio(loop_scope="module")
async def test_requests_of_a_worker_that_cannot_be_killed_move_to_other_workers(engine, monkeypatch, caplog):
    """As when a driver keeps it in the kernel: it neither ends nor closes its line."""
    monkeypatch.setattr(worker_handle, "KILL_TIMEOUT", 0.01)
    monkeypatch.setattr(worker_handle, "LEAVE_TIMEOUT", 0.01)
    wish = Options(max_tokens=64, block_length=8, ignore_eos=True, cache="none")
    await until(lambda: len(engine.consumer.capacity) == 2)
    known = await engine.generate(PROMPT, wish)
    load = [asyncio.create_task(engine.generate(PROMPT, wish)) for _ in range(8)]
    steps = engine.profile.steps + 3
    await until(lambda: engine.profile.steps >= steps)
    process = engine.executor.workers[0].process
    monkeypatch.setattr(process, "kill", lambda: os.kill(process.pid, signal.SIGSTOP))
    (instance,) = [id for id, one in engine.executor.instances.items() if one.instance.ranks == (0,)]
    engine.executor.kill(instance, "it hangs")
    answers = await asyncio.gather(*load)
    await until(lambda: len(engine.consumer.capacity) == 2)
    assert process.poll() is None
    assert f"the process {process.pid} of the worker on cpu cannot be killed" in caplog.messages
    strike(process.pid)
    process.wait()
    assert [answer.token_ids for answer in answers] == [known.token_ids] * 8


def test_no_thread_waits_for_ever_for_a_process_that_cannot_be_killed(monkeypatch, caplog):
    monkeypatch.setattr(child_processes, "PATIENCE", 0.01)
    with subprocess.Popen(["sleep", "60"]) as child:
        with monkeypatch.context() as kept:
            kept.setattr(child, "kill", lambda: None)
            child_processes.end(child)
        child.kill()
    assert caplog.messages == [f"the process {child.pid} (60) cannot be killed"]


def ended(rank, how):
    return rank, WorkerExit(how, "the reason")


@given(st.lists(st.builds(ended, st.integers(0, 2), st.sampled_from(Ended)), max_size=40), st.sampled_from([1, 2, 3]))
def test_an_engine_gives_up_when_so_many_ranks_cannot_load_that_none_can_serve(deaths, shards):
    job = SimpleNamespace(shards=shards, device="cpu")
    workers, in_a_row = ProcessExecutor([job] * 3, None, None), [0, 0, 0]
    for rank, death in deaths:
        if death.ended is Ended.FAILED:
            in_a_row[rank] += 1
        elif death.ended is Ended.LOST:
            in_a_row[rank] = 0
        hopeless = [count >= MAX_FAILURES for count in in_a_row]
        if 3 - sum(hopeless) >= shards:
            workers.count(rank, job, death)
            continue
        with pytest.raises(DilaserveError, match="the worker on cpu does not come back: the reason"):
            workers.count(rank, job, death)
        return


def test_a_failed_first_start_says_why():
    assert isinstance(refusal(WorkerExit(Ended.FAILED, "why")), CheckpointError)
    told = refusal(WorkerExit(Ended.NOT_STARTED, "no process could be started: [Errno 11]"))
    assert told.message.endswith("; see what limits the processes, open files and memory of this user")


def test_every_way_in_which_a_worker_ends_is_described():
    assert exit_reason(None, False) == "it closed its line but still runs"
    assert exit_reason(3, False) == "exit code 3"
    assert exit_reason(-9, False) == "killed by SIGKILL"
    assert exit_reason(-40, False) == "killed by signal 40"
    assert exit_reason(-9, True).startswith("killed by the kernel, as memory ran out; lower")


def run(script):
    text = textwrap.dedent(script)
    done = forked_python.run("-c", text, cwd=HOME)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.splitlines()


def test_a_forked_child_that_exits_does_not_end_the_workers(random_model):
    """However it exits, and with a directory in which workers meet. The engine's loop runs in a thread."""
    said = run(f"""
        import asyncio, os, sys, threading
        from dilaserve import Config, Engine, Options
        from dilaserve.system import child_processes

        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()

        def done(work):
            return asyncio.run_coroutine_threadsafe(work, loop).result(60)

        engine = Engine(Config.of(model={str(random_model)!r}, devices="cpu", group_backend="gloo"))
        done(engine.__aenter__())
        before = [child.pid for child in child_processes.running]
        for leave in (sys.exit, child_processes.kill, lambda: asyncio.run(engine._leave()), lambda: os._exit(0)):
            if not (pid := os.fork()):
                assert not child_processes.running
                leave()
                sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
        print(done(engine.generate("hello", Options(max_tokens=8))).completion_tokens)
        print([child.pid for child in child_processes.running] == before, len(before))
        print(os.path.isdir(os.path.dirname(engine.executor.workers[0].job.store)))
        done(engine._leave())
        """)
    assert said == ["8", "True 3", "True"]


def test_an_engine_works_where_the_standard_streams_are_closed(random_model, tmp_path):
    run(f"""
        import os
        for fd in (0, 1, 2):
            os.close(fd)
        import asyncio
        from dilaserve import Config, Engine, Options

        async def main():
            async with Engine(Config.of(model={str(random_model)!r}, devices="cpu")) as engine:
                return (await engine.generate("hello", Options(max_tokens=8))).completion_tokens

        tokens = asyncio.run(main())
        with open({str(tmp_path / "said")!r}, "w") as file:
            file.write(str(tokens))
        """)
    assert (tmp_path / "said").read_text() == "8"


def test_an_engine_works_inside_a_daemonic_process(random_model):
    said = run(f"""
        import asyncio, multiprocessing
        from dilaserve import Config, Engine, Options

        async def answer():
            async with Engine(Config.of(model={str(random_model)!r}, devices="cpu")) as engine:
                return (await engine.generate("hello", Options(max_tokens=8))).completion_tokens

        def work(_):
            assert multiprocessing.current_process().daemon
            return asyncio.run(answer())

        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(pool.map(work, [0]))
        """)
    assert said == ["[8]"]


def test_a_stall_is_reported_for_a_blocked_loop_only():
    async def lives():
        loop = asyncio.get_running_loop()
        pulse = StallDetector(loop)
        pulse.watch(True)
        await asyncio.sleep(100 * PERIOD)
        seen = [pulse.missed(loop.time())]
        loop.jumping.now += 26.0  # the process was stopped
        seen += [pulse.missed(loop.time()), pulse.missed(loop.time())]
        loop.jumping.now += 9.0
        await asyncio.sleep(2 * PERIOD)  # a beat is the first to see it
        loop.jumping.now += PERIOD + LATE / 2
        seen.append(pulse.missed(loop.time()))
        pulse.watch(False)
        await asyncio.sleep(2 * PERIOD)
        loop.jumping.now += 1000.0  # nobody watches: it may have slept
        return [*seen, pulse.missed(loop.time())]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        none, pause, again, beaten, idle = runner.run(lives())
    assert (none, again, idle) == (0.0, 0.0, 0.0)
    assert 26.0 - PERIOD <= pause <= 26.0
    assert 9.0 - 2 * PERIOD <= beaten <= 9.0 + PERIOD


@pytest.mark.parametrize("pauses", [0, 1, 3])
def test_a_stop_of_the_engine_process_extends_the_time_limit_of_a_running_step(pauses, monkeypatch):
    """Of the time that it lives through, a step that hangs has no more than ever."""

    async def hanging():
        async with Engine(Config.of(), assemble=pretended(llada_8b_h200(), 1, 1024)) as engine:
            loop = asyncio.get_running_loop()
            killed = loop.create_future()
            monkeypatch.setattr(engine.executor, "launch", lambda batch: None)
            monkeypatch.setattr(engine.executor, "kill", lambda instance, reason: killed.set_result(instance))
            last = asyncio.create_task(engine.generate([0] * 32, Options(max_tokens=64)))
            began = loop.time()
            for _ in range(pauses):
                await asyncio.sleep(3.0)
                loop.jumping.now += 26.0
                await asyncio.sleep(1.5)
                assert not killed.done()
            await killed
            last.cancel()
            return loop.time() - began

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        took = runner.run(hanging())
    assert 20.0 + pauses * (26.0 - PERIOD) <= took < 25.0 + pauses * (26.0 + PERIOD)
