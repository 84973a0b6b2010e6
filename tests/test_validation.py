"""One check for HTTP and Python: whatever a caller passes is right, or `BadRequest` says what to change."""

import array
import enum
import math
import re

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilaserve.engine.prompts import Message, conversation, is_conversation, listed, token_ids
from dilaserve.engine.submit import Options, validated
from dilaserve.errors import BadRequest
from dilaserve.server import openai
from dilaserve.server.schema import ChatRequest, decoded

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
SHARED = sorted(set(Options.__struct_fields__) & set(ChatRequest.__struct_fields__))  # fields of both


class Template:
    def __init__(self, *roles):
        self.roles = roles

    def knows_role(self, role):
        return role in self.roles


class Unhashable(str):
    __hash__ = None


class Kind(str, enum.Enum):  # noqa: UP042 - whose hash and text are not the string's
    CACHE = "prefix"
    ROLE = "user"


@pytest.mark.parametrize(
    ("wishes", "param", "words"),
    [
        (dict(cache="foo"), "cache", "one of none, prefix, dual, exact, not 'foo'"),
        (dict(cache=["none"]), "cache", "a string, not a list"),
        (dict(cache=object()), "cache", "a string, not an object"),
        (dict(on_miss="foo"), "on_miss", "one of best_effort, reject, cancel_when_late"),
        (dict(on_miss=None), "on_miss", "not null"),
        (dict(decode=3), "decode", "a string, not an integer"),
        (dict(user=["a"]), "user", "a string, not a list"),
        (dict(user=b"a"), "user", "a string, not bytes"),
        (dict(user="\ud800"), "user", "half of a surrogate pair"),
        (dict(task=["x"]), "task", "a string, not a list"),
        (dict(task={"x": 1}), "task", "a string, not an object"),
        (dict(slo_class=3), "slo_class", "a string, not an integer"),
        (dict(max_tokens="3"), "max_tokens", "an integer, not a string"),
        (dict(max_tokens=3.0), "max_tokens", "an integer, not a float"),
        (dict(max_tokens=True), "max_tokens", "an integer, not a boolean"),
        (dict(max_tokens=np.int64(3)), "max_tokens", "an integer, not numpy.int64"),
        (dict(temperature=np.float32(0.5)), "temperature", "a number, not numpy.float32"),
        (dict(temperature="warm"), "temperature", "a number, not a string"),
        (dict(temperature=True), "temperature", "a number, not a boolean"),
        (dict(temperature=1j), "temperature", "a number, not complex"),
        (dict(temperature=math.inf), "temperature", "between 0 and 2, not inf"),
        (dict(temperature=math.nan), "temperature", "between 0 and 2, not nan"),
        (dict(temperature=10**400), "temperature", "out of range"),
        (dict(deadline_ms="3"), "deadline_ms", "a number, not a string"),
        (dict(deadline_ms=math.nan), "deadline_ms", "above 0"),
        (dict(deadline_ms=math.inf), "deadline_ms", "at most 86400000"),
        (dict(deadline_ms=0), "deadline_ms", "above 0"),
        (dict(stop=None), "stop", "a list, not null"),
        (dict(stop="end"), "stop", "a list, not a string"),
        (dict(stop=("a", 3)), "stop[1]", "a string, not an integer"),
        (dict(stop=iter("a")), "stop", "a list, not"),
        (dict(stop_token_ids=(1, "2")), "stop_token_ids[1]", "an integer, not a string"),
        (dict(ignore_eos=1), "ignore_eos", "true or false, not an integer"),
        (dict(seed="7"), "seed", "an integer, not a string"),
        (dict(priority=1.5), "priority", "an integer, not a float"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_it_must_be(wishes, param, words):
    with pytest.raises(BadRequest) as caught:
        validated(Options(**wishes))
    assert caught.value.param == param
    assert words in caught.value.message
    assert len(caught.value.message) < 250


@pytest.mark.parametrize("options", [{}, {"max_tokens": 3}, "fast", 3, [], Options])
def test_only_options_are_accepted_as_options(options):
    with pytest.raises(
        BadRequest, match=r"options must be (dilaserve\.)?Options, not \w+; write Options\(max_tokens=32\)"
    ):
        validated(options)


def test_lenient_forms_of_values_are_accepted():
    found = validated(Options(temperature=1, stop=["a"], stop_token_ids=[1], user=Unhashable("u"), cache=Kind.CACHE))
    assert found == Options(temperature=1.0, stop=("a",), stop_token_ids=(1,), user="u", cache="prefix")
    assert (type(found.temperature), type(found.user), type(found.cache)) == (float, str, str)
    assert validated(None) == Options()


def test_old_names_are_taken_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"tenant=…\) is deprecated; write user"):
        assert validated(Options(tenant="t")) == Options(user="t")
    with pytest.warns(DeprecationWarning, match=r"write deadline_ms \(in milliseconds\)") as warned:
        assert validated(Options(deadline=1.5)) == Options(deadline_ms=1500.0)
    assert warned[0].filename == __file__
    for both in (dict(tenant="t", user="u"), dict(deadline=1.0, deadline_ms=1000.0)):
        with pytest.warns(DeprecationWarning, match="write"), pytest.raises(BadRequest, match="is an old name of"):
            validated(Options(**both))
    for bad in (dict(deadline="3"), dict(deadline=10**400), dict(deadline=math.nan), dict(tenant=["t"])):
        with pytest.warns(DeprecationWarning, match="write"), pytest.raises(BadRequest):
            validated(Options(**bad))


def outcome(call):
    """What a call returns, or the `BadRequest` that it raises."""
    try:
        return call()
    except BadRequest as error:
        return error


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from([np.int64(3), np.float64(0.5), np.array([1]), object(), Options, 10**400, -(10**400), 1j])
    | st.sampled_from(["dual", "none", "best_effort", "reject", "steps", "factor"]),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), some, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*SHARED, "deadline_ms", "on_miss", "task", "slo_class"]), ANYTHING, max_size=3))
