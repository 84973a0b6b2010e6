"""A doorbell within one event loop."""

import asyncio


class Bell:
    """One task waits for it and others ring it, on one loop; waiting resets it.

    `asyncio.Event` and `Queue` look up the running loop at every wait, which costs a system call.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.is_ringing = False
        self.waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        self.is_ringing = True
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        while not self.is_ringing:
            self.waiter = self.loop.create_future()
            await self.waiter
        self.is_ringing = False
