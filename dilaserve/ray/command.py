"""`dilaserve ray`: the door and the nodes on Ray, here or on a cluster that runs."""

import argparse
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import ray
from ray import serve

from dilaserve.config import Config
from dilaserve.errors import ConfigError, DilaserveError
from dilaserve.models import hub
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.ray.app import NODE, Layout, application
from dilaserve.ray.node_calls import NodeCard
from dilaserve.server.listening import url_of
from dilaserve.system import host

log = logging.getLogger(__name__)
NAME = "dilaserve"  # of the application
STORE = 80 * 2**20  # bytes of Ray's object store, which holds nothing of ours but pieces of answers
USUAL = {  # of Ray's processes, unless the environment says otherwise
    "RAY_worker_niceness": "0",  # else the engine would run at 15, and its workers even below
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_TELEMETRY": "0",
}
Announce = Callable[[str, str, bool, bool], None]


def run(settings: Config, extras: argparse.Namespace, announce: Announce) -> int:
    """Deploy, say where, and stay until a signal comes; with --address, leave once nodes answer.

    Raises `ConfigError` before Ray starts, and `DilaserveError` when the nodes do not come up.
    """
    layout = layout_of(extras)
    check(settings, here=extras.address is None)
    deployed = application(sharing(settings, layout) if extras.address is None else settings, layout)
    interrupted_by_signals()
    with cluster(extras.address, layout):
        serve.start(http_options={"host": settings.server.host, "port": settings.server.port})
        try:
            serve.run(deployed, name=NAME, route_prefix="/", blocking=False)
        except RuntimeError as error:
            raise DilaserveError(f"the nodes did not come up: {error}; their logs are below {logs_of()}") from error
        say_ready(settings, announce)
        if extras.address is None:
            threading.Event().wait()
    return 0


def sharing(settings: Config, layout: Layout) -> Config:
    """Where all nodes are on this machine, each computes with its part of the cores, unless --cpu-threads says else."""
    if settings.device.cpu_threads is not None:
        return settings
    _, most = layout.bounds()
    threads = max(1, host.cores() // most)
    return msgspec.structs.replace(settings, device=msgspec.structs.replace(settings.device, cpu_threads=threads))


def say_ready(settings: Config, announce: Announce) -> None:
    handle = serve.get_deployment_handle(NODE, NAME)
    card: NodeCard = handle.card.remote().result(timeout_s=60.0)
    server = settings.server
    announce(url_of(server.host, server.port), card.model.name, server.api_key is not None, card.chats)


def layout_of(extras: argparse.Namespace) -> Layout:
    given = {name: value for name, value in vars(extras).items() if name in Layout.__struct_fields__}
    layout = Layout(**given)
    layout.bounds()
    return layout


def check(settings: Config, here: bool) -> None:
    """Raises `ConfigError` for settings that Ray's proxies do not have, and for a model that is missing `here`."""
    if here:
        Checkpoint(hub.directory_of(settings.model.model, settings.model.revision))
    if settings.server.ssl_certfile is not None:
        raise ConfigError("TLS is for a proxy before Ray; leave out --ssl-certfile", param="ssl_certfile")
    if "," in settings.server.host or settings.server.port == 0:
        raise ConfigError("Ray's proxy listens on one --host and one --port; give one of each, and not port 0")


@contextmanager
def cluster(address: str | None, layout: Layout) -> Iterator[None]:
    """The Ray that is at the address, or one of this machine alone while the block runs. Raises `DilaserveError`."""
    for name, value in USUAL.items():
        os.environ.setdefault(name, value)
    local: dict[str, Any] = {}
    if address is None:
        _, most = layout.bounds()
        cores = most * layout.cpus + layout.doors + 1
        local = {"object_store_memory": STORE, "num_cpus": max(cores, host.cores()), "include_dashboard": False}
    for name in ("ray.serve", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.WARNING, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DilaserveError(f"Ray could not be reached or started: {error}") from error
    interrupted_by_signals()  # Ray has set its own handler of SIGTERM, which ends with exit code 15
    try:
        yield
    finally:
        if address is None:
            with suppress(Exception):  # of a Serve that has not started
                serve.delete(NAME)
        ray.shutdown()


def interrupted_by_signals() -> None:
    """SIGINT or SIGTERM end what runs with `KeyboardInterrupt`; a second one ends the process at once."""
    again = False

    def asked(number: int, frame: object) -> None:
        nonlocal again
        if again:
            os._exit(1)
        again = True
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, asked)


def logs_of() -> str:
    return "/tmp/ray/session_latest/logs/serve"
