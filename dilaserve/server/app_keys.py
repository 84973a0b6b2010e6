"""What the application's requests share."""

from aiohttp import web

from dilaserve.config import Config
from dilaserve.engine.engine import Engine
from dilaserve.server.api_keys import Keyring, Tenant
from dilaserve.server.cors import Origins
from dilaserve.server.intake import Intake
from dilaserve.server.page_files import Page
from dilaserve.server.telemetry import Telemetry

ENGINE: web.AppKey[Engine] = web.AppKey("engine", Engine)
CONFIG: web.AppKey[Config] = web.AppKey("config", Config)
INTAKE: web.AppKey[Intake] = web.AppKey("intake", Intake)
KEYS: web.AppKey[Keyring] = web.AppKey("keys", Keyring)
ORIGINS: web.AppKey[Origins] = web.AppKey("origins", Origins)
TENANT: web.RequestKey[Tenant] = web.RequestKey("tenant", Tenant)  # whose key the request came with, if it has a name
PAGE: web.AppKey[Page] = web.AppKey("page", Page)
TELEMETRY: web.AppKey[Telemetry] = web.AppKey("telemetry", Telemetry)
