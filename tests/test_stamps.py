"""Stamps: a volume that is older than its backings know is not believed."""

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from clonefs.engines import Recorder, StorageSystem
from clonefs.engines.stamps import SOURCE, Doubt, Stamp, look
from clonefs.extents import extent_list
from clonefs.testing.world import Disk, SimulatedMedium, SimulatedUnit, World
from clonefs.units import LogicalUnit, MissingUnit, open_backing
from clonefs.volume import CloneState, MetadataVolume, format_medium, format_volume, open_volume

EXTENTS = 8
SIZE = EXTENTS * 4096
UUID = bytes(range(16))
WORDS = "00010203-0405-0607-0809-0a0b0c0d0e0f"
ANOTHER = "11111111-2222-3333-4444-555555555555"


class Machine:
    """A volume and three disks; `lines` are the events of the last daemon."""

    def __init__(self) -> None:
        volume = bytearray(1 << 20)
        self.world = World(random.Random(0), volume=volume, volume_on_disk=bytearray(volume))
        format_medium(SimulatedMedium(self.world), UUID)
        for name in ("source", "a", "b"):
            SimulatedUnit(self.world, name, Disk.of(bytearray(SIZE)))
        self.lines: list[str] = []
        self.boot = 1

    def put_in_place(self, older: bytes) -> None:
        """An older copy of the volume."""
        self.world.volume[:] = self.world.volume_on_disk[:] = older

    def stamps(self) -> list[Stamp | None]:
        return [Stamp.of(disk) for disk in self.world.disks.values()]

    def all_of(self, generation: int) -> list[Stamp]:
        """The stamps after `set_up`."""
        words = (SOURCE, "fractured", "synchronized")
        return [Stamp(WORDS, generation, word) for word in words]

    async def run(self, body: Callable[[StorageSystem], Awaitable[None]], *, stop: bool) -> None:
        """A daemon that does `body`, and is stopped or dies."""
        self.lines = []
        volume = MetadataVolume(SimulatedMedium(self.world), f"boot {self.boot}")

        async def open_unit(
            path: Path, *, create_size: int | None = None, size: int | None = None
        ) -> LogicalUnit:
            return self.world.disks[path.name]

        async def at_once(work: Callable[[], None]) -> None:
            await trio.lowlevel.checkpoint()
            work()

        async def nothing(_: str) -> None:
            await trio.lowlevel.checkpoint()

        system = StorageSystem(
            Recorder(volume, at_once),
            open_unit,
            forget_pages=nothing,
            wall_clock=trio.current_time,
            on_event=self.lines.append,
        )
        async with trio.open_nursery() as nursery:
            await system.start(nursery)
            await body(system)
            if stop:
                await system.stop()
            nursery.cancel_scope.cancel()

    def check_that_no_power_cut_brings_another_volume_back(self) -> None:
        """The next mount would be in doubt again, and a restore that was begun since would stop."""
        self.world.power_cut = True
        for disk in self.world.disks.values():
            for _ in range(20):
                left = disk.after_death().stamps[-1]
                assert left is not None
                assert left.startswith(WORDS)
        self.world.power_cut = False

    def doubts(self) -> int:
        return sum("every extent is taken to differ" in line for line in self.lines)


async def set_up(system: StorageSystem) -> None:
    await system.add_group("g", Path("/source"), size=None, extent_size=4096)
    for name in ("a", "b"):
        await system.add_clone("g", name, Path(f"/{name}"), sync=True)
    while {each.state for each in system.servers["g"].group.clones.values()} != {
        CloneState.SYNCHRONIZED
    }:
        await system.servers["g"].progress()
    await system.fracture([("g", "a")])
    await system.servers["g"].checkpoint()  # which leaves the PDM with what really differs


async def nothing_more(system: StorageSystem) -> None:
    await trio.lowlevel.checkpoint()


