"""A simulated machine: disks, a volume's pages, time, faults, and the instant at which the daemon
dies.

Whatever could be the last thing that the daemon did is a *point*: every I/O, before and after it,
and every change of a live map. At the point with the chosen number the machine is frozen: what the
page cache has at that instant is what the next daemon finds. What the dying one still does after
that (its tasks are being cancelled) happens to a world that nobody will look at.

A disk has what its page cache shows, what is on stable storage, and what each sector has been in
between. That outlives a daemon, until the power goes.
"""

import errno
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from clonefs.errors import ClonefsError, DeviceError, failed
from clonefs.extents import SECTOR
from clonefs.testing.oracle import Violation
from clonefs.units import Buffer, FlushFailure, LogicalUnit

PAGE = 4096
VOLUME = "volume"
EVICTS = 0.05  # how likely, at each I/O

# Told of a sector of a disk that a failed flush has lost: the disk, the byte, and what is there now
# on stable storage.
OnLoss = Callable[[str, int, bytes], None]


@dataclass(slots=True)
class WriteUnderWay:
    """A write that a disk has not finished."""

    offset: int
    data: bytes


@dataclass(slots=True)
class Disk:
    """The sectors of a disk. `unflushed`: what each sector (its first byte) has been since it was
    flushed, oldest first. `lost`: sectors that a failed flush has dropped, and the page cache may
    show until it is short of memory; `unknown`: those of them that the next daemon has not been told
    of."""

    content: bytearray
    on_disk: bytearray
    unflushed: dict[int, list[bytes]] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    reverted: set[int] = field(default_factory=set)  # what was unknown when the power went
    # The stamp on stable storage, and those since, oldest first.
    stamps: list[str | None] = field(default_factory=lambda: [None])

    @classmethod
    def of(cls, content: bytearray) -> "Disk":
        """A disk with `content`, all of it on stable storage."""
        return cls(content, bytearray(content))

    def put(self, start: int, sector: bytes) -> None:
        """Write a sector."""
        self.content[start : start + SECTOR] = sector
        self.unflushed.setdefault(start, []).append(sector)
        self.lost.discard(start)
        self.unknown.discard(start)
        self.reverted.discard(start)

    def evict(self, rng: random.Random) -> list[int]:
        """The page cache lets go of some of what a failed flush has lost; it counts as clean. Returns
        the sectors that now show what is on disk."""
        evicted = []
        for start in sorted(self.lost - self.unknown):
            part = slice(start, start + SECTOR)
            if rng.random() < 0.5 and self.content[part] != self.on_disk[part]:
                self.content[part] = self.on_disk[part]
                evicted.append(start)
        return evicted

    def copy(self) -> "Disk":
        """The same, to be changed by somebody else."""
        unflushed = {start: list(versions) for start, versions in self.unflushed.items()}
        content, on_disk = bytearray(self.content), bytearray(self.on_disk)
        sets = set(self.lost), set(self.unknown), set(self.reverted)
        return Disk(content, on_disk, unflushed, *sets, list(self.stamps))

    def cut(self, rng: random.Random) -> None:
        """The power goes: each sector is as it was on disk, or as it has been at any time since."""
        for start, versions in self.unflushed.items():
            self.on_disk[start : start + SECTOR] = rng.choice(
                [bytes(self.on_disk[start : start + SECTOR]), *versions]
            )
        self.content[:] = self.on_disk
        self.unflushed.clear()
        self.reverted |= self.unknown
        self.lost.clear()
        self.unknown.clear()
        self.stamps = [rng.choice(self.stamps)]


@dataclass(slots=True)
class Frozen:
    """What is left when the daemon has died, or has ended: the disks, and the volume."""

    disks: dict[str, Disk]
    volume: bytearray
    volume_on_disk: bytearray


@dataclass(slots=True)
class Faults:
    """What fails. `rate`: of reads and writes of disks; `flush_rate`: of flushes; `volume_rate`: of
    durable writes to the volume. `at`: the number of an I/O that fails. `lasting`: what failed at
    that number goes on failing, for as long as the daemon lives; `lasting_rate` is the chance of
    that for the others."""

    rate: float = 0.0
    flush_rate: float = 0.0
    volume_rate: float = 0.0
    lasting_rate: float = 0.0
    at: int | None = None
    lasting: bool = False


