"""The durable maps: sectors, copies, damage."""

import random
from typing import Any

import pytest
from bitarray import bitarray

from clonefs.engines.durability import CHUNK, Durability
from clonefs.extents import ExtentMap
from clonefs.group import CloneGroup
from clonefs.volume import CloneRecord, CloneState, DurableMap, GroupRecord, MapSlot
from clonefs.volume.durable import (
    PERSISTENT_DELTA_MAP,
    PERSISTENT_PROTECTED_RESTORE_MAP,
    SECTORS_AT_ONCE,
)
from clonefs.volume.layout import DURABLE_SECTOR, EXTENTS_PER_DURABLE_SECTOR

BITS = EXTENTS_PER_DURABLE_SECTOR
EXTENTS = 3 * BITS + 100
UUID = bytes(range(16))
COPIES = (0, 8192)


class Disk:
    """Where the sectors lie."""

    def __init__(self) -> None:
        self.content = bytearray(16384)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length])

    def write_out(self, durable: DurableMap) -> int:
        batch = durable.begin_write()
        for offset, data in batch.writes:
            self.content[offset : offset + len(data)] = data
        durable.end_write(written=True)
        return len(batch.writes)

    def load(self, *, epoch: int = 1, damaged_as: int = 0, uuid: bytes = UUID) -> DurableMap:
        kind = PERSISTENT_PROTECTED_RESTORE_MAP
        durable = DurableMap(kind, uuid, COPIES, EXTENTS, epoch)
        durable.load(self.read, damaged_as=damaged_as)
        return durable


def test_what_was_written_is_loaded_again() -> None:
    disk = Disk()
    durable = disk.load()
    durable.mark(5, 6)
    durable.mark(BITS - 1, BITS + 2)
    durable.mark(EXTENTS - 1, EXTENTS)
    assert not durable.covers(5, 6)
    assert disk.write_out(durable) == 4  # sectors 0 and 1 in one piece, sector 3; two copies
    assert durable.covers(5, 6)
    assert durable.covers(BITS - 1, BITS + 2)
    assert not durable.covers(5, 7)
    assert disk.load().bits == durable.bits
    assert not disk.load().damaged


def test_what_is_being_written_is_not_relied_on() -> None:
    durable = Disk().load()
    durable.mark(0, 10)
    durable.begin_write()
    durable.mark(20, 21)
    assert not durable.covers(0, 10)
    durable.end_write(written=True)
    assert durable.covers(0, 10)
    assert not durable.covers(20, 21)
    durable.begin_write()  # of the same sector, which keeps what it has
    assert durable.covers(0, 10)
    assert not durable.covers(9, 21)
    durable.end_write(written=False)  # nobody knows what it has now
    assert not durable.covers(0, 10)
    durable.begin_write()
    assert not durable.covers(0, 10)
    durable.end_write(written=True)
    assert durable.covers(0, 10)
    assert durable.covers(20, 21)


def test_what_is_cleared_and_marked_again_is_not_relied_on() -> None:
    durable = Disk().load()
    durable.mark(0, 10)
    durable.begin_write()
    durable.end_write(written=True)
    durable.clear(bitarray("1", endian="little"), 3)
    durable.begin_write()
    durable.mark(3, 4)
    assert durable.covers(0, 3)
    assert not durable.covers(3, 4)
    durable.end_write(written=True)
    assert not durable.covers(3, 4)
    durable.begin_write()
    durable.end_write(written=True)
    assert durable.covers(0, 10)


