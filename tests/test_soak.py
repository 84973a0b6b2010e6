"""What judges the soak runs: fuzz cases come again, faults of answers are seen, and counters are compared."""

import json
from collections import Counter

import pytest
from soaking import cases, wire
from soaking.asking import Known, Outcome, judged
from soaking.counters import added_up
from soaking.mixed import grown
from soaking.wire import Answer

EVENLY = dict.fromkeys(cases.KINDS, 1)
HEADERS = {"x-request-id": "a", "content-type": "application/json"}
ERROR = {"message": "wrong", "type": "invalid_request_error", "param": None, "code": None}


def error(status, headers=HEADERS, **changed):
    return Answer(status, headers, json.dumps({"error": ERROR | changed}).encode())


def test_a_case_depends_on_seed_and_number_only():
    first, again = [[cases.case(7, number, EVENLY) for number in range(100)] for _ in range(2)]
    assert first == again
    assert {case.kind for case in first} == set(cases.KINDS)
    assert cases.case(8, 3, EVENLY) != first[3]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(200, HEADERS, b"{}"), []),
        (error(400), []),
        (error(503, code="unavailable"), []),
        (error(504, code="deadline"), []),
        (error(500, code="internal"), ["undocumented 500 internal: wrong"]),
        (error(503), ["undocumented 503 None: wrong"]),
        (error(404, {}), ["404 without x-request-id"]),
        (Answer(404, HEADERS, b"404: Not Found"), ["404 not in OpenAI's shape: b'404: Not Found'"]),
        (error(400, message="a" * 5000), [f"400: a message of 5000 characters: {'a' * 80}…"]),
    ],
)
def test_faults_of_an_answer_are_named(answer, expected):
    assert wire.faults(answer) == expected


def test_a_stream_must_end_as_it_should():
    headers = HEADERS | {"content-type": "text/event-stream; charset=utf-8"}
    failed = ERROR | {"type": "server_error"}
    assert wire.faults(Answer(200, headers, b"data: {}\n\ndata: [DONE]\n\n")) == []
    assert wire.faults(Answer(200, headers, b"data: {}\n\n")) == ["a stream without [DONE]"]
    broken = b"data: " + json.dumps({"error": failed}, separators=(",", ":")).encode() + b"\n\n"
    assert wire.faults(Answer(200, headers, broken)) == [f"undocumented error in a stream: {failed}"]


@pytest.mark.parametrize(
    ("cache", "text", "refreshes", "expected"),
    [
        ("none", "abc", 9, Outcome.RIGHT),
        ("none", "abd", 9, Outcome.WRONG),
        ("dual, always refreshed", "abd", 9, Outcome.WRONG),
        ("dual", "abd", 4, Outcome.WRONG),  # nothing disturbed it
        ("dual", "abd", 5, Outcome.MOVED),
        ("dual", "abc", 5, Outcome.RIGHT),
    ],
)
def test_only_a_further_refresh_excuses_another_answer(cache, text, refreshes, expected):
    assert judged(Known(cache, {}, "abc", 4), text, refreshes) is expected


def test_counters_that_do_not_add_up_miss_their_goal():
    metrics = {f"dilaserve_{name}": 0.0 for name in ("requests_running", "requests_waiting")}
    names = ("steps", "step_rows", "wasted_seconds", "device_seconds", "workers_lost")
    metrics |= {f"dilaserve_{name}_total": 1.0 for name in names}
    metrics |= {f"dilaserve_deadlines_total {fate}": 2.0 for fate in ("met", "missed", "declined")}
    right = Counter({"met": 2, "missed": 2, "declined": 1, "given up": 1})
    assert all(figure.reached for figure in added_up(metrics, right, killed=1))
    missed = [
        figure.what for figure in added_up(metrics, right - Counter(["given up"]), killed=1) if not figure.reached
    ]
    assert missed == ["counted deadlines missed, declined or given up", "counted deadlines, all fates"]


@pytest.mark.parametrize(("sizes", "reached"), [([50, 90] + [100] * 18, True), ([100] * 10 + [102] * 10, False)])
def test_growth_counts_after_the_warm_up(sizes, reached):
    assert grown([size * 2**20 for size in sizes]).reached is reached
