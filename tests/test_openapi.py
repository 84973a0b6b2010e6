"""/openapi.json: a valid document, of all routes, that says what requests and answers really hold."""

import msgspec
import pytest
from http_requests import CHAT, COMPLETE, HELLO, post
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from dilaserve.server import routes, schema
from dilaserve.server.openapi import FIELDS, ROUTES, document

DOCUMENT = msgspec.json.decode(document())
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ASKED = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
BODIES = [
    (CHAT, HELLO | LOGPROBS | {"temprature": 1}),
    (CHAT, HELLO | {"slo": {"deadline_ms": 60_000}, "n": 2}),
    (CHAT, HELLO | {"return_token_ids": True, "resume_token_ids": [5, 6], "slo": {"elapsed_ms": 10.5}}),
    (COMPLETE, {"prompt": ["hello", "you"], "max_tokens": 8, "return_token_ids": True, "n": 2}),
    (COMPLETE, {"prompt": ["hello", "you"], "max_tokens": 8, "logprobs": 2}),
    (COMPLETE, {"prompt": "hello", "max_tokens": 8, "echo": True}),
    (COMPLETE, {"prompt": "hello", "max_tokens": 8}),
    (RESPONSES, {"input": "hello", "max_output_tokens": 8, "top_logprobs": 1}),
    (RESPONSES, {"input": [{"role": "user", "content": "hi"}], "instructions": "x", "metadata": {"a": "b"}}),
    (MESSAGES, ASKED),
    (MESSAGES, ASKED | {"resume_token_ids": [5]}),
    (MESSAGES, ASKED | {"system": "x", "maxTokens": 1}),
]


def check(name, value):
    """Raise an error that names what of the value is not as the document says."""
    Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}).validate(value)


def check_event(content, data):
    """The same for the data of an event."""
    stated = content["text/event-stream"]["schema"]
    held = stated["properties"]["data"]
    Draft202012Validator(stated).validate({"data": data})
    kind = held.get("contentSchema") or held["anyOf"][1]["contentSchema"]
    Draft202012Validator(kind | {"components": DOCUMENT["components"]}).validate(msgspec.json.decode(data))


def name_of(content):
    return content["schema"]["$ref"].rpartition("/")[2]


def answered(path, method="post", code="200"):
    """What the document says of an answer, by content type."""
    found = DOCUMENT["paths"][path][method]["responses"][code]
    if "$ref" in found:
        found = DOCUMENT["components"]["responses"][found["$ref"].rpartition("/")[2]]
    return found["content"]


def test_the_document_is_valid():
    validate(DOCUMENT)
    assert msgspec.json.decode(document("/llm/"))["servers"] == [{"url": "/llm"}]


def test_all_routes_of_the_application_are_described():
    served = {(method.lower(), pattern) for method, pattern, _ in routes.ROUTES}
    assert served == {(route.method, route.path) for route in ROUTES}


def test_what_the_document_says_of_fields_is_of_fields_that_there_are():
    kinds = [route.body for route in ROUTES if route.body] + [schema.Slo, schema.LikelihoodWish, schema.StreamOptions]
    names = {field.encode_name for kind in kinds for field in msgspec.structs.fields(kind)}
    assert FIELDS.keys() <= names
    assert set(schema.Shared.__struct_fields__) <= FIELDS.keys()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_answers_and_events_are_what_the_document_says(client, path, body):
    check(name_of(DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]), body)
    content = answered(path)
    status, answer, _ = await post(client, path, body)
    assert status == 200, answer
    check(name_of(content["application/json"]), answer)
    wished = {"include_usage": True, "include_canvas": True, "continuous_usage_stats": True}
    options = {} if path in (RESPONSES, MESSAGES) else {"stream_options": wished}
    async with client.post(path, json=body | {"stream": True} | options) as response:
        raw = (await response.read()).decode()
    data = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: {")]
    assert len(data) > 3
    for one in data:
        check_event(content, one)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_likelihood_is_what_the_document_says(client):
    for wish in ({"likelihood": "pseudo", "max_tokens": 0}, {"likelihood": {"groups": 2}, "max_tokens": 1}):
        body = {"prompt": ["hello", "you"], "echo": True, "logprobs": 1} | wish
        check("CompletionRequest", body)
        status, answer, _ = await post(client, COMPLETE, body)
        assert status == 200, answer
        check("TextCompletion", answer)


@pytest.mark.asyncio(loop_scope="module")
async def test_answers_of_other_routes_are_what_the_document_says(client):
    paths = [route.path for route in ROUTES if route.method == "get" and route.answer not in (None, dict)]
    for path in paths:
        query = {"prompt_tokens": 5} if path == "/v1/quote" else {}
        async with client.get(path.replace("{model}", "random"), params=query) as response:
            assert response.status == 200, path
            check(name_of(answered(path, "get")["application/json"]), await response.json())
    async with client.get("/openapi.json") as response:
        assert (await response.read(), response.content_type) == (document(), "application/json")
    others = {
        "/tokenize": {"prompt": "hello"},
        "/detokenize": {"tokens": [104, 105]},
        f"{MESSAGES}/count_tokens": {"messages": ASKED["messages"]},
    }
    for path, body in others.items():
        _, answer, _ = await post(client, path, body)
        check(name_of(answered(path)["application/json"]), answer)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_page_and_its_files_are_of_the_types_that_the_document_names(client):
    for path in ("/", "/static/style.css", "/static/icon.svg", "/static/api.js", "/static/none"):
        route = path if path == "/" else "/static/{name}"
        async with client.get(path) as response:
            assert response.content_type in answered(route, "get", str(response.status)), path


@pytest.mark.asyncio(loop_scope="module")
async def test_errors_are_what_the_document_says(client):
    for path in (CHAT, COMPLETE, RESPONSES, MESSAGES):
        status, answer, _ = await post(client, path, {"max_tokens": "x", "max_output_tokens": "x"})
        check(name_of(answered(path, code=str(status))["application/json"]), answer)