def test_a_stamp_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "backing"
    unit = open_backing(path, create_size=SIZE)
    assert Stamp.of(unit) is None
    for durable in (True, False):
        unit.set_stamp(str(Stamp(WORDS, 17, "restoring")), durable=durable)
        assert Stamp.of(unit) == Stamp(WORDS, 17, "restoring")
    unit.close()
    again = open_backing(path)
    assert Stamp.of(again) == Stamp(WORDS, 17, "restoring")
    again.set_stamp("what is this", durable=False)
    assert Stamp.of(again) is None
    again.close()
    assert Stamp.of(MissingUnit("gone", SIZE, "gone")) is None


async def test_a_stamp_is_never_newer_than_the_record_and_new_with_each_commit() -> None:
    machine = Machine()

    async def body(system: StorageSystem) -> None:
        await set_up(system)
        generation = system.volume.generation
        assert machine.stamps() == machine.all_of(generation)
        await system.set_rate("g", "a", 5)
        assert machine.stamps() == machine.all_of(generation + 1)

    await machine.run(body, stop=True)
    volume = MetadataVolume(SimulatedMedium(machine.world), "boot")
    assert volume.record.clean
    assert machine.stamps() == machine.all_of(volume.generation)


@pytest.mark.parametrize("stop", [True, False])
async def test_an_older_volume_is_in_doubt_once(stop: bool) -> None:
    machine = Machine()
    await machine.run(set_up, stop=stop)
    older = bytes(machine.world.volume)

    async def more(system: StorageSystem) -> None:
        await system.sources["g"].write(4096, b"x" * 512)
        await system.set_rate("g", "a", 5)

    await machine.run(more, stop=stop)
    assert machine.doubts() == 0
    newest = machine.stamps()
    machine.put_in_place(older)

    async def look_at_it(system: StorageSystem) -> None:
        group = system.servers["g"].group
        states = [clone.state for clone in group.clones.values()]
        assert states == [CloneState.FRACTURED, CloneState.OUT_OF_SYNC]
        for clone in group.clones.values():
            assert extent_list(clone.delta) == f"0-{EXTENTS - 1}"
        durable, _ = system.volume.durable_maps(group.record, EXTENTS)
        assert durable.bits.all()
        assert system.servers["g"].durability.delta.covers(0, EXTENTS)

    await machine.run(look_at_it, stop=False)
    assert machine.doubts() == 1
    for old, new in zip(newest, machine.stamps(), strict=True):
        assert old is not None
        assert new is not None
        assert new.generation > old.generation
    await machine.run(look_at_it, stop=stop)
    assert machine.doubts() == 0


@pytest.mark.parametrize("died_at", range(1, 30))
async def test_a_daemon_that_dies_while_it_is_in_doubt(died_at: int) -> None:
    """Wherever it was, the next one is in doubt as well, or all may differ already."""
    machine = Machine()
    await machine.run(set_up, stop=True)
    older = bytes(machine.world.volume)
    await machine.run(nothing_more, stop=True)
    machine.put_in_place(older)
    world = machine.world
    world.points, world.die_at, world.power_cut = 0, died_at, died_at % 2 == 0
    with trio.CancelScope() as world.scope:
        await machine.run(nothing_more, stop=False)
    if world.frozen is None:
        return  # it has got through before
    machine.boot += world.power_cut
    machine.world = World(
        random.Random(0),
        volume=world.frozen.volume,
        volume_on_disk=world.frozen.volume_on_disk,
    )
    for name, disk in world.frozen.disks.items():
        SimulatedUnit(machine.world, name, disk)

    async def look_at_it(system: StorageSystem) -> None:
        group = system.servers["g"].group
        assert group.clones["b"].state is CloneState.OUT_OF_SYNC
        assert [clone.delta.count for clone in group.clones.values()] == [EXTENTS] * 2

    await machine.run(look_at_it, stop=True)


async def test_a_backing_of_another_volume_brings_its_group_in_doubt() -> None:
    machine = Machine()
    await machine.run(set_up, stop=True)
    machine.world.disks["b"].set_stamp(str(Stamp(ANOTHER, 1, SOURCE)), durable=True)
    await machine.run(nothing_more, stop=False)
    assert machine.doubts() == 1
    assert ANOTHER in " ".join(machine.lines)
    machine.check_that_no_power_cut_brings_another_volume_back()
    await machine.run(nothing_more, stop=True)
    assert machine.doubts() == 0