@dataclass(slots=True)
class World:
    """The machine. `die_at` is the number of the point at which the daemon dies, None for never."""

    random: random.Random
    volume: bytearray
    volume_on_disk: bytearray
    die_at: int | None = None
    power_cut: bool = False
    faults: Faults = field(default_factory=Faults)
    on_loss: OnLoss = lambda name, start, sector: None
    points: int = 0
    operations: int = 0
    failed: int = 0
    disks: dict[str, "SimulatedUnit"] = field(default_factory=dict)
    frozen: Frozen | None = None
    frozen_at_point: bool = False
    volume_failed: bool = False
    scope: trio.CancelScope | None = None
    failing: set[tuple[str, str]] = field(default_factory=set)  # (verb, disk): for ever

    def point(self) -> None:
        """The daemon may have died here."""
        self.points += 1
        if self.points == self.die_at and self.frozen is None:
            self.freeze()
            self.frozen_at_point = True
            assert self.scope is not None
            self.scope.cancel()

    def freeze(self) -> None:
        """What is there at this instant is what is left."""
        disks = {name: unit.after_death() for name, unit in self.disks.items()}
        volume, on_disk = bytearray(self.volume), bytearray(self.volume_on_disk)
        if self.power_cut:  # each page of the volume is as it was on disk, or as it is
            for at in range(0, len(volume), PAGE):
                if self.random.random() < 0.5:
                    on_disk[at : at + PAGE] = volume[at : at + PAGE]
            volume = bytearray(on_disk)
        self.frozen = Frozen(disks, volume, on_disk)

    async def delay(self) -> None:
        """The time that an I/O takes, in which others run."""
        await trio.sleep(self.random.choice((0.0, 0.0, 0.0001, 0.001, 0.004)))

    def begins(self, verb: str, name: str) -> bool:
        """An I/O begins. Returns whether it will fail."""
        self.operations += 1
        self._evict()
        self.point()
        if (verb, name) in self.failing:
            return True
        faults = self.faults
        rate = faults.flush_rate if verb == "flush" else faults.rate
        rate = faults.volume_rate if name == VOLUME else rate
        by_number = self.operations == faults.at
        if not (by_number or (rate and self.random.random() < rate)):
            return False
        self.failed += 1
        lasts = faults.lasting if by_number else self.random.random() < faults.lasting_rate
        if lasts:
            self.failing.add((verb, name))
        return True

    def _evict(self) -> None:
        """Now and then the machine is short of memory. Nobody is told of what goes."""
        if self.frozen is not None:
            return
        for name, unit in self.disks.items():
            if unit.disk.lost and self.random.random() < EVICTS:
                for start in unit.disk.evict(self.random):
                    self.on_loss(name, start, bytes(unit.disk.on_disk[start : start + SECTOR]))

    def mend(self) -> None:
        """Nothing fails any more."""
        self.faults = Faults()
        self.failing.clear()

    def error(self, verb: str, name: str) -> DeviceError:
        """What a failed I/O raises."""
        codes = (errno.EIO, errno.ENOSPC) if verb == "write" else (errno.EIO,)
        code = self.random.choice(codes)
        return DeviceError(code, f"cannot {verb} {name}: a simulated {os.strerror(code)}", name)


