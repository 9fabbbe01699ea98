"""The metadata volume: format, records in two slots, live maps, locks, damage."""

import errno
import os
from pathlib import Path

import msgspec
import pytest

from clonefs.errors import ClonefsError
from clonefs.extents import extent_list
from clonefs.volume import (
    CloneRecord,
    CloneState,
    FileMedium,
    GroupRecord,
    MapSlot,
    MetadataVolume,
    Record,
    format_volume,
    open_volume,
    was_closed_cleanly,
)
from clonefs.volume.layout import PAGE, durable_maps_length, live_map_length, pack_record, plan

EXTENTS = 100_000


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    path = tmp_path / "meta"
    format_volume(path, size=1 << 20, force=False)
    return path


def a_group(volume: MetadataVolume, name: str = "payroll") -> GroupRecord:
    protected = volume.new_map_slot(EXTENTS)
    durable = volume.new_durable_slot(EXTENTS, beside=(protected,))
    delta = volume.new_map_slot(EXTENTS, beside=(protected, durable))
    clone = CloneRecord("nightly", "/clone", CloneState.FRACTURED, delta)
    return GroupRecord(name, "/source", EXTENTS * 4096, 4096, protected, durable, (clone,))


def test_format_allocates_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    format_volume(path, size=None, force=False)
    found = path.stat()
    assert found.st_size == 64 << 20
    assert found.st_blocks * 512 >= found.st_size


def test_format_refuses_what_holds_something(tmp_path: Path, meta: Path) -> None:
    with pytest.raises(ClonefsError, match="volume already") as caught:
        format_volume(meta, size=None, force=False)
    assert caught.value.errno == errno.EEXIST
    data = tmp_path / "data"
    data.write_bytes(bytes(2 << 20) + b"x")
    with pytest.raises(ClonefsError, match="not empty"):
        format_volume(data, size=1 << 20, force=False)
    assert data.read_bytes() == bytes(2 << 20) + b"x"
    format_volume(data, size=1 << 20, force=True)
    assert was_closed_cleanly(data)


def test_format_takes_an_empty_file_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "zeros"
    path.write_bytes(bytes(1 << 20))
    format_volume(path, size=None, force=False)
    assert open_volume(path).superblock.size == 1 << 20


@pytest.mark.parametrize("size", [0, 4096, (1 << 20) - 1])
def test_format_refuses_what_is_too_small(tmp_path: Path, size: int) -> None:
    with pytest.raises(ClonefsError, match="too small") as caught:
        format_volume(tmp_path / "meta", size=size, force=False)
    assert caught.value.errno == errno.EINVAL
    assert not (tmp_path / "meta").exists()


def test_format_and_open_refuse_what_is_neither_file_nor_device(tmp_path: Path) -> None:
    for action in (lambda p: format_volume(p, size=None, force=True), open_volume):
        with pytest.raises(ClonefsError):
            action(tmp_path)
    with pytest.raises(ClonefsError) as caught:
        open_volume(tmp_path / "nothing")
    assert caught.value.errno == errno.ENOENT


def test_a_volume_is_locked_against_a_second_opening(meta: Path) -> None:
    volume = open_volume(meta)
    for action in (open_volume, lambda p: format_volume(p, size=None, force=True)):
        with pytest.raises(ClonefsError, match="in use") as caught:
            action(meta)
        assert caught.value.errno == errno.EBUSY
    volume.close(clean=False)
    open_volume(meta).close(clean=False)


def test_records_and_maps_come_back(meta: Path) -> None:
    volume = open_volume(meta, boot_id="one")
    group = a_group(volume)
    volume.commit(volume.opened().with_group(group))
    volume.map(group.clones[0].delta, EXTENTS).mark(70_000, 70_005)
    volume.map(group.protected, EXTENTS).mark(3, 4)
    volume.close(clean=True)
    assert was_closed_cleanly(meta)
    again = open_volume(meta, boot_id="two")
    assert again.trusted
    found = again.record.groups[0]
    assert found.live_checksum is not None
    assert msgspec.structs.replace(found, live_checksum=None) == group
    assert extent_list(again.map(group.clones[0].delta, EXTENTS)) == "70000-70004"
    assert extent_list(again.map(group.protected, EXTENTS)) == "3"
    again.close(clean=False)


def test_maps_are_trusted_in_the_same_boot_only(meta: Path) -> None:
    volume = open_volume(meta, boot_id="one")
    volume.commit(volume.opened())
    volume.close(clean=False)
    for boot, trusted in (("one", True), ("two", False)):
        volume = open_volume(meta, boot_id=boot)
        assert volume.trusted is trusted
        volume.close(clean=False)