async def test_a_new_backing_with_the_stamp_of_another_volume_is_taken_over() -> None:
    """Durably, before the record names it."""
    machine = Machine()
    for disk in machine.world.disks.values():
        disk.set_stamp(str(Stamp(ANOTHER, 1000, SOURCE)), durable=True)
    await machine.run(set_up, stop=False)
    machine.check_that_no_power_cut_brings_another_volume_back()


def test_what_a_stamp_tells(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    format_volume(path, size=1 << 20, force=False)
    volume = open_volume(path)
    world = World(random.Random(0), bytearray(), bytearray())

    def unit(stamp: str | None) -> LogicalUnit:
        disk = Disk.of(bytearray(SIZE))
        disk.stamps = [stamp]
        return SimulatedUnit(world, "disk", disk)

    same, newer = (f"{volume.uuid} {volume.generation + more} fractured" for more in (0, 6))
    assert look(volume, {"g": [unit(None), unit(same), unit("nonsense")]}) == Doubt({}, 0, {})
    doubt = look(volume, {"g": [unit(newer), unit(same)], "h": [unit(None)]})
    assert doubt.newest == volume.generation + 6
    assert doubt.reasons.keys() == {"g", "h"}
    assert doubt.states == {"disk": CloneState.FRACTURED}
    assert "is older than disk" in doubt.reasons["h"]
    other = f"{ANOTHER} 99 fractured"
    doubt = look(volume, {"g": [unit(other), unit(same)], "h": [unit(same)]})
    assert doubt.states == {}
    assert doubt.newest == 0
    assert doubt.reasons.keys() == {"g"}
    generation = volume.generation
    volume.overtake(generation + 6, volume.opened())
    assert volume.generation in (generation + 8, generation + 9)
    volume.close(clean=False)
    with_both = open_volume(path)
    assert with_both.damage == ()
    assert with_both.generation == volume.generation
    with_both.close(clean=False)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_overtaking_leaves_two_records_that_follow_each_other(tmp_path: Path, ahead: int) -> None:
    path = tmp_path / "meta"
    format_volume(path, size=1 << 20, force=False)
    volume = open_volume(path)
    started = volume.generation
    volume.overtake(started + ahead, volume.opened())
    assert volume.generation > started + ahead
    assert {volume.superblock.record_slot(volume.generation - n) for n in (0, 1)} == {
        volume.superblock.record_slot(n) for n in (0, 1)
    }
    assert (volume.generation - started) % 2 == 0
    volume.close(clean=False)


async def test_sectors_of_a_restore_that_the_record_does_not_know_of_are_gone() -> None:
    """A copy that was taken while something went on may have an older record than maps. The next
    restore gets the number of one that has been there already."""
    machine = Machine()
    await machine.run(set_up, stop=True)
    older = bytes(machine.world.volume)

    async def restore(system: StorageSystem) -> None:
        source = system.sources["g"]
        await source.write(0, b"x" * SIZE)
        await system.set_rate("g", "a", 1)
        await system.protected_restore("g", "a")
        await source.write(5 * 4096, b"y" * 4096)
        await source.flush()
        _, protected = system.volume.durable_maps(system.servers["g"].group.record, EXTENTS)
        assert protected.bits.count() == 1

    await machine.run(restore, stop=True)
    maps = MetadataVolume(SimulatedMedium(machine.world), "boot").superblock.first_map_byte
    machine.put_in_place(older[:maps] + bytes(machine.world.volume[maps:]))

    async def restore_again(system: StorageSystem) -> None:
        await system.set_rate("g", "a", 1)
        await system.protected_restore("g", "a")
        record = system.servers["g"].group.record
        assert record.epoch == 1
        _, protected = system.volume.durable_maps(record, EXTENTS)
        assert not protected.bits.any()

    await machine.run(restore_again, stop=False)
    assert machine.doubts() == 1