def test_what_is_cleared_is_covered_no_more() -> None:
    disk = Disk()
    durable = disk.load()
    durable.mark(0, EXTENTS)
    disk.write_out(durable)
    part = bitarray(200, endian="little")
    part.setall(0)
    part[10:20] = 1
    durable.clear(part, BITS - 15)
    assert not durable.covers(BITS - 5, BITS - 4)
    assert not durable.covers(BITS + 4, BITS + 5)
    assert durable.covers(2 * BITS, 3 * BITS)
    disk.write_out(durable)
    assert disk.load().bits == durable.bits
    assert durable.bits.count(0) == 10


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("sector", [0, 1, 3])
def test_a_sector_that_is_bad_in_one_copy_is_read_from_the_other(sector: int, copy: int) -> None:
    disk = Disk()
    durable = disk.load()
    durable.mark(sector * BITS + 7, sector * BITS + 8)
    disk.write_out(durable)
    disk.content[copy + sector * DURABLE_SECTOR + 100] ^= 1
    assert disk.load().bits[sector * BITS + 7]
    assert not disk.load().damaged
    assert disk.load().single == [sector]


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("sector", [0, 1, 3])
def test_the_newer_copy_counts(sector: int, copy: int) -> None:
    """A write is cut off between the copies; the older one may be that which was never written."""
    disk = Disk()
    durable = disk.load()
    part = slice(copy + sector * DURABLE_SECTOR, copy + (sector + 1) * DURABLE_SECTOR)
    for extent in (sector * BITS + 7, sector * BITS + 9):
        old = bytes(disk.content[part])
        durable.mark(extent, extent + 1)
        disk.write_out(durable)
        new = bytes(disk.content[part])
        disk.content[part] = old
        loaded = disk.load()
        assert loaded.bits == durable.bits
        assert not loaded.damaged
        assert loaded.unwritten == {sector}
        disk.content[part] = new


@pytest.mark.parametrize("damaged_as", [0, 1])
def test_a_sector_that_is_bad_everywhere(damaged_as: int) -> None:
    disk = Disk()
    durable = disk.load()
    durable.mark(BITS, BITS + 1)
    disk.write_out(durable)
    for copy in COPIES:
        disk.content[copy + DURABLE_SECTOR + 200] ^= 1
    loaded = disk.load(damaged_as=damaged_as)
    assert loaded.damaged == [1]
    assert loaded.bits[:BITS].count(1) == 0
    assert loaded.bits[BITS : 2 * BITS].count(damaged_as) == BITS
    # All ones must be written before anybody relies on them... or be bad again, which is as good.
    assert not loaded.covers(BITS, BITS + 1)


def test_sectors_of_another_restore_volume_place_or_map_do_not_count() -> None:
    disk = Disk()
    durable = disk.load()
    durable.mark(0, 100)
    disk.write_out(durable)
    assert disk.load(epoch=2).bits.count(1) == 0
    assert not disk.load(epoch=2).damaged
    assert disk.load(uuid=bytes(16)).damaged == [0]
    moved = Disk()
    for copy in COPIES:
        start = copy + DURABLE_SECTOR
        moved.content[start : start + DURABLE_SECTOR] = disk.content[copy : copy + DURABLE_SECTOR]
    assert moved.load().damaged == [1]
    delta = DurableMap(PERSISTENT_DELTA_MAP, UUID, (COPIES[0],), EXTENTS, 1)
    delta.load(disk.read, damaged_as=1)
    assert delta.damaged == [0]
    assert delta.bits[:BITS].all()


@pytest.mark.parametrize("sector", [0, 1, 3])
def test_a_copy_that_is_bad_or_old_is_written_again(sector: int) -> None:
    disk = Disk()
    durable = disk.load()
    durable.mark(sector * BITS + 7, sector * BITS + 8)
    disk.write_out(durable)
    disk.content[COPIES[0] + sector * DURABLE_SECTOR + 100] ^= 1
    again = disk.load()
    assert again.unwritten == {sector}
    disk.write_out(again)
    disk.content[COPIES[1] + sector * DURABLE_SECTOR + 100] ^= 1  # now the other one
    assert disk.load().bits[sector * BITS + 7]


def test_a_new_restore_makes_damaged_sectors_good() -> None:
    disk = Disk()
    durable = disk.load()
    durable.mark(BITS, BITS + 1)
    disk.write_out(durable)
    for copy in COPIES:
        disk.content[copy + DURABLE_SECTOR + 200] ^= 1
    loaded = disk.load()
    assert loaded.damaged == [1]
    assert not loaded.unwritten  # zeros there would say that hosts have written nothing
    loaded.begin_epoch(2)
    disk.write_out(loaded)
    assert not disk.load(epoch=2).damaged


def test_a_new_restore_begins_with_nothing() -> None:
    disk = Disk()
    durable = disk.load()
    durable.mark(0, 100)
    disk.write_out(durable)
    durable.begin_epoch(2)
    assert durable.bits.count(1) == 0
    durable.mark(50, 51)
    disk.write_out(durable)
    assert disk.load(epoch=2).bits.count(1) == 1
    assert disk.load(epoch=1).bits.count(1) == 0


