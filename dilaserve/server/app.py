"""The application: routes, the order of checks around every request, and the life from listening to the last answer."""

import asyncio
import contextlib
import gc
import hmac
import logging
import math
import os
import re
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
from aiohttp import web

from dilaserve import __version__
from dilaserve.config import Config
from dilaserve.engine.assembly import Assemble, real
from dilaserve.engine.engine import Engine, Stream
from dilaserve.engine.prompts import Message, Prompt, conversation
from dilaserve.engine.stream import collect
from dilaserve.errors import (
    BadRequest,
    DilaserveError,
    Forbidden,
    NotFound,
    Unauthorized,
    Unavailable,
    quoted,
    shortened,
)
from dilaserve.executor.worker_processes import Progress
from dilaserve.server import listening, metrics, openai, plan_api, schema, sse
from dilaserve.server.connection import Connection
from dilaserve.server.feeder import Feeder
from dilaserve.server.intake import Intake
from dilaserve.server.paths import rooted
from dilaserve.server.responses import Json, ResponseFormat, failure
from dilaserve.system import child_processes, signals
from dilaserve.tokenizer.tokenizer import LONGEST, MARKS

log = logging.getLogger(__name__)
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Announce = Callable[[str, str, bool, bool], None]  # address, model, whether a key is needed, whether it chats
Asked = TypeVar("Asked", bound=schema.Common)
ENGINE: web.AppKey[Engine] = web.AppKey("engine", Engine)
CONFIG: web.AppKey[Config] = web.AppKey("config", Config)
INTAKE: web.AppKey[Intake] = web.AppKey("intake", Intake)
IDLE_WITHIN = 75.0  # seconds for the whole head of the next request, before a connection is closed; proxies keep 60
LINGER = 2.0  # seconds that answers get to leave after the engine is done
PLAN = "/v1/plan"
OPEN = {"/health", "/ready", "/version", "/metrics"}  # no key needed
STATUSES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 408: "timeout", 415: "unsupported_type"}
STATUSES[417] = "expectation_failed"
_json = msgspec.json.Encoder()


async def serve(
    config: Config,
    progress: Progress,
    announce: Announce,
    assemble: Assemble = real,
    sockets: Sequence[socket.socket] | None = None,
) -> int:
    """Load, listen, and on SIGTERM or SIGINT finish what runs; a second signal exits at once.

    `sockets` are bound to the configured addresses, or that is done here after loading. Returns the exit code, 1 when
    the engine itself has broken (the log says how). Raises `ConfigError` before any port opens when the model or the
    address cannot be used.
    """
    loop, stop, me = asyncio.get_running_loop(), asyncio.Event(), asyncio.current_task()
    started = False

    def interrupt() -> None:
        if stop.is_set():
            child_processes.kill()
            os._exit(1)
        stop.set()
        if not started and me:
            signals.leave_soon(0)
            me.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, interrupt)
    try:
        async with Engine(config, progress, assemble) as engine, running(engine, config, sockets) as address:
            started = True
            freeze()
            announce(address, engine.model.name, config.server.api_key is not None, engine.text.template is not None)
            if engine.advice:
                log.info("%s", engine.advice)
            ended = asyncio.create_task(engine.ended())
            await asyncio.wait([ended, waiting := asyncio.create_task(stop.wait())], return_when="FIRST_COMPLETED")
            waiting.cancel()
            if ended.done():
                return 1
            ended.cancel()
            log.info("stopping: %d requests are running", len(engine.streams))
            await engine.drain(config.server.grace_period)
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    return 0


def freeze() -> None:
    """What loading has made stays; the collector no longer stops the event loop to look at all of it."""
    gc.collect()
    gc.freeze()


