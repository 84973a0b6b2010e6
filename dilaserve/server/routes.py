"""What each route answers."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from dilaserve import __version__
from dilaserve.engine import likelihood
from dilaserve.engine.engine import Completion
from dilaserve.engine.prompts import Message, Prompt, conversation
from dilaserve.engine.stream import AnswerStream, collect
from dilaserve.engine.submit import Options
from dilaserve.errors import BadRequest, NotFound, quoted
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
from dilaserve.server.backend import Backend
from dilaserve.server.http import HttpRequest, HttpResponse, json_response
from dilaserve.server.messages_events import MessagesFormat
from dilaserve.server.responses import Json, ResponseFormat
from dilaserve.server.responses_events import ResponsesFormat
from dilaserve.server.service import Service
from dilaserve.tokenizer.tokenizer import LONGEST, MARKS

log = logging.getLogger(__name__)
Handler = Callable[[Service, HttpRequest], Awaitable[HttpResponse]]
T = TypeVar("T")
Asked = TypeVar("Asked", bound=schema.Shared)


async def read(service: Service, request: HttpRequest, kind: type[T]) -> T:
    """The body as a request of this kind."""
    asked: list[T] = await service.intake.read(request, lambda body: schema.decoded(body, kind))
    return asked[0]


async def read_warned(service: Service, request: HttpRequest, kind: type[Asked]) -> tuple[Asked, list[str]]:
    """The body, and warnings about it, which go into the answer and the log."""
    asked, warnings = await service.intake.read(
        request, lambda body: schema.decoded(body, kind), lambda body: misspellings.misspelled(body, kind)
    )
    for warning in warnings:
        log.warning("request %s: %s", request.id, warning)
    return asked, warnings


def warned(service: Service, request: HttpRequest, asked: schema.Common, warnings: list[str]) -> list[str]:
    """Take over what the headers say; these warnings, and those about the headers, which gateways set every time."""
    ignored = openai.with_headers(asked, request.headers, service.backend)
    for warning in ignored:
        log.info("request %s: %s", request.id, warning)
    return warnings + ignored


async def front(service: Service, request: HttpRequest) -> HttpResponse:
    """The page; for clients that want JSON, what this is and the routes that it has."""
    if page_files.wants_page(request):
        return await service.page.answer(request, "index.html")
    routes = sorted({pattern for _, pattern, _ in ROUTES})
    return json_response({"service": "dilaserve", "version": __version__, "routes": routes})


async def static(service: Service, request: HttpRequest) -> HttpResponse:
    return await service.page.answer(request, request.names["name"])


async def statistics(service: Service, request: HttpRequest) -> HttpResponse:
    since = stats.since_of(request.query.get("since"))
    return json_response(await service.backend.stats(since, time.time()))


async def health(service: Service, request: HttpRequest) -> HttpResponse:
    await service.backend.check_alive()
    return json_response({"status": "ok"})


async def ready(service: Service, request: HttpRequest) -> HttpResponse:
    await service.backend.check_ready()
    return json_response({"status": "ready"})


async def version(service: Service, request: HttpRequest) -> HttpResponse:
    return json_response({"version": __version__})


async def measured(service: Service, request: HttpRequest) -> HttpResponse:
    return HttpResponse(await service.backend.metrics(), media_type="text/plain; charset=utf-8")


async def documented(service: Service, request: HttpRequest) -> HttpResponse:
    root = service.config.server.root_path
    return HttpResponse(openapi.document(root))


async def models(service: Service, request: HttpRequest) -> HttpResponse:
    engine = service.backend
    return json_response({"object": "list", "data": [card(engine, name) for name in served(engine)]})


async def model(service: Service, request: HttpRequest) -> HttpResponse:
    known(service.backend, request.names["model"])
    return json_response(card(service.backend, request.names["model"]))


def served(engine: Backend) -> list[str]:
    """Every name that the model answers to, the shown one first."""
    return list(dict.fromkeys([engine.model.name, *engine.config.model.names]))


def card(engine: Backend, name: str) -> Json:
    about = engine.model
    return {
        "id": name,
        "object": "model",
        "created": about.created,
        "owned_by": "dilaserve",
        "root": about.root,
        "max_model_len": about.max_model_len,
    }


def known(engine: Backend, name: str | None) -> None:
    if name is not None and name not in (names := served(engine)):
        raise NotFound(
            f"the model {quoted(name)} is not served here, only {', '.join(map(repr, names))}",
            param="model",
            code="model_not_found",
        )


async def chat(service: Service, request: HttpRequest) -> HttpResponse:
    asked, warnings = await read_warned(service, request, schema.ChatRequest)
    prompt = await chatted(service.backend, asked.messages)
    form = openais(service.backend, asked, warned(service, request, asked, warnings))
    return await respond(service, request, asked, form, [prompt])


async def responses(service: Service, request: HttpRequest) -> HttpResponse:
    asked, warnings = await read_warned(service, request, schema.ResponsesRequest)
    engine, heard = service.backend, responses_api.as_chat(asked)
    with heard.spelled():
        prompt = await chatted(engine, heard.chat.messages)
        warnings = warned(service, request, heard.chat, warnings)
        form = ResponsesFormat(openais(engine, heard.chat, warnings), responses_api.repeated(asked))
        return await respond(service, request, heard.chat, form, [prompt])


async def messages(service: Service, request: HttpRequest) -> HttpResponse:
    asked, warnings = await read_warned(service, request, schema.MessagesRequest)
    engine, heard = service.backend, messages_api.as_chat(asked)
    with heard.spelled():
        prompt = await chatted(engine, heard.chat.messages)
        warnings = warned(service, request, heard.chat, warnings)
        form = MessagesFormat(openais(engine, heard.chat, warnings), request.id)
        return await respond(service, request, heard.chat, form, [prompt])


async def count_tokens(service: Service, request: HttpRequest) -> HttpResponse:
    asked, engine = await read(service, request, schema.CountTokensRequest), service.backend
    heard = messages_api.counted(asked)
    known(engine, asked.model)
    with heard.spelled():
        ids = await engine.tokenize(await chatted(engine, heard.chat.messages))
    return json_response({"input_tokens": len(ids)})


def openais(engine: Backend, asked: schema.ChatRequest, warnings: Sequence[str]) -> ResponseFormat:
    """How OpenAI writes the answer of this chat."""
    wanted, ids = asked.stream_options, asked.return_token_ids
    return ResponseFormat(engine, True, bool(asked.logprobs), bool(asked.stop), warnings, wanted, ids)


async def chatted(engine: Backend, said: list[Message]) -> Prompt:
    return await engine.off_loop(MARKS * len(said), lambda: conversation(said, engine.text))


async def complete(service: Service, request: HttpRequest) -> HttpResponse:
    asked, warnings = await read_warned(service, request, schema.CompletionRequest)
    engine, prompts = service.backend, openai.prompts(asked.prompt)
    wanted, ids = asked.stream_options, asked.return_token_ids
    estimated = likelihood_api.wanted(asked, request.headers)
    warnings = warned(service, request, asked, warnings)
    form = ResponseFormat(engine, False, asked.logprobs is not None, bool(asked.stop), warnings, wanted, ids)
    if estimated is not None:
        return await score(service, request, asked, form, prompts, likelihood_api.sampling(estimated, asked.seed))
    return await respond(service, request, asked, form, prompts, bool(asked.echo))


async def score(
    service: Service,
    request: HttpRequest,
    asked: schema.CompletionRequest,
    form: ResponseFormat,
    prompts: Sequence[Prompt],
    sampling: likelihood.Sampling,
) -> HttpResponse:
    """Estimate the likelihood of each prompt, one after the other; leaving early cancels what runs."""
    engine, limit = service.backend, service.config.server.max_choices
    known(engine, asked.model)
    openai.choices_wanted(asked, len(prompts), limit, engine.config.scheduler.max_queue)
    tenant, tops, choices, spent, total = request.tenant, bool(asked.logprobs), list[Json](), 0, 0
    with counted(service, request, len(prompts)), openai.spelled(asked):
        options = openai.options(msgspec.structs.replace(asked, max_tokens=1, max_completion_tokens=None), 0, tenant)
        for id, prompt in zip(engine_ids(request, len(prompts)), prompts, strict=True):
            ids = await engine.tokenize(prompt, engine.model.max_model_len)
            found = await engine.estimate(ids, sampling, options, id)
            more = await generated(engine, ids, options, f"{id}-next") if likelihood_api.longest(asked) else None
            one = likelihood_api.choice(form, len(choices), ids, await echo(engine, prompt), found, more, tops)
            choices.append(one | {"likelihood": likelihood_api.estimated(found, sampling.fitted(len(ids)))})
            spent, total = spent + len(more.token_ids if more else ()), total + len(ids)
    return json_response(likelihood_api.answer(form, choices, total, spent))


async def generated(engine: Backend, ids: list[int], options: Options, id: str) -> Completion:
    async with await engine.submit(ids, options, id=id) as stream:
        return await collect(stream)


@contextlib.contextmanager
def counted(service: Service, request: HttpRequest, count: int) -> Iterator[None]:
    """So many requests of the key's owner run meanwhile. Raises `Overloaded` above what the key allows."""
    if (tenant := request.tenant) is None:
        yield
        return
    keys = service.keys
    keys.begin(tenant, count, asyncio.get_running_loop().time())
    try:
        yield
    finally:
        keys.end(tenant, count)


