"""/openapi.json: every route, its bodies, answers, events and errors, made from the structs of both directions."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import msgspec

from dilaserve import __version__
from dilaserve.engine.prompts import ROLES, TEXTS
from dilaserve.engine.submit import MAX_DEADLINE, MAX_TENANT_LENGTH
from dilaserve.server import answer_schema as out
from dilaserve.server import first_arrival, gateway_headers, messages_schema, responses_schema, schema
from dilaserve.server.likelihood_api import HEADER, KINDS
from dilaserve.server.messages_api import BLOCKS
from dilaserve.server.plan_api import PlanRequest
from dilaserve.server.quote_api import ABOUT, QuoteRequest
from dilaserve.server.responses_api import ITEMS
from dilaserve.types import MAX_TOP_LOGPROBS

Json = dict[str, Any]
REF = "#/components/schemas/{name}"


class Route(NamedTuple):
    """`answer` None: text. `events`: what an event of a stream holds. `open`: no key is asked for. `texts`: the media
    types of text that it has instead of, or beside, JSON. `query`: its parameters.
    """

    method: str
    path: str
    summary: str
    answer: type | None
    body: type | None = None
    events: tuple[type, ...] = ()
    open: bool = False
    texts: tuple[str, ...] = ()
    query: type | None = None


TEXT: Json = {"type": "string"}
LATENCY: Json = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_DEADLINE}
FILES = "text/css", "text/html", "text/javascript", "image/svg+xml"
CHAT = out.ChatCompletion, schema.ChatRequest, (out.ChatChunk, out.ChatCanvas)
COMPLETION = out.TextCompletion, schema.CompletionRequest, (out.TextChunk, out.TextCanvas)
RESPONSE = responses_schema.Response, schema.ResponsesRequest, (responses_schema.ResponseEvent,)
MESSAGE = messages_schema.AnthropicAnswer, schema.MessagesRequest, (messages_schema.MessageEvent,)
COUNT = messages_schema.TokenCount, schema.CountTokensRequest
ROUTES = (
    Route("post", "/v1/chat/completions", "Answer a conversation", *CHAT),
    Route("post", "/v1/completions", "Go on with a text", *COMPLETION),
    Route("post", "/v1/responses", "Answer, as OpenAI's responses", *RESPONSE),
    Route("post", "/v1/messages", "Answer, as Anthropic's messages", *MESSAGE),
    Route("post", "/v1/messages/count_tokens", "Count a message's tokens", *COUNT),
    Route("get", "/v1/models", "The models that are served", out.Models),
    Route("get", "/v1/models/{model}", "One model", out.Model),
    Route("get", "/v1/quote", "What would become of a request now", out.Quote, query=QuoteRequest),
    Route("get", "/v1/plan", "Which devices form instances, and what was before", out.PlanState),
    Route("post", "/v1/plan", "Change the plan; takes the admin key", out.PlanChange, PlanRequest),
    Route("post", "/tokenize", "Tokens of a text or a conversation", out.Tokens, schema.TokenizeRequest),
    Route("post", "/detokenize", "The text of tokens", out.Detokenized, schema.DetokenizeRequest),
    Route("get", "/v1/stats", "The last minutes, the plan, and the steps of requests", dict),
    Route(
        "get",
        "/",
        "The page for browsers; for clients that want JSON, the routes",
        dict,
        open=True,
        texts=("text/html",),
    ),
    Route("get", "/static/{name}", "A file of the page", None, open=True, texts=FILES),
    Route("get", "/health", "Whether the engine is alive", out.Status, open=True),
    Route("get", "/ready", "Whether requests are taken", out.Status, open=True),
    Route("get", "/version", "The server's version", out.Version, open=True),
    Route("get", "/metrics", "Counts for Prometheus", None, open=True, texts=("text/plain",)),
    Route("get", "/openapi.json", "This document", dict, open=True),
)
ERRORS = {
    400: "malformed, or asks for something that cannot be honoured; `param` names the field",
    401: "the key is missing or wrong",
    403: "the key does not allow it",
    404: "an unknown model or route",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "every place is taken, or the deadline cannot be met",
    500: "an error on our side; others are not affected",
    503: "starting or shutting down, or too many bytes are being received",
    504: "the deadline has passed",
}
RETRIED = (429, 503)
DONE = "[DONE]"  # what the streams of OpenAI's older routes end with
STRICT = ("Slo", "LikelihoodWish")  # parts of requests that take no other fields
LIMITED = ("integer", "number", "string")
HEADERS = {
    "x-request-id": ("the name of the request in answers and in the log; made if missing", {"type": "string"}),
    "x-slo-deadline-ms": ("`slo.deadline_ms`, for gateways that do not touch bodies", {"type": "number"}),
    "x-slo-class": ("`slo.class`", {"type": "string"}),
    "x-priority": ("`priority`", {"type": "integer"}),
    first_arrival.HEADER: ("Unix seconds at which the first server had it, see `slo.elapsed_ms`", {"type": "number"}),
    gateway_headers.OBJECTIVE: ("`slo.class`, where it names one and nothing else asks for a deadline", TEXT),
    gateway_headers.FAIRNESS_ID: ("`user`, where there is none", {"type": "string", "maxLength": MAX_TENANT_LENGTH}),
    gateway_headers.TTFT: ("milliseconds to the first token; a deadline with the next, or without `stream`", LATENCY),
    gateway_headers.TPOT: ("milliseconds for each token behind the first; a deadline with the one before", LATENCY),
}
LIKELIHOOD = {HEADER: ("`likelihood`, for clients that cannot touch the body", {"enum": [*KINDS]})}


def between(least: float, most: float | None = None) -> Json:
    return {"minimum": least} | ({} if most is None else {"maximum": most})


def above(least: float, most: float) -> Json:
    return {"exclusiveMinimum": least, "maximum": most}


def listed(items: Json) -> Json:
    return {"type": "array", "minItems": 1, "items": items}


TOKENS = listed({"type": "integer", "minimum": 0})
FIELDS: Mapping[str, tuple[str, Json]] = {  # of requests: what it says, and its limits
    "model": ("the name in /v1/models; may be left out", {}),
    "min_tokens": ("no end token and no stop string before", between(0)),
    "temperature": ("0, the default, takes the most probable token", between(0, 2)),
    "top_p": (
        "the smallest set of tokens of this probability; above temperature 0",
        {"exclusiveMinimum": 0, "maximum": 1},
    ),
    "top_k": ("so many most probable tokens; 0 or -1: all", between(-1)),
    "min_p": ("of at least this share of the best token's probability", between(0, 1)),
    "seed": ("the same seed gives the same text", between(-(2**63), 2**63 - 1)),
    "stop": ("up to 16 strings at which the text is cut", {}),
    "stop_token_ids": ("up to 32 tokens that end the answer", {}),
    "include_stop_str_in_output": ("what ends the answer is part of its text", {}),
    "stream": ("server-sent events instead of one answer", {}),
    "include_usage": ("a last event with the tokens of all choices", {}),
    "include_canvas": ("an event after each step with the open block: its tokens, masks and confidences", {}),
    "decode": ("the rule by which positions are unmasked", {}),
    "confidence_threshold": ("what reaches it is unmasked", between(0, 1)),
    "num_denoising_steps": ("a fixed number of steps", between(1)),
    "factor": ("of Fast-dLLM's rule", between(0)),
    "editing_threshold": ("tokens are replaced by others of this confidence", between(0, 1)),
    "block_length": ("tokens that are unmasked together", between(1)),
    "cache": ("the kind of K/V cache", {}),
    "refresh_interval": ("steps between refreshes within a block; 0: none", between(0)),
    "resume_token_ids": ("the answer's tokens that the client has; it goes on behind them, with what is new alone", {}),
    "return_token_ids": ("token ids of the prompt and of the answer, as vLLM gives them", {}),
    "elapsed_ms": ("milliseconds since the request came to the first server that had it", between(0, MAX_DEADLINE)),
    "ignore_eos": ("go on behind the model's end tokens", {}),
    "slo": ("the deadline", {}),
    "deadline_ms": (
        "milliseconds from arrival to the end of the answer",
        {"exclusiveMinimum": 0, "maximum": MAX_DEADLINE},
    ),
    "on_miss": ("what becomes of a request whose deadline cannot be met", {}),
    "priority": ("each level counts twice as much as the one below", between(-8, 8)),
    "min_confidence_threshold": ("no deadline lowers the threshold below", between(0, 1)),
    "max_tokens": ("tokens of the answer, at most", between(1)),
    "max_completion_tokens": ("another name of max_tokens, which it replaces", between(1)),
    "max_output_tokens": ("tokens of the answer, at most", between(1)),
    "n": ("answers to each prompt", between(1)),
    "user": ("the tenant", {"maxLength": 512}),
    "top_logprobs": ("most probable tokens of each position", between(0, MAX_TOP_LOGPROBS)),
    "groups": ("parts into which the tokens are divided", between(1)),
    "rounds": ("divisions of the tokens whose values are averaged", between(1)),
    "start": ("the first token that is scored", between(0)),
}


PLACES: Mapping[tuple[str, str], Json] = {  # limits of single structs' fields
    ("Message", "role"): {"enum": list(ROLES)},
    ("AnthropicMessage", "role"): {"enum": list(ROLES)},
    ("InputItem", "role"): {"enum": [*ROLES, None]},
    ("InputItem", "type"): {"enum": list(ITEMS)},
    ("ContentBlock", "type"): {"enum": list(BLOCKS)},
    ("Part", "type"): {"enum": list(TEXTS)},
    ("CompletionRequest", "prompt"): {"anyOf": [TEXT, listed(TEXT), TOKENS, listed(TOKENS)]},
    ("CompletionRequest", "max_tokens"): {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
    ("ChatRequest", "messages"): {"minItems": 1},
    ("MessagesRequest", "messages"): {"minItems": 1},
    ("CountTokensRequest", "messages"): {"minItems": 1},
}


@cache
def document(root_path: str = "") -> bytes:
    """The document as JSON; `root_path` is the prefix under which a proxy serves all this."""
    return msgspec.json.encode(described(root_path))


def described(root_path: str) -> Json:
    types = {one for route in ROUTES for one in (route.answer, route.body, *route.events) if one not in (None, dict)}
    named = sorted({*types, out.Error, messages_schema.AnthropicError}, key=lambda one: one.__name__)
    _, components = msgspec.json.schema_components(named, ref_template=REF)
    paths: dict[str, Json] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "DiLaServe",
            "version": __version__,
            "description": "Serves a diffusion language model. Fields that are refused stand in the server's README.",
        },
        "servers": [{"url": "/" + root_path.strip("/")}],
        "security": [{"bearer": []}, {"x-api-key": []}],
        "paths": paths,
        "components": {
            "schemas": {name: explained(one) for name, one in components.items()},
            "responses": responses(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def operation(route: Route) -> Json:
    words = route.path.replace("{", "").replace("}", "").replace(".", "/").split("/")
    found: Json = {
        "operationId": "_".join([route.method, *filter(None, words)]),
        "summary": route.summary,
        "responses": {"200": answer(route)} | errors(route),
    }
    if route.open:
        found["security"] = []
    if route.body:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": of(route.body)}}}
    headers = HEADERS | (LIKELIHOOD if route.body is schema.CompletionRequest else {}) if route.events else {}
    parameters = [parameter(name, *about) for name, about in headers.items()]
    places = re.findall(r"{(\w+)}", route.path)
    parameters += [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in places]
    parameters += asked(route.query) if route.query else []
    return found | ({"parameters": parameters} if parameters else {})


def asked(query: type) -> list[Json]:
    """The parameters of a query."""
    _, components = msgspec.json.schema_components([query], ref_template=REF)
    one, found = components[query.__name__], list[Json]()
    for name, about in one["properties"].items():
        text = FIELDS[name][0] if name in FIELDS else ABOUT[name]
        kind = {key: value for key, value in field(name, about).items() if key not in ("description", "default")}
        needed = name in one["required"]
        found.append({"name": name, "in": "query", "required": needed, "description": text, "schema": kind})
    return found


def answer(route: Route) -> Json:
    content: Json = {kind: {"schema": TEXT} for kind in route.texts}
    if route.answer:
        content["application/json"] = {"schema": {"type": "object"} if route.answer is dict else of(route.answer)}
    if route.events:
        content["text/event-stream"] = {"schema": event(route)}
    return {
        "description": "the answer; with `stream: true` events of it" if route.events else "the answer",
        "content": content,
    }


def event(route: Route) -> Json:
    """One event of a stream, with its data as text, as OpenAPI 3.2 describes events too."""
    kinds = [of(one) for one in (*route.events, error_of(route))]
    holds = {"contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    data = {"anyOf": [{"const": DONE}, holds]} if out.Error is error_of(route) else holds
    return {"type": "object", "required": ["data"], "properties": {"event": TEXT, "data": TEXT | data}}


def errors(route: Route) -> Json:
    """What may go wrong; Anthropic's routes have the shape that Anthropic's clients read."""
    codes = set(ERRORS) if route.body else {500, 503} if route.open else {401, 404, 500, 503}
    codes |= {404} if "{" in route.path else {400} if route.query else set()
    kind = "Anthropic" if error_of(route) is messages_schema.AnthropicError else ""
    return {str(code): {"$ref": f"#/components/responses/{kind}{code}"} for code in sorted(codes)}


def error_of(route: Route) -> type:
    return messages_schema.AnthropicError if route.path.startswith("/v1/messages") else out.Error


def responses() -> Json:
    kinds = {"": out.Error, "Anthropic": messages_schema.AnthropicError}
    return {f"{name}{code}": error(code, kind) for name, kind in kinds.items() for code in ERRORS}


def error(code: int, kind: type) -> Json:
    found: Json = {"description": ERRORS[code], "content": {"application/json": {"schema": of(kind)}}}
    if code in RETRIED:
        about = {"description": "seconds after which trying again makes sense", "schema": {"type": "integer"}}
        found["headers"] = {"retry-after": about}
    return found


def parameter(name: str, about: str, kind: Json) -> Json:
    return {"name": name, "in": "header", "description": about, "schema": kind}


def of(kind: type) -> Json:
    return {"$ref": REF.format(name=kind.__name__)}


def explained(one: Json) -> Json:
    """A struct's schema, with what `FIELDS` says of its fields; answers, which take no others, stay as they are."""
    if "additionalProperties" in one and one.get("title") not in STRICT:
        return one
    fields = {
        name: field(name, about) | PLACES.get((one["title"], name), {})
        for name, about in one.get("properties", {}).items()
    }
    return one | {"properties": fields}


def field(name: str, about: Json) -> Json:
    if name not in FIELDS:
        return about
    text, limits = FIELDS[name]
    kinds = [one | (limits if one.get("type") in LIMITED else {}) for one in about.get("anyOf", [])]
    return about | {"description": text} | ({"anyOf": kinds} if kinds else limits)
