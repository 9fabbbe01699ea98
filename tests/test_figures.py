"""The figures of the patent application, with the patent's own bits.

Real group and engines over simulated units; extents are those of the figures, 0 to 7 (Fig. 6, 8).
"""

import errno
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from bitarray import bitarray

from clonefs.engines import AFTERWARDS, GroupServer, Recorder, StorageSystem
from clonefs.engines.recorder import Change
from clonefs.errors import DeviceError
from clonefs.extents import ExtentMap, extent_list
from clonefs.group import CloneGroup
from clonefs.testing.world import Disk, SimulatedMedium, SimulatedUnit, World
from clonefs.units import LogicalUnit
from clonefs.volume import CloneState, MetadataVolume, Record, format_medium

EXTENT = 4096
EXTENTS = 8
SIZE = EXTENT * EXTENTS
CHECKPOINT = 1000.0  # seconds: when a test says so, and not before


def extent_of(letter: str) -> bytes:
    return letter.encode() * EXTENT


def _listed(bits: bitarray) -> str:
    return extent_list(ExtentMap(bits, len(bits)))


class Rig:
    """A group over simulated disks."""

    def __init__(self, system: StorageSystem, world: World) -> None:
        self.system = system
        self.world = world

    @property
    def group(self) -> CloneGroup:
        return self.system.servers["group"].group

    def delta(self, clone: str) -> str:
        return extent_list(self.group.clones[clone].delta)

    def durable(self) -> tuple[str, str]:
        """The Persistent Delta Map and the Persistent Protected Restore Map."""
        durability = self.system.servers["group"].durability
        return _listed(durability.delta.bits), _listed(durability.protected.bits)

    def cut_the_power(self) -> World:
        """The machine as it is found again: only what was flushed is left."""
        disks = {name: unit.disk.on_disk for name, unit in self.world.disks.items()}
        volume = bytearray(self.world.volume_on_disk)
        world = World(random.Random(0), volume=volume, volume_on_disk=bytearray(volume))
        for name, content in disks.items():
            SimulatedUnit(world, name, Disk.of(content))
        return world

    @property
    def protected(self) -> str:
        return extent_list(self.group.protected)

    def content(self, disk: str) -> bytes:
        return bytes(self.world.disks[disk].content)

    async def write(self, first: int, data: bytes, *, offset: int = 0) -> None:
        await self.system.sources["group"].write(first * EXTENT + offset, data)

    async def read(self, first: int, count: int = 1) -> bytes:
        return bytes(await self.system.sources["group"].read(first * EXTENT, count * EXTENT))

    async def until(self, clone: str, state: CloneState) -> None:
        while self.group.clones[clone].state is not state:
            await self.system.servers["group"].progress()

    async def start_restore_with_delta(self, clone: str, *extents: int) -> None:
        """Fracture `clone`, write `extents` of the Source, restore, with the sweep held back."""
        await self.system.fracture([("group", clone)])
        for extent in extents:
            await self.write(extent, extent_of("x"))
        await self.system.protected_restore("group", clone)


@asynccontextmanager
async def rig(
    *clones: str, after: World | None = None, boot: str = "another boot", run_ahead: int = 1
) -> AsyncIterator[Rig]:
    """A group with these clones, synchronized; or what recovery makes of `after` a power cut, or in the
    same `boot`."""
    world = after or World(
        random.Random(0), volume=bytearray(1 << 20), volume_on_disk=bytearray(1 << 20)
    )
    if after is None:
        format_medium(SimulatedMedium(world), bytes(16))
    for name in () if after else ("source", *clones):
        content = b"".join(extent_of(letter) for letter in "abcdefgh")
        first = bytearray(content if name == "source" else bytes(SIZE))
        SimulatedUnit(world, name, Disk.of(first))

    async def open_unit(
        path: Path, *, create_size: int | None = None, size: int | None = None
    ) -> LogicalUnit:
        return world.disks[path.name]

    async def nothing(_group: str) -> None:
        pass

    async def at_once(work: Callable[[], None]) -> None:
        work()

    system = StorageSystem(
        Recorder(
            MetadataVolume(SimulatedMedium(world), "boot" if after is None else boot),
            at_once,
        ),
        open_unit,
        forget_pages=nothing,
        wall_clock=trio.current_time,
        on_event=lambda line: None,
        run=EXTENT,
        run_ahead=run_ahead,
        checkpoint=CHECKPOINT,
    )
    async with trio.open_nursery() as nursery:
        await system.start(nursery)
        if after is not None:
            yield Rig(system, world)
            nursery.cancel_scope.cancel()
            return
        await system.add_group("group", Path("/source"), size=None, extent_size=EXTENT)
        made = Rig(system, world)
        for name in clones:
            await system.add_clone("group", name, Path(f"/{name}"), sync=True)
            await made.until(name, CloneState.SYNCHRONIZED)
        yield made
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _virtual_time(autojump_clock: trio.testing.MockClock) -> None:
    """Rates and delays cost nothing."""


