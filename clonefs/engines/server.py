"""A Clone Group at work: the group, the units under it, and the tasks that wait.

The group decides, the units move bytes; this module ties them together and has what both engines
and host I/O need: who is woken when, and how a clone that fails is split off.
"""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from clonefs.engines.counters import SOURCE, GroupCounters
from clonefs.engines.durability import Durability
from clonefs.engines.gate import Gate
from clonefs.engines.recorder import Change, Recorder
from clonefs.errors import ClonefsError, DeviceError
from clonefs.group import MIRRORED, Clone, CloneGroup, transitions
from clonefs.units import LogicalUnit, MissingUnit
from clonefs.volume import CloneState, GroupRecord

if TYPE_CHECKING:
    from clonefs.engines.verify import Verification

OnChange = Callable[[GroupRecord, GroupRecord], None]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class CopyCounts:
    """Extents copied since the running copy began, or since the mount."""

    sync: int = 0
    cod: int = 0


class GroupServer:
    """One group of the mount. `wall_clock` gives seconds since the epoch; `on_event` gets a line and
    the level at which it is logged (None: not at all), `on_error` the name of an LU and a sentence."""

    def __init__(
        self,
        group: CloneGroup,
        source: LogicalUnit,
        clones: dict[str, LogicalUnit],
        recorder: Recorder,
        wall_clock: Callable[[], float],
        on_change: OnChange,
        durability: Durability,
        on_event: Callable[[str, int | None], None],
        on_error: Callable[[str, str], None],
    ) -> None:
        self.group = group
        self.source = source
        self.units = clones
        self.recorder = recorder
        self.gate = Gate()
        self.commands = trio.Lock()
        # Held by a checkpoint: no unit is closed and no map is added under it.
        self.flushing = trio.Lock()
        self.counts = CopyCounts()
        self.counters = GroupCounters()
        self.faults: dict[str, str] = {}
        # By the names of units, since the mount or the last whole copy: what hosts have been told of
        # them last; and flushes that have failed, which are never believed again (D10).
        self.failures: dict[str, str] = {}
        self.unflushed: dict[str, str] = {}
        self.verifications: dict[str, Verification] = {}  # the last one of each clone
        self._on_event = on_event
        self._on_error = on_error
        # When what the Source shows was last changed: by a host, or by a restore that began.
        self.modified = source.modified()
        self._wall_clock = wall_clock
        self.durability = durability
        self._on_change = on_change
        self._progress = trio.lowlevel.ParkingLot()
        self._restless = True

    @property
    def name(self) -> str:
        """The group's name."""
        return self.group.record.name

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._wall_clock()

    def unit(self, clone: Clone) -> LogicalUnit:
        """The unit under a clone."""
        return self.units[clone.name]

    # Waiting

    async def progress(self) -> None:
        """Wait until a copy or a mirrored write has ended, or the state has changed.

        Who waits looks again at what it waits for: what ended may have failed (L3).
        """
        await self._progress.park()

    def wake(self) -> None:
        """A copy or a mirrored write has ended, or the state has changed."""
        self._progress.unpark_all()
        self.gate.stir()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """The group with no request inside and nothing being copied, while the body runs."""
        try:
            async with self.gate.hold(self.group.scoreboard):
                yield
        finally:
            self.wake()  # engines wait for the gate to open, also after a command that failed

    # Changes of the record

    async def change(self, change: Change) -> None:
        """Commit a change of this group's record, and adopt it."""
        await self.change_together((self, change))

    @staticmethod
    async def change_together(*changes: "tuple[GroupServer, Change]") -> None:
        """The same for several groups, in one record."""
        before = [server.group.record for server, _ in changes]
        recorder = changes[0][0].recorder

        def then() -> None:
            for (server, _), record in zip(changes, before, strict=True):
                server._changed(record)

        await recorder.change(*((server.group, change) for server, change in changes), then=then)

    def _changed(self, before: GroupRecord) -> None:
        self.durability.adopted()
        if self.group.record.epoch != before.epoch:  # a restore begins, or begins again
            self.modified = self.now()
        self._restless = True
        self._on_change(before, self.group.record)
        self.wake()

    def tell(self, line: str, level: int | None = logging.INFO) -> None:
        """An event that is no change of state, for the log too at that level."""
        self._on_event(line, level)

    # Failures

    async def split_off(self, name: str, error: ClonefsError) -> None:
        """Split a mirrored clone off that has failed: at once, and then for good in the record."""
        clone = self.group.clones.get(name)
        if clone is None or clone.state not in MIRRORED:
            return
        self.counters.clone(name).splits += 1
        before = self.group.record
        record = transitions.split_off_failed(before, name, reason=error.reason, now=self.now())
        self.group.split_off(record, name)
        self._changed(before)
        await self._commit_as_it_is()

    async def no_longer_equal(self) -> None:
        """A write to the Source failed: mirrored clones that were equal may differ, and are copied
        to again."""
        before = record = self.group.record
        for clone in self.group.mirrored:
            if clone.state is CloneState.SYNCHRONIZED and clone.delta.count:
                record = transitions.no_longer_equal(record, clone.name, clone.delta.count)
        if record is not before:
            self.group.adopt(record)
            self._changed(before)
            await self._commit_as_it_is()

    async def _commit_as_it_is(self) -> None:
        """The state has changed already. If it cannot be recorded, the live maps still have every
        difference, so nothing is lost; the volume says what is wrong at the next command."""
        try:
            await self.change(lambda record: record)
        except ClonefsError as error:
            log.error("%s: %s", self.name, error.reason, extra={"clonefs_group": self.name})

    async def flush_source(self) -> None:
        """Flush the Source, and P with it (D6). Raises ClonefsError; then, if the flush failed,
        every map says that all may differ (D10)."""
        await self.durability.flush(self._flush_source_unit)

    async def _flush_source_unit(self) -> None:
        try:
            with self.counters.lu(SOURCE).backing_flush.timed():
                await self.source.flush()
        except ClonefsError as error:
            self._flush_failed(self.source, error)
            self.group.distrust(None)
            await self._remember_failure(None)
            await self._distrust_durably()
            await self.no_longer_equal()
            raise

    async def _remember_failure(self, name: str | None) -> None:
        """The next daemon has to know that a flush has failed: nobody tells it."""
        if name in transitions.unflushed(self.group.record):
            return
        if isinstance(self.source if name is None else self.units.get(name), MissingUnit):
            return
        with contextlib.suppress(ClonefsError):  # then nothing is written any more at all
            await self.change(lambda record: transitions.flush_failed(record, name))

    async def _distrust_durably(self) -> None:
        with contextlib.suppress(ClonefsError):  # then nothing is written any more at all
            await self.durability.mark_all()

    async def checkpoint(self) -> None:
        """Trim the durable maps (D2). Raises ClonefsError."""
        async with self.flushing:
            with self.counters.checkpoint.timed():
                await self.durability.checkpoint(self.flush_all)
            self.counters.checkpoint_at = time.monotonic()

    async def rest(self) -> None:
        """What is clear of the maps takes no memory, if a change of state may have cleared much since
        the last time. Raises ClonefsError."""
        if self._restless:
            self._restless = False
            async with self.flushing:
                for extents, slot in self.group.live_maps():
                    await self.recorder.rest(extents, slot)
                    await trio.lowlevel.checkpoint()
                self.durability.delta.rest()
                self.durability.protected.rest()

    async def flush_all(self) -> None:
        """Flush every unit. Raises ClonefsError."""
        await self.flush_source()
        for name in list(self.units):
            if name in self.units:
                await self.flush_clone(name)

    async def flush_clone(self, name: str) -> None:
        """Flush a clone; the same. In a Reverse Sync the record says so instead (D10)."""
        unit = self.units[name]
        try:
            with self.counters.lu(name).backing_flush.timed():
                await unit.flush()
        except ClonefsError as error:
            if self.units.get(name) is not unit:  # it has been removed meanwhile
                raise
            self._flush_failed(unit, error)
            clone = self.group.clones.get(name)
            if clone is not None and clone is self.group.restoring and not self.group.protecting:
                await self._fail_reverse_sync(name, error)
                await self._remember_failure(name)
                raise
            self.group.distrust(name)
            await self._remember_failure(name)
            await self._distrust_durably()
            await self.split_off(name, error)
            raise

    async def _fail_reverse_sync(self, name: str, error: ClonefsError) -> None:
        def change(record: GroupRecord) -> GroupRecord:
            if transitions.clone_named(record, name).state is not CloneState.REVERSE_SYNCHRONIZING:
                return record
            return transitions.failed_in_reverse_sync(record, name, reason=error.reason)

        self.fault(name, error.reason)
        with contextlib.suppress(ClonefsError):  # then nothing is written any more at all
            await self.change(change)

    def _flush_failed(self, unit: LogicalUnit, error: ClonefsError) -> None:
        if unit.name not in self.unflushed and not isinstance(unit, MissingUnit):
            self.unflushed[unit.name] = error.reason
            self.tell(f"{self._lu_of(unit.name)}: {error.reason}", logging.ERROR)

    def device_failed(self, error: DeviceError) -> None:
        """A host request has failed, which is in the log. The first one of a unit is an event."""
        unit = self.source if error.unit == self.source.name else None
        if unit is None:
            unit = next((each for each in self.units.values() if each.name == error.unit), None)
        if unit is None or isinstance(unit, MissingUnit) or unit.name in self.unflushed:
            return
        if unit.name not in self.failures:
            self.tell(f"{self._lu_of(unit.name)}: {error.reason}", None)
        self.failures[unit.name] = error.reason

    def forget(self, unit: LogicalUnit) -> None:
        """The unit is no longer one of this group."""
        self.failures.pop(unit.name, None)
        self.unflushed.pop(unit.name, None)

    def _lu_of(self, unit: str) -> str:
        name = next((name for name, each in self.units.items() if each.name == unit), "source")
        return f"{self.name}/{name}"

    def fault(self, name: str, reason: str) -> None:
        """Something that stops the running copy of a clone; it goes on to be tried."""
        if self.faults.get(name) != reason:
            self._on_error(name, reason)
        self.faults[name] = reason

    def mended(self, name: str) -> None:
        """The copy of the clone goes on without faults."""
        self.faults.pop(name, None)

    def copied(self, name: str) -> None:
        """The copy of the clone is complete: what failed before has been done since."""
        self.mended(name)
        if name in self.units:
            self.failures.pop(self.units[name].name, None)
