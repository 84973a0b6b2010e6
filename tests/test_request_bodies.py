"""Bodies that are meant to hurt: none stalls the event loop or takes more memory than allowed."""

import asyncio
import json

import pytest
import stalls
from hypothesis import given
from hypothesis import strategies as st

from dilaserve import Config
from dilaserve.errors import BadRequest, ConfigError, Unavailable
from dilaserve.server import json_shape
from dilaserve.server.intake import Claim, Intake
from dilaserve.server.loop_share import LoopShare

pytestmark = pytest.mark.asyncio(loop_scope="module")
STALL = 0.5  # seconds: ten times what an idle machine is held to, for this one is busy


@pytest.fixture(scope="module")
def target():
    with stalls.server() as target:
        yield target


@pytest.fixture(scope="module")
def shapes():
    return stalls.shapes()


@pytest.mark.parametrize("name", stalls.shapes(1000))
async def test_no_body_stalls_the_event_loop(target, shapes, name):
    seen = await asyncio.to_thread(stalls.drive, target, shapes[name], 4)
    assert seen.statuses <= {200, 400, 408, 413, 503}
    assert seen.stall < STALL, seen


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def parts(value):
    """Numbers of containers and of strings."""
    if isinstance(value, str):
        return 0, 1
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    found = [parts(one) for one in inner]
    return isinstance(value, list | dict) + sum(one[0] for one in found), sum(one[1] for one in found)


@given(JSON, st.integers(1, 50), st.booleans())
async def test_what_a_body_holds_is_counted_the_same_in_any_pieces(value, size, ascii):
    body, counter = json.dumps(value, ensure_ascii=ascii).encode(), json_shape.Counter()
    for start in range(0, len(body), size):
        counter.add(body[start : start + size])
    containers, strings = parts(value)
    assert (counter.found.containers, counter.found.strings) == (containers, 2 * strings)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * (json_shape.CONTAINERS + 1),
        b'{"prompt": [1' + b",1" * (json_shape.NUMBERS + 1),
        b'["a"' + b',"a"' * json_shape.STRINGS,
        b"[1" + b",1e5" * (json_shape.FRACTIONS + 1),
        b"[1" + b",1.5" * (json_shape.FRACTIONS + 1),
        b'"' + b"\\n" * (json_shape.ESCAPES + 1) + b'"',
    ],
)
async def test_a_body_that_holds_too_much_is_refused_before_it_is_decoded(body):
    with pytest.raises(BadRequest, match="the body holds more than"):
        json_shape.check(body)


async def test_text_may_hold_any_number_of_brackets():
    json_shape.check(json.dumps({"prompt": "[{,.e" * 200_000, "stop": ['"\\', "\\"]}).encode())


async def test_bodies_in_flight_are_bounded_and_short_bodies_are_still_accepted():
    intake = Intake(1_000_000, 4_000_000)
    try:
        claims = [Claim(intake) for _ in range(4)]
        for claim in claims[:3]:
            claim.grow(1_000_000)
        with pytest.raises(Unavailable, match="--max-inflight-bytes") as refused:
            claims[3].grow(1_000_000)
        assert refused.value.retry_after == 1.0
        claims[3].grow(100)
        claims[0].shrink(0)
        claims[3].grow(900_000)
        for claim in claims:
            claim.shrink(0)
        assert intake.held == 0
    finally:
        intake.close()
    with pytest.raises(ConfigError, match="--max-inflight-bytes 5 is less than"):
        Config.of(max_inflight_bytes=5)
    assert Config.of(max_body_bytes=100).server.inflight_bytes == 1600


async def test_unfinished_bodies_take_no_more_memory_than_allowed_and_give_it_back():
    with stalls.server("max_inflight_bytes=16777216") as target:
        before, within, after = await asyncio.to_thread(stalls.unfinished, target, 100)
    assert within - before < 200 * 2**20, (before, within)  # of 400 MiB that were sent
    assert after - before < 100 * 2**20, (before, after)


async def test_work_gets_half_of_the_loop(monkeypatch):
    now, slept = [0.0], []

    async def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("dilaserve.server.loop_share.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("dilaserve.server.loop_share.asyncio.sleep", sleep)
    pace = LoopShare()

    def work():
        now[0] += 0.010

    for _ in range(3):
        await pace.run(work)
    assert slept == [pytest.approx(0.008), pytest.approx(0.010)]
