"""What the Sync Engines of all groups share: a bound on copies at once, and what comes at the end."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from clonefs.engines.server import GroupServer

AT_ONCE = 4

Complete = Callable[[GroupServer, str], Awaitable[None]]


class Transfers:
    """`complete` is called when a clone has nothing left to copy."""

    def __init__(self, complete: Complete) -> None:
        self.complete = complete
        self.waiting: set[tuple[str, str]] = set()
        self._limiter = trio.CapacityLimiter(AT_ONCE)

    @asynccontextmanager
    async def turn(self, group: str, clone: str) -> AsyncIterator[None]:
        """Have one of the AT_ONCE turns while the body runs."""
        self.waiting.add((group, clone))
        try:
            # Not yet a copy: nothing is claimed while it waits.
            await self._limiter.acquire()
        finally:
            self.waiting.discard((group, clone))
        try:
            yield
        finally:
            self._limiter.release()