async def test_figure_6_three_host_writes() -> None:
    """Bits 4 and 7 are set in the Delta Map; host writes to extents 0, 4 and 7."""
    async with rig("clone") as r:
        with hold_the_sweep(r):
            await r.start_restore_with_delta("clone", 4, 7)
            assert (r.delta("clone"), r.protected) == ("4,7", "")
            # Write 1: no COD is required, and bit 0 is set in the Protected Restore Map.
            await r.write(0, b"1" * 512)
            assert (r.delta("clone"), r.protected) == ("4,7", "0")
            assert r.system.servers["group"].counts.cod == 0
            # Writes 2 and 3: a COD each; bits 4 and 7 are cleared, then set in the other map.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.write, 4, b"2" * 512)
                nursery.start_soon(r.write, 7, b"3" * 512)
            assert (r.delta("clone"), r.protected) == ("", "0,4,7")
            assert r.system.servers["group"].counts.cod == 2
        # What was not written in extents 4 and 7 is the clone's.
        assert await r.read(4) == b"2" * 512 + extent_of("e")[512:]
        assert await r.read(7) == b"3" * 512 + extent_of("h")[512:]
        # The Sync Engine completes; the Protected Restore Map becomes the new Delta Map.
        await r.until("clone", CloneState.FRACTURED)
        assert (r.delta("clone"), r.protected) == ("0,4,7", "")
        assert r.content("clone") == b"".join(extent_of(letter) for letter in "abcdefgh")


async def test_figure_8_a_write_over_two_extents_with_a_second_clone() -> None:
    """Bit 7 but not 6 is set in clone 22's Delta Map; clone 60 is fractured, its map empty."""
    async with rig("clone22", "clone60") as r:
        await r.system.fracture([("group", "clone22")])
        await r.write(7, extent_of("x"))
        await r.write(1, extent_of("y"))
        await r.system.fracture([("group", "clone60")])
        with hold_the_sweep(r):
            await r.system.protected_restore("group", "clone22")
            # L6: the restore will change the Source under clone 60.
            assert (r.delta("clone22"), r.delta("clone60"), r.protected) == ("1,7", "1,7", "")
            # Host write 1 covers the end of extent 6 and the beginning of extent 7.
            await r.write(6, b"w" * 1024, offset=EXTENT - 512)
            assert r.system.servers["group"].counts.cod == 1
            assert r.protected == "6-7"
            assert r.delta("clone22") == "1"
            assert r.delta("clone60") == "1,6-7"
        assert await r.read(6, 2) == (extent_of("g")[:-512] + b"w" * 1024 + extent_of("h")[512:])
        await r.until("clone22", CloneState.FRACTURED)
        assert r.delta("clone22") == "6-7"
        assert r.content("clone22") == b"".join(extent_of(letter) for letter in "abcdefgh")


