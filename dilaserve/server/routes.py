"""What each route answers."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec
from aiohttp import web

from dilaserve import __version__
from dilaserve.engine import likelihood
from dilaserve.engine.engine import Engine, Stream
from dilaserve.engine.prompts import Message, Prompt, conversation
from dilaserve.engine.stream import collect
from dilaserve.errors import (
    BadRequest,
    DilaserveError,
    NotFound,
    Unavailable,
    quoted,
)
from dilaserve.server import (
    likelihood_api,
    messages_api,
    misspellings,
    openai,
    openapi,
    page_files,
    plan_api,
    quote_api,
    responses_api,
    schema,
    sse,
    stats,
)
from dilaserve.server.app_keys import CONFIG, ENGINE, INTAKE, KEYS, PAGE, TELEMETRY, TENANT
from dilaserve.server.guard import json_response, refused
from dilaserve.server.messages_events import MessagesFormat
from dilaserve.server.responses import Json, ResponseFormat
from dilaserve.server.responses_events import ResponsesFormat
from dilaserve.tokenizer.tokenizer import LONGEST, MARKS

log = logging.getLogger(__name__)
T = TypeVar("T")
Asked = TypeVar("Asked", bound=schema.Shared)


async def read(request: web.Request, kind: type[T]) -> T:
    """The body as a request of this kind."""
    asked: list[T] = await request.app[INTAKE].read(request, lambda body: schema.decoded(body, kind))
    return asked[0]


async def read_warned(request: web.Request, kind: type[Asked]) -> tuple[Asked, list[str]]:
    """The body, and warnings about it, which go into the answer and the log."""
    asked, warnings = await request.app[INTAKE].read(
        request, lambda body: schema.decoded(body, kind), lambda body: misspellings.misspelled(body, kind)
    )
    for warning in warnings:
        log.warning("request %s: %s", request[sse.REQUEST_ID], warning)
    return asked, warnings


async def front(request: web.Request) -> web.StreamResponse:
    """The page; for clients that want JSON, what this is and the routes that it has."""
    if page_files.wants_page(request):
        return await request.app[PAGE].answer(request, "index.html")
    routes = sorted({resource.canonical for resource in request.app.router.resources()})
    return json_response({"service": "dilaserve", "version": __version__, "routes": routes})


async def static(request: web.Request) -> web.StreamResponse:
    return await request.app[PAGE].answer(request, request.match_info["name"])


async def statistics(request: web.Request) -> web.StreamResponse:
    since = stats.since_of(request.query.get("since"))
    return json_response(stats.shown(request.app[ENGINE], request.app[TELEMETRY].history, since, time.time()))


async def health(request: web.Request) -> web.StreamResponse:
    return (
        json_response({"status": "ok"})
        if request.app[ENGINE].alive
        else refused(DilaserveError("the engine has stopped"), request)
    )


async def ready(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    if not engine.ready:
        raise Unavailable("the server is draining" if engine.draining else "no worker is ready", retry_after=1.0)
    return json_response({"status": "ready"})


async def version(request: web.Request) -> web.StreamResponse:
    return json_response({"version": __version__})


async def measured(request: web.Request) -> web.StreamResponse:
    return web.Response(body=request.app[TELEMETRY].text(), content_type="text/plain", charset="utf-8")


async def documented(request: web.Request) -> web.StreamResponse:
    root = request.app[CONFIG].server.root_path
    return web.Response(body=openapi.document(root), content_type="application/json")


async def models(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    return json_response({"object": "list", "data": [card(engine, name) for name in served(engine)]})


async def model(request: web.Request) -> web.StreamResponse:
    known(request.app[ENGINE], request.match_info["model"])
    return json_response(card(request.app[ENGINE], request.match_info["model"]))


def served(engine: Engine) -> list[str]:
    """Every name that the model answers to, the shown one first."""
    return list(dict.fromkeys([engine.model.name, *engine.config.model.names]))


def card(engine: Engine, name: str) -> Json:
    about = engine.model
    return {
        "id": name,
        "object": "model",
        "created": about.created,
        "owned_by": "dilaserve",
        "root": about.root,
        "max_model_len": about.max_model_len,
    }


def known(engine: Engine, name: str | None) -> None:
    if name is not None and name not in (names := served(engine)):
        raise NotFound(
            f"the model {quoted(name)} is not served here, only {', '.join(map(repr, names))}",
            param="model",
            code="model_not_found",
        )


async def chat(request: web.Request) -> web.StreamResponse:
    asked, warnings = await read_warned(request, schema.ChatRequest)
    engine = request.app[ENGINE]
    return await respond(request, asked, openais(engine, asked, warnings), [await chatted(engine, asked.messages)])


async def responses(request: web.Request) -> web.StreamResponse:
    asked, warnings = await read_warned(request, schema.ResponsesRequest)
    engine, heard = request.app[ENGINE], responses_api.as_chat(asked)
    form = ResponsesFormat(openais(engine, heard.chat, warnings), responses_api.repeated(asked))
    with heard.spelled():
        prompt = await chatted(engine, heard.chat.messages)
        return await respond(request, heard.chat, form, [prompt])


async def messages(request: web.Request) -> web.StreamResponse:
    asked, warnings = await read_warned(request, schema.MessagesRequest)
    engine, heard = request.app[ENGINE], messages_api.as_chat(asked)
    form = MessagesFormat(openais(engine, heard.chat, warnings), request[sse.REQUEST_ID])
    with heard.spelled():
        prompt = await chatted(engine, heard.chat.messages)
        return await respond(request, heard.chat, form, [prompt])


async def count_tokens(request: web.Request) -> web.StreamResponse:
    asked, engine = await read(request, schema.CountTokensRequest), request.app[ENGINE]
    heard = messages_api.counted(asked)
    known(engine, asked.model)
    with heard.spelled():
        ids = await engine.tokenize(await chatted(engine, heard.chat.messages))
    return json_response({"input_tokens": len(ids)})


def openais(engine: Engine, asked: schema.ChatRequest, warnings: Sequence[str]) -> ResponseFormat:
    """How OpenAI writes the answer of this chat."""
    wanted, ids = asked.stream_options, asked.return_token_ids
    return ResponseFormat(engine, True, bool(asked.logprobs), bool(asked.stop), warnings, wanted, ids)


async def chatted(engine: Engine, said: list[Message]) -> Prompt:
    return await engine.off_loop(MARKS * len(said), lambda: conversation(said, engine.text))


async def complete(request: web.Request) -> web.StreamResponse:
    asked, warnings = await read_warned(request, schema.CompletionRequest)
    engine, prompts = request.app[ENGINE], openai.prompts(asked.prompt)
    wanted, ids = asked.stream_options, asked.return_token_ids
    form = ResponseFormat(engine, False, asked.logprobs is not None, bool(asked.stop), warnings, wanted, ids)
    if (estimated := likelihood_api.wanted(asked, request.headers)) is not None:
        return await score(request, asked, form, prompts, likelihood_api.sampling(estimated, asked.seed))
    return await respond(request, asked, form, prompts, bool(asked.echo))


async def score(
    request: web.Request,
    asked: schema.CompletionRequest,
    form: ResponseFormat,
    prompts: Sequence[Prompt],
    sampling: likelihood.Sampling,
) -> web.StreamResponse:
    """Estimate the likelihood of each prompt, one after the other; leaving early cancels what runs."""
    engine, limit = request.app[ENGINE], request.app[CONFIG].server.max_choices
    known(engine, asked.model)
    openai.with_headers(asked, request.headers)
    openai.choices_wanted(asked, len(prompts), limit, engine.config.scheduler.max_queue)
    tenant, tops, choices, spent, total = request.get(TENANT), bool(asked.logprobs), list[Json](), 0, 0
    with counted(request, len(prompts)), openai.spelled(asked):
        options = openai.options(msgspec.structs.replace(asked, max_tokens=1, max_completion_tokens=None), 0, tenant)
        for id, prompt in zip(engine_ids(request, len(prompts)), prompts, strict=True):
            ids = await engine.tokenize(prompt, engine.model.max_model_len)
            found = await likelihood.estimate(engine, ids, sampling, options, id)
            more = await engine.generate(ids, options) if likelihood_api.longest(asked) else None
            one = likelihood_api.choice(form, len(choices), ids, await echo(engine, prompt), found, more, tops)
            choices.append(one | {"likelihood": likelihood_api.estimated(found, sampling.fitted(len(ids)))})
            spent, total = spent + len(more.token_ids if more else ()), total + len(ids)
    return json_response(likelihood_api.answer(form, choices, total, spent))


@contextlib.contextmanager
def counted(request: web.Request, count: int) -> Iterator[None]:
    """So many requests of the key's owner run meanwhile. Raises `Overloaded` above what the key allows."""
    if (tenant := request.get(TENANT)) is None:
        yield
        return
    keys = request.app[KEYS]
    keys.begin(tenant, count, asyncio.get_running_loop().time())
    try:
        yield
    finally:
        keys.end(tenant, count)


