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

from aiohttp import web

from dilaserve import __version__
from dilaserve.config import Config
from dilaserve.engine.assembly import Assemble, real
from dilaserve.engine.engine import Engine
from dilaserve.errors import ConfigError
from dilaserve.executor.executor import Progress
from dilaserve.plans import spelled
from dilaserve.server import aiohttp_edge, listening, tls
from dilaserve.server.backend import LocalBackend
from dilaserve.server.connection import Connection
from dilaserve.server.feeder import Feeder
from dilaserve.server.service import Service, tenants
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
        service, encrypted = Service(LocalBackend(engine, config), config), tls.context(server)
        if on_hangup and (encrypted or config.server.api_key_file is not None):
            on_hangup(lambda: read_again(service, config, encrypted))
        runner = web.ServerRunner(aiohttp_edge.server(service), shutdown_timeout=LINGER)
        await runner.setup()
        try:
            async with opened(runner.server, bound, encrypted):
                yield " and ".join(listening.url(one, encrypted is not None) for one in bound)
        finally:
            await runner.cleanup()
            await service.close()


def read_again(service: Service, config: Config, encrypted: ssl.SSLContext | None) -> None:
    """Read keys and certificate again, or keep the old ones if that fails."""
    try:
        if config.server.api_key_file is not None:
            service.keys.replace(tenants(config))
        if encrypted:
            tls.load(encrypted, config.server)
    except ConfigError as error:
        log.error("%s; what was read before stays", error.message)
        return
    log.info("read again: %d keys%s", len(service.keys.tenants), ", the certificate" if encrypted else "")


@contextlib.asynccontextmanager
async def opened(
    server: web.Server | None,
    sockets: Sequence[socket.socket],
    encrypted: ssl.SSLContext | None,
) -> AsyncIterator[None]:
    """What web.SockSite does, with connections of our own."""
    assert server

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