async def test_figures_7_to_9_a_restore_that_a_power_cut_broke_off() -> None:
    """Host write 1 sets bits 6 and 7 in clone 60's map and in the Persistent Delta Map; recovery
    sets them again in clone 22's, and the Protected Restore Map keeps both engines off them."""
    async with rig("clone22", "clone60") as r:
        server = r.system.servers["group"]
        await server.checkpoint()
        await r.system.fracture([("group", "clone22")])
        await r.write(7, extent_of("x"))
        await r.write(1, extent_of("y"))
        await r.system.fracture([("group", "clone60")])
        with hold_the_sweep(r):
            await r.system.protected_restore("group", "clone22")
            await r.write(6, b"w" * 1024, offset=EXTENT - 512)
            await r.system.sources["group"].flush()
            # Fig. 8: what is on stable storage before the failure.
            assert r.durable() == ("1,6-7", "6-7")
            assert (r.delta("clone22"), r.delta("clone60")) == ("1", "1,6-7")
            world = r.cut_the_power()
    expected = extent_of("g")[:-512] + b"w" * 1024 + extent_of("h")[512:]
    async with rig(after=world) as r:
        # Fig. 9: bits 6 and 7 had been cleared in clone 22's map, and are set again (area 63).
        assert (r.delta("clone22"), r.delta("clone60"), r.protected) == ("1,6-7", "1,6-7", "6-7")
        assert r.group.clones["clone22"].state is CloneState.RESTORING
        assert r.group.pending_count() == 1
        with hold_the_sweep(r):
            # Host write 2, to the same extents: no COD, for that would overwrite host write 1.
            assert await r.read(6, 2) == expected
            await r.write(7, b"z" * 512, offset=2048)
            assert r.system.servers["group"].counts.cod == 0
        await r.until("clone22", CloneState.FRACTURED)
        # Neither engine has copied extents 6 and 7: only extent 1 came from the clone.
        assert r.system.servers["group"].counts.sync == 1
        written = bytearray(expected)
        written[EXTENT + 2048 : EXTENT + 2560] = b"z" * 512
        assert await r.read(6, 2) == written
        assert await r.read(1) == extent_of("b")
        assert (r.delta("clone22"), r.protected) == ("6-7", "")
        assert r.content("clone22") == b"".join(extent_of(letter) for letter in "abcdefgh")


async def test_a_checkpoint_trims_what_is_equal_again() -> None:
    async with rig("clone") as r:
        server = r.system.servers["group"]
        assert r.durable() == ("0-7", "")
        await server.checkpoint()
        assert r.durable() == ("", "")
        await r.write(3, b"m" * 512)  # mirrored: different for an instant
        assert r.durable() == ("3", "")
        await r.system.fracture([("group", "clone")])
        await r.write(5, b"s" * 512)
        await server.checkpoint()
        assert (r.delta("clone"), r.durable()) == ("5", ("5", ""))


async def test_a_sequential_writer_waits_for_its_intent_once() -> None:
    """What is marked ahead of it is marked on while it writes, each time twice as much."""
    async with rig("clone", run_ahead=2) as r:
        server = r.system.servers["group"]
        await server.checkpoint()
        await r.system.fracture([("group", "clone")])
        covered: list[bool] = []
        durable: list[str] = []
        for extent in range(8):
            covered.append(server.durability.covers(extent * EXTENT, EXTENT))
            await r.write(extent, extent_of("x"))
            await trio.testing.wait_all_tasks_blocked()
            durable.append(r.durable()[0])
        assert covered == [False] + 7 * [True]
        assert durable == 2 * ["0-3"] + 6 * ["0-7"]