async def echo(engine: Engine, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else await spoken(engine, await engine.tokenize(prompt))


async def spoken(engine: Engine, ids: list[int]) -> str:
    return await engine.off_loop(len(ids), lambda: engine.detokenize(ids))


async def respond(
    request: web.Request, asked: schema.Common, form: sse.AnswerFormat, prompts: Sequence[Prompt], echoes: bool = False
) -> web.StreamResponse:
    """Start every choice, then answer whole or as a stream; leaving early cancels them all."""
    engine, limit = request.app[ENGINE], request.app[CONFIG].server.max_choices
    known(engine, asked.model)
    openai.check_stream(asked)
    openai.with_headers(asked, request.headers)
    n = openai.choices_wanted(asked, len(prompts), limit, engine.config.scheduler.max_queue)
    ids = engine_ids(request, n * len(prompts))
    each = [await echo(engine, prompt) if echoes else "" for prompt in prompts for _ in range(n)]
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(counted(request, len(ids)))
        if tracing := request.app[TELEMETRY].tracing:
            tracing.begin(ids, request.headers)
            stack.callback(tracing.answered, ids)
        tenant, streams = request.get(TENANT), list[Stream]()
        for prompt in prompts:
            for _ in range(n):
                with openai.spelled(asked):
                    options = openai.options(asked, len(streams), tenant, engine.config.decode.seed)
                    started = await engine.submit(prompt, options, id=ids[len(streams)])
                streams.append(await stack.enter_async_context(started))
        form.begin(streams)
        prompt_tokens = sum(stream.prompt_tokens for stream in streams[::n])
        if asked.stream:
            return await sse.relay(request, form, streams, each, prompt_tokens)
        completions = await asyncio.gather(*(collect(stream) for stream in streams))
        return json_response(form.answer(completions, each, prompt_tokens))


def engine_ids(request: web.Request, count: int) -> list[str]:
    """The engine's ids of a request's choices: the request's own, with numbers behind it for several.

    Clients may send the same id again while the first still runs, so an id of theirs is made unique.
    """
    id = request[sse.REQUEST_ID]
    if "x-request-id" in request.headers:
        id = f"{id}-{secrets.token_hex(4)}"
    return [id] if count == 1 else [f"{id}-{index}" for index in range(count)]


async def quote(request: web.Request) -> web.StreamResponse:
    engine, asked = request.app[ENGINE], quote_api.asked(request.query)
    known(engine, asked.model)
    return json_response(quote_api.answer(engine, asked, request.get(TENANT)))


async def plan(request: web.Request) -> web.StreamResponse:
    return json_response(plan_api.shown(request.app[ENGINE]))


async def replan(request: web.Request) -> web.StreamResponse:
    asked, engine = await read(request, plan_api.PlanRequest), request.app[ENGINE]
    change = await engine.replan(plan_api.wanted(asked), plan_api.because(asked))
    return json_response(plan_api.as_json(engine, change))


async def tokenize(request: web.Request) -> web.StreamResponse:
    asked, engine = await read(request, schema.TokenizeRequest), request.app[ENGINE]
    known(engine, asked.model)
    openai.check_tokenize(asked)
    prompt = asked.prompt if asked.prompt is not None else await chatted(engine, asked.messages or [])
    ids = await engine.tokenize(prompt)
    return json_response({"tokens": ids, "count": len(ids), "max_model_len": engine.model.max_model_len})


async def detokenize(request: web.Request) -> web.StreamResponse:
    asked, engine = await read(request, schema.DetokenizeRequest), request.app[ENGINE]
    known(engine, asked.model)
    try:
        if len(asked.tokens) > LONGEST:
            raise BadRequest(f"{len(asked.tokens)} tokens are too many; send at most {LONGEST} at a time")
        ids = await engine.tokenize(asked.tokens)
    except BadRequest as error:
        raise BadRequest(error.message, param="tokens") from error
    return json_response({"prompt": await spoken(engine, ids)})
