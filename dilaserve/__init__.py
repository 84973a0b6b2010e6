"""DiLaServe serves diffusion language models within deadlines.

The public names; each is imported when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dilaserve.config import Config
    from dilaserve.engine import Chunk, Completion, Engine, Options
    from dilaserve.errors import BadRequest, ConfigError, DilaserveError, Overloaded, RequestFailed, Unavailable

__version__ = "0.1.0"
__all__ = [
    "BadRequest",
    "Chunk",
    "Completion",
    "Config",
    "ConfigError",
    "DilaserveError",
    "Engine",
    "Options",
    "Overloaded",
    "RequestFailed",
    "Unavailable",
    "__version__",
]


_HOMES = {
    "config": ("Config",),
    "engine": ("Chunk", "Completion", "Engine", "Options"),
    "errors": ("BadRequest", "ConfigError", "DilaserveError", "Overloaded", "RequestFailed", "Unavailable"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"dilaserve.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