async def test_a_clone_that_is_added_during_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its map is full; a checkpoint that does not know it must not clear what it has."""
    async with rig("clone") as r, trio.open_nursery() as nursery:
        SimulatedUnit(r.world, "late", Disk.of(bytearray(SIZE)))
        server = r.system.servers["group"]
        flush, change = server.source.flush, server.change
        checkpointed = trio.Event()

        async def flush_and_let_it_come() -> None:
            nursery.start_soon(add)
            await trio.testing.wait_all_tasks_blocked()
            await flush()

        async def add() -> None:
            monkeypatch.setattr(server.source, "flush", flush)
            await r.system.add_clone("group", "late", Path("/late"), sync=False)

        async def change_late(change_record: Change) -> None:
            await checkpointed.wait()
            await change(change_record)

        monkeypatch.setattr(server.source, "flush", flush_and_let_it_come)
        monkeypatch.setattr(server, "change", change_late)
        await server.checkpoint()
        checkpointed.set()
        while "late" not in r.group.clones:
            await server.progress()
        assert (r.delta("late"), r.durable()) == ("0-7", ("0-7", ""))


@pytest.mark.parametrize("when", ["the last flush", "the commit"])
async def test_a_checkpoint_that_fails_while_a_restore_ends(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says, that all may differ, must not get lost in a map that is given another meaning."""
    async with rig("clone") as r, trio.open_nursery() as nursery:
        server = r.system.servers["group"]
        recorder = r.system.recorder
        flush, blocking = server.source.flush, recorder._blocking
        flushes = 0
        checkpointed = trio.Event()

        async def fails() -> None:
            raise DeviceError(errno.EIO, "flushing failed", server.source.name)

        async def fail_a_checkpoint() -> None:
            monkeypatch.setattr(recorder, "_blocking", blocking)
            monkeypatch.setattr(server.source, "flush", fails)
            with pytest.raises(DeviceError):
                await server.checkpoint()
            monkeypatch.setattr(server.source, "flush", flush)
            checkpointed.set()

        async def flush_beside_a_checkpoint() -> None:
            nonlocal flushes
            flushes += 1
            if flushes == 2:  # the last one, with the group held
                if when == "the last flush":
                    await fail_a_checkpoint()
                else:
                    monkeypatch.setattr(recorder, "_blocking", commit_beside_a_checkpoint)
            await flush()

        async def commit_beside_a_checkpoint(work: Callable[[], None]) -> None:
            nursery.start_soon(fail_a_checkpoint)
            await trio.testing.wait_all_tasks_blocked()
            work()

        with hold_the_sweep(r):
            await r.start_restore_with_delta("clone", 3)
            monkeypatch.setattr(server.source, "flush", flush_beside_a_checkpoint)
        if when == "the commit":
            await r.until("clone", CloneState.FRACTURED)
        await checkpointed.wait()
        while server.gate.held:
            await server.progress()
        # The other way it is not over: nobody knows what of the Source is left.
        expected = CloneState.FRACTURED if when == "the commit" else CloneState.RESTORING
        assert r.group.clones["clone"].state is expected
        assert (r.delta("clone"), r.protected) == ("0-7", "")


async def test_a_flush_of_the_clone_that_fails_while_a_restore_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """L6: all of the clone may differ now, and the restore will copy all of it: the others have to
    know, before the record says that it has begun."""
    async with rig("clone", "other") as r, trio.open_nursery() as nursery:
        server, recorder = r.system.servers["group"], r.system.recorder
        blocking = recorder._blocking
        await r.system.fracture([("group", "clone"), ("group", "other")])

        async def fails() -> None:
            raise DeviceError(errno.EIO, "flushing failed", "clone")

        async def fail_a_flush() -> None:
            with pytest.raises(DeviceError):
                await server.flush_clone("clone")

        async def commit_beside_a_flush(work: Callable[[], None]) -> None:
            monkeypatch.setattr(recorder, "_blocking", blocking)
            monkeypatch.setattr(server.units["clone"], "flush", fails)
            assert (r.delta("clone"), r.delta("other")) == ("3", "3")
            nursery.start_soon(fail_a_flush)
            await trio.testing.wait_all_tasks_blocked()
            assert (r.delta("clone"), r.delta("other")) == ("0-7", "0-7")
            work()

        with hold_the_sweep(r):
            await r.write(3, extent_of("x"))
            monkeypatch.setattr(recorder, "_blocking", commit_beside_a_flush)
            await r.system.protected_restore("group", "clone")
            assert r.group.clones["clone"].state is CloneState.RESTORING
            await trio.testing.wait_all_tasks_blocked()
            assert (r.delta("clone"), r.delta("other")) == ("0-7", "0-7")
            assert r.group.clones["clone"].record.unflushed


