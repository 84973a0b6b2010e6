"""The rules by which latencies and objectives in headers become a deadline or a class."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dilaserve.engine.submit import MAX_DEADLINE
from dilaserve.errors import BadRequest
from dilaserve.server import gateway_headers
from dilaserve.server.gateway_headers import OBJECTIVE, TPOT, TTFT, AskedSlo

milliseconds = st.floats(min_value=0.001, max_value=1e6)


@given(first=milliseconds, each=milliseconds, tokens=st.integers(0, 10**6), streamed=st.booleans())
def test_a_deadline_leaves_each_token_its_time(first, each, tokens, streamed):
    wanted = first + each * max(0, tokens - 1)
    assume(abs(wanted - MAX_DEADLINE) > 1e-3)
    headers = {TTFT: repr(first), TPOT: repr(each)}
    if wanted > MAX_DEADLINE:
        with pytest.raises(BadRequest, match=TPOT):
            gateway_headers.slo(headers, tokens, streamed, ())
    else:
        assert gateway_headers.slo(headers, tokens, streamed, ()) == AskedSlo(pytest.approx(wanted), None, ())


def honoured_or_refused(*asked):
    try:
        return gateway_headers.slo(*asked)
    except BadRequest as error:
        return error


@given(
    headers=st.dictionaries(st.sampled_from([TTFT, TPOT, OBJECTIVE]), st.one_of(st.text(), milliseconds.map(str))),
    tokens=st.integers(0, 4096),
    streamed=st.booleans(),
    classes=st.sets(st.text(min_size=1)),
)
def test_whatever_headers_say_is_honoured_warned_of_or_refused(headers, tokens, streamed, classes):
    found = honoured_or_refused(headers, tokens, streamed, classes)
    if isinstance(found, BadRequest):
        assert found.param in headers
        return
    assert found.deadline_ms is None or 0 < found.deadline_ms <= MAX_DEADLINE
    assert found.class_ is None or (found.class_ in classes and found.deadline_ms is None)
    honoured = {OBJECTIVE} if found.class_ is not None else set()
    honoured |= {TTFT, TPOT} if found.deadline_ms is not None else set()
    ignored = {warning.partition(" ")[0] for warning in found.warnings}
    assert not honoured & ignored
    assert {name for name, value in headers.items() if value} <= honoured | ignored
