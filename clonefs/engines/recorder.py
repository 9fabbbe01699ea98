"""Commits: the one way by which the record changes.

A change is a function from a group's record to its next one. It is committed first and adopted
after; and it is applied again to the record as it is then, since a clone that failed meanwhile has
been split off at once and must stay so.

Changes of different groups that come while a record is being written go into the next one together:
sixty-four restores that begin at once take a few commits. Each hears by itself whether it was refused.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import trio

from clonefs.engines.counters import Tally
from clonefs.extents import ExtentMap
from clonefs.group import CloneGroup
from clonefs.units import LogicalUnit
from clonefs.volume import GroupRecord, MapSlot, MetadataVolume, Record
from clonefs.volume.durable import starts_of_maps

Change = Callable[[GroupRecord], GroupRecord]
Blocking = Callable[[Callable[[], None]], Awaitable[None]]


async def in_thread(work: Callable[[], None]) -> None:
    """Run what blocks in a thread."""
    await trio.to_thread.run_sync(work)


@dataclass(eq=False, slots=True)
class _Waiting:
    """A change that is to be committed, of these groups, or of whatever there is if there are none;
    `adopt` follows it in the same step. Once it is `taken` by somebody who commits, it is `ended` by
    him, with or without an error."""

    change: Callable[[Record], Record]
    groups: frozenset[CloneGroup]
    adopt: Callable[[], None]
    taken: bool = False
    ended: trio.Event = field(default_factory=trio.Event)
    error: BaseException | None = None

    def adopt_it(self) -> None:
        """The record has it."""
        try:
            self.adopt()
        except Exception as error:  # the state has changed meanwhile
            self.error = error


class Recorder:
    """Commits records to `volume`, one at a time; `blocking` runs what blocks.

    `backings_of`: the units of a group, each with a word about it, that get a stamp with each commit
    that changes the group (clonefs/engines/stamps.py).
    """

    def __init__(self, volume: MetadataVolume, blocking: Blocking = in_thread) -> None:
        self.volume = volume
        self.backings_of: Callable[[GroupRecord], Iterable[tuple[LogicalUnit, str]]] = lambda _: ()
        self._blocking = blocking
        self._lock = trio.Lock()
        self._waiting: list[_Waiting] = []
        self.on_broken: Callable[[str], None] = lambda reason: None
        self._told = False
        self.commits = Tally()

    def _look(self) -> None:
        """Tell once that the volume cannot be written any more."""
        if self.volume.broken is not None and not self._told:
            self._told = True
            self.on_broken(self.volume.broken.reason)

    async def commit(self, change: Callable[[Record], Record]) -> None:
        """Commit what `change` makes of the record. Raises ClonefsError: nothing has changed."""
        await self._take_turns(_Waiting(change, frozenset(), lambda: None))

    async def _take_turns(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        try:
            async with self._lock:
                if not waiting.taken:
                    await self._commit_together(self._fitting(waiting))
        except trio.Cancelled:
            if not waiting.taken:
                self._waiting.remove(waiting)
                raise
            # It will be in the record, or is, and whoever asked for it has to know.
            with trio.CancelScope(shield=True):
                await waiting.ended.wait()
        if waiting.error is not None:
            raise waiting.error

    def _fitting(self, first: _Waiting) -> list[_Waiting]:
        """What can be in one record with `first`, which comes first: a second change of a group has to
        see what the first one has made of it."""
        batch, groups = [first], set(first.groups)
        for each in self._waiting if groups else ():
            if each is not first and each.groups and groups.isdisjoint(each.groups):
                batch.append(each)
                groups |= each.groups
        for each in batch:
            each.taken = True
            self._waiting.remove(each)
        return batch

    async def _commit_together(self, batch: list[_Waiting]) -> None:
        record = self.volume.record
        accepted: list[_Waiting] = []
        for each in batch:
            try:
                record = each.change(record)
                accepted.append(each)
            except Exception as error:
                each.error = error
        try:
            if record != self.volume.record:
                with trio.CancelScope(shield=True):  # the others have not given up
                    await self._commit_record(record)
        except BaseException as error:
            for each in accepted:
                each.error = error
            if not isinstance(error, Exception):
                raise
        else:
            for each in accepted:
                each.adopt_it()
        finally:
            for each in batch:
                each.ended.set()

    async def _commit_record(self, record: Record) -> None:
        old = {group.name: group for group in self.volume.record.groups}
        changed = [group for group in record.groups if group != old.get(group.name)]
        backings = [each for group in changed for each in self.backings_of(group)]
        with self.commits.timed():
            await self._write(lambda: self._commit(record, backings))

    async def _write(self, work: Callable[[], None]) -> None:
        try:
            await self._blocking(work)
        finally:
            self._look()

    def _commit(self, record: Record, backings: Iterable[tuple[LogicalUnit, str]]) -> None:
        self.volume.commit(record)
        self._stamp(backings, durable=False)

    def _stamp(self, backings: Iterable[tuple[LogicalUnit, str]], *, durable: bool) -> None:
        for unit, word in backings:
            stamp = f"{self.volume.uuid} {self.volume.generation} {word}"
            unit.set_stamp(stamp, durable=durable)

    async def stamp(self, backings: Iterable[tuple[LogicalUnit, str]], *, durable: bool) -> None:
        """Let the backings know of the volume and its record as it is; see clonefs/engines/stamps.py.
        What has not been committed must not be in it: so between commits, and after them."""
        async with self._lock:
            await self._blocking(lambda: self._stamp(backings, durable=durable))

    async def settle(self) -> None:
        """What was found on the volume is on stable storage; see MetadataVolume.settle."""
        async with self._lock:
            await self._write(self.volume.settle)

    async def overtake(self, generation: int, record: Record) -> None:
        """Commit `record` as newer than `generation`; see MetadataVolume.overtake."""
        async with self._lock:
            await self._write(lambda: self.volume.overtake(generation, record))

    async def forget_protected(self, group: GroupRecord) -> None:
        """Zeros in the place of the group's PPRM. Raises ClonefsError."""
        _, start, _ = starts_of_maps(group.durable)
        end = group.durable.offset + group.durable.length
        await self.clear_durably(MapSlot(start, end - start))

    async def conclude(self) -> None:
        """Everything is on disk, and the record says so; see MetadataVolume.conclude."""
        async with self._lock:
            await self._write(self.volume.conclude)

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

    async def rest(self, extents: ExtentMap, slot: MapSlot) -> None:
        """Let the clear pieces of the live map in `slot` rest. Raises ClonefsError."""
        self.check()
        if extents.begin_rest():
            flushed = False
            try:
                await self._write(lambda: self.volume.flush_map(slot))
                flushed = True
            finally:
                extents.end_rest(flushed=flushed)

    async def clear_durably(self, slot: MapSlot) -> None:
        """Zeros in the place of durable maps. Raises ClonefsError."""
        self.check()
        await self._write(lambda: self.volume.clear_durably(slot))

    async def close(self, *, clean: bool) -> None:
        """Close the volume; see MetadataVolume.close."""
        async with self._lock:
            await self._blocking(lambda: self.volume.close(clean=clean))

    async def change(
        self, *changes: tuple[CloneGroup, Change], then: Callable[[], None] = lambda: None
    ) -> None:
        """Change several groups in one record: after a crash all of it is there, or nothing. `then`
        is done in the step in which they are adopted."""

        def apply(record: Record) -> Record:
            for group, change in changes:
                record = record.with_group(change(group.record))
            return record

        def adopt() -> None:
            for group, change in changes:
                group.adopt(change(group.record))
            then()

        groups = frozenset(group for group, _ in changes)
        await self._take_turns(_Waiting(apply, groups, adopt))
