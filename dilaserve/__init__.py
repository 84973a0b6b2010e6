"""DiLaServe serves diffusion language models within deadlines.

The public names; each is imported when it is used. `DilaServe` is for scripts and notebooks, `Engine` for programs that
run on asyncio. Both raise the errors below, which are all `DilaserveError`s: `ConfigError` when a model or a setting
cannot work, `BadRequest` for a request that cannot be honoured, `Overloaded` when there is no place for it,
`DeadlineMissed` when its deadline cannot be kept, `RequestFailed` when it was given up because of an error on our side,
and `Unavailable` when the engine is not running.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dilaserve.config import Config
    from dilaserve.engine.engine import Engine, ModelCard, Profile
    from dilaserve.engine.prompts import Prompt
    from dilaserve.engine.stream import Chunk, Completion, Stream
    from dilaserve.engine.submit import Options
    from dilaserve.engine.synchronous import Chunks, DilaServe
    from dilaserve.errors import (
        BadRequest,
        ConfigError,
        DeadlineMissed,
        DilaserveError,
        Overloaded,
        RequestFailed,
        Unavailable,
    )
    from dilaserve.types import Change, Plan, Quote, Usage

__version__ = "0.1.0"
__all__ = [
    "BadRequest",
    "Change",
    "Chunk",
    "Chunks",
    "Completion",
    "Config",
    "ConfigError",
    "DeadlineMissed",
    "DilaServe",
    "DilaserveError",
    "Engine",
    "ModelCard",
    "Options",
    "Overloaded",
    "Plan",
    "Profile",
    "Prompt",
    "Quote",
    "RequestFailed",
    "Stream",
    "Unavailable",
    "Usage",
    "__version__",
]


_HOMES = {
    "config": ("Config",),
    "engine.engine": ("Engine", "ModelCard", "Profile"),
    "errors": (
        *("BadRequest", "ConfigError", "DeadlineMissed", "DilaserveError"),
        *("Overloaded", "RequestFailed", "Unavailable"),
    ),
    "engine.submit": ("Options",),
    "engine.prompts": ("Prompt",),
    "engine.stream": ("Chunk", "Completion", "Stream"),
    "engine.synchronous": ("Chunks", "DilaServe"),
    "types": ("Change", "Plan", "Quote", "Usage"),
}


if not TYPE_CHECKING:  # a checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        for module, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"dilaserve.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
