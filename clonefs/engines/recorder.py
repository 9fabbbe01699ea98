"""Commits: the one way by which the record changes.

A change is a function from a group's record to its next one. It is committed first and adopted
after; and it is applied again to the record as it is then, since a clone that failed meanwhile has
been split off at once and must stay so.
"""

from collections.abc import Awaitable, Callable, Iterable

import trio

from clonefs.group import CloneGroup
from clonefs.volume import GroupRecord, MapSlot, MetadataVolume, Record

Change = Callable[[GroupRecord], GroupRecord]
Blocking = Callable[[Callable[[], None]], Awaitable[None]]


async def in_thread(work: Callable[[], None]) -> None:
    """Run what blocks in a thread."""
    await trio.to_thread.run_sync(work)


class Recorder:
    """Commits records to `volume`, one at a time; `blocking` runs what blocks."""

    def __init__(self, volume: MetadataVolume, blocking: Blocking = in_thread) -> None:
        self.volume = volume
        self._blocking = blocking
        self._lock = trio.Lock()
        self.on_broken: Callable[[str], None] = lambda reason: None
        self._told = False

    def _look(self) -> None:
        """Tell once that the volume cannot be written any more."""
        if self.volume.broken is not None and not self._told:
            self._told = True
            self.on_broken(self.volume.broken.reason)

    async def commit(self, change: Callable[[Record], Record]) -> None:
        """Commit what `change` makes of the record. Raises ClonefsError: nothing has changed."""
        async with self._lock:
            record = change(self.volume.record)
            if record != self.volume.record:
                await self._write(lambda: self.volume.commit(record))

    async def _write(self, work: Callable[[], None]) -> None:
        try:
            await self._blocking(work)
        finally:
            self._look()

    def check(self) -> None:
        """Raises ClonefsError (EIO) once the metadata volume cannot be written."""
        if self.volume.broken is not None:
            raise self.volume.broken

    async def write_durably(self, writes: Iterable[tuple[int, bytes]]) -> None:
        """Sectors of durable maps, in that order. Raises ClonefsError."""
        self.check()

        def write() -> None:
            for offset, data in writes:
                self.volume.write_durably(offset, data)

        await self._write(write)

    async def clear_durably(self, slot: MapSlot) -> None:
        """Zeros in the place of durable maps. Raises ClonefsError."""
        self.check()
        await self._write(lambda: self.volume.clear_durably(slot))

    async def close(self, *, clean: bool) -> None:
        """Close the volume; see MetadataVolume.close."""
        async with self._lock:
            await self._blocking(lambda: self.volume.close(clean=clean))

    async def change(self, *changes: tuple[CloneGroup, Change]) -> None:
        """Change several groups in one record: after a crash all of it is there, or nothing."""

        def apply(record: Record) -> Record:
            for group, change in changes:
                record = record.with_group(change(group.record))
            return record

        await self.commit(apply)
        for group, change in changes:
            group.adopt(change(group.record))