async def echo(engine: Backend, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else await spoken(engine, await engine.tokenize(prompt))


async def spoken(engine: Backend, ids: list[int]) -> str:
    return await engine.off_loop(len(ids), lambda: engine.detokenize(ids))


async def respond(
    service: Service,
    request: HttpRequest,
    asked: schema.Common,
    form: sse.AnswerFormat,
    prompts: Sequence[Prompt],
    echoes: bool = False,
) -> HttpResponse:
    """Start every choice, then answer whole or as a stream; leaving early cancels them all."""
    engine, limit = service.backend, service.config.server.max_choices
    known(engine, asked.model)
    openai.check_stream(asked)
    n = openai.choices_wanted(asked, len(prompts), limit, engine.config.scheduler.max_queue)
    ids = engine_ids(request, n * len(prompts))
    each = [await echo(engine, prompt) if echoes else "" for prompt in prompts for _ in range(n)]
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(counted(service, request, len(ids)))
        stack.callback(engine.traced(ids, request.headers))
        streams = list[AnswerStream]()
        for prompt in prompts:
            for _ in range(n):
                with openai.spelled(asked):
                    options = openai.options(asked, len(streams), request.tenant, engine.config.decode.seed)
                    started = await engine.submit(prompt, options, id=ids[len(streams)])
                streams.append(await stack.enter_async_context(started))
        form.begin(streams)
        prompt_tokens = sum(stream.prompt_tokens for stream in streams[::n])
        if asked.stream:
            return sse.relay(request, form, streams, each, prompt_tokens, stack.pop_all())
        completions = await asyncio.gather(*(collect(stream) for stream in streams))
        return json_response(form.answer(completions, each, prompt_tokens))


def engine_ids(request: HttpRequest, count: int) -> list[str]:
    """The engine's ids of a request's choices: the request's own, with numbers behind it for several.

    Clients may send the same id again while the first still runs, so an id of theirs is made unique.
    """
    id = request.id
    if "x-request-id" in request.headers:
        id = f"{id}-{secrets.token_hex(4)}"
    return [id] if count == 1 else [f"{id}-{index}" for index in range(count)]


async def quote(service: Service, request: HttpRequest) -> HttpResponse:
    asked = quote_api.asked(request.query)
    known(service.backend, asked.model)
    return json_response(await quote_api.answer(service.backend.quote, asked, request.tenant))


async def plan(service: Service, request: HttpRequest) -> HttpResponse:
    return json_response(await service.backend.plan())


async def replan(service: Service, request: HttpRequest) -> HttpResponse:
    asked = await read(service, request, plan_api.PlanRequest)
    return json_response(await service.backend.replan(asked))


async def tokenize(service: Service, request: HttpRequest) -> HttpResponse:
    asked, engine = await read(service, request, schema.TokenizeRequest), service.backend
    known(engine, asked.model)
    openai.check_tokenize(asked)
    prompt = asked.prompt if asked.prompt is not None else await chatted(engine, asked.messages or [])
    ids = await engine.tokenize(prompt)
    return json_response({"tokens": ids, "count": len(ids), "max_model_len": engine.model.max_model_len})


async def detokenize(service: Service, request: HttpRequest) -> HttpResponse:
    asked, engine = await read(service, request, schema.DetokenizeRequest), service.backend
    known(engine, asked.model)
    try:
        if len(asked.tokens) > LONGEST:
            raise BadRequest(f"{len(asked.tokens)} tokens are too many; send at most {LONGEST} at a time")
        ids = await engine.tokenize(asked.tokens)
    except BadRequest as error:
        raise BadRequest(error.message, param="tokens") from error
    return json_response({"prompt": await spoken(engine, ids)})


ROUTES: tuple[tuple[str, str, Handler], ...] = (  # a name in braces stands for a part of the path
    ("GET", "/", front),
    ("GET", "/static/{name}", static),
    ("GET", "/health", health),
    ("GET", "/ready", ready),
    ("GET", "/version", version),
    ("GET", "/metrics", measured),
    ("GET", "/openapi.json", documented),
    ("GET", "/v1/stats", statistics),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{model}", model),
    ("POST", "/v1/chat/completions", chat),
    ("POST", "/v1/completions", complete),
    ("POST", "/v1/responses", responses),
    ("POST", messages_api.MESSAGES, messages),
    ("POST", messages_api.COUNT_TOKENS, count_tokens),
    ("GET", "/v1/quote", quote),
    ("GET", "/v1/plan", plan),
    ("POST", "/v1/plan", replan),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
)