@contextlib.asynccontextmanager
async def running(engine: Engine, config: Config, sockets: Sequence[socket.socket] | None = None) -> AsyncIterator[str]:
    """The application on its addresses; gives them as the ready line shows them."""
    server = config.server
    with listening.bound(server.host, server.port) if sockets is None else contextlib.nullcontext(sockets) as bound:
        runner = web.AppRunner(application(engine, config), handler_cancellation=True, shutdown_timeout=LINGER)
        await runner.setup()
        try:
            async with opened(runner.server, bound, server.root_path):
                yield " and ".join(map(listening.url, bound))
        finally:
            await runner.cleanup()


@contextlib.asynccontextmanager
async def opened(server: web.Server | None, sockets: Sequence[socket.socket], root_path: str) -> AsyncIterator[None]:
    """What web.SockSite does, with connections of our own."""
    assert server
    server.request_factory = rooted(server.request_factory, root_path)
    server.request_handler = answered(server.request_handler)  # type: ignore[assignment]

    def connected() -> Connection:
        return Connection(  # which inflates nothing: it would, without a bound, what comes behind a refusal
            server,
            feeder,
            loop=loop,
            keepalive_timeout=IDLE_WITHIN,
            access_log=None,
            auto_decompress=False,
        )

    loop = asyncio.get_running_loop()
    feeder = Feeder(loop)
    async with contextlib.AsyncExitStack() as stack:
        for one in sockets:
            try:
                listener = await loop.create_server(connected, sock=listening.inheritable(one), backlog=1024)
            except OSError as error:
                host, port = one.getsockname()[:2]
                raise listening.refusal(host, port, error) from error
            stack.callback(listener.close)
        yield


def application(engine: Engine, config: Config) -> web.Application:
    app = web.Application(middlewares=[guarded], client_max_size=config.server.max_body_bytes)
    app[ENGINE], app[CONFIG] = engine, config
    app[INTAKE] = Intake(config.server.max_body_bytes, config.server.inflight_bytes)
    app.on_cleanup.append(close_intake)
    app.add_routes(
        [
            web.get("/health", health),
            web.get("/ready", ready),
            web.get("/version", version),
            web.get("/metrics", measured),
            web.get("/v1/models", models),
            web.get("/v1/models/{model:.+}", model),
            web.post("/v1/chat/completions", chat),
            web.post("/v1/completions", complete),
            web.get(PLAN, plan),
            web.post(PLAN, replan),
            web.post("/tokenize", tokenize),
            web.post("/detokenize", detokenize),
        ]
    )
    return app


async def close_intake(app: web.Application) -> None:
    app[INTAKE].close()


# around every request


def answered(handle: Handler) -> Handler:
    """What answers every request, inside aiohttp's routing and outside: the answer has an id and OpenAI's shape."""

    async def identified(request: web.Request) -> web.StreamResponse:
        given = request.headers.get("x-request-id", "")
        id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else secrets.token_hex(12)
        request[sse.REQUEST_ID] = id
        try:
            response = await handle(request)
        except web.HTTPException as error:  # an expectation that is refused before any route
            response = respelled(error, request)
        if not response.prepared:
            response.headers["x-request-id"] = id
        return response

    return identified