def test_a_torn_commit_leaves_the_record_before_it(meta: Path) -> None:
    volume = open_volume(meta)
    before = volume.opened()
    volume.commit(before)
    volume.commit(volume.record.with_group(a_group(volume)))
    offset = volume.superblock.record_slot(volume.generation)
    volume.close(clean=False)
    with meta.open("r+b") as file:
        file.seek(offset + 100)
        file.write(b"\xff")
    volume = open_volume(meta)
    assert volume.record == before
    volume.close(clean=False)


def test_a_record_of_another_volume_is_not_taken(tmp_path: Path, meta: Path) -> None:
    other = tmp_path / "other"
    format_volume(other, size=1 << 20, force=False)
    superblock = plan(1 << 20, bytes(16))
    foreign = pack_record(superblock, 9, msgspec.json.encode(Record(boot_id="foreign")))
    with meta.open("r+b") as file:
        file.seek(superblock.record_slot(9))
        file.write(foreign)
    volume = open_volume(meta)
    assert volume.record.boot_id == ""
    volume.close(clean=False)


def test_two_damaged_records_are_refused(meta: Path) -> None:
    with meta.open("r+b") as file:
        for generation in (0, 1):
            file.seek(plan(1 << 20, bytes(16)).record_slot(generation) + 30)
            file.write(b"garbage")
    with pytest.raises(ClonefsError, match=r"damaged.*record slot A.*record slot B"):
        open_volume(meta)


@pytest.mark.parametrize(("offset", "sentence"), [(0, "no superblock"), (20, "checksum")])
def test_a_damaged_superblock_is_refused(meta: Path, offset: int, sentence: str) -> None:
    with meta.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff")
    with pytest.raises(ClonefsError, match=sentence):
        open_volume(meta)


def test_a_volume_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    format_volume(path, size=2 << 20, force=False)
    os.truncate(path, 1 << 20)
    with pytest.raises(ClonefsError, match="cut short"):
        open_volume(path)


def test_overlapping_slots_are_refused(meta: Path) -> None:
    volume = open_volume(meta)
    group = a_group(volume)
    first = volume.superblock.first_map_byte
    volume.commit(
        volume.opened().with_group(
            msgspec.structs.replace(group, protected=MapSlot(first, 8 * PAGE))
        )
    )
    volume.close(clean=False)
    with pytest.raises(ClonefsError, match="overlaps"):
        open_volume(meta)


def test_slots_are_reused_and_come_back_empty(meta: Path) -> None:
    volume = open_volume(meta)
    group = a_group(volume)
    volume.commit(volume.opened().with_group(group))
    volume.map(group.protected, EXTENTS).mark_all()
    volume.commit(volume.record.without_group("payroll"))
    slot = volume.new_map_slot(EXTENTS)
    assert slot == group.protected
    assert volume.map(slot, EXTENTS).count == 0
    volume.close(clean=False)


def test_a_full_volume_says_so_and_stays_as_it_is(meta: Path) -> None:
    volume = open_volume(meta)
    volume.commit(volume.opened())

    def fill() -> None:
        for number in range(1000):
            volume.commit(volume.record.with_group(a_group(volume, f"g{number}")))

    with pytest.raises(ClonefsError, match="full") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    count = len(volume.record.groups)
    assert count > 3
    volume.close(clean=False)
    volume = open_volume(meta)
    assert len(volume.record.groups) == count
    volume.close(clean=False)


def test_a_record_that_outgrows_its_slot_is_refused(meta: Path) -> None:
    volume = open_volume(meta)
    group = a_group(volume)
    long = msgspec.structs.replace(group, backing="/" + "x" * (1 << 16))
    with pytest.raises(ClonefsError, match="record of groups") as caught:
        volume.commit(volume.opened().with_group(long))
    assert caught.value.errno == errno.ENOSPC
    volume.commit(volume.opened().with_group(group))
    volume.close(clean=False)


def test_a_commit_that_failed_is_not_found_later(
    meta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write reached the page cache, and only then failed: the record must not be taken."""
    volume = open_volume(meta)
    before = volume.opened()
    volume.commit(before)
    original = FileMedium.write_durably

    def fails_once(self: FileMedium, offset: int, data: bytes) -> None:
        original(self, offset, data)
        monkeypatch.setattr(FileMedium, "write_durably", original)
        raise ClonefsError(errno.EIO, "the disk failed")

    monkeypatch.setattr(FileMedium, "write_durably", fails_once)
    for _ in range(2):  # and it stays refused
        with pytest.raises(ClonefsError, match="the disk failed"):
            volume.commit(before.with_group(a_group(volume)))
    assert volume.broken is not None
    volume.close(clean=False)
    volume = open_volume(meta)
    assert volume.record == msgspec.structs.replace(before, doubtful=True)
    volume.close(clean=False)


def test_sizes_of_the_format() -> None:
    assert live_map_length(1) == PAGE
    assert live_map_length(PAGE * 8 + 1) == 2 * PAGE
    assert durable_maps_length(1) == 3 * PAGE
    assert durable_maps_length(8 * 3840 + 1) == 6 * PAGE
