"""A simulated machine: disks, a volume's pages, time, and the instant at which the daemon dies.

Whatever could be the last thing that the daemon did is a *point*: every I/O, before and after it,
and every change of a live map. At the point with the chosen number the machine is frozen: what the
page cache has at that instant is what the next daemon finds. What the dying one still does after
that (its tasks are being cancelled) happens to a world that nobody will look at.
"""

import random
from dataclasses import dataclass, field

import trio

from clonefs.errors import DeviceError
from clonefs.extents import SECTOR
from clonefs.units import Buffer, LogicalUnit

EIO = 5
PAGE = 4096


@dataclass(slots=True)
class WriteUnderWay:
    """A write that a disk has not finished."""

    offset: int
    data: bytes


@dataclass(slots=True)
class Frozen:
    """What is left when the daemon has died: the bytes of each disk, and of the volume."""

    disks: dict[str, bytearray]
    volume: bytearray


@dataclass(slots=True)
class World:
    """The machine. `die_at` is the number of the point at which the daemon dies, None for never;
    `fault_rate` the chance of an I/O to fail."""

    random: random.Random
    die_at: int | None = None
    fault_rate: float = 0.0
    points: int = 0
    operations: int = 0
    faults: int = 0
    disks: dict[str, "SimulatedUnit"] = field(default_factory=dict)
    volume: bytearray = field(default_factory=bytearray)
    volume_on_disk: bytearray = field(default_factory=bytearray)
    power_cut: bool = False
    frozen: Frozen | None = None
    scope: trio.CancelScope | None = None

    def point(self) -> None:
        """The daemon may have died here."""
        self.points += 1
        if self.points == self.die_at:
            disks = {name: disk.after_death() for name, disk in self.disks.items()}
            self.frozen = Frozen(disks, self._volume_after_death())
            assert self.scope is not None
            self.scope.cancel()

    def _volume_after_death(self) -> bytearray:
        """The pages of the volume; after a power cut each as it was on disk, or as it is."""
        if not self.power_cut:
            return bytearray(self.volume)
        left = bytearray(self.volume_on_disk)
        for at in range(0, len(left), PAGE):
            if self.random.random() < 0.5:
                left[at : at + PAGE] = self.volume[at : at + PAGE]
        return left

    async def delay(self) -> None:
        """The time that an I/O takes, in which others run."""
        await trio.sleep(self.random.choice((0.0, 0.0, 0.0001, 0.001, 0.004)))

    def maybe_fail(self, verb: str, name: str) -> None:
        """An I/O error, once in a while."""
        if self.fault_rate and self.random.random() < self.fault_rate:
            self.faults += 1
            raise DeviceError(EIO, f"cannot {verb} {name}: a simulated error", name)