def test_whatever_passes_has_the_types_that_the_scheduler_counts_on(wishes):
    found = outcome(lambda: validated(Options(**wishes)))
    if isinstance(found, BadRequest):
        assert 0 < len(found.message) < 300
        return
    assert msgspec.convert(msgspec.structs.asdict(found), Options) == found
    hash(found)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(SHARED), st.none() | st.booleans() | st.integers() | st.text(), max_size=3))
def test_what_http_accepts_python_accepts_as_well(fields):
    options = outcome(lambda: openai.options(decoded(msgspec.json.encode(CHAT | fields), ChatRequest), 0))
    if isinstance(options, Options):
        found = outcome(lambda: validated(options))  # a value may be out of its range, and never of another type
        assert isinstance(found, Options) or not re.search("must be an? ", found.message)


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([{"role": "usr", "content": "x"}], "messages[0].role", "'usr' is not one of system"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role", "a string, not a list"),
        ([{"role": "user"}], "messages[0].content", "needs content"),
        ([{"role": "user", "content": None}], "messages[0].content", "needs content"),
        ([{"role": "user", "content": 3}], "messages[0].content", "a string or a list, not an integer"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]", "not an integer"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content", "half of a surrogate pair"),
        ([{"content": "x"}], "messages[0].role", "is missing"),
        ([{"role": "user", "content": "x"}, {}], "messages[1].role", "is missing"),
        ([{1: 2}], "messages[0]", "strings as keys"),
        ([{"role": "assistant", "function_call": {"name": "f", "arguments": object()}}], "messages", "JSON"),
        ([], "messages", "must not be empty"),
    ],
)
def test_a_message_that_cannot_be_is_named(messages, param, words):
    with pytest.raises(BadRequest) as caught:
        conversation(messages, Template())
    assert (caught.value.param, words in caught.value.message) == (param, True)


def test_messages_from_python_are_those_from_http():
    said = [{"role": Kind.ROLE, "content": [{"type": "text", "text": "a"}, "b"]}, {"role": "tool", "content": "c"}]
    read = [msgspec.convert(one | {"role": one["role"]}, Message) for one in said]
    assert conversation(said, Template()) == conversation(read, Template())
    assert conversation(conversation(said, Template()), Template()) == [
        {"role": "user", "content": "ab"},
        {"role": "user", "content": "Result of the tool: c"},
    ]


@pytest.mark.parametrize(
    "prompt",
    [
        *(None, 3, 1.5, b"text", bytearray(b"x"), memoryview(b"x"), {"role": "user"}, {1, 2}, iter([1]), object()),
        *(np.array([1, 2]), np.array(1), [np.int64(1)], [1.0], [True], [None], ["a"], [[1]], [-1], [512], [10**30]),
        *([{"role": "user", "content": "x"}, "y"], "\ud800"),
    ],
)
def test_a_value_that_is_no_prompt_is_refused_with_the_allowed_types(prompt):
    def read():
        held = listed(prompt)
        return "a conversation" if is_conversation(held) else token_ids(held, 512)

    assert isinstance(found := outcome(read), BadRequest)
    assert found.param == "prompt"


def test_every_sequence_of_ids_is_a_prompt():
    for prompt in ([1, 2], (1, 2), range(1, 3), array.array("i", [1, 2])):
        assert token_ids(listed(prompt), 512) == [1, 2]
    assert token_ids([], 512) == []
