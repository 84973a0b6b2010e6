"""What the engine needs of whatever runs its batches."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from dilaserve.types import Batch, Event, Moves

Progress = Callable[[str, int, int], None]  # device, bytes placed, bytes in all
Post = Callable[[Event], None]


class Executor(Protocol):
    """Whatever can run batches: worker processes, or a machine that only spends the time."""

    async def run(self, post: Post, started: asyncio.Future[None]) -> None:
        """Serve until cancelled; every event goes to `post`.

        `started` is resolved when instances may be formed, or gets the `CheckpointError` that prevents it.
        """

    def launch(self, batch: Batch) -> None:
        """Begin a step; its `StepDone` comes by `post`."""

    def stop_early(self, batch: Batch) -> None:
        """Let a batch of several steps end with the one that is under way; it may have ended by itself."""

    def reshard(self, moves: Moves) -> None:
        """End instances and form others; an `InstanceReady` comes for each of these."""

    def kill(self, instance: int, reason: str) -> None:
        """The instance hangs; its `InstanceLost` comes by `post`."""