class SimulatedUnit:
    """A disk in `world`. Sectors are written whole; a write of several may be seen in part."""

    def __init__(self, world: World, name: str, content: bytearray) -> None:
        self.world = world
        self.name = name
        self.size = len(content)
        self.content = content
        self.sparse = True
        # What is on stable storage, and what each sector has been since, oldest first.
        self._on_disk = bytearray(content)
        self._unflushed: dict[int, list[bytes]] = {}
        self._under_way: list[WriteUnderWay] = []
        world.disks[name] = self

    def after_death(self) -> bytearray:
        """The content, with any part of what was under way. After a power cut each sector that was
        not flushed is as it was on disk, or as it has been at any time since."""
        content = bytearray(self.content)
        if self.world.power_cut:
            content = bytearray(self._on_disk)
            for start, versions in self._unflushed.items():
                chosen = self.world.random.choice([content[start : start + SECTOR], *versions])
                content[start : start + SECTOR] = chosen
        for write in self._under_way:
            for at in range(0, len(write.data), SECTOR):
                if self.world.random.random() < 0.5:
                    start = write.offset + at
                    content[start : start + SECTOR] = write.data[at : at + SECTOR]
        return content

    def read_now(self, offset: int, length: int) -> Buffer | None:
        self.world.operations += 1
        self.world.point()
        if self.world.random.random() < 0.5:
            return None
        self.world.maybe_fail("read", self.name)
        return bytes(self.content[offset : offset + length])

    async def read(self, offset: int, length: int) -> Buffer:
        self.world.operations += 1
        self.world.point()
        await self.world.delay()
        self.world.maybe_fail("read", self.name)
        data = bytes(self.content[offset : offset + length])
        await self.world.delay()
        return data

    def write_now(self, offset: int, data: Buffer) -> bool:
        self.world.operations += 1
        self.world.point()
        if self.world.random.random() < 0.5:
            return False
        self.world.maybe_fail("write", self.name)
        for at in range(0, len(data), SECTOR):
            self._put(offset + at, bytes(data[at : at + SECTOR]))
        self.world.point()
        return True

    def _put(self, start: int, sector: bytes) -> None:
        self.content[start : start + SECTOR] = sector
        self._unflushed.setdefault(start, []).append(sector)

    async def write(self, offset: int, data: Buffer) -> None:
        self.world.operations += 1
        self.world.point()
        write = WriteUnderWay(offset, bytes(data))
        self._under_way.append(write)
        try:
            await self.world.delay()
            sectors = list(range(0, len(write.data), SECTOR))
            if self.world.random.random() < 0.3:
                self.world.random.shuffle(sectors)
            pause = self.world.random.choice(sectors) if len(sectors) > 1 else None
            for at in sectors:
                if at == pause:
                    await self.world.delay()
                    self.world.maybe_fail("write", self.name)
                self._put(offset + at, write.data[at : at + SECTOR])
            self.world.maybe_fail("write", self.name)
            await self.world.delay()
        finally:
            self._under_way.remove(write)
        self.world.point()

    async def copy_from(self, origin: LogicalUnit, offset: int, length: int) -> None:
        middle = offset + max(SECTOR, length // SECTOR // 2 * SECTOR)
        end = offset + length
        for start, stop in ((offset, min(middle, end)), (min(middle, end), end)):
            if start < stop:
                await self.write(start, await origin.read(start, stop - start))

    async def flush(self) -> None:
        self.world.operations += 1
        self.world.point()
        flushed = {start: len(versions) for start, versions in self._unflushed.items()}
        await self.world.delay()
        self.world.point()
        for start, count in flushed.items():
            # Another flush may have done some of it.
            versions = self._unflushed.get(start, [])
            if versions:
                done = versions[: min(count, len(versions))]
                self._on_disk[start : start + SECTOR] = done[-1]
                del versions[: len(done)]
                if not versions:
                    del self._unflushed[start]
        self.world.point()

    async def data_from(self, offset: int) -> int:
        await self.world.delay()
        return next((at for at in range(offset, self.size) if self.content[at]), self.size)

    def allocated(self) -> int:
        return self.size

    def modified(self) -> float | None:
        return None

    def close(self) -> None:
        pass

    def discard(self) -> None:
        pass


class SimulatedMedium:
    """The pages of a metadata volume in `world`."""

    name = "a simulated volume"

    def __init__(self, world: World) -> None:
        self._world = world
        self.size = len(world.volume)
        self.view = memoryview(world.volume)

    def write_durably(self, offset: int, data: bytes) -> None:
        self._world.operations += 1
        self._world.point()
        middle = self._world.random.randrange(0, len(data), SECTOR) if len(data) > SECTOR else 0
        for start, stop in ((0, middle), (middle, len(data))):
            self.view[offset + start : offset + stop] = data[start:stop]
            self._world.volume_on_disk[offset + start : offset + stop] = data[start:stop]
            self._world.point()

    def flush(self) -> None:
        self._world.point()
        self._world.volume_on_disk[:] = self._world.volume

    def close(self) -> None:
        self.view.release()