class SimulatedUnit:
    """A disk in `world`. Sectors are written whole; a write of several may be seen in part."""

    def __init__(self, world: World, name: str, disk: Disk) -> None:
        self.world = world
        self.name = name
        self.disk = disk
        self.size = len(disk.content)
        self.sparse = True
        self._under_way: list[WriteUnderWay] = []
        self._flushing = trio.Lock()
        self._flush_failure = FlushFailure(name)
        world.disks[name] = self

    @property
    def content(self) -> bytearray:
        """What the page cache has."""
        return self.disk.content

    def after_death(self) -> Disk:
        """The disk, with any part of what was under way."""
        disk = self.disk.copy()
        rng = self.world.random
        for write in self._under_way:
            for at in range(0, len(write.data), SECTOR):
                if rng.random() < 0.5:
                    disk.put(write.offset + at, write.data[at : at + SECTOR])
        if self.world.power_cut:
            disk.cut(rng)
        return disk

    def read_now(self, offset: int, length: int) -> Buffer | None:
        fails = self.world.begins("read", self.name)
        if self.world.random.random() < 0.5:
            return None
        if fails:
            raise self.world.error("read", self.name)
        return bytes(self.content[offset : offset + length])

    async def read(self, offset: int, length: int) -> Buffer:
        fails = self.world.begins("read", self.name)
        await self.world.delay()
        if fails:
            raise self.world.error("read", self.name)
        data = bytes(self.content[offset : offset + length])
        await self.world.delay()
        return data

    def write_now(self, offset: int, data: Buffer) -> bool:
        fails = self.world.begins("write", self.name)
        if self.world.random.random() < 0.5:
            return False
        if fails:
            raise self.world.error("write", self.name)
        for at in range(0, len(data), SECTOR):
            self.disk.put(offset + at, bytes(data[at : at + SECTOR]))
        self.world.point()
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        fails = self.world.begins("write", self.name)
        rng = self.world.random
        write = WriteUnderWay(offset, bytes(data))
        self._under_way.append(write)
        try:
            await self.world.delay()
            sectors = list(range(0, len(write.data), SECTOR))
            if rng.random() < 0.3:
                rng.shuffle(sectors)
            # There it pauses, or fails; a failure may also come after the last one.
            pause = rng.randrange(len(sectors) + 1)
            for at in sectors[:pause]:
                self.disk.put(offset + at, write.data[at : at + SECTOR])
            await self.world.delay()
            if fails:
                raise self.world.error("write", self.name)
            for at in sectors[pause:]:
                self.disk.put(offset + at, write.data[at : at + SECTOR])
            await self.world.delay()
        finally:
            self._under_way.remove(write)
        self.world.point()

    async def copy_from(
        self, origin: LogicalUnit, ranges: Sequence[tuple[int, int]], *, share: bool
    ) -> int:
        for number, (offset, length) in enumerate(ranges):
            try:
                await self._copy_range(origin, offset, length)
            except ClonefsError:
                if number == 0:
                    raise
                return number
        return len(ranges)

    async def _copy_range(self, origin: LogicalUnit, offset: int, length: int) -> None:
        middle = offset + max(SECTOR, length // SECTOR // 2 * SECTOR)
        end = offset + length
        for start, stop in ((offset, min(middle, end)), (min(middle, end), end)):
            if start < stop:
                await self.write(start, await origin.read(start, stop - start))

    async def flush(self) -> None:
        async with self._flushing:
            self._flush_failure.check()
            fails = self.world.begins("flush", self.name)
            counts = {start: len(versions) for start, versions in self.disk.unflushed.items()}
            await self.world.delay()
            self.world.point()
            for start, count in counts.items():
                self._flushed(start, count, lost=fails and self.world.random.random() < 0.5)
            self.world.point()
            if fails:
                raise self._flush_failure.remember("a simulated error")

    def _flushed(self, start: int, count: int, *, lost: bool) -> None:
        """The first `count` versions of a sector are flushed: the last of them is on disk, or lost
        for good, though the page cache shows it."""
        disk = self.disk
        versions = disk.unflushed[start]
        if not lost:
            disk.on_disk[start : start + SECTOR] = versions[count - 1]
        del versions[:count]
        if versions:
            return
        del disk.unflushed[start]
        if lost:
            disk.lost.add(start)
            if self.world.frozen is None:
                self.world.on_loss(self.name, start, bytes(disk.on_disk[start : start + SECTOR]))

    async def forget_cached(self) -> None:
        await self.flush()
        for start in self.disk.lost:
            part = slice(start, start + SECTOR)
            self.content[part] = self.disk.on_disk[part]
        self.disk.lost.clear()
        self.disk.unknown.clear()
        self.world.point()

    async def data_from(self, offset: int) -> int:
        await self.world.delay()
        return next((at for at in range(offset, self.size) if self.content[at]), self.size)

    def allocated(self) -> int:
        return self.size

    def stamp(self) -> str | None:
        return self.disk.stamps[-1]

    def set_stamp(self, stamp: str, *, durable: bool) -> None:
        self.world.point()
        self.disk.stamps.append(stamp)
        self.world.point()
        if durable:
            self.disk.stamps[:] = [stamp]
            self.world.point()

    def modified(self) -> float | None:
        return None

    def close(self) -> None:
        pass

    def discard(self) -> None:
        pass


class SimulatedMedium:
    """The pages of a metadata volume in `world`."""

    name = VOLUME
    piece = 1

    def __init__(self, world: World) -> None:
        self._world = world
        self._resting: dict[int, int] = {}
        self.size = len(world.volume)
        self.view = memoryview(world.volume)

    def read(self, offset: int, length: int) -> bytes:
        self._look()
        return bytes(self.view[offset : offset + length])

    def keep(self, offset: int, length: int) -> None:
        assert not any(offset <= at < offset + length for at in self._resting)

    def rest(self, offset: int, length: int) -> None:
        self._resting[offset] = length
        self._look()

    def wake(self, offset: int, length: int) -> None:
        self._look()
        assert self._resting.pop(offset) == length

    def forget(self, offset: int, length: int) -> None:
        for at in [at for at in self._resting if offset <= at < offset + length]:
            del self._resting[at]

    def _look(self) -> None:
        """On a real volume a store to what rests ends the process; and what rests has only the disk."""
        for at, length in self._resting.items():
            for pages in (self._world.volume, self._world.volume_on_disk):
                if any(pages[at : at + length]):
                    raise Violation(
                        f"the {length} bytes at {at} of the volume rest, but are not clear"
                    )

    def write_durably(self, offset: int, data: bytes) -> None:
        self._look()
        world = self._world
        fails = world.begins("write", VOLUME)
        sectors = range(0, len(data), SECTOR)
        early = {each for each in sectors if len(sectors) > 1 and world.random.random() < 0.5}
        for part in (early, set(sectors) - early):
            # The page cache has what could not be written, and so may the disk.
            on_disk = not fails or world.random.random() < 0.5
            for start in sorted(part):
                at, sector = offset + start, data[start : start + SECTOR]
                self.view[at : at + len(sector)] = sector
                if on_disk:
                    world.volume_on_disk[at : at + len(sector)] = sector
            world.point()
        if fails:
            world.volume_failed = True
            raise failed("writing to the volume failed: a simulated error")

    def flush_part(self, offset: int, length: int) -> None:
        self._may_fail()
        part = slice(offset, offset + length)
        self._world.volume_on_disk[part] = self._world.volume[part]

    def flush(self) -> None:
        self._look()
        self._may_fail()
        self._world.volume_on_disk[:] = self._world.volume

    def _may_fail(self) -> None:
        if self._world.begins("flush", VOLUME):
            self._world.volume_failed = True
            raise failed("flushing the volume failed: a simulated error")

    def close(self) -> None:
        self.view.release()
