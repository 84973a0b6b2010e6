"""DiLaServe serves diffusion language models within deadlines.

The public names; nothing heavy is imported until one of them is used.
"""

from typing import TYPE_CHECKING, Any

from dilaserve.config import Config
from dilaserve.errors import BadRequest, ConfigError, DilaserveError, Overloaded, RequestFailed, Unavailable

if TYPE_CHECKING:
    from dilaserve.engine import Chunk, Completion, Engine, Options

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


def __getattr__(name: str) -> Any:
    if name in ("Engine", "Options", "Chunk", "Completion"):
        from dilaserve import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