@pytest.mark.parametrize("boot", ["boot", "another boot"])
async def test_what_a_failed_write_has_left_in_the_page_cache_is_written_once_more(
    boot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D10: there it looks as durable as everything else. After a reboot it is gone."""
    async with rig("clone") as r:
        volume, world = r.system.volume, r.world
        record = volume.superblock.record_slot(volume.generation)
        delta = volume.record.groups[0].durable.offset
    cached = bytes(world.volume)
    for at in (record, delta):
        assert any(cached[at : at + 512])
        world.volume_on_disk[at : at + 512] = bytes(512)
    order: list[str] = []
    settle, commit = MetadataVolume.settle, MetadataVolume.commit

    def settles(self: MetadataVolume) -> None:
        settle(self)
        order.append("settled")
        for at in (record, delta):
            expected = cached[at : at + 512] if boot == "boot" else bytes(512)
            assert world.volume_on_disk[at : at + 512] == expected

    def commits(self: MetadataVolume, record: Record) -> None:
        order.append("committed")
        commit(self, record)

    monkeypatch.setattr(MetadataVolume, "settle", settles)
    monkeypatch.setattr(MetadataVolume, "commit", commits)
    async with rig("clone", after=world, boot=boot):
        assert order[0] == "settled"


async def test_what_is_forgotten_counts_as_different() -> None:
    """D10: a daemon that could not make the kernel forget what a flush had lost has copied it, cleared
    the bit, and died; now the Source is what is on its disk again."""
    async with rig("clone") as r:
        server, source = r.system.servers["group"], r.world.disks["source"]
        await r.write(3, extent_of("x"))
        r.world.failing.add(("flush", "source"))
        while not source.disk.lost:  # what a flush loses is drawn
            source._flush_failure._failure = None
            await r.write(3, extent_of("x"))
            with pytest.raises(DeviceError):
                await server.flush_source()
        server.group.clones["clone"].delta.clear_all()
    r.world.failing.clear()
    for unit in list(r.world.disks.values()):
        SimulatedUnit(r.world, unit.name, unit.disk)
    async with rig("clone", after=r.world, boot="boot") as again:
        assert again.group.clones["clone"].record.copy_total == EXTENTS
        await again.until("clone", CloneState.SYNCHRONIZED)
        assert again.content("clone") == again.content("source")
        assert again.content("source")[3 * EXTENT : 4 * EXTENT] != extent_of("x")


@pytest.mark.parametrize("when", ["before its turn", "at the end"])
async def test_nothing_is_copied_from_a_source_whose_flush_has_failed(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D10, also where the engine has asked before, and waits for its turn or for the group."""
    async with rig("clone") as r, trio.open_nursery() as nursery:
        server = r.system.servers["group"]
        await r.system.fracture([("group", "clone")])
        await r.write(3, extent_of("x"))
        turn, hot = r.system.transfers.turn, r.system._copy_hot_extents
        waits, goes_on, recorded = trio.Event(), trio.Event(), trio.Event()

        async def fails() -> None:
            raise DeviceError(errno.EIO, "flushing failed", "source")

        async def fail_a_flush() -> None:
            with pytest.raises(DeviceError):
                await server.flush_source()

        async def record_late(work: Callable[[], None]) -> None:
            await recorded.wait()
            work()

        @asynccontextmanager
        async def late_turn(group: str, clone: str) -> AsyncIterator[None]:
            async with turn(group, clone):
                waits.set()
                await goes_on.wait()
                yield

        async def late(server: GroupServer, name: str) -> None:
            waits.set()
            await goes_on.wait()
            await hot(server, name)
            server.wake()

        if when == "at the end":
            monkeypatch.setattr(r.system, "_copy_hot_extents", late)
        else:
            monkeypatch.setattr(r.system.transfers, "turn", late_turn)
        await r.system.sync("group", "clone")
        await waits.wait()
        monkeypatch.setattr(server.source, "flush", fails)
        monkeypatch.setattr(r.system.recorder, "_blocking", record_late)
        nursery.start_soon(fail_a_flush)
        await trio.testing.wait_all_tasks_blocked()
        assert r.delta("clone") == "0-7"
        goes_on.set()
        await trio.testing.wait_all_tasks_blocked()
        while "clone" not in server.faults and r.delta("clone") == "0-7":
            await server.progress()  # it copies, which it should not
        recorded.set()
        assert r.delta("clone") == "0-7"


async def test_a_write_of_whole_extents_needs_no_copy() -> None:
    async with rig("clone") as r:
        with hold_the_sweep(r):
            await r.start_restore_with_delta("clone", 2, 3, 5)
            await r.write(2, extent_of("W") * 2)
            assert r.system.servers["group"].counts.cod == 0
            assert (r.delta("clone"), r.protected) == ("5", "2-3")
        await r.until("clone", CloneState.FRACTURED)
        assert await r.read(0, 8) == b"".join(extent_of(letter) for letter in "abWWefgh")


async def test_a_read_copies_and_leaves_the_protected_restore_map_alone() -> None:
    async with rig("clone") as r:
        with hold_the_sweep(r):
            await r.start_restore_with_delta("clone", 3, 4)
            assert await r.read(3) == extent_of("d")
            assert (r.delta("clone"), r.protected) == ("4", "")
            assert r.content("source")[3 * EXTENT : 4 * EXTENT] == extent_of("d")


async def test_a_read_has_its_answer_before_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig("clone") as r:
        due: list[Callable[[], None]] = []
        AFTERWARDS.set(due.append)
        source = r.system.sources["group"]
        with hold_the_sweep(r):
            await r.start_restore_with_delta("clone", 3, 4)
            monkeypatch.setattr(r.world.random, "random", lambda: 1.0)  # nobody needs to wait
            assert source.read_now(3 * EXTENT, EXTENT) == extent_of("d")
            assert r.delta("clone") == "3-4"
            due.pop()()
            assert (r.delta("clone"), r.protected) == ("4", "")
            assert r.content("source")[3 * EXTENT : 4 * EXTENT] == extent_of("d")
            assert r.system.servers["group"].counts.cod == 1
            # Somebody overwrites the extent between the answer and the copy.
            assert source.read_now(4 * EXTENT, EXTENT) == extent_of("e")
            await r.write(4, extent_of("W"))
            due.pop()()
            assert r.content("source")[4 * EXTENT : 5 * EXTENT] == extent_of("W")
            assert r.system.servers["group"].counts.cod == 1


async def test_a_copy_for_a_read_is_not_made_without_its_intent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """D1. The Persistent Delta Map lacks what differs only for moments, while it is being written."""
    async with rig("clone") as r:
        due: list[Callable[[], None]] = []
        AFTERWARDS.set(due.append)
        source, delta = r.system.sources["group"], r.system.servers["group"].durability.delta
        with hold_the_sweep(r):
            await r.start_restore_with_delta("clone", 3, 4)
            monkeypatch.setattr(r.world.random, "random", lambda: 1.0)  # nobody needs to wait
            delta.bits[3] = 0
            for extent, letter, there in ((4, "e", "e"), (3, "d", "x")):
                assert source.read_now(extent * EXTENT, EXTENT) == extent_of(letter)
                due.pop()()
                assert r.delta("clone") == "3"
                content = r.content("source")
                assert content[extent * EXTENT : (extent + 1) * EXTENT] == extent_of(there)


async def test_a_copy_that_is_due_after_the_restore_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rig("clone") as r:
        due: list[Callable[[], None]] = []
        AFTERWARDS.set(due.append)
        with hold_the_sweep(r):
            await r.start_restore_with_delta("clone", 3)
            monkeypatch.setattr(r.world.random, "random", lambda: 1.0)
            assert r.system.sources["group"].read_now(3 * EXTENT, EXTENT) == extent_of("d")
            await r.system.force_fracture("group", "clone")
            due.pop()()
        assert r.delta("clone") == "3"
        assert r.content("source")[3 * EXTENT : 4 * EXTENT] == extent_of("x")


class hold_the_sweep:  # noqa: N801 - used like a function
    """The Sync Engines copy nothing while the body runs: only the COD Engine does."""

    def __init__(self, r: Rig) -> None:
        self._group = r.group
        self._server = r.system.servers["group"]

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(type(self._group), "claim_restore", lambda *args: None)

    def __exit__(self, *exc: object) -> None:
        self._patch.undo()
        self._server.wake()  # an engine that found nothing to claim waits for somebody to end a copy
