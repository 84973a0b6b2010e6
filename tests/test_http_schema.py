"""Bodies as they come in: what is honoured, what is harmless, and what is refused by name."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.engine.prompts import ROLES, Message, conversation
from dilaserve.errors import MAX_ECHO, BadRequest, quoted, shortened
from dilaserve.server import openai, unsupported
from dilaserve.server.misspellings import misspelled
from dilaserve.server.schema import (
    MAX_DEFAULT,
    REFUSED,
    ChatRequest,
    CompletionRequest,
    CountTokensRequest,
    DetokenizeRequest,
    MessagesRequest,
    ResponsesRequest,
    TokenizeRequest,
    decoded,
)

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BODIES = {
    ChatRequest: CHAT,
    CompletionRequest: {"prompt": "hi"},
    TokenizeRequest: {"prompt": "hi"},
    DetokenizeRequest: {"tokens": [1]},
    ResponsesRequest: {"input": "hi"},
    MessagesRequest: CHAT | {"max_tokens": 8},
    CountTokensRequest: CHAT,
}
KINDS = list(BODIES)
DEFAULTS = {  # as OpenAI's and vLLM's references give them
    **{"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none"},
    **{"parallel_tool_calls": True, "functions": [], "function_call": "auto", "modalities": ["text"]},
    **{"response_format": {"type": "text"}, "suffix": "", "best_of": 1, "top_logprobs": 0, "store": False},
    **{"reasoning_effort": "medium", "verbosity": "medium", "service_tier": "auto", "metadata": {"run": "7"}},
    **{"repetition_penalty": 1.0, "length_penalty": 1.0, "use_beam_search": False, "logits_processors": []},
    **{"bad_words": [], "skip_special_tokens": True, "spaces_between_special_tokens": True, "documents": []},
    **{"continue_final_message": False, "add_generation_prompt": True, "chat_template_kwargs": {}},
    **{"mm_processor_kwargs": {}, "return_token_ids": False, "return_tokens_as_token_ids": False},
    **{"include_reasoning": True, "guided_json_object": False, "kv_transfer_params": {}, "vllm_xargs": {}},
    **{"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "min_tokens": 0, "stop": []},
    **{"stop_token_ids": [], "include_stop_str_in_output": False, "ignore_eos": False, "stream": False},
    **{"priority": 0, "user": "", "stream_options": {"include_usage": False}, "seed": 0},
}
OTHERS = {  # what changes the answer, and cannot be honoured
    **{"frequency_penalty": 0.1, "presence_penalty": -2, "logit_bias": {"5": 1}, "tools": [{"type": "function"}]},
    **{"tool_choice": "required", "response_format": {"type": "json_object"}, "suffix": "x", "best_of": 2},
    **{"audio": {"voice": "x"}, "modalities": ["text", "audio"], "prediction": {"content": "x"}},
    **{"reasoning_effort": "high", "verbosity": "low", "web_search_options": {}, "store": True},
    **{"repetition_penalty": 1.1, "length_penalty": 0.9, "use_beam_search": True, "logits_processors": ["x"]},
    **{"prompt_logprobs": 0, "allowed_token_ids": [1], "bad_words": ["x"], "skip_special_tokens": False},
    **{"guided_json": {}, "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "a", "regex": "a"},
    **{"structured_outputs": {"regex": "a"}, "truncate_prompt_tokens": 5, "continue_final_message": True},
    **{"add_generation_prompt": False, "documents": [{}], "chat_template": "x", "chat_template_kwargs": {"a": 1}},
    **{"request_id": "x", "return_tokens_as_token_ids": True, "mm_processor_kwargs": {"a": 1}, "no_stop_trim": True},
}


def body(kind, **fields):
    return json.dumps(BODIES[kind] | fields).encode()


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_every_field_at_its_default_is_accepted(kind):
    for name, value in DEFAULTS.items():
        openai.check_stream(decoded(body(kind, **{name: value}), kind))
    openai.options(decoded(body(kind, **DEFAULTS), kind), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_null_is_the_default_of_every_field_that_is_not_needed(kind):
    fields = {*(field.encode_name for field in msgspec.structs.fields(kind)), *REFUSED.get(kind, ())}
    decoded(body(kind, **dict.fromkeys(fields - BODIES[kind].keys() - {"messages", "prompt"})), kind)
    for message in ("content", "refusal", "name", "tool_calls", "tool_call_id", "function_call"):
        decoded(body(ChatRequest, messages=[{"role": "assistant", message: None}]), ChatRequest)


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_whatever_else_a_refused_field_says_is_refused_by_name(kind):
    for name, value in OTHERS.items():
        with pytest.raises(BadRequest, match=f"{name} cannot be honoured") as caught:
            decoded(body(kind, **{name: value}), kind)
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in REFUSED])
def test_each_refused_field_takes_null_and_no_nonsense(kind):
    for name, about in REFUSED[kind].items():
        decoded(body(kind, **{name: None}), kind)
        if about.harmless is not unsupported.anything:
            with pytest.raises(BadRequest, match="cannot be honoured"):
                decoded(body(kind, **{name: {"non": "sense"}}), kind)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"null", "the body must be an object, not null"),
        (b"[1]", "the body must be an object, not a list"),
        (
            b'{"messages": [], "slo": {"deadlin_ms": 5}}',
            "slo has no field 'deadlin_ms'; correct its name or leave it out",
        ),
    ],
)
def test_a_body_of_another_shape_is_told_in_plain_words(body, words):
    with pytest.raises(BadRequest, match=words):
        decoded(body, ChatRequest)


def test_a_bias_of_nothing_is_harmless_and_true_is_no_number():
    decoded(body(ChatRequest, logit_bias={"5": 0, "6": 0.0}), ChatRequest)
    for name in ("frequency_penalty", "best_of"):
        with pytest.raises(BadRequest):
            decoded(body(ChatRequest, **{name: False}), ChatRequest)


def test_a_long_value_of_a_refused_field_is_refused_unread():
    with pytest.raises(BadRequest, match="tools cannot be honoured"):
        decoded(b'{"messages": [], "tools": ' + b"[" + b"[]," * MAX_DEFAULT + b"[]]}", ChatRequest)
    for broken in (b'"\xff"', b'"\\ud83d"', b"[" * 5000 + b"]" * 5000):
        with pytest.raises(BadRequest):
            decoded(b'{"messages": [], "tools": ' + broken + b"}", ChatRequest)


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("top-p", "top_p"),
        ("stops", "stop"),
        ("guided_jsn", "guided_json"),
        ("confidence_treshold", "confidence_threshold"),
    ],
)
def test_a_misspelled_field_is_told(sent, meant):
    (warning,) = misspelled(body(ChatRequest, **{sent: 1}), ChatRequest)
    assert warning == f"the field {sent!r} is unknown and was ignored; did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("kind", "sent", "meant"),
    [
        *[(ChatRequest, name, f"slo.{name}") for name in ("deadline_ms", "class", "on_miss", "task")],
        (CompletionRequest, "deadlineMs", "slo.deadline_ms"),
        (CompletionRequest, "deadline", "slo.deadline_ms"),
        (ChatRequest, "include_usage", "stream_options.include_usage"),
        (ChatRequest, "max_output_tokens", "max_tokens"),
        (ChatRequest, "system", "messages"),
        (ResponsesRequest, "max_tokens", "max_output_tokens"),
        (MessagesRequest, "max_new_tokens", "max_tokens"),
        (MessagesRequest, "user", "metadata.user_id"),
    ],
)
def test_a_field_in_the_wrong_place_is_told_of_the_right_one(kind, sent, meant):
    (warning,) = misspelled(body(kind, **{sent: 1}), kind)
    assert warning == f"the field {sent!r} is unknown and was ignored; did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("kind", "none", "some"),
    [
        (ChatRequest, {"tool_choice": "none"}, {"tool_choice": "auto"}),
        (CompletionRequest, {"tool_choice": "none"}, {}),
        (ResponsesRequest, {"tool_choice": "none"}, {"tool_choice": "required"}),
        (MessagesRequest, {"tool_choice": {"type": "none"}}, {"tool_choice": {"type": "auto"}}),
    ],
)
def test_tools_are_accepted_where_none_may_be_called(kind, none, some):
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * MAX_DEFAULT}}]
    decoded(body(kind, tools=tools, **none), kind)
    with pytest.raises(BadRequest, match="tools cannot be honoured: answers hold no calls of tools"):
        decoded(body(kind, tools=tools, **some), kind)
    if kind is ChatRequest:
        decoded(body(kind, functions=tools, function_call="none"), kind)


def test_no_known_and_no_strange_field_is_a_misspelled_one():
    for kind in (ChatRequest, CompletionRequest):
        known = {*(field.encode_name for field in msgspec.structs.fields(kind)), *REFUSED[kind]}
        assert misspelled(body(kind, **dict.fromkeys(known)), kind) == []
        assert misspelled(body(kind, new_field_of_next_month=1, x=2), kind) == []


def test_warnings_are_few_and_short_whatever_is_sent():
    many = {f"temperatur{i}": 1 for i in range(1000)}
    assert len(misspelled(body(ChatRequest, **many), ChatRequest)) == 8
    assert misspelled(body(ChatRequest, **{f"temperature{i}": 1 for i in range(20_000)}), ChatRequest) == []
    assert misspelled(body(ChatRequest, **{"temperature" * 100: 1}), ChatRequest) == []


class Knows:
    """A text whose template knows these roles."""

    def __init__(self, *roles):
        self.roles = roles

    def knows_role(self, role):
        return role in self.roles


def spoken(*messages, knows=()):
    return conversation([msgspec.convert(message, Message) for message in messages], Knows(*knows))


def test_every_text_part_is_text():
    parts = [{"type": kind, "text": kind[0]} for kind in ("text", "input_text", "output_text")]
    message = {"role": "user", "content": [*parts, {"type": "refusal", "refusal": "no"}, "!"]}
    assert spoken(message) == [{"role": "user", "content": "tiono!"}]
    for part in ({"type": "image_url"}, {"type": "text"}, {"type": "refusal", "text": "no"}, {"type": "x" * 500}):
        with pytest.raises(BadRequest, match="is not text") as caught:
            spoken({"role": "user", "content": [part]})
        assert (caught.value.param, len(caught.value.message) < 200) == ("messages[0].content", True)


def test_tool_calls_and_their_results_become_text():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    custom = {"id": "c2", "type": "custom", "custom": {"name": "shell", "input": "ls"}}
    assert spoken(
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call, custom]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "a.txt"}]},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": "so", "function_call": {"name": "f", "arguments": {"a": 1}}},
        {"role": "function", "name": "f", "content": "y"},
    ) == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": 'Call weather({"city": "Oslo"})\nCall shell(ls)'},
        {"role": "user", "content": "Result of weather: rain"},
        {"role": "user", "content": "Result of shell: a.txt"},
        {"role": "user", "content": "Result of the tool: x"},
        {"role": "assistant", "content": 'so\nCall f({"a":1})'},
        {"role": "user", "content": "Result of f: y"},
    ]


def test_only_assistant_messages_may_be_empty():
    assert spoken({"role": "assistant", "content": None}) == [{"role": "assistant", "content": ""}]
    assert spoken({"role": "assistant", "refusal": "no"}) == [{"role": "assistant", "content": "no"}]
    for role in ROLES.keys() - {"assistant"}:
        with pytest.raises(BadRequest, match="needs content"):
            spoken({"role": role, "content": None})


def test_a_developer_is_a_system_where_the_template_knows_none():
    message = {"role": "developer", "content": "x"}
    assert spoken(message)[0]["role"] == "system"
    assert spoken(message, knows=["developer"])[0]["role"] == "developer"


def test_seeds_wrap():
    request = decoded(body(ChatRequest, seed=2**63 - 1), ChatRequest)
    assert [openai.options(request, choice).seed for choice in (0, 1, 2)] == [2**63 - 1, -(2**63), -(2**63) + 1]
    request = decoded(body(ChatRequest, seed=-(2**63)), ChatRequest)
    assert [openai.options(request, choice).seed for choice in (0, 1)] == [-(2**63), -(2**63) + 1]


def test_the_text_of_a_tokenizer_has_the_special_tokens_it_has_here():
    messages = {"messages": CHAT["messages"]}
    for sent in (
        {"prompt": "x"},
        {"prompt": "x", "add_special_tokens": True},
        messages | {"add_special_tokens": False},
    ):
        openai.check_tokenize(decoded(json.dumps(sent).encode(), TokenizeRequest))
    for sent in ({"prompt": "x", "add_special_tokens": False}, messages | {"add_special_tokens": True}, {}):
        with pytest.raises(BadRequest):
            openai.check_tokenize(decoded(json.dumps(sent).encode(), TokenizeRequest))


@given(st.text() | st.integers() | st.lists(st.text()) | st.floats())
def test_no_error_repeats_more_than_its_share(value):
    assert len(quoted(value)) <= MAX_ECHO
    assert len(shortened(str(value))) <= MAX_ECHO


def test_numbers_of_any_size_are_quoted():
    assert quoted(10**5000) == "a number of 16610 bits"
    assert quoted(-3) == "-3"


@given(st.data())
def test_a_body_with_any_bytes_changed_is_refused_in_a_sentence_or_read(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    sent = bytearray(body(kind, max_tokenz=1, user="Zoë", stop=["é"]))
    for place, value in data.draw(
        st.dictionaries(st.integers(0, len(sent) - 1), st.integers(0, 255), max_size=3)
    ).items():
        sent[place] = value
    try:
        decoded(sent, kind)
    except BadRequest:
        return
    misspelled(sent, kind)


@pytest.mark.parametrize("text", [b'"\x98ax_tokens": 1', b'"x": "\xcb"', b'"x": {"\x98": 1}'])
def test_bytes_that_are_no_utf_8_are_refused_also_in_unknown_fields(text: bytes) -> None:
    with pytest.raises(BadRequest, match="not valid JSON: 'utf-8' codec"):
        decoded(b'{"prompt": "hi", ' + text + b"}", CompletionRequest)
