"""What the Sync Engines of all groups share: a bound on copies at once, and what comes at the end."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from clonefs.engines.server import GroupServer

AT_ONCE = 4
RUN = 1 << 20  # bytes that are copied at a time at the least: hosts that write to one wait for all
LONGEST = 256  # times as many, where copying takes hardly any time

Complete = Callable[[GroupServer, str], Awaitable[bool]]


class Transfers:
    """`complete` is called when a clone has nothing left to copy; `run` is how many bytes an engine
    claims at a time at first, and `longest` at most."""

    def __init__(self, complete: Complete, run: int = RUN) -> None:
        self.complete = complete
        self.run = run
        self.longest = run * LONGEST
        self.waiting: set[tuple[str, str]] = set()
        self._limiter = trio.CapacityLimiter(AT_ONCE)

    @asynccontextmanager
    async def turn(self, group: str, clone: str) -> AsyncIterator[None]:
        """Have one of the AT_ONCE turns while the body runs."""
        try:
            self._limiter.acquire_nowait()
        except trio.WouldBlock:
            self.waiting.add((group, clone))
            try:
                await self._limiter.acquire()
            finally:
                self.waiting.discard((group, clone))
        try:
            yield
        finally:
            self._limiter.release()
