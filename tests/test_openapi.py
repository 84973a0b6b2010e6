"""/openapi.json: a valid document, of all routes, that says what requests and answers really hold."""

import msgspec
import pytest
from http_requests import CHAT, COMPLETE, HELLO, post, stream
from jsonschema import Draft202012Validator, ValidationError
from openapi_spec_validator import validate

from dilaserve.engine.canvas import Canvas
from dilaserve.server import schema
from dilaserve.server.app import application
from dilaserve.server.openapi import FIELDS, ROUTES, document

DOCUMENT = msgspec.json.decode(document())
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ASKED = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
BODIES = [
    (CHAT, HELLO | LOGPROBS | {"temprature": 1}),
    (CHAT, HELLO | {"slo": {"deadline_ms": 60_000}, "n": 2}),
    (COMPLETE, {"prompt": ["hello", "you"], "max_tokens": 8, "logprobs": 2}),
    (COMPLETE, {"prompt": "hello", "max_tokens": 8, "echo": True}),
    (COMPLETE, {"prompt": "hello", "max_tokens": 8}),
    (RESPONSES, {"input": "hello", "max_output_tokens": 8, "top_logprobs": 1}),
    (RESPONSES, {"input": [{"role": "user", "content": "hi"}], "instructions": "x", "metadata": {"a": "b"}}),
    (MESSAGES, ASKED),
    (MESSAGES, ASKED | {"system": "x", "maxTokens": 1}),
]


def check(content, value):
    """Raise an error that names what of the value is not as the document says."""
    Draft202012Validator(content["schema"] | {"components": DOCUMENT["components"]}).validate(value)


def named(name):
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


def answered(path, method="post", code="200"):
    """What the document says of an answer, by content type."""
    found = DOCUMENT["paths"][path][method]["responses"][code]
    if "$ref" in found:
        found = DOCUMENT["components"]["responses"][found["$ref"].rpartition("/")[2]]
    return found["content"]


def test_the_document_is_valid():
    validate(DOCUMENT)
    assert msgspec.json.decode(document("/llm/"))["servers"] == [{"url": "/llm"}]


@pytest.mark.asyncio(loop_scope="module")
async def test_all_routes_of_the_application_are_described(engine):
    routes = application(engine, engine.config).router.routes()
    served = {(one.method.lower(), one.resource.canonical.replace(":.+", "")) for one in routes if one.method != "HEAD"}
    assert served == {(route.method, route.path) for route in ROUTES}


def test_what_the_document_says_of_fields_is_of_fields_that_there_are():
    kinds = [route.body for route in ROUTES if route.body] + [schema.Slo, schema.StreamOptions]
    names = {field.encode_name for kind in kinds for field in msgspec.structs.fields(kind)}
    assert FIELDS.keys() <= names
    assert set(schema.Shared.__struct_fields__) <= FIELDS.keys()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_answers_and_events_are_what_the_document_says(client, path, body):
    check(DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"], body)
    content = answered(path)
    status, answer, _ = await post(client, path, body)
    assert status == 200, answer
    check(content["application/json"], answer)
    options = {} if path in (RESPONSES, MESSAGES) else {"stream_options": {"include_usage": True}}
    async with client.post(path, json=body | {"stream": True} | options) as response:
        raw = (await response.read()).decode()
    data = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: {")]
    assert len(data) > 3
    for one in data:
        check(content["text/event-stream"], msgspec.json.decode(one))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [(CHAT, HELLO, "ChatCanvasChunk"), (COMPLETE, {"prompt": "hello", "max_tokens": 8}, "TextCanvasChunk")],
)
async def test_canvases_of_a_stream_are_what_the_document_says(client, path, body, kind):
    chunks = await stream(client, path, body | {"stream_options": {"include_canvas": True}})
    canvases = [chunk for chunk in chunks if "canvas" in chunk.get("dilaserve", {})]
    assert canvases
    for chunk in chunks:
        check(answered(path)["text/event-stream"], chunk)
    for chunk in canvases:
        check(named(kind), chunk)
        chunk["dilaserve"]["canvas"]["other"] = 1
        with pytest.raises(ValidationError):
            check(answered(path)["text/event-stream"], chunk)
    fields = DOCUMENT["components"]["schemas"]["ShownCanvas"]
    assert set(fields["required"]) == set(fields["properties"]) == {*Canvas.__struct_fields__, "masked"}
    asked = DOCUMENT["components"]["schemas"]["StreamOptions"]["properties"]["include_canvas"]
    assert "open block" in asked["description"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_likelihood_is_what_the_document_says(client):
    samples = {"kind": "monte-carlo", "samples": 2}
    for wish in (
        {"likelihood": "pseudo", "max_tokens": 0},
        {"likelihood": {"groups": 2}, "max_tokens": 1},
        {"likelihood": samples, "max_tokens": 0},
    ):
        body = {"prompt": ["hello", "you"], "echo": True, "logprobs": 1} | wish
        check(named("CompletionRequest"), body)
        status, answer, _ = await post(client, COMPLETE, body)
        assert status == 200, answer
        check(named("TextCompletion"), answer)


@pytest.mark.asyncio(loop_scope="module")
async def test_answers_of_other_routes_are_what_the_document_says(client):
    paths = [route.path for route in ROUTES if route.method == "get" and route.answer not in (None, dict)]
    for path in paths:
        async with client.get(path.replace("{model}", "random")) as response:
            assert response.status == 200, path
            check(answered(path, "get")["application/json"], await response.json())
    async with client.get("/openapi.json") as response:
        assert (await response.read(), response.content_type) == (document(), "application/json")
    others = {
        "/tokenize": {"prompt": "hello"},
        "/detokenize": {"tokens": [104, 105]},
        f"{MESSAGES}/count_tokens": {"messages": ASKED["messages"]},
    }
    for path, body in others.items():
        _, answer, _ = await post(client, path, body)
        check(answered(path)["application/json"], answer)


@pytest.mark.asyncio(loop_scope="module")
async def test_errors_are_what_the_document_says(client):
    for path in (CHAT, COMPLETE, RESPONSES, MESSAGES):
        status, answer, _ = await post(client, path, {"max_tokens": "x", "max_output_tokens": "x"})
        check(answered(path, code=str(status))["application/json"], answer)
