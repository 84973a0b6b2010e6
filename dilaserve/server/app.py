"""The application's life: from listening to the last answer."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from aiohttp import web

from dilaserve import __version__
from dilaserve.config import Config
from dilaserve.engine.assembly import Assemble, real
from dilaserve.engine.engine import Engine
from dilaserve.errors import ConfigError
from dilaserve.executor.executor import Progress
from dilaserve.plans import spelled
from dilaserve.server import api_keys, listening, tls
from dilaserve.server.api_keys import Keyring, Tenant
from dilaserve.server.app_keys import CONFIG, ENGINE, INTAKE, KEYS, ORIGINS, PAGE, TELEMETRY
from dilaserve.server.connection import Connection
from dilaserve.server.cors import Origins
from dilaserve.server.feeder import Feeder
from dilaserve.server.guard import PLAN, answered, guarded
from dilaserve.server.intake import Intake
from dilaserve.server.messages_api import COUNT_TOKENS, MESSAGES
from dilaserve.server.page_files import Page
from dilaserve.server.paths import rooted
from dilaserve.server.routes import (
    chat,
    complete,
    count_tokens,
    detokenize,
    documented,
    front,
    health,
    measured,
    messages,
    model,
    models,
    plan,
    quote,
    ready,
    replan,
    responses,
    static,
    statistics,
    tokenize,
    version,
)
from dilaserve.server.telemetry import Telemetry
from dilaserve.system import child_processes, signals

log = logging.getLogger(__name__)
Announce = Callable[[str, str, bool, bool], None]  # address, model, whether a key is needed, whether it chats
IDLE_WITHIN = 75.0  # seconds for the whole head of the next request, before a connection is closed; proxies keep 60
LINGER = 2.0  # seconds that answers get to leave after the engine is done


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

    def hangup(again: Callable[[], None]) -> None:
        loop.add_signal_handler(signal.SIGHUP, again)

    tenants(config)  # what is wrong with keys or the certificate is said before the model is loaded
    tls.context(config.server)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, interrupt)
    try:
        async with Engine(config, progress, assemble) as engine, running(engine, config, sockets, hangup) as address:
            started = True
            freeze()
            log.info("serving %s on %s", described(engine, config), address)
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


def described(engine: Engine, config: Config) -> str:
    """What is served and with what, for the first line of the log."""
    model, tokens = engine.model, engine.consumer.capacity.values()
    known = {
        "version": __version__,
        "model": model.name,
        "directory": model.root,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "max_model_len": model.max_model_len,
        "devices": ",".join(engine.devices),
        "dtype": model.dtype,
        "threads": model.threads,
        "kv_tokens": sum(tokens),
        "plan": spelled(engine.plan),
        "planner": "on" if engine.planner else "off",
        "profile": "calibrated" if model.calibrated else "estimates",
    }
    return " ".join(f"{name}={value}" for name, value in known.items() if value)


def freeze() -> None:
    """What loading has made stays; the collector no longer stops the event loop to look at all of it."""
    gc.collect()
    gc.freeze()


@contextlib.asynccontextmanager
async def running(
    engine: Engine,
    config: Config,
    sockets: Sequence[socket.socket] | None = None,
    on_hangup: Callable[[Callable[[], None]], None] | None = None,
) -> AsyncIterator[str]:
    """The application on its addresses; gives them as the ready line shows them.

    `on_hangup` is given what reads keys and certificate again, if there are any.
    """
    server = config.server
    with listening.bound(server.host, server.port) if sockets is None else contextlib.nullcontext(sockets) as bound:
        app, encrypted = application(engine, config), tls.context(server)
        if on_hangup and (encrypted or config.server.api_key_file is not None):
            on_hangup(lambda: read_again(app, config, encrypted))
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=LINGER)
        await runner.setup()
        try:
            async with opened(runner.server, bound, server.root_path, app[TELEMETRY], encrypted):
                yield " and ".join(listening.url(one, encrypted is not None) for one in bound)
        finally:
            await runner.cleanup()


def read_again(app: web.Application, config: Config, encrypted: ssl.SSLContext | None) -> None:
    """Read keys and certificate again, or keep the old ones if that fails."""
    try:
        if config.server.api_key_file is not None:
            app[KEYS].replace(tenants(config))
        if encrypted:
            tls.load(encrypted, config.server)
    except ConfigError as error:
        log.error("%s; what was read before stays", error.message)
        return
    log.info("read again: %d keys%s", len(app[KEYS].tenants), ", the certificate" if encrypted else "")


@contextlib.asynccontextmanager
async def opened(
    server: web.Server | None,
    sockets: Sequence[socket.socket],
    root_path: str,
    telemetry: Telemetry,
    encrypted: ssl.SSLContext | None,
) -> AsyncIterator[None]:
    """What web.SockSite does, with connections of our own."""
    assert server
    server.request_factory = rooted(server.request_factory, root_path)
    server.request_handler = answered(server.request_handler, telemetry.requests.answered)  # type: ignore[assignment]

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
                listener = await loop.create_server(
                    connected, sock=listening.inheritable(one), backlog=1024, ssl=encrypted
                )
            except OSError as error:
                host, port = one.getsockname()[:2]
                raise listening.refusal(host, port, error) from error
            stack.callback(listener.close)
        yield


def application(engine: Engine, config: Config) -> web.Application:
    app = web.Application(middlewares=[guarded], client_max_size=config.server.max_body_bytes)
    app[ENGINE], app[CONFIG] = engine, config
    app[INTAKE] = Intake(config.server.max_body_bytes, config.server.inflight_bytes)
    app[TELEMETRY] = Telemetry(engine, config)
    app[KEYS], app[ORIGINS] = Keyring(tenants(config)), Origins(config.server.allowed_origins)
    app.on_response_prepare.append(mark_origin)
    app[PAGE] = Page(config.server.root_path)
    app.on_cleanup.append(close)
    app.add_routes(
        [
            web.get("/", front),
            web.get("/static/{name}", static),
            web.get("/health", health),
            web.get("/ready", ready),
            web.get("/version", version),
            web.get("/metrics", measured),
            web.get("/openapi.json", documented),
            web.get("/v1/stats", statistics),
            web.get("/v1/models", models),
            web.get("/v1/models/{model:.+}", model),
            web.post("/v1/chat/completions", chat),
            web.post("/v1/completions", complete),
            web.post("/v1/responses", responses),
            web.post(MESSAGES, messages),
            web.post(COUNT_TOKENS, count_tokens),
            web.get("/v1/quote", quote),
            web.get(PLAN, plan),
            web.post(PLAN, replan),
            web.post("/tokenize", tokenize),
            web.post("/detokenize", detokenize),
        ]
    )
    return app


def tenants(config: Config) -> list[Tenant]:
    """Those of --api-key-file. Raises `ConfigError`."""
    if config.server.api_key_file is None:
        return []
    file, budget = Path(config.server.api_key_file), config.scheduler.accuracy_budget
    found = api_keys.read(file)
    api_keys.budgets_within(found, None if budget == "off" else budget, file)
    return found


async def mark_origin(request: web.Request, response: web.StreamResponse) -> None:
    request.app[ORIGINS].mark(request, response)


async def close(app: web.Application) -> None:
    app[INTAKE].close()
    await asyncio.to_thread(app[TELEMETRY].close)