@web.middleware
async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check the request's key, and turn whatever goes wrong into OpenAI's error shape."""
    id = request[sse.REQUEST_ID]
    try:
        authorize(request)
        response = await handler(request)
    except DilaserveError as error:
        response = refused(error)
    except web.HTTPException as error:
        response = respelled(error, request)
    except (ConnectionResetError, asyncio.CancelledError):
        log.info("request %s: the client left", id)
        raise
    except Exception:
        log.exception("request %s failed", id)
        response = refused(DilaserveError(f"internal error; the log has more under request id {id}", code="internal"))
    return response


def authorize(request: web.Request) -> None:
    server = request.app[CONFIG].server
    if request.path == PLAN and request.method == "POST":
        if server.admin_key is None:
            raise Forbidden("the plan cannot be changed here; start the server with --admin-key")
        if sends(request, server.admin_key):
            return
        if server.api_key is not None and sends(request, server.api_key):
            raise Forbidden("the API key may not change the plan; send the admin key")
        raise Unauthorized("the admin key is missing or wrong; send it as `Authorization: Bearer KEY`")
    if server.api_key is None or request.path in OPEN:
        return
    if not sends(request, server.api_key) and not (server.admin_key and sends(request, server.admin_key)):
        raise Unauthorized("the API key is missing or wrong; send it as `Authorization: Bearer KEY`")


def sends(request: web.Request, key: str) -> bool:
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(sent.strip().encode(errors="replace"), key.encode())
    return scheme.lower() == "bearer" and right


def refused(error: DilaserveError) -> web.Response:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.never_feasible:
        headers["x-should-retry"] = "false"  # OpenAI's clients heed it
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return answer(failure(error), error.status, headers)


def respelled(error: web.HTTPException, request: web.Request) -> web.Response:
    """aiohttp's own refusals (404, 405, 413 …) in OpenAI's shape."""
    reasons = {
        404: f"there is no {shortened(f'{request.method} {request.path}')}",
        405: f"{shortened(request.path)} does not take {shortened(request.method)}",
        417: "the only expectation that is met is 100-continue; leave out the header Expect",
        413: f"the body exceeds {request.app[CONFIG].server.max_body_bytes} bytes (--max-body-bytes)",
    }
    ours = BadRequest(
        reasons.get(error.status) or shortened(error.text or error.reason), code=STATUSES.get(error.status)
    )
    headers = {"allow": error.headers["allow"]} if "allow" in error.headers else {}
    response = answer(failure(ours), error.status, headers)
    if error.status == 400:  # the body is broken, and with it what would come behind it
        response.force_close()
    return response


def answer(body: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=_json.encode(body), status=status, headers=headers, content_type="application/json")


async def read(request: web.Request, kind: type[T]) -> T:
    """The body as a request of this kind."""
    asked: list[T] = await request.app[INTAKE].read(request, lambda body: schema.decoded(body, kind))
    return asked[0]


async def read_warned(request: web.Request, kind: type[Asked]) -> tuple[Asked, list[str]]:
    """The body, and warnings about it, which go into the answer and the log."""
    asked, warnings = await request.app[INTAKE].read(
        request, lambda body: schema.decoded(body, kind), lambda body: schema.misspelled(body, kind)
    )
    for warning in warnings:
        log.warning("request %s: %s", request[sse.REQUEST_ID], warning)
    return asked, warnings


# routes


async def health(request: web.Request) -> web.StreamResponse:
    return answer({"status": "ok"}) if request.app[ENGINE].alive else refused(DilaserveError("the engine has stopped"))


async def ready(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    if not engine.ready:
        raise Unavailable("the server is draining" if engine.draining else "no worker is ready", retry_after=1.0)
    return answer({"status": "ready"})


async def version(request: web.Request) -> web.StreamResponse:
    return answer({"version": __version__})


async def measured(request: web.Request) -> web.StreamResponse:
    return web.Response(body=metrics.text(request.app[ENGINE]), content_type="text/plain", charset="utf-8")


async def models(request: web.Request) -> web.StreamResponse:
    return answer({"object": "list", "data": [card(request.app[ENGINE])]})


async def model(request: web.Request) -> web.StreamResponse:
    known(request.app[ENGINE], request.match_info["model"])
    return answer(card(request.app[ENGINE]))


def card(engine: Engine) -> Json:
    about = engine.model
    return {
        "id": about.name,
        "object": "model",
        "created": about.created,
        "owned_by": "dilaserve",
        "root": about.root,
        "max_model_len": about.max_model_len,
    }


def known(engine: Engine, name: str | None) -> None:
    if name is not None and name != engine.model.name:
        raise NotFound(
            f"the model {quoted(name)} is not served here, only {engine.model.name!r}",
            param="model",
            code="model_not_found",
        )


async def chat(request: web.Request) -> web.StreamResponse:
    asked, warnings = await read_warned(request, schema.ChatRequest)
    engine = request.app[ENGINE]
    form = ResponseFormat(engine, chat=True, logprobs=bool(asked.logprobs), stops=bool(asked.stop), warnings=warnings)
    return await respond(request, asked, form, [await chatted(engine, asked.messages)])


async def chatted(engine: Engine, said: list[Message]) -> Prompt:
    return await engine.off_loop(MARKS * len(said), lambda: conversation(said, engine.text))


async def complete(request: web.Request) -> web.StreamResponse:
    asked, warnings = await read_warned(request, schema.CompletionRequest)
    engine, prompts = request.app[ENGINE], openai.prompts(asked.prompt)
    if asked.logprobs and not isinstance(asked.logprobs, bool):
        raise BadRequest("only logprobs 0 can be honoured: only the chosen token's is kept", param="logprobs")
    form = ResponseFormat(
        engine, chat=False, logprobs=asked.logprobs is not None, stops=bool(asked.stop), warnings=warnings
    )
    return await respond(request, asked, form, prompts, bool(asked.echo))


async def echo(engine: Engine, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else await spoken(engine, await engine.tokenize(prompt))


async def spoken(engine: Engine, ids: list[int]) -> str:
    return await engine.off_loop(len(ids), lambda: engine.detokenize(ids))


async def respond(
    request: web.Request, asked: schema.Common, form: ResponseFormat, prompts: Sequence[Prompt], echoes: bool = False
) -> web.StreamResponse:
    """Start every choice, then answer whole or as a stream; leaving early cancels them all."""
    engine, limit = request.app[ENGINE], request.app[CONFIG].server.max_choices
    known(engine, asked.model)
    openai.check_stream(asked)
    openai.with_headers(asked, request.headers)
    n = openai.choices_wanted(asked, len(prompts), limit, engine.config.scheduler.max_queue)
    each = [await echo(engine, prompt) if echoes else "" for prompt in prompts for _ in range(n)]
    async with contextlib.AsyncExitStack() as stack:
        streams: list[Stream] = []
        for prompt in prompts:
            for _ in range(n):
                with openai.spelled(asked):
                    started = await engine.submit(prompt, openai.options(asked, len(streams)))
                streams.append(await stack.enter_async_context(started))
        prompt_tokens = sum(stream.prompt_tokens for stream in streams[::n])
        if asked.stream:
            count = bool(asked.stream_options and asked.stream_options.include_usage)
            return await sse.relay(request, form, streams, each, prompt_tokens, count)
        completions = await asyncio.gather(*(collect(stream) for stream in streams))
        return answer(form.answer(completions, each, prompt_tokens))


async def plan(request: web.Request) -> web.StreamResponse:
    return answer(plan_api.shown(request.app[ENGINE]))


async def replan(request: web.Request) -> web.StreamResponse:
    asked, engine = await read(request, plan_api.PlanRequest), request.app[ENGINE]
    change = await engine.replan(plan_api.wanted(asked), plan_api.because(asked))
    return answer(plan_api.as_json(engine, change))


async def tokenize(request: web.Request) -> web.StreamResponse:
    asked, engine = await read(request, schema.TokenizeRequest), request.app[ENGINE]
    known(engine, asked.model)
    openai.check_tokenize(asked)
    prompt = asked.prompt if asked.prompt is not None else await chatted(engine, asked.messages or [])
    ids = await engine.tokenize(prompt)
    return answer({"tokens": ids, "count": len(ids), "max_model_len": engine.model.max_model_len})


async def detokenize(request: web.Request) -> web.StreamResponse:
    asked, engine = await read(request, schema.DetokenizeRequest), request.app[ENGINE]
    known(engine, asked.model)
    try:
        if len(asked.tokens) > LONGEST:
            raise BadRequest(f"{len(asked.tokens)} tokens are too many; send at most {LONGEST} at a time")
        ids = await engine.tokenize(asked.tokens)
    except BadRequest as error:
        raise BadRequest(error.message, param="tokens") from error
    return answer({"prompt": await spoken(engine, ids)})
