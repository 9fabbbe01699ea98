"""A daemon in a simulated world, and what hosts and people do to it.

Whatever is done is told to the ledger of the group, before and after, so that it knows what may be
read. A request or a command that is refused or fails is an answer like any other.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from clonefs.engines import HostLu, StorageSystem
from clonefs.errors import ClonefsError
from clonefs.extents import SECTOR
from clonefs.group import Clone
from clonefs.testing.ledger import SOURCE, Begun, Clock, Ledger, disk_name
from clonefs.testing.oracle import Register, Violation, stamp, stamps
from clonefs.testing.world import Disk, World
from clonefs.volume import CloneState

EXTENT = 4096
PER_EXTENT = EXTENT // SECTOR
PATIENCE = 2.0  # virtual seconds


@dataclass(slots=True)
class Counts:
    """What was done."""

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    commands: int = 0
    refused: int = 0
    restores: int = 0
    fractures: int = 0
    verifications: int = 0


class Driver:
    """One life of the daemon. `next_stamp` gives a number that no sector has had yet; `ordered` gets
    what `write_in_order` has written: sector, the earlier stamp, the later one."""

    def __init__(
        self,
        world: World,
        system: StorageSystem,
        ledgers: dict[str, Ledger],
        clock: Clock,
        counts: Counts,
        next_stamp: Callable[[], int],
        ordered: list[tuple[int, int, int]],
    ) -> None:
        self.world = world
        self.system = system
        self.ledgers = ledgers
        self.counts = counts
        self._clock = clock
        self._next_stamp = next_stamp
        self._ordered = ordered

    @property
    def alive(self) -> bool:
        """Whether what happens still counts."""
        return self.world.frozen is None

    def disks(self) -> dict[str, Disk]:
        """The disks as they are."""
        return {name: unit.disk for name, unit in self.world.disks.items()}

    def clone(self, group: str, name: str) -> Clone | None:
        """A clone, if it is there."""
        server = self.system.servers.get(group)
        return None if server is None else server.group.clones.get(name)

    def state(self, group: str, name: str) -> CloneState | None:
        """The state of a clone, if it is there."""
        clone = self.clone(group, name)
        return None if clone is None else clone.state

    def observe(self) -> None:
        """A state may have changed. The group is held and drained then, or the clone has failed."""
        if not self.alive:
            return
        for name, server in self.system.servers.items():
            self.ledgers[name].observe(server.group, self.disks(), since=self._clock.now)

    # Hosts. Sectors are counted from the start of the LU.

    def lu(self, group: str, name: str) -> tuple[Register, HostLu] | None:
        """An LU and what is known of it; None for a clone that is no point-in-time copy."""
        ledger = self.ledgers[group]
        if name == SOURCE and group in self.system.sources:
            return ledger.source, self.system.sources[group]
        if name in ledger.copies and (group, name) in self.system.clones:
            return ledger.copies[name], self.system.clones[group, name]
        return None

    async def read(self, group: str, name: str, first: int, count: int) -> None:
        """Read, and check what was read."""
        found = self.lu(group, name)
        if found is None:
            return
        register, lu = found
        self.counts.reads += 1
        start = self._clock.tick()
        try:
            data = lu.read_now(first * SECTOR, count * SECTOR)
            if data is None:
                data = await lu.read(first * SECTOR, count * SECTOR)
        except ClonefsError:
            return
        if self.alive and self.lu(group, name) == found:
            what = f"a read of {group}/{name}"
            register.check(first, stamps(data), start, self._clock.tick(), what)

    async def write(self, group: str, name: str, first: int, count: int) -> bool:
        """Write sectors with stamps of their own. Returns whether it was acknowledged."""
        values = [self._next_stamp() for _ in range(count)]
        return await self._write_stamps(group, name, first, values)

    async def write_in_order(self, group: str, other: str, sector: int) -> None:
        """Write a sector of one Source, and when that is done one of another. No later one is to be
        seen in clones that were fractured together without the earlier one."""
        earlier, later = self._next_stamp(), self._next_stamp()
        self._ordered.append((sector, earlier, later))
        if await self._write_stamps(group, SOURCE, sector, [earlier]):
            await self._write_stamps(other, SOURCE, sector, [later])

    async def _write_stamps(self, group: str, name: str, first: int, values: list[int]) -> bool:
        found = self.lu(group, name)
        if found is None:
            return False
        register, lu = found
        self.counts.writes += 1
        data = b"".join(stamp(value) for value in values)
        begun = register.begin(first, values, self._clock.tick())
        ledger = self.ledgers[group]
        done = await self._under_way(
            group, register, begun, lambda: self._write(lu, first * SECTOR, data)
        )
        if done and self.alive and name == SOURCE:
            ledger.written_since = True
        return done

    async def _write(self, lu: HostLu, offset: int, data: bytes) -> None:
        if not lu.write_now(offset, data):
            await lu.write(offset, data)

    async def _under_way(
        self, group: str, register: Register, begun: Begun, work: Callable[[], Awaitable[None]]
    ) -> bool:
        entry = (register, begun)
        under_way = self.ledgers[group].under_way
        under_way.append(entry)
        try:
            await work()
        except ClonefsError:
            if self.alive:
                under_way.remove(entry)
                register.give_up(begun, self._clock.tick())
            return False
        if self.alive:
            under_way.remove(entry)
            register.end(begun, self._clock.tick())
        return True

    async def flush(self, group: str, name: str) -> None:
        """Flush: what was acknowledged before survives a power cut."""
        found = self.lu(group, name)
        if found is None:
            return
        register, lu = found
        self.counts.flushes += 1
        start = self._clock.tick()
        disk = self.world.disks[disk_name(group, name)].disk
        lost = disk.lost - disk.unknown
        try:
            await lu.flush()
        except ClonefsError:
            return
        if self.alive:
            if lost & disk.lost:
                raise Violation(
                    f"a flush of {name} of {group} has been believed after one that failed"
                )
            register.flushed(start)

    # People

    async def command(self, *groups: str, give: Callable[[], Awaitable[None]]) -> bool:
        """Give a command to groups. Returns whether it was carried out."""
        self.counts.commands += 1
        for group in groups:
            self.ledgers[group].commanded_at = self._clock.tick()
            self.ledgers[group].commanding += 1
        try:
            await give()
        except ClonefsError:
            self.counts.refused += 1
            return False
        finally:
            if self.alive:
                for group in groups:
                    self.ledgers[group].commanding -= 1
                    self.ledgers[group].written_since = False
        return True

    async def fracture(self, *clones: tuple[str, str], force: bool = False) -> bool:
        """Fracture clones, at one instant."""
        self.counts.fractures += 1
        groups = [group for group, _ in clones]
        if force:
            ((group, name),) = clones
            return await self.command(group, give=lambda: self.system.force_fracture(group, name))
        return await self.command(*groups, give=lambda: self.system.fracture(clones))

    async def sync(self, group: str, name: str, *, then_fracture: bool = False) -> bool:
        """Mirror a clone again."""
        return await self.command(
            group, give=lambda: self.system.sync(group, name, then_fracture=then_fracture)
        )

    async def rate(self, group: str, name: str, rate: int | None) -> bool:
        """Bound the copies of a clone, in bytes a second."""
        return await self.command(group, give=lambda: self.system.set_rate(group, name, rate))

    async def verify(self, group: str, name: str, rate: int | None) -> bool:
        """Compare a clone with its Source, which must find nothing; that is looked at when the
        events come."""
        self.counts.verifications += 1
        return await self.command(group, give=lambda: self.system.verify(group, name, rate))

    async def add_group(self, group: str) -> bool:
        """Make a group, if there is none."""
        if group in self.system.servers:
            return True
        path = Path(f"/{disk_name(group, SOURCE)}")
        return await self.command(
            group,
            give=lambda: self.system.add_group(group, path, size=None, extent_size=EXTENT),
        )

    async def add_clone(self, group: str, name: str, *, sync: bool = True) -> bool:
        """Make a clone, if there is none of that name."""
        if group not in self.system.servers or self.clone(group, name) is not None:
            return False
        path = Path(f"/{disk_name(group, name)}")
        return await self.command(
            group, give=lambda: self.system.add_clone(group, name, path, sync=sync)
        )

    async def remove_clone(self, group: str, name: str) -> bool:
        """Forget a clone."""
        done = await self.command(
            group, give=lambda: self.system.remove_clone(group, name, in_use=lambda: False)
        )
        if done:  # nobody knows any more what a flush of it has lost
            disk = self.world.disks[disk_name(group, name)].disk
            disk.unknown |= disk.lost
        self.observe()
        return done

    async def remove_group(self, group: str) -> bool:
        """Forget a group."""
        return await self.command(
            group, give=lambda: self.system.remove_group(group, in_use=lambda: False)
        )

    async def restore(self, group: str, name: str, *, reverse: bool = False) -> bool:
        """A Protected Restore, or a Reverse Sync.

        No state changes when a restore begins again, so it takes effect while the command runs, like
        a write of the clone's content to all of the Source.
        """
        if reverse:
            return await self.command(group, give=lambda: self.system.reverse_sync(group, name))
        self.counts.restores += 1

        async def again() -> None:
            await self.system.protected_restore(group, name)

        if self.state(group, name) is not CloneState.RESTORING:
            return await self.command(group, give=again)
        ledger = self.ledgers[group]
        disk = self.world.disks[disk_name(group, name)].disk
        begun = ledger.source.begin(0, stamps(disk.content), self._clock.tick())
        entry = (ledger.source, begun)
        ledger.under_way.append(entry)
        done = await self.command(group, give=again)
        if self.alive:
            ledger.under_way.remove(entry)
            if done:
                ledger.restored(begun, disk, self.world.disks[disk_name(group, SOURCE)].disk)
            else:
                ledger.source.give_up(begun, self._clock.tick())
        return done

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait until something is so, or for PATIENCE: what fails may never come to it."""
        with trio.move_on_after(PATIENCE):
            while not reached():  # noqa: ASYNC110 - the time is virtual
                await trio.sleep(0.01)
