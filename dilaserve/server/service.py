"""What the routes of one server share."""

import asyncio
from pathlib import Path

from dilaserve.config import Config
from dilaserve.server import api_keys
from dilaserve.server.api_keys import Keyring, Tenant
from dilaserve.server.backend import Backend
from dilaserve.server.cors import Origins
from dilaserve.server.intake import Intake
from dilaserve.server.page_files import Page


class Service:
    """`backend` answers; the service holds keys, bodies in flight, and the page. Raises `ConfigError` for bad keys."""

    def __init__(self, backend: Backend, config: Config) -> None:
        server = config.server
        self.backend, self.config = backend, config
        self.intake = Intake(server.max_body_bytes, server.inflight_bytes)
        self.keys, self.origins = Keyring(tenants(config)), Origins(server.allowed_origins)
        self.page = Page(server.root_path)

    async def close(self) -> None:
        self.intake.close()
        await asyncio.to_thread(self.backend.close)


def tenants(config: Config) -> list[Tenant]:
    """Those of --api-key-file. Raises `ConfigError`."""
    if config.server.api_key_file is None:
        return []
    file, budget = Path(config.server.api_key_file), config.scheduler.accuracy_budget
    found = api_keys.read(file)
    api_keys.budgets_within(found, None if budget == "off" else budget, file)
    return found
