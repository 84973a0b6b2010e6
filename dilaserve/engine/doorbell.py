"""A doorbell within one event loop."""

import asyncio


class Bell:
    """What one task waits for and others ring, on one loop; waiting takes the ring away.

    `asyncio.Event` and `Queue` look up the running loop at every wait, which costs a system call.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.rung = False
        self.waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        self.rung = True
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        while not self.rung:
            self.waiter = self.loop.create_future()
            await self.waiter
        self.rung = False
