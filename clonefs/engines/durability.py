"""What makes the maps survive a power cut: intent, checkpoints, and the Protected Restore Map.

D1: nobody writes to an extent of the Source or of a clone before the Persistent Delta Map has it.
D2: it is cleared late, by a checkpoint. D5, D6: the Persistent Protected Restore Map gets an extent
after a flush of the Source that began when the Source was complete there.

Writers that arrive together share one write of the sectors (group commit); a run ahead of a writer
is marked with it, RUN_AHEAD extents, and when a sequential one has come half-way through it the next
run is marked while it goes on, each twice as long up to MOST_RUNS times that: so it waits once. What is
too much, the next checkpoint clears.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import trio
from bitarray import bitarray

from clonefs.engines.counters import Tally
from clonefs.engines.recorder import Recorder
from clonefs.group import CloneGroup
from clonefs.volume import DurableMap

RUN_AHEAD = 512  # extents, aligned
MOST_RUNS = 16  # that are marked ahead of a sequential writer
CHUNK = 1 << 18  # extents that a checkpoint looks at in one step
CHECKPOINT = 5.0  # seconds


class Durability:
    """The durable maps of one group: `delta` is its PDM, `protected` its PPRM."""

    def __init__(
        self,
        group: CloneGroup,
        recorder: Recorder,
        delta: DurableMap,
        protected: DurableMap,
        run_ahead: int = RUN_AHEAD,
    ) -> None:
        self.delta = delta
        self.protected = protected
        self.delta_writes = Tally()
        self.protected_writes = Tally()
        self._group = group
        self._recorder = recorder
        self._run_ahead = run_ahead
        self._runs = 1  # that were marked ahead the last time,
        self._marked_to = 0  # up to this extent
        self._half_way = -1  # the extent in the middle of them, once; who writes it wants more
        self._more = trio.Event()
        self._writing: dict[int, trio.Event] = {}

    def covers(self, offset: int, length: int) -> bool:
        """D1: whether a write of these bytes may be issued."""
        first, stop = self._group.geometry.extents_of(offset, length)
        if first <= self._half_way < stop:
            self._half_way = -1
            self._more.set()
        return not self._group.clones or self.delta.covers(first, stop)

    async def cover(self, offset: int, length: int) -> None:
        """D1: mark the extents, and what lies around them, and wait until that is durable. Does not
        wait if it is already, and lets nobody run between the last look and its return.

        Raises ClonefsError if it cannot be.
        """
        first, stop = self._group.geometry.extents_of(offset, length)
        while self._group.clones and not self.delta.covers(first, stop):
            self.delta.mark(*self._with_run_ahead(first, stop))
            await self._write_out(self.delta)

    def _with_run_ahead(self, first: int, stop: int) -> tuple[int, int]:
        """The extents, and what lies around them: whole aligned runs. A writer who comes to the end
        of what was marked last is a sequential one, and gets twice as much ahead each time."""
        sequential = first <= self._marked_to <= stop
        self._runs = min(2 * self._runs, MOST_RUNS) if sequential else 1
        ahead = self._run_ahead
        self._marked_to = min((-(-stop // ahead) + self._runs - 1) * ahead, self.delta.extents)
        self._half_way = (stop + self._marked_to) // 2 if stop < self._marked_to else -1
        return first // ahead * ahead, self._marked_to

    async def wanted(self) -> None:
        """Wait until a sequential writer will soon need more than what is marked ahead of it."""
        await self._more.wait()
        self._more = trio.Event()

    async def mark_ahead(self) -> None:
        """Mark what comes next. Raises ClonefsError if that cannot be; who needs it will hear it too."""
        first = self._marked_to
        if self._group.clones and first < self.delta.extents:
            self.delta.mark(*self._with_run_ahead(first, first + 1))
            await self._write_out(self.delta)

    async def mark_all(self) -> None:
        """Every extent may differ from now on: a new clone, or a device that lost something."""
        self.delta.mark(0, self.delta.extents)
        await self.settle(self.delta)

    async def include_live_maps(self) -> None:
        """After a death of the daemon in the same boot: what the live maps have, the PDM must have."""
        self.mark_live_maps()
        await self.settle(self.delta)
        await self.settle(self.protected)

    def mark_live_maps(self) -> None:
        """Mark what the live maps have, in memory only."""
        maps = [each for each, _ in self._group.live_maps() if each.count]
        for start in range(0, self.delta.extents, CHUNK):
            stop = min(start + CHUNK, self.delta.extents)
            if any(each.next_set(start, stop) >= 0 for each in maps):
                for first, end in runs(self._group.live_union(start, stop)):
                    self.delta.mark(start + first, start + end)

    async def settle(self, durable: DurableMap) -> None:
        """All that is marked in `durable` is on stable storage. Raises ClonefsError."""
        while durable.unwritten or durable.writing:
            await self._write_out(durable)

    async def _write_out(self, durable: DurableMap) -> None:
        """Write what is unwritten, or wait for the one who is writing."""
        event = self._writing.get(id(durable))
        if event is not None:
            await event.wait()
            self._recorder.check()
            return
        event = self._writing[id(durable)] = trio.Event()
        batch = durable.begin_write()
        tally = self.delta_writes if durable is self.delta else self.protected_writes
        written = False
        try:
            with tally.timed(sum(len(data) for _, data in batch.writes)):
                await self._recorder.write_durably(batch.writes)
            written = True
        finally:
            durable.end_write(written=written)
            del self._writing[id(durable)]
            event.set()

    # The Persistent Protected Restore Map

    async def flush(self, flush: Callable[[], Awaitable[None]]) -> None:
        """D5, D6: flush the Source with `flush`, then let the PPRM have what P had before that.

        Raises ClonefsError; then the PPRM has less, and is given the rest by the next flush.
        """
        group, epoch = self._group, self.protected.epoch
        extents = list(group.newly_protected)
        await flush()
        if epoch != self.protected.epoch:
            return  # another restore has begun meanwhile, and nothing of this one counts any more
        for first, stop in extents:
            self.protected.mark(first, stop)
        self.protected.mend()  # it has all of P now, so that a damaged sector can be made good
        await self.settle(self.protected)
        if epoch == self.protected.epoch:
            # Not before: who flushes at the same time must wait for the same extents.
            for each in extents:
                group.newly_protected.pop(each, None)

    def adopted(self) -> None:
        """The record has changed: a restore that began has an empty PPRM of its own number."""
        if self.protected.epoch != self._group.record.epoch:
            self._group.newly_protected = {}
            self.protected.begin_epoch(self._group.record.epoch)

    # Checkpoints

    async def checkpoint(self, flush: Callable[[], Awaitable[None]]) -> None:
        """D2: clear what no live map has any more. `flush` flushes every unit of the group.

        Extents are chosen while nothing is in flight to them; then all is flushed; and those that
        nobody has touched since are cleared. Raises ClonefsError if a flush or a write fails.
        """
        group = self._group
        group.touched = []
        try:
            chosen = [each async for each in self._clear_in_live_maps()]
            if chosen or group.newly_protected:
                await flush()
            for start, clear in chosen:
                stop = start + len(clear)
                bits = clear & ~group.live_union(start, stop)
                for first, end in group.touched:
                    if first < stop and start < end:
                        bits[max(first, start) - start : min(end, stop) - start] = 0
                self.delta.clear(bits, start)
                await trio.lowlevel.checkpoint()
        finally:
            group.touched = None
        await self.settle(self.delta)

    async def _clear_in_live_maps(self) -> AsyncIterator[tuple[int, bitarray]]:
        for start in range(0, self.delta.extents, CHUNK):
            stop = min(start + CHUNK, self.delta.extents)
            bits = self.delta.bits[start:stop]
            if bits.any():
                bits &= ~self._group.live_union(start, stop)
                if bits.any():
                    yield start, bits
            await trio.lowlevel.checkpoint()


def runs(bits: bitarray) -> Iterator[tuple[int, int]]:
    """The runs of set bits as (first, stop)."""
    first = bits.find(1)
    while first >= 0:
        stop = bits.find(0, first)
        stop = len(bits) if stop < 0 else stop
        yield first, stop
        first = bits.find(1, stop) if stop < len(bits) else -1
