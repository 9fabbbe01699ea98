"""check and dump: every kind of damage, made on purpose, is found; what is safe is mended.

`--repair` must write what a finding says and nothing else, so each repair is compared byte for byte.
"""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from clonefs.cli import main
from clonefs.engines import recovery
from clonefs.errors import ClonefsError
from clonefs.extents import extent_list
from clonefs.volume import (
    CloneRecord,
    CloneState,
    DurableMap,
    GroupRecord,
    MapSlot,
    MetadataVolume,
    Record,
    check,
    format_volume,
    open_volume,
)
from clonefs.volume.check import Fault, Finding, Severity
from clonefs.volume.dump import describe
from clonefs.volume.durable import starts_of_maps
from clonefs.volume.layout import DURABLE_SECTOR, PAGE, pack_record
from clonefs.volume.record import encode_record
from clonefs.volume.volume import open_medium

EXTENTS = 10_000  # three durable sectors, and a live map that ends within a page
SIZE = 1 << 20
THEN, NOW = "the boot before", "this boot"


@dataclass
class Meta:
    """A volume with the group payroll and its clones nightly and weekly, closed."""

    path: Path
    group: GroupRecord
    generation: int
    record_size: int
    first_map_byte: int

    def content(self) -> bytes:
        return self.path.read_bytes()

    def put(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def slot(self, generation: int) -> int:
        return PAGE + generation % 2 * self.record_size

    def durable(self, which: int, sector: int) -> int:
        """The byte of a durable sector: of the PDM (0), or of a copy of the PPRM (1, 2)."""
        return starts_of_maps(self.group.durable)[which] + sector * DURABLE_SECTOR

    def damage(self, which: int, sector: int) -> None:
        self.put(self.durable(which, sector) + 40, b"damage")

    def examine(self, boot_id: str = NOW) -> tuple[Finding, ...]:
        medium = open_medium(self.path, read_only=True)
        try:
            return check.examine(medium, boot_id)
        finally:
            medium.close()

    def only(self, boot_id: str = NOW) -> Finding:
        """The one finding that there is."""
        (finding,) = self.examine(boot_id)
        return finding

    def repair(self, boot_id: str = NOW) -> set[int]:
        """Repair, and return the bytes that have changed."""
        before = self.content()
        medium = open_medium(self.path)
        try:
            check.repair(medium, check.examine(medium, boot_id))
        finally:
            medium.close()
        after = self.content()
        assert len(after) == len(before)
        return {at for at in range(len(before)) if before[at] != after[at]}

    def repaired(self, boot_id: str, *places: tuple[int, int]) -> None:
        """Repair; then it is sound and opens, and only (offset, length) `places` have changed."""
        changed = self.repair(boot_id)
        allowed = {at for start, length in places for at in range(start, start + length)}
        assert changed
        assert changed <= allowed
        assert self.examine(boot_id) == ()
        volume = open_volume(self.path, boot_id=boot_id)
        (found,) = volume.record.groups
        assert replace(found, live_checksum=None) == self.group
        volume.close(clean=False)


Prepare = Callable[[MetadataVolume, GroupRecord], GroupRecord | None]


def a_volume(path: Path, prepare: Prepare | None = None, *, clean: bool = True) -> Meta:
    """Make a volume; `prepare` sets its maps and may return another group to be committed."""
    format_volume(path, size=SIZE, force=False)
    volume = open_volume(path, boot_id=THEN)
    slots: list[MapSlot] = []
    for durable in (False, True, False, False):
        new = volume.new_durable_slot if durable else volume.new_map_slot
        slots.append(new(EXTENTS, beside=tuple(slots)))
    clones = (
        CloneRecord("nightly", "/nightly", CloneState.FRACTURED, slots[2]),
        CloneRecord("weekly", "/weekly", CloneState.SYNCHRONIZED, slots[3]),
    )
    group = GroupRecord(
        "payroll", "/source", EXTENTS * 4096, 4096, slots[0], slots[1], epoch=3, clones=clones
    )
    volume.commit(volume.opened().with_group(group))
    if prepare is not None:
        changed = prepare(volume, group)
        if changed is not None:
            group = changed
            volume.commit(volume.record.with_group(group))
    superblock = volume.superblock
    volume.close(clean=clean)
    generation = volume.generation
    return Meta(path, group, generation, superblock.record_size, superblock.first_map_byte)


def write_out(volume: MetadataVolume, durable: DurableMap) -> None:
    for offset, data in durable.begin_write().writes:
        volume.write_durably(offset, data)
    durable.end_write(written=True)


def in_delta_maps(volume: MetadataVolume, group: GroupRecord) -> None:
    """Extents 3-5 and 4000 are different in nightly, and the Persistent Delta Map knows."""
    delta, _ = volume.durable_maps(group, EXTENTS)
    for first, stop in ((3, 6), (4000, 4001)):
        volume.map(group.clone("nightly").delta, EXTENTS).mark(first, stop)
        delta.mark(first, stop)
    write_out(volume, delta)


def in_a_restore(volume: MetadataVolume, group: GroupRecord) -> GroupRecord:
    """A restore from nightly: 3-5 pending, 7 and 8000 written by a host."""
    delta, protected = volume.durable_maps(group, EXTENTS)
    weekly = volume.map(group.clone("weekly").delta, EXTENTS)
    volume.map(group.clone("nightly").delta, EXTENTS).mark(3, 6)
    for extent in (7, 8000):
        volume.map(group.protected, EXTENTS).mark(extent, extent + 1)
        protected.mark(extent, extent + 1)
    for first, stop in ((3, 8), (8000, 8001)):
        weekly.mark(first, stop)
        delta.mark(first, stop)
    write_out(volume, delta)
    write_out(volume, protected)
    group = group.with_clone(replace(group.clone("nightly"), state=CloneState.RESTORING))
    return group.with_clone(replace(group.clone("weekly"), state=CloneState.FRACTURED))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "meta"


@pytest.fixture
def meta(path: Path) -> Meta:
    return a_volume(path, in_delta_maps)


@pytest.fixture
def restoring(path: Path) -> Meta:
    return a_volume(path, in_a_restore)


@pytest.fixture(autouse=True)
def boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands run in the boot NOW."""
    monkeypatch.setattr("clonefs.volume.volume.this_boot", lambda: NOW)


def sound_volumes() -> dict[str, tuple[Prepare | None, bool]]:
    return {
        "empty maps": (None, True),
        "differences": (in_delta_maps, True),
        "a restore": (in_a_restore, True),
        "a crash": (in_delta_maps, False),
        "a crash in a restore": (in_a_restore, False),
    }


@pytest.mark.parametrize("which", sound_volumes())
@pytest.mark.parametrize("boot_id", [THEN, NOW])
def test_what_is_sound_is_left_alone(path: Path, which: str, boot_id: str) -> None:
    prepare, clean = sound_volumes()[which]
    meta = a_volume(path, prepare, clean=clean)
    assert meta.examine(boot_id) == ()
    assert meta.repair(boot_id) == set()


def test_a_new_volume_is_sound(path: Path) -> None:
    format_volume(path, size=SIZE, force=False)
    medium = open_medium(path, read_only=True)
    assert check.examine(medium, NOW) == ()
    medium.close()


# The superblock and the records


@pytest.mark.parametrize(("offset", "text"), [(0, "no superblock"), (20, "checksum")])
def test_a_damaged_superblock_is_not_guessed(meta: Meta, offset: int, text: str) -> None:
    meta.put(offset, b"\xff")
    finding = meta.only()
    assert (finding.fault, finding.repairable) == (Fault.SUPERBLOCK, False)
    assert text in finding.text
    assert meta.repair() == set()


def test_a_volume_that_was_cut_short(path: Path) -> None:
    format_volume(path, size=2 * SIZE, force=False)
    os.truncate(path, SIZE)
    medium = open_medium(path, read_only=True)
    (finding,) = check.examine(medium, NOW)
    describe(medium, NOW)
    medium.close()
    assert finding.fault is Fault.CUT_SHORT


def test_the_older_record_slot_is_mended_from_the_newer(meta: Meta) -> None:
    meta.put(meta.slot(meta.generation - 1) + 30, b"damage")
    finding = meta.only()
    assert (finding.fault, finding.severity) == (Fault.RECORD_SLOT, Severity.WRONG)
    assert "newer" not in finding.text
    meta.repaired(NOW, (meta.slot(meta.generation - 1), meta.record_size))
    volume = open_volume(meta.path)
    assert volume.generation == meta.generation
    assert volume.record.clean
    volume.close(clean=False)


def test_a_damaged_record_that_may_be_the_newest_is_not_written_over(path: Path) -> None:
    meta = a_volume(path, in_delta_maps, clean=False)
    meta.put(meta.slot(meta.generation) + 30, b"damage")
    finding = meta.only(THEN)
    assert f"newer than the other (generation {meta.generation})" in finding.text
    assert not finding.repairable
    assert meta.repair(THEN) == set()
    told = json.loads(run("dump", "--json", path).stdout)["record_slots"]
    assert "payroll" in told[meta.generation % 2]["text"]
    assert told[1 - meta.generation % 2]["text"] is None


def test_a_newest_record_that_is_gone_without_a_trace_is_still_missed(meta: Meta) -> None:
    """Its slot gets a copy of the other, which is not newer: stamps of the backings go on to tell."""
    meta.put(meta.slot(meta.generation), b"damage")
    assert "newer" not in meta.only().text
    meta.repair(NOW)
    volume = open_volume(meta.path)
    assert volume.generation == meta.generation - 1
    assert volume.damage == ()
    volume.close(clean=False)


def test_a_slot_in_which_nothing_has_been_written(meta: Meta) -> None:
    meta.put(meta.slot(meta.generation - 1), bytes(PAGE))
    assert "no record has been written there" in meta.only().text
    meta.repaired(NOW, (meta.slot(meta.generation - 1), meta.record_size))


def put_record(meta: Meta, slot: int, generation: int, record: Record) -> None:
    volume = open_volume(meta.path)
    data = pack_record(volume.superblock, generation, encode_record(record))
    volume.close(clean=False)
    meta.put(meta.slot(slot), data)


@pytest.mark.parametrize("generation", [50, 51])
@pytest.mark.parametrize("slot", [0, 1])
def test_generations_that_do_not_follow_each_other(meta: Meta, slot: int, generation: int) -> None:
    """Also one in the wrong slot, which the next commit but one would have overwritten."""
    record = Record(groups=(meta.group,))
    put_record(meta, slot, generation, record)
    found = meta.examine()
    assert {finding.fault for finding in found} == {Fault.RECORD_SLOT}
    assert ("other slot" in " ".join(each.text for each in found)) == (generation % 2 != slot)
    meta.repaired(NOW, (PAGE, 2 * meta.record_size))
    volume = open_volume(meta.path)
    assert volume.record == record
    assert volume.generation >= generation
    volume.close(clean=False)


def test_two_damaged_records_are_not_guessed(meta: Meta) -> None:
    for generation in (0, 1):
        meta.put(meta.slot(generation) + 60, b"\0\0")
    found = meta.examine()
    assert [each.fault for each in found] == [
        Fault.RECORD_SLOT,
        Fault.RECORD_SLOT,
        Fault.NO_RECORD,
    ]
    assert not any(each.repairable for each in found)
    assert meta.repair() == set()


# What the record says


def committed(path: Path, change: Callable[[GroupRecord], GroupRecord]) -> Meta:
    return a_volume(path, lambda volume, group: change(group))


@pytest.mark.parametrize(
    ("slot", "text"),
    [
        (MapSlot(0, PAGE), "overlap the records"),
        (MapSlot(SIZE - PAGE, 2 * PAGE), "outside of the volume"),
        (MapSlot(SIZE - PAGE, 0), "not whole pages"),
        (MapSlot(SIZE - PAGE + 512, 512), "not whole pages"),
    ],
)
def test_a_slot_that_cannot_be(path: Path, slot: MapSlot, text: str) -> None:
    meta = committed(path, lambda group: replace(group, protected=slot))
    found = meta.examine()
    assert {each.fault for each in found} == {Fault.MAP_SLOT}
    assert any(text in each.text for each in found)
    assert meta.repair() == set()


def test_slots_that_overlap(path: Path) -> None:
    meta = committed(path, lambda group: replace(group, protected=group.clones[0].delta))
    finding = meta.only()
    assert finding.fault is Fault.MAP_SLOT
    assert "Delta Map" in finding.text
    assert "overlap payroll: the Protected Restore Map" in finding.text


def test_a_slot_that_is_too_small_for_its_map(path: Path) -> None:
    meta = committed(path, lambda group: replace(group, size=1 << 40))
    assert {each.fault for each in meta.examine()} == {Fault.MAP_SLOT}
    assert "it needs" in meta.examine()[0].text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: replace(g, extent_size=5000), "geometry"),
        (lambda g: replace(g, clones=(g.clones[0], replace(g.clones[1], name="nightly"))), "two"),
        (
            lambda g: replace(
                g, clones=tuple(replace(c, state=CloneState.RESTORING) for c in g.clones)
            ),
            "one only",
        ),
    ],
)
def test_a_record_that_contradicts_itself(
    path: Path, change: Callable[[GroupRecord], GroupRecord], text: str
) -> None:
    found = committed(path, change).examine()
    assert {each.fault for each in found} == {Fault.STRUCTURE}
    assert text in found[0].text


# Live maps


def test_bits_beyond_the_last_extent(meta: Meta) -> None:
    slot = meta.group.clone("nightly").delta
    meta.put(slot.offset + EXTENTS // 8, b"\xff\xff")
    finding = meta.only()
    assert (finding.fault, finding.where) == (Fault.BITS_BEYOND_THE_END, "payroll/nightly")
    assert "16 bits" in finding.text
    meta.repaired(NOW, (slot.offset + EXTENTS // 8, 2))


def test_the_last_extents_are_not_beyond_the_end(path: Path) -> None:
    """The last byte of the map is shared when their number is no multiple of eight."""

    def prepare(volume: MetadataVolume, group: GroupRecord) -> GroupRecord:
        delta, _ = volume.durable_maps(group, EXTENTS)
        delta.mark(EXTENTS - 8, EXTENTS)
        write_out(volume, delta)
        volume.map(group.clones[0].delta, EXTENTS).mark(EXTENTS - 8, EXTENTS - 3)
        return replace(group, size=(EXTENTS - 3) * 4096)

    meta = a_volume(path, prepare)
    at = meta.group.clones[0].delta.offset + EXTENTS // 8 - 1
    meta.put(at, b"\xff")
    assert "3 bits" in meta.only().text
    meta.repaired(NOW, (at, 1))
    assert meta.content()[at] == 0b00011111


@pytest.mark.parametrize(("clean", "severity"), [(True, Severity.WRONG), (False, Severity.NOTE)])
def test_a_synchronized_clone_that_differs(path: Path, clean: bool, severity: Severity) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> None:
        in_delta_maps(volume, group)
        volume.map(group.clone("weekly").delta, EXTENTS).mark(3, 5)

    finding = a_volume(path, prepare, clean=clean).only(THEN)
    assert (finding.fault, finding.severity) == (Fault.NOT_EQUAL, severity)
    assert "2 extents may differ" in finding.text


@pytest.mark.parametrize("clean", [True, False])
def test_protected_extents_though_nothing_is_restored(path: Path, clean: bool) -> None:
    """A daemon that died in a change of state may leave them, but not one that stopped."""

    def prepare(volume: MetadataVolume, group: GroupRecord) -> None:
        in_delta_maps(volume, group)
        volume.map(group.protected, EXTENTS).mark(4000, 4001)

    finding = a_volume(path, prepare, clean=clean).only(THEN)
    assert (finding.fault, finding.repairable) == (Fault.LEFT_PROTECTED, False)
    assert finding.severity is (Severity.WRONG if clean else Severity.NOTE)


def test_live_maps_that_are_not_trusted_say_nothing(path: Path) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> None:
        volume.map(group.clone("weekly").delta, EXTENTS).mark(0, 9)
        volume.map(group.protected, EXTENTS).mark(0, 9)

    meta = a_volume(path, prepare, clean=False)
    assert {each.fault for each in meta.examine(THEN)} == {
        Fault.NOT_EQUAL,
        Fault.LEFT_PROTECTED,
        Fault.DELTA_BITS,
    }
    assert meta.examine(NOW) == ()


def test_a_pending_extent_that_another_clone_does_not_know(path: Path) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> GroupRecord:
        changed = in_a_restore(volume, group)
        volume.map(group.clone("weekly").delta, EXTENTS).clear(4, 5)
        return changed

    finding = a_volume(path, prepare).only()
    assert (finding.fault, finding.where) == (Fault.PENDING_UNMARKED, "payroll/weekly")
    assert "(4)" in finding.text


# Durable maps


def test_a_damaged_delta_sector_becomes_all_ones(meta: Meta) -> None:
    for sector in (1, 2):
        meta.damage(0, sector)
    finding = meta.only()
    assert finding.fault is Fault.DELTA_SECTOR
    assert "sectors 1-2" in finding.text
    meta.repaired(NOW, (meta.durable(0, 1), 2 * DURABLE_SECTOR))
    volume = open_volume(meta.path)
    delta, _ = volume.durable_maps(meta.group, EXTENTS)
    assert delta.bits.count(1, 3840, EXTENTS) == EXTENTS - 3840
    assert delta.bits.count(1, 0, 3840) == 3
    volume.close(clean=False)


def test_a_delta_sector_of_another_place_is_damaged(meta: Meta) -> None:
    at = meta.durable(0, 0)
    meta.put(meta.durable(0, 2), meta.content()[at : at + DURABLE_SECTOR])
    assert "sector 2 " in meta.only().text
    meta.repaired(NOW, (meta.durable(0, 2), DURABLE_SECTOR))


def test_bits_that_the_persistent_delta_map_lacks(path: Path) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> None:
        in_delta_maps(volume, group)
        nightly = volume.map(group.clone("nightly").delta, EXTENTS)
        nightly.mark(10, 12)
        nightly.mark(9999, 10_000)

    meta = a_volume(path, prepare)
    finding = meta.only()
    assert finding.fault is Fault.DELTA_BITS
    assert "(10-11,9999)" in finding.text
    meta.repaired(NOW, (meta.durable(0, 0), DURABLE_SECTOR), (meta.durable(0, 2), DURABLE_SECTOR))
    volume = open_volume(meta.path)
    delta, _ = volume.durable_maps(meta.group, EXTENTS)
    nightly = volume.map(meta.group.clone("nightly").delta, EXTENTS)
    assert delta.bits == nightly.bits[:EXTENTS]
    del nightly
    volume.close(clean=False)


@pytest.mark.parametrize("copy", [1, 2])
@pytest.mark.parametrize("boot_id", [THEN, NOW])
def test_a_protected_sector_that_is_bad_in_one_copy(
    restoring: Meta, copy: int, boot_id: str
) -> None:
    before = restoring.content()
    restoring.damage(copy, 0)
    restoring.damage(copy, 1)  # has never been written in either copy
    finding = restoring.only(boot_id)
    assert finding.fault is Fault.PROTECTED_COPY
    assert f"sectors 0-1 of the Persistent Protected Restore Map cannot be read in copy {copy}" in (
        finding.text
    )
    restoring.repaired(boot_id, (restoring.durable(copy, 0), 2 * DURABLE_SECTOR))
    assert restoring.content() == before


def test_each_copy_may_mend_the_other(restoring: Meta) -> None:
    before = restoring.content()
    restoring.damage(1, 0)
    restoring.damage(2, 2)
    assert [each.fault for each in restoring.examine()] == [Fault.PROTECTED_COPY] * 2
    restoring.repair()
    assert restoring.content() == before


def test_a_copy_that_a_crash_has_left_behind(path: Path) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> GroupRecord:
        changed = in_a_restore(volume, group)
        _, protected = volume.durable_maps(group, EXTENTS)
        volume.map(group.protected, EXTENTS).mark(6, 7)
        protected.mark(6, 7)
        offset, data = protected.begin_write().writes[0]
        volume.write_durably(offset, data)  # and the machine stops before the second copy
        return changed

    meta = a_volume(path, prepare, clean=False)
    finding = meta.only()
    assert (finding.fault, finding.severity) == (Fault.PROTECTED_COPY_BEHIND, Severity.NOTE)
    meta.repaired(NOW, (meta.durable(2, 0), DURABLE_SECTOR))
    meta.damage(1, 0)
    assert "6-7" in protected_list(meta)


def protected_list(meta: Meta) -> str:
    medium = open_medium(meta.path, read_only=True)
    durable = describe(medium, NOW)["groups"]["payroll"]["durable"]
    medium.close()
    return str(durable["persistent_protected_restore_map"]["extents"])


def test_copies_that_contradict_each_other(path: Path) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> GroupRecord:
        changed = in_a_restore(volume, group)
        _, protected = volume.durable_maps(group, EXTENTS)
        _, other = volume.durable_maps(group, EXTENTS)
        protected.mark(3, 4)
        other.mark(4, 5)
        volume.write_durably(*protected.begin_write().writes[0])
        volume.write_durably(*other.begin_write().writes[1])
        return changed

    finding = a_volume(path, prepare, clean=False).only()
    assert (finding.fault, finding.repairable) == (Fault.PROTECTED_COPIES_DIFFER, False)


def damage_both(meta: Meta) -> Meta:
    for copy in (1, 2):
        meta.damage(copy, 2)
    return meta


def test_both_copies_bad_while_a_restore_runs_is_not_guessed(path: Path) -> None:
    meta = damage_both(a_volume(path, in_a_restore, clean=False))
    finding = meta.only()
    assert (finding.fault, finding.repairable) == (Fault.PROTECTED_SECTOR, False)
    assert "can only be started again" in finding.text
    assert meta.repair() == set()


def test_both_copies_bad_while_the_live_map_is_trusted(restoring: Meta) -> None:
    finding = damage_both(restoring).only()
    assert (finding.fault, finding.repairable) == (Fault.PROTECTED_SECTOR, False)
    assert "goes on" in finding.text


def test_both_copies_bad_while_nothing_is_restored(meta: Meta) -> None:
    finding = damage_both(meta).only()
    assert (finding.fault, finding.repairable) == (Fault.PROTECTED_SECTOR, True)
    meta.repaired(NOW, (meta.durable(1, 2), DURABLE_SECTOR), (meta.durable(2, 2), DURABLE_SECTOR))


def test_a_persistent_protected_restore_map_that_has_too_much(path: Path) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> GroupRecord:
        changed = in_a_restore(volume, group)
        volume.map(group.protected, EXTENTS).clear(8000, 8001)
        return changed

    finding = a_volume(path, prepare).only()
    assert (finding.fault, finding.repairable) == (Fault.PROTECTED_BITS, False)
    assert "(8000)" in finding.text


def test_protected_extents_that_the_persistent_delta_map_lacks(path: Path) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> GroupRecord:
        changed = in_a_restore(volume, group)
        _, protected = volume.durable_maps(group, EXTENTS)
        protected.mark(5000, 5001)
        write_out(volume, protected)
        return changed

    meta = a_volume(path, prepare, clean=False)
    finding = meta.only(NOW)
    assert finding.fault is Fault.DELTA_BITS
    assert "(5000)" in finding.text
    meta.repaired(NOW, (meta.durable(0, 1), DURABLE_SECTOR))


def test_sectors_of_a_restore_that_the_record_does_not_know(path: Path) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> GroupRecord:
        in_delta_maps(volume, group)
        _, protected = volume.durable_maps(replace(group, epoch=9), EXTENTS)
        protected.mark(1, 2)
        write_out(volume, protected)
        return replace(group, epoch=8)

    finding = a_volume(path, prepare).only()
    assert (finding.fault, finding.repairable) == (Fault.EPOCH, False)


def test_several_things_at_once(path: Path) -> None:
    """Some of it can be mended, and the rest stays as it is."""
    meta = a_volume(path, in_a_restore, clean=False)
    meta.damage(0, 0)
    meta.damage(1, 0)
    meta.damage(1, 2)
    meta.damage(2, 2)
    meta.put(meta.slot(meta.generation + 1) + 30, b"damage")
    assert [each.fault for each in meta.examine()] == [
        Fault.RECORD_SLOT,
        Fault.DELTA_SECTOR,
        Fault.PROTECTED_COPY,
        Fault.PROTECTED_SECTOR,
    ]
    meta.repair()
    assert meta.only().fault is Fault.PROTECTED_SECTOR


# What the next mount will do


def foretold(meta: Meta, boot_id: str) -> list[str]:
    before = meta.content()
    volume = MetadataVolume(open_medium(meta.path, read_only=True), boot_id)
    told = recovery.foretell(volume, {})
    volume.close(clean=False)
    assert meta.content() == before
    return told


def test_the_next_mount_after_a_stop(meta: Meta) -> None:
    assert foretold(meta, NOW) == [
        "the volume was closed cleanly: the live maps are taken as they stand"
    ]


def test_the_next_mount_after_a_death_of_the_daemon(path: Path) -> None:
    assert foretold(a_volume(path, in_a_restore, clean=False), THEN) == [
        "only the daemon has ended: the live maps are taken as they stand",
        "payroll/nightly: the restore goes on, 3 extents pending, 2 protected",
    ]


def test_the_next_mount_after_a_power_cut(path: Path) -> None:
    assert foretold(a_volume(path, in_delta_maps, clean=False), NOW) == [
        "the machine went down: the live maps are filled from the durable ones",
        "payroll/weekly: synchronized -> synchronizing, 4 extents to copy",
    ]


def test_the_next_mount_with_a_protected_sector_lost(path: Path) -> None:
    told = foretold(damage_both(a_volume(path, in_a_restore, clean=False)), NOW)
    assert told[1].endswith("damaged in both copies")
    assert told[2].startswith("payroll/nightly: restoring -> reverse-out-of-sync: ")


# The commands


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_check_says_that_a_volume_is_sound(meta: Meta) -> None:
    before = meta.content()
    result = run("check", meta.path)
    assert result.exit_code == 0
    assert result.stdout == (
        "next mount: the volume was closed cleanly: the live maps are taken as they stand\n"
    )
    assert result.stderr == f"clonefs: {meta.path} is sound\n"
    assert meta.content() == before


def test_check_of_a_file_that_can_only_be_read(meta: Meta) -> None:
    meta.path.chmod(0o400)
    assert run("check", meta.path).exit_code == 0
    assert run("dump", meta.path).exit_code == 0


def test_notes_are_no_reason_to_fail(path: Path) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> GroupRecord:
        delta, _ = volume.durable_maps(group, EXTENTS)
        delta.mark(3, 4)
        write_out(volume, delta)
        volume.map(group.clone("weekly").delta, EXTENTS).mark(3, 4)
        return group

    a_volume(path, prepare, clean=False)
    volume = open_volume(path)
    volume.commit(replace(volume.record, boot_id=NOW))
    volume.close(clean=False)
    result = run("check", path)
    assert result.exit_code == 0
    assert result.stdout.startswith("note: payroll/weekly: ")
    assert "is sound, with 1 note" in result.stderr


def test_check_finds_and_repair_mends(meta: Meta) -> None:
    meta.damage(0, 1)
    before = meta.content()
    result = run("check", meta.path)
    assert result.exit_code == 1
    assert result.stdout.startswith("wrong: payroll: sector 1 of the Persistent Delta Map")
    assert "(--repair mends it)\n" in result.stdout
    assert result.stderr == (
        f"clonefs: {meta.path} is not sound: 1 finding, of which --repair can mend 1\n"
    )
    assert meta.content() == before
    result = run("check", "--repair", meta.path)
    assert result.exit_code == 0
    assert result.stdout.startswith("repaired: payroll: sector 1")
    assert run("check", meta.path).exit_code == 0


def test_check_for_programs(meta: Meta) -> None:
    meta.damage(0, 1)
    (finding,) = meta.examine()
    told = {
        "severity": "wrong",
        "where": "payroll",
        "text": finding.text,
        "repairable": True,
    }
    result = run("check", "--json", meta.path)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    report = json.loads(result.stdout)
    assert report["volume"] == str(meta.path)
    assert (report["repaired"], report["found"]) == ([], [told])
    assert len(report["next_mount"]) > 0
    result = run("check", "--repair", "--json", meta.path)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["repaired"], report["found"]) == ([told], [])


def test_repair_says_what_it_will_not_guess(path: Path) -> None:
    meta = damage_both(a_volume(path, in_a_restore, clean=False))
    result = run("check", "--repair", meta.path)
    assert result.exit_code == 1
    assert "repaired" not in result.stdout
    assert "can only be started again" in result.stdout
    assert "mend none" in result.stderr


def test_check_of_a_volume_that_no_mount_takes(meta: Meta) -> None:
    meta.put(20, b"\xff")
    result = run("check", meta.path)
    assert result.exit_code == 1
    assert "next mount: it is refused: " in result.stdout


def test_check_of_a_record_that_contradicts_itself(path: Path) -> None:
    meta = committed(path, lambda group: replace(group, size=1 << 40))
    result = run("check", meta.path)
    assert result.exit_code == 1
    assert "next mount: it is refused: the metadata volume is damaged" in result.stdout
    assert run("dump", meta.path).exit_code == 0


@pytest.mark.parametrize("command", ["dump", "check"])
def test_a_mounted_volume_is_refused(meta: Meta, command: str) -> None:
    volume = open_volume(meta.path)
    result = run(command, meta.path)
    volume.close(clean=False)
    assert result.exit_code == 1
    assert result.stderr == (
        f"clonefs: {meta.path} is in use: it is mounted, or serves as a backing\n"
    )
    assert run(command).exit_code == 2
    assert run(command, meta.path, "--frobnicate").exit_code == 2


@pytest.mark.parametrize("command", ["dump", "check"])
def test_what_is_no_volume_is_refused(tmp_path: Path, command: str) -> None:
    assert "does not exist" in run(command, tmp_path / "nothing").stderr
    small = tmp_path / "small"
    small.write_bytes(b"small")
    assert "too small" in run(command, small).stderr


def test_dump_for_people(restoring: Meta) -> None:
    restoring.damage(2, 2)
    result = run("dump", restoring.path)
    assert result.exit_code == 0
    for line in (
        f"generation {restoring.generation}, valid, the newest",
        "closed cleanly: the live maps would be trusted now",
        "  Protected Restore Map: 2 extents (7,8000), ",
        "  Persistent Delta Map: 6 extents (3-7,8000)",
        "2 of 3 sectors written, generation 1, of restore number 3",
        "1 of 3 sectors written, generation 1, of restore number 3, DAMAGED: 2",
        "  clone nightly: restoring, /nightly",
        "    Delta Map: 3 extents (3-5), ",
    ):
        assert line in result.stdout


def test_dump_shortens_long_lists(path: Path) -> None:
    def prepare(volume: MetadataVolume, group: GroupRecord) -> None:
        for extent in range(0, EXTENTS, 2):
            volume.map(group.clones[0].delta, EXTENTS).mark(extent, extent + 1)

    a_volume(path, prepare)
    line = next(line for line in run("dump", path).stdout.splitlines() if "(0,2,4" in line)
    assert len(line) < 140
    assert "... and 49" in line


def test_dump_for_programs(restoring: Meta) -> None:
    before = restoring.content()
    told = json.loads(run("dump", "--json", restoring.path).stdout)
    assert told["volume"]["first_map_byte"] == restoring.first_map_byte
    assert [slot["valid"] for slot in told["record_slots"]] == [True, True]
    assert told["record"]["generation"] == restoring.generation
    assert told["record"]["live_maps_trusted"]
    group = told["groups"]["payroll"]
    assert group["protected_restore_map"]["extents"] == "7,8000"
    assert group["clones"]["nightly"]["delta_map"]["count"] == 3
    protected = group["durable"]["persistent_protected_restore_map"]
    assert (protected["epoch"], protected["count"]) == (3, 2)
    assert [copy["generations"] for copy in protected["copies"]] == [[1, 1], [1, 1]]
    assert restoring.content() == before


def test_dump_after_a_power_cut(path: Path) -> None:
    a_volume(path, in_delta_maps, clean=False)
    told = json.loads(run("dump", "--json", path).stdout)
    assert not told["record"]["live_maps_trusted"]
    assert "would not be trusted" in run("dump", path).stdout


def test_dump_of_a_volume_with_both_records_damaged(meta: Meta) -> None:
    """What can still be read of the newer one is shown, and is not called the truth."""
    for generation in (meta.generation, meta.generation - 1):
        meta.put(meta.slot(generation) + 8 + 8 + 4, b"\0\0\0\0")  # the checksum
    told = json.loads(run("dump", "--json", meta.path).stdout)
    assert told["record"]["damaged"]
    assert not told["record"]["live_maps_trusted"]
    assert told["groups"]["payroll"]["clones"]["nightly"]["delta_map"]["extents"] == "3-5,4000"
    assert "it may be anything" in run("dump", meta.path).stdout


@pytest.mark.parametrize("damage", [b"\xff" * 200, bytes(200)])
def test_dump_of_a_volume_with_nothing_left(meta: Meta, damage: bytes) -> None:
    meta.put(0, damage)
    for generation in (0, 1):
        meta.put(meta.slot(generation), damage)
    told = json.loads(run("dump", "--json", meta.path).stdout)
    assert told["record"] is None
    assert told["groups"] == {}
    assert "no record can be read" in run("dump", meta.path).stdout


def test_dump_with_a_damaged_superblock(meta: Meta) -> None:
    meta.put(44, b"\0\0\0\0")  # only the checksum
    told = json.loads(run("dump", "--json", meta.path).stdout)
    assert "checksum" in told["volume"]["damage"]
    assert told["record_slots"][0]["valid"]
    assert told["groups"]["payroll"]["durable"]["persistent_delta_map"]["count"] == 4


def test_a_medium_for_reading_cannot_be_written(meta: Meta) -> None:
    before = meta.content()
    medium = open_medium(meta.path, read_only=True)
    medium.view[0:4] = b"lost"
    with pytest.raises(ClonefsError) as caught:
        medium.write_durably(0, b"lost")
    assert caught.value.errno == errno.EIO
    medium.close()
    assert meta.content() == before


def test_live_maps_that_were_overwritten_after_a_clean_end(path: Path) -> None:
    """They are not what the record has a checksum of: the next mount takes the durable ones."""
    meta = a_volume(path, in_delta_maps)
    assert meta.examine() == ()
    meta.put(meta.group.clone("nightly").delta.offset, bytes(PAGE))
    finding = meta.only()
    assert (finding.fault, finding.severity) == (Fault.LIVE_MAPS, Severity.WRONG)
    assert not finding.repairable
    volume = open_volume(path)
    assert volume.overwritten == {"payroll"}
    assert volume.trusted
    assert not volume.trusts(meta.group)
    group = recovery.load(volume, volume.record.groups[0]).group
    assert extent_list(group.clones["nightly"].delta) == "3-5,4000"
    volume.close(clean=False)


def test_live_maps_that_were_overwritten_are_no_help_for_a_map_that_both_copies_have_lost(
    path: Path,
) -> None:
    meta = damage_both(a_volume(path, in_a_restore))
    assert "goes on with the restore" in meta.only(THEN).text
    meta.put(meta.group.protected.offset, b"XX")
    assert [finding.fault for finding in meta.examine(THEN)] == [
        Fault.LIVE_MAPS,
        Fault.PROTECTED_SECTOR,
    ]
    assert "can only be started again" in meta.examine(THEN)[1].text
