"""The gate that all host requests of a group go through.

A transition needs the group still: the gate is held, so that nobody new comes in, and drained, so
that nobody is left inside. Requests that are done in one step, without waiting, need only look
whether it is held.
"""

from collections.abc import AsyncIterator, Sized
from contextlib import asynccontextmanager

import trio


class Gate:
    """`held`: nobody may come in. `inside`: requests that came in and have not left."""

    __slots__ = ("_arrivals", "_departures", "held", "inside")

    def __init__(self) -> None:
        self.held = False
        self.inside = 0
        self._arrivals = trio.lowlevel.ParkingLot()
        self._departures = trio.lowlevel.ParkingLot()

    async def enter(self) -> None:
        """Come in, once the gate is open. Who came in must `leave`."""
        while self.held:
            await self._arrivals.park()
        self.inside += 1

    def leave(self) -> None:
        """Go out."""
        self.inside -= 1
        if self.held:
            self.stir()

    def stir(self) -> None:
        """Something that a drain waits for may have ended."""
        self._departures.unpark_all()

    @asynccontextmanager
    async def hold(self, scoreboard: Sized) -> AsyncIterator[None]:
        """Hold the gate until everybody is out and nothing is claimed on `scoreboard`; then the
        body runs, and the gate opens again. One holder at a time."""
        assert not self.held
        self.held = True
        try:
            while self.inside or len(scoreboard):
                await self._departures.park()
            yield
        finally:
            self.held = False
            self._arrivals.unpark_all()
