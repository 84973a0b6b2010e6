"""What the application's requests share."""

from aiohttp import web

from dilaserve.config import Config
from dilaserve.engine.engine import Engine
from dilaserve.server.intake import Intake
from dilaserve.server.telemetry import Telemetry

ENGINE: web.AppKey[Engine] = web.AppKey("engine", Engine)
CONFIG: web.AppKey[Config] = web.AppKey("config", Config)
INTAKE: web.AppKey[Intake] = web.AppKey("intake", Intake)
TELEMETRY: web.AppKey[Telemetry] = web.AppKey("telemetry", Telemetry)
