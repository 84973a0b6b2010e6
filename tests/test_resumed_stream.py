"""An answer that goes on at another node: nothing is lost, nothing comes twice, and it ends."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.engine.stream import Chunk
from dilaserve.engine.submit import Options
from dilaserve.errors import BadRequest, DilaserveError, Overloaded, Unavailable
from dilaserve.ray.node_calls import Call, Failure, Started
from dilaserve.ray.resumed_stream import START_WITHIN, TRIES, NodeLost, ResumedStream
from dilaserve.sim.clock import VirtualLoop
from dilaserve.types import Usage

WHOLE = tuple(range(100, 130))
CALL = Call((1, 2, 3), Options(elapsed_ms=500.0), "mine")
DRAINING = Failure.of(Unavailable("the server is shutting down; try another", retry_after=5.0))
USAGE = Usage(steps=1, refreshes=1, queued=0.0, served=1.0, mean_confidence=1.0)


class Scripted:
    """Nodes that write `WHOLE`, in parts of `size` tokens, but for what the script says of each call in turn: after how
    many parts the node is lost (`silent`: its stream just ends), or its refusal.
    """

    def __init__(self, script=(), size=4, silent=False):
        self.script, self.size, self.silent = list(script), size, silent
        self.calls = []

    async def answer(self, call):
        self.calls.append(call)
        fate = self.script.pop(0) if self.script else None
        if isinstance(fate, Failure):
            yield fate
            return
        given = call.options.resume_token_ids
        assert given == WHOLE[: len(given)]
        parts = [WHOLE[i : i + self.size] for i in range(len(given), len(WHOLE), self.size)]
        for number, part in enumerate([(), *parts, ()]):
            if number == fate:
                if self.silent:
                    return
                raise NodeLost("killed")
            await asyncio.sleep(1.0)
            last = number == len(parts) + 1
            if number == 0:
                yield Started("node", len(given))
            else:
                yield Chunk(
                    "x" * len(part), part, finish_reason="length" if last else None, usage=USAGE if last else None
                )


def run(work):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


async def read(nodes, call=CALL):
    async with await ResumedStream(nodes.answer, call).begin() as stream:
        return await stream.whole()


def tokens(chunks):
    return tuple(id for chunk in chunks for id in chunk.token_ids)


FATES = st.one_of(st.integers(0, 9), st.just(DRAINING))


@given(st.lists(FATES, max_size=20), st.integers(1, 16), st.booleans())
def test_whatever_is_lost_the_answer_is_whole_or_ends_after_so_many_tries(script, size, silent):
    nodes = Scripted(script, size, silent)
    chunks, status = run(tried(nodes))
    if chunks is None:
        fruitless = nodes.calls[-TRIES:]
        assert (status, len(fruitless)) == (503, TRIES)
        assert len({call.options.resume_token_ids for call in fruitless}) == 1
        return
    assert tokens(chunks) == WHOLE
    assert [chunk.finish_reason for chunk in chunks].count("length") == 1
    assert chunks[-1].usage.restarts <= len(nodes.calls) - 1


async def tried(nodes):
    try:
        return await read(nodes), None
    except DilaserveError as error:
        return None, error.status


def test_the_next_node_gets_the_tokens_the_time_that_has_passed_the_seed_and_another_id():
    nodes = Scripted([3])
    assert tokens(run(read(nodes))) == WHOLE
    first, second = nodes.calls
    assert second.options.resume_token_ids == WHOLE[:8]
    assert 3400.0 < second.options.elapsed_ms < 3700.0  # three pieces of a second each, a pause, and what was before
    assert first.options.seed == second.options.seed is not None
    assert first.id == "mine" != second.id
    assert first.options.elapsed_ms == 500.0


def test_tokens_that_the_client_had_before_come_first():
    call = Call((1, 2, 3), Options(resume_token_ids=WHOLE[:10]), "mine")
    nodes = Scripted([2])
    assert tokens(run(read(nodes, call))) == WHOLE[10:]
    assert nodes.calls[1].options.resume_token_ids == WHOLE[:14]


def test_a_node_that_goes_before_it_has_begun_is_followed_by_one_that_gets_the_whole_request():
    nodes = Scripted([0, DRAINING])
    assert tokens(run(read(nodes))) == WHOLE
    assert [call.options.resume_token_ids for call in nodes.calls] == [(), (), ()]


@pytest.mark.parametrize("error", [Overloaded("all places are taken", retry_after=2.0), BadRequest("no", param="seed")])
def test_a_refusal_is_believed(error):
    nodes = Scripted([Failure.of(error)])
    with pytest.raises(DilaserveError, match=error.message) as refused:
        run(read(nodes))
    found = refused.value
    assert (found.status, found.code, found.param) == (error.status, error.code, error.param)
    assert found.retry_after == error.retry_after
    assert len(nodes.calls) == 1


def test_without_any_node_the_request_ends_within_a_bound():
    async def answer(call):
        await asyncio.sleep(1e6)
        yield Started("never")

    async def ask():
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable, match="no node has taken the request"):
            await ResumedStream(answer, CALL).begin()
        return asyncio.get_running_loop().time() - began

    assert run(ask()) == pytest.approx(START_WITHIN, abs=1.0)


def test_leaving_early_tells_the_node():
    left = []

    async def answer(call):
        try:
            async for piece in Scripted().answer(call):
                yield piece
        finally:
            left.append(call.id)

    async def ask():
        async with await ResumedStream(answer, CALL).begin() as stream:
            await anext(stream)

    run(ask())
    assert left == ["mine"]