def test_against_a_model() -> None:
    rng = random.Random(3)
    disk = Disk()
    durable = disk.load()
    model = bitarray(EXTENTS, endian="little")
    for _ in range(400):
        first = rng.randrange(EXTENTS)
        stop = min(EXTENTS, first + rng.choice((1, 3, 300, 5000)))
        if rng.random() < 0.6:
            durable.mark(first, stop)
            model[first:stop] = 1
        else:
            bits = bitarray(stop - first, endian="little")
            bits.setall(1)
            durable.clear(bits, first)
            model[first:stop] = 0
        if rng.random() < 0.3:
            disk.write_out(durable)
            assert disk.load().bits == model
    assert durable.bits == model


def test_a_large_map_of_which_little_was_ever_written() -> None:
    """What was never written is passed over in one step; what lies beyond the end of the volume is
    damaged, and so is a sector whose only copy is bad."""
    extents = 5000 * BITS + 7
    written = [(0, 1), (2047 * BITS + 5, 2048 * BITS + 3), (4100 * BITS, 4101 * BITS)]
    content = bytearray(5001 * DURABLE_SECTOR)
    durable = DurableMap(PERSISTENT_DELTA_MAP, UUID, (0,), extents, 0)
    for run in written:
        durable.mark(*run)
    for offset, data in durable.begin_write().writes:
        content[offset : offset + len(data)] = data
    durable.end_write(written=True)

    def load(length: int) -> DurableMap:
        loaded = DurableMap(PERSISTENT_DELTA_MAP, UUID, (0,), extents, 0)
        loaded.load(lambda at, size: bytes(content[:length][at : at + size]), damaged_as=1)
        return loaded

    whole = load(len(content))
    assert whole.bits[:extents] == durable.bits[:extents]
    assert not whole.damaged
    content[4100 * DURABLE_SECTOR + 100] ^= 1
    short = load(4998 * DURABLE_SECTOR + 7)
    assert short.damaged == [4100, 4998, 4999, 5000]
    expected = durable.bits[:extents]
    expected[4998 * BITS :] = 1
    assert short.bits[:extents] == expected


def test_what_any_live_map_has_is_marked() -> None:
    """A part at a time; runs go across the parts, and maps that are clear are not looked at."""
    extents = 3 * CHUNK + 11
    maps: dict[MapSlot, ExtentMap] = {}

    def map_of(slot: MapSlot, extents: int) -> ExtentMap:
        return maps.setdefault(slot, ExtentMap.empty(extents))

    slots = [MapSlot(4096 * number, 4096) for number in range(5)]
    clones = tuple(
        CloneRecord(name, f"/{name}", CloneState.FRACTURED, slot)
        for name, slot in zip("abc", slots[2:], strict=True)
    )
    record = GroupRecord("g", "/s", extents * 4096, 4096, slots[0], slots[1], clones)
    group = CloneGroup(record, map_of)
    group.clones["a"].delta.mark(CHUNK - 3, CHUNK + 2)
    group.clones["c"].delta.mark(CHUNK + 1, CHUNK + 4)
    group.clones["c"].delta.mark(extents - 1, extents)
    group.protected.mark(7, 8)
    unused: Any = None
    delta = DurableMap(PERSISTENT_DELTA_MAP, UUID, (0,), extents, 0)
    Durability(group, unused, delta, unused).mark_live_maps()
    assert [*delta.bits[:extents].search(1)] == [
        *(7, *range(CHUNK - 3, CHUNK + 4), extents - 1),
    ]


def test_a_large_map_is_written_in_several_batches() -> None:
    """No step takes long, and nothing is relied on before its own batch is done."""
    sectors = 2 * SECTORS_AT_ONCE + 5
    durable = DurableMap(PERSISTENT_DELTA_MAP, UUID, (0,), sectors * BITS, 0)
    durable.mark(0, sectors * BITS)
    sizes, ends = [], []
    while durable.unwritten:
        batch = durable.begin_write()
        ends.append(durable.covers(0, sectors * BITS))
        sizes.append(sum(len(data) for _, data in batch.writes) // DURABLE_SECTOR)
        durable.end_write(written=len(sizes) != 2)  # the second is lost, and comes again
    assert sum(sizes) == sectors + SECTORS_AT_ONCE
    assert max(sizes) == SECTORS_AT_ONCE
    assert not any(ends)
    assert durable.covers(0, sectors * BITS)
