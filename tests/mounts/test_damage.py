"""Damage to the metadata volume between two mounts.

Whatever has become of it, the next mount refuses it with a sentence, or says in its log and in
`events` what it found and goes on with maps that claim too much rather than too little. It is never
silent, and no LU shows a wrong byte.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from clonefs.volume import GroupRecord, format_volume, open_volume
from clonefs.volume.durable import starts_of_maps
from clonefs.volume.layout import PAGE
from tests.mounts.mount import (
    EXTENT,
    Clone,
    Group,
    KiB,
    MiB,
    Mount,
    assert_same,
    digest,
    mounted,
    noise,
    read,
    run,
    write,
)

SIZE = 2 * MiB
ALL = set(range(SIZE // EXTENT))
GOOD, RUIN = noise("good", SIZE), noise("ruin", SIZE)
SECTOR = 512
JUNK = noise("junk", SECTOR)

End = Callable[[Mount], None]


@pytest.fixture(params=["unmounted", "killed"])
def end(request: pytest.FixtureRequest) -> End:
    """What ends a mount."""
    return Mount.umount if request.param == "unmounted" else Mount.kill


# The volume, while nobody has it mounted --------------------------------------------------------


def overwrite(mount: Mount, offset: int, data: bytes = JUNK) -> None:
    """Damage the file of the volume."""
    fd = os.open(mount.meta, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def record_slots(mount: Mount) -> tuple[int, int]:
    """The bytes at which the newest record and the one before it lie."""
    volume = open_volume(mount.meta)
    try:
        superblock, newest = volume.superblock, volume.generation
    finally:
        volume.close(clean=False)
    return superblock.record_slot(newest), superblock.record_slot(newest - 1)


def group_record(mount: Mount, group: Group) -> GroupRecord:
    """What the volume has of a group."""
    volume = open_volume(mount.meta)
    try:
        return next(each for each in volume.record.groups if each.name == group.name)
    finally:
        volume.close(clean=False)


def lose_the_page_cache(mount: Mount) -> None:
    """Let the volume believe that the machine was restarted since."""
    volume = open_volume(mount.meta)
    try:
        volume.commit(msgspec.structs.replace(volume.record, boot_id="another boot"))
    finally:
        volume.close(clean=False)


def put_in_place(mount: Mount, copy: Path) -> None:
    """As `cp` does: the file stays the same one."""
    shutil.copyfile(copy, mount.meta)


def refuse(mount: Mount, *words: str) -> None:
    """Mounting exits 1 with one line that has these words, and leaves the volume as it is."""
    before = digest(mount.meta)
    result = subprocess.run(
        [sys.executable, "-m", "clonefs", "mount", mount.meta, mount.mountpoint],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert [word for word in words if word not in line] == [], line
    assert digest(mount.meta) == before
    assert not mount.mountpoint.is_mount()


def start_and_hear(mount: Mount, *patterns: str) -> None:
    """Mount: `events` and the log say it, each of them."""
    for pattern in patterns:
        mount.expect_in_log(pattern)
    logged = mount.log.stat().st_size
    mount.start()
    events, log = mount.control("events").path.read_text(), mount.log.read_text()[logged:]
    for pattern in patterns:
        assert pattern in events
        assert pattern in log


def start_in_silence(mount: Mount) -> None:
    """Mount: nothing is damaged."""
    mount.start()
    recovery = json.loads(mount.control("status.json").read())["recovery"]
    assert recovery is None or recovery["damage"] == []


# What is on it ---------------------------------------------------------------------------------


def split_and_written(mount: Mount) -> tuple[Group, Clone, Clone]:
    """A Source, a clone that is split off, one that is mirrored; extents 3 and 9 were written. The
    last two records say so."""
    group = mount.add_group(data=GOOD)
    clone, mirror = group.add_clone("nightly"), group.add_clone("mirror")
    clone.fracture()
    for extent in (3, 9):
        write(group.source, extent * EXTENT, RUIN[extent * EXTENT :][:EXTENT])
    clone.rate("8M")
    return group, clone, mirror


def in_a_restore(mount: Mount) -> tuple[Group, Clone, bytes]:
    """A restore that has hardly begun, and what its Source must show: a host has written, and
    fsynced, since."""
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    clone.rate(1)
    clone.restore()
    clone.wait_for_the_one_extent()
    fd = os.open(group.source, os.O_WRONLY)
    try:
        os.pwrite(fd, b"by a host", 20 * EXTENT + 5)
        os.fsync(fd)
    finally:
        os.close(fd)
    at = 20 * EXTENT + 5
    return group, clone, GOOD[:at] + b"by a host" + GOOD[at + 9 :]


def finish(clone: Clone, expected: bytes) -> None:
    """Let the restore end: the Source is that, and the clone what it was."""
    clone.rate("max")
    clone.wait("fractured")
    assert_same(clone.group.source.read_bytes(), expected, "the Source")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    assert clone.delta() == {20}


def check_in_doubt(group: Group, clone: Clone, mirror: Clone, source: bytes) -> None:
    """Nothing has been copied, nothing will be by itself, and all may differ; the clone is still
    good for a restore, which then copies everything."""
    assert_same(group.source.read_bytes(), source, "the Source")
    assert (clone.state, mirror.state) == ("fractured", "out-of-sync")
    assert mirror.status()["condition"] == "system-fractured"
    for each in (clone, mirror):
        assert each.delta() == ALL
        assert "every extent" not in each.control("error").read()
    assert "look at what it holds before you restore" in clone.control("error").read()
    assert "sync it, once you know that its Source is good" in mirror.control("error").read()
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    group.mount.umount()
    start_in_silence(group.mount)
    assert clone.delta() == ALL
    clone.restore()
    assert_same(group.source.read_bytes(), GOOD, "restored")
    clone.wait("fractured")
    assert_same(group.backing.read_bytes(), GOOD, "the Source's backing")
    mirror.sync()
    mirror.wait("synchronized")
    assert_same(mirror.path.read_bytes(), GOOD, "the mirror")


# The file, the superblock, the records ----------------------------------------------------------


@pytest.mark.parametrize("size", [0, PAGE, 1 * MiB, 4 * MiB - PAGE])
def test_a_file_that_was_cut_short_is_refused(mount: Mount, end: End, size: int) -> None:
    group, clone, _ = split_and_written(mount)
    end(mount)
    whole = mount.work / "whole"
    shutil.copyfile(mount.meta, whole)
    os.truncate(mount.meta, size)
    refuse(mount, str(mount.meta), "cut short" if size >= MiB else "too small")
    put_in_place(mount, whole)
    start_in_silence(mount)
    assert clone.delta() == {3, 9}
    assert read(group.source, 3 * EXTENT, 9) == RUIN[3 * EXTENT :][:9]


def test_a_damaged_superblock_is_refused(mount: Mount, end: End) -> None:
    split_and_written(mount)
    end(mount)
    overwrite(mount, 0)
    refuse(mount, str(mount.meta), "no superblock")


def test_a_superblock_with_a_flipped_bit_is_refused(mount: Mount) -> None:
    mount.umount()
    content = mount.meta.read_bytes()
    overwrite(mount, 20, bytes([content[20] ^ 4]))
    refuse(mount, str(mount.meta), "checksum")


@pytest.mark.parametrize("sector", [0, 1])
def test_the_newest_record_damaged(mount: Mount, end: End, sector: int) -> None:
    """The one before it is used; but the backings know that there was a newer one."""
    group, clone, mirror = split_and_written(mount)
    end(mount)
    newest, _ = record_slots(mount)
    overwrite(mount, newest + sector * SECTOR)
    start_and_hear(mount, "record slot", "the other record is used", "the metadata volume")
    source = bytearray(GOOD)
    for extent in (3, 9):
        source[extent * EXTENT : (extent + 1) * EXTENT] = RUIN[extent * EXTENT :][:EXTENT]
    check_in_doubt(group, clone, mirror, bytes(source))


def test_the_newest_record_damaged_that_had_split_a_clone_off(mount: Mount) -> None:
    """The one before it calls the clone mirrored, but the clone knows better."""
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    mount.kill()
    newest, _ = record_slots(mount)
    overwrite(mount, newest)
    start_and_hear(mount, "record slot", "is older than")
    assert (clone.state, clone.delta()) == ("fractured", ALL)
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    assert_same(group.source.read_bytes(), RUIN, "the Source")


def test_the_newest_record_damaged_that_had_begun_a_restore(mount: Mount) -> None:
    """The one before it knows of no restore; but the Source is part old, and its state says so."""
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    clone.rate(1)
    clone.restore()
    mount.kill()
    newest, _ = record_slots(mount)
    overwrite(mount, newest)
    start_and_hear(mount, "record slot", "is older than")
    assert clone.state == "reverse-out-of-sync"
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    assert_same(
        group.source.read_bytes(), group.backing.read_bytes(), "the Source as it lies there"
    )
    clone.rate("max")
    clone.restore()
    assert_same(group.source.read_bytes(), GOOD, "restored")
    clone.wait("fractured")


def test_the_older_record_damaged(mount: Mount, end: End) -> None:
    """Nobody needs it; the next commit writes over it."""
    _, clone, mirror = split_and_written(mount)
    end(mount)
    _, older = record_slots(mount)
    overwrite(mount, older)
    start_and_hear(mount, "the other record is used")
    assert (clone.state, clone.delta()) == ("fractured", {3, 9})
    mirror.wait("synchronized")
    mount.umount()
    start_in_silence(mount)


def test_both_records_damaged_are_refused(mount: Mount, end: End) -> None:
    split_and_written(mount)
    end(mount)
    for slot in record_slots(mount):
        overwrite(mount, slot)
    refuse(mount, str(mount.meta), "is damaged", "record slot A", "record slot B")


def test_a_record_of_another_volume(mount: Mount, end: End) -> None:
    """Whole, and of a higher generation; but not this volume's."""
    group, clone, mirror = split_and_written(mount)
    source = group.source.read_bytes()
    end(mount)
    newest, _ = record_slots(mount)
    with mounted(mount.work / "elsewhere") as other:
        other.add_group(SIZE)
        other.umount()
        at, _ = record_slots(other)
        page = other.meta.read_bytes()[at : at + PAGE]
        other.start()
    overwrite(mount, newest, page)
    start_and_hear(mount, "belongs to another volume", "the metadata volume")
    check_in_doubt(group, clone, mirror, source)


# The maps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [False, True], ids=["same boot", "another boot"])
def test_a_sector_of_the_persistent_delta_map_damaged(mount: Mount, lost: bool) -> None:
    """Its extents are marked in it, and taken to differ if the live maps are gone."""
    group, clone, mirror = split_and_written(mount)
    source = group.source.read_bytes()
    mount.kill()
    if lost:
        lose_the_page_cache(mount)
    delta, _, _ = starts_of_maps(group_record(mount, group).durable)
    overwrite(mount, delta)
    start_and_hear(mount, "1 sectors of the Persistent Delta Map are damaged")
    assert clone.delta() == (ALL if lost else {3, 9})
    mirror.wait("synchronized")
    assert_same(mirror.path.read_bytes(), source, "the mirror")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    mount.umount()
    start_in_silence(mount)


@pytest.mark.parametrize("lost", [False, True], ids=["same boot", "another boot"])
@pytest.mark.parametrize("copy", [1, 2])
def test_one_copy_of_the_persistent_protected_restore_map_damaged(
    mount: Mount, copy: int, lost: bool
) -> None:
    """The other one has it all: the host keeps what it wrote."""
    group, clone, expected = in_a_restore(mount)
    mount.kill()
    if lost:
        lose_the_page_cache(mount)
    overwrite(mount, starts_of_maps(group_record(mount, group).durable)[copy])
    heard = "1 sectors of the Persistent Protected Restore Map are damaged in one copy"
    start_and_hear(mount, heard)
    assert (clone.state, group.protected()) == ("restoring", {20})
    assert_same(group.source.read_bytes(), expected, "the Source")
    mount.kill()
    start_in_silence(mount)  # it is mended
    finish(clone, expected)


def test_both_copies_damaged_while_the_live_maps_are_there(mount: Mount) -> None:
    """The live map has it, and it is written again."""
    group, clone, expected = in_a_restore(mount)
    mount.kill()
    _, *copies = starts_of_maps(group_record(mount, group).durable)
    for copy in copies:
        overwrite(mount, copy)
    start_and_hear(mount, "damaged in both copies")
    # Not all of the Source: that would copy what is pending, and end the restore.
    assert read(group.source, 20 * EXTENT + 5, 9) == b"by a host"
    fd = os.open(group.source, os.O_WRONLY)
    os.fsync(fd)
    os.close(fd)
    mount.kill()
    lose_the_page_cache(mount)
    mount.start()
    assert "damaged" not in mount.control("events").path.read_text()
    assert group.protected() == {20}
    finish_after_a_power_cut(group, clone, expected)


def finish_after_a_power_cut(group: Group, clone: Clone, expected: bytes) -> None:
    """The map may claim more difference than there is, but the bytes are the same."""
    clone.rate("max")
    clone.wait("fractured")
    assert_same(group.source.read_bytes(), expected, "the Source")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    assert 20 in clone.delta()


def test_both_copies_damaged_and_the_live_maps_gone(mount: Mount) -> None:
    """Nobody knows what hosts have written: the restore waits for a person, and nothing is
    overwritten until then."""
    group, clone, _ = in_a_restore(mount)
    mount.kill()
    lose_the_page_cache(mount)
    _, *copies = starts_of_maps(group_record(mount, group).durable)
    for copy in copies:
        overwrite(mount, copy)
    before = digest(group.backing)
    start_and_hear(mount, "damaged in both copies")
    assert clone.state == "reverse-out-of-sync"
    assert clone.status()["condition"] == "waiting"
    assert "write 1 to protected_restore" in clone.control("error").read()
    assert digest(group.source) == digest(group.backing) == before
    clone.rate("max")
    clone.restore()
    assert_same(group.source.read_bytes(), GOOD, "restored")
    clone.wait("fractured")
    assert_same(group.backing.read_bytes(), GOOD, "the Source's backing")


@pytest.mark.parametrize("junk", [bytes(PAGE), noise("junk", PAGE)], ids=["zeros", "noise"])
def test_a_page_of_a_delta_map_overwritten_after_an_unmount(mount: Mount, junk: bytes) -> None:
    group, clone, mirror = split_and_written(mount)
    source = group.source.read_bytes()
    mount.umount()
    overwrite(mount, group_record(mount, group).clone("nightly").delta.offset, junk)
    start_and_hear(mount, f"{group.name}: its live maps are not what the volume was closed with")
    assert {3, 9} <= clone.delta()
    mirror.wait("synchronized")
    assert_same(mirror.path.read_bytes(), source, "the mirror")
    clone.restore()
    assert_same(group.source.read_bytes(), GOOD, "restored")
    clone.wait("fractured")
    assert_same(group.backing.read_bytes(), GOOD, "the Source's backing")
    mount.umount()
    start_in_silence(mount)


@pytest.mark.parametrize("junk", [bytes(PAGE), b"\xff" * PAGE], ids=["zeros", "ones"])
@pytest.mark.parametrize("which", ["protected", "delta"])
def test_a_page_of_a_map_of_a_restore_overwritten_after_an_unmount(
    mount: Mount, which: str, junk: bytes
) -> None:
    """The durable maps have it: what the host wrote stays, and all the rest is restored."""
    group, clone, expected = in_a_restore(mount)
    mount.umount()
    record = group_record(mount, group)
    slot = record.protected if which == "protected" else record.clone("nightly").delta
    overwrite(mount, slot.offset, junk)
    start_and_hear(mount, "its live maps are not what the volume was closed with")
    assert_same(group.source.read_bytes(), expected, "the Source")
    finish_after_a_power_cut(group, clone, expected)
    assert_same(group.backing.read_bytes(), expected, "its backing")


# Older copies ----------------------------------------------------------------------------------


def copy_of(mount: Mount) -> Path:
    """A copy of the volume as it lies there now."""
    copy = mount.work / "older copy"
    shutil.copyfile(mount.meta, copy)
    return copy


@pytest.mark.parametrize("taken", ["while mounted", "while not mounted"])
def test_an_older_copy_from_before_hosts_wrote(mount: Mount, end: End, taken: str) -> None:
    """Its maps do not have what was written since: a restore by them would leave stale extents."""
    group, clone, mirror = split_and_written(mount)
    if taken == "while mounted":
        copy = copy_of(mount)
        mount.umount()
    else:
        mount.umount()
        copy = copy_of(mount)
    mount.start()
    write(group.source, 17 * EXTENT, RUIN[17 * EXTENT :][: 2 * EXTENT])
    source = group.source.read_bytes()
    end(mount)
    put_in_place(mount, copy)
    told = f"{group.name}: the metadata volume {mount.meta} is older than"
    assert told in run(sys.executable, "-m", "clonefs", "check", mount.meta)
    start_and_hear(mount, told, "older copy")
    check_in_doubt(group, clone, mirror, source)


def test_an_older_copy_from_the_mount_that_was_killed(mount: Mount) -> None:
    """There was no mount in between; but a change of state."""
    group, clone, mirror = split_and_written(mount)
    copy = copy_of(mount)
    clone.rate("7M")
    write(group.source, 17 * EXTENT, RUIN[17 * EXTENT :][: 2 * EXTENT])
    source = group.source.read_bytes()
    mount.kill()
    put_in_place(mount, copy)
    start_and_hear(mount, "is older than")
    check_in_doubt(group, clone, mirror, source)


def test_an_older_copy_from_the_mount_that_was_unmounted(mount: Mount) -> None:
    """There was not even a change of state; but the end of the mount was one."""
    group, clone, mirror = split_and_written(mount)
    copy = copy_of(mount)
    write(group.source, 17 * EXTENT, RUIN[17 * EXTENT :][: 2 * EXTENT])
    source = group.source.read_bytes()
    mount.umount()
    put_in_place(mount, copy)
    start_and_hear(mount, "is older than")
    check_in_doubt(group, clone, mirror, source)


def test_an_older_copy_that_is_moved_into_place(mount: Mount, end: End) -> None:
    """As `mv` does: the file is another one."""
    group, clone, mirror = split_and_written(mount)
    mount.umount()
    copy = copy_of(mount)
    mount.start()
    source = group.source.read_bytes()
    end(mount)
    copy.rename(mount.meta)
    start_and_hear(mount, "is older than")
    check_in_doubt(group, clone, mirror, source)


KNOWN = pytest.mark.parametrize("known", [True, False], ids=["known", "not known"])


def forget_the_state(clone: Clone, *, known: bool) -> None:
    """Unless it is to be `known`: only the Source has a stamp."""
    if not known:
        os.removexattr(clone.backing, "user.clonefs.volume")


@KNOWN
def test_an_older_copy_with_a_restore_that_is_over(mount: Mount, end: End, known: bool) -> None:
    """It must not go on: it would overwrite what hosts have written since."""
    group, clone, _ = in_a_restore(mount)
    copy = copy_of(mount)
    clone.rate("max")
    clone.wait("fractured")
    write(group.source, 0, RUIN)
    end(mount)
    put_in_place(mount, copy)
    forget_the_state(clone, known=known)
    start_and_hear(mount, "is older than")
    if known:
        assert clone.state == "fractured"
    else:
        assert clone.state == "reverse-out-of-sync"
        assert clone.status()["condition"] == "waiting"
        assert "a restore from it does not go on by itself" in clone.control("error").read()
    assert (clone.delta(), group.protected()) == (ALL, set())
    assert_same(group.source.read_bytes(), RUIN, "the Source")
    mount.kill()  # it stays so, whatever happens
    start_in_silence(mount)
    assert_same(group.source.read_bytes(), RUIN, "the Source")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    clone.rate("max")
    clone.restore()
    clone.wait("fractured")
    assert_same(group.backing.read_bytes(), GOOD, "restored")


@KNOWN
def test_an_older_copy_from_before_a_fracture(mount: Mount, end: End, known: bool) -> None:
    """It calls a clone mirrored that is the only good copy by now: nothing may be copied to it."""
    group = mount.add_group(data=GOOD)
    clone = group.add_clone()
    mount.umount()
    copy = copy_of(mount)
    mount.start()
    clone.fracture()
    write(group.source, 0, RUIN)
    end(mount)
    put_in_place(mount, copy)
    forget_the_state(clone, known=known)
    start_and_hear(mount, "is older than")
    assert (clone.state, clone.delta()) == ("fractured" if known else "out-of-sync", ALL)
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    assert_same(group.source.read_bytes(), RUIN, "the Source")


def test_an_older_copy_from_before_a_sync(mount: Mount, end: End) -> None:
    """It calls a clone a point-in-time copy that has been half overwritten since."""
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    mount.umount()
    copy = copy_of(mount)
    mount.start()
    clone.rate(1)
    clone.sync()
    clone.wait_for_the_one_extent()
    end(mount)
    put_in_place(mount, copy)
    start_and_hear(mount, "is older than")
    assert (clone.state, clone.delta()) == ("out-of-sync", ALL)
    assert_same(group.source.read_bytes(), RUIN, "the Source")


def test_an_older_copy_from_before_a_restore(mount: Mount, end: End) -> None:
    """It knows nothing of the restore, and the Source is part old: its state says so."""
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    mount.umount()
    copy = copy_of(mount)
    mount.start()
    clone.rate(1)
    clone.restore()
    end(mount)
    put_in_place(mount, copy)
    start_and_hear(mount, "is older than")
    assert (clone.state, clone.delta()) == ("reverse-out-of-sync", ALL)
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    clone.restore()
    assert_same(group.source.read_bytes(), GOOD, "restored")


def test_an_older_copy_while_the_backing_with_the_newest_stamp_is_missing(mount: Mount) -> None:
    """Any other backing of the volume tells as well."""
    group, clone, mirror = split_and_written(mount)
    mount.umount()
    copy = copy_of(mount)
    mount.start()
    write(group.source, 17 * EXTENT, RUIN[17 * EXTENT :][:EXTENT])
    mount.umount()
    put_in_place(mount, copy)
    away = clone.backing.with_name("away")
    clone.backing.rename(away)
    mount.expect_in_log("does not exist")
    start_and_hear(mount, "is older than")
    assert mirror.state == "out-of-sync"
    mount.umount(clean=False)  # nobody knows what the missing one has
    away.rename(clone.backing)
    start_in_silence(mount)
    assert (clone.state, clone.delta()) == ("fractured", ALL)


def test_backings_without_a_place_for_stamps_are_not_checked(mount: Mount) -> None:
    """Everything else works; that an older copy is put in place is not noticed there."""
    bare = mount.work / "bare"
    bare.mkdir()
    run("mount", "-t", "ramfs", "ramfs", bare)
    try:
        backing = bare / "source.img"
        backing.write_bytes(GOOD)
        with pytest.raises(OSError):
            os.setxattr(backing, "user.clonefs.volume", b"")
        mount.control("add_group").write(f"bare {backing}")
        group = Group(mount, "bare", backing)
        clone = group.add_fractured()
        mount.umount()
        copy = copy_of(mount)
        mount.start()
        assert clone.state == "fractured"
        write(group.source, 0, RUIN)
        assert clone.delta() == ALL
        mount.umount()
        put_in_place(mount, copy)
        start_in_silence(mount)
        assert clone.state == "fractured"
        mount.umount()
    finally:
        run("umount", bare)
    mount.expect_in_log("does not exist")
    mount.start()


# Other volumes ---------------------------------------------------------------------------------


def test_another_volume_in_its_place(mount: Mount, end: End) -> None:
    """It shows its own groups, and does nothing to the backings that it does not know; the right
    volume finds them as it left them."""
    group, clone, mirror = split_and_written(mount)
    uuid = mount.status()["volume"]["uuid"]
    source = group.source.read_bytes()
    end(mount)
    kept = [digest(path) for path in (group.backing, clone.backing, mirror.backing)]
    own = mount.work / "own"
    mount.meta.rename(own)
    format_volume(mount.meta, size=MiB, force=False)
    mount.start()
    assert mount.status()["groups"] == {}
    assert mount.status()["volume"]["uuid"] != uuid
    mount.umount()
    own.rename(mount.meta)
    start_in_silence(mount)
    assert kept == [digest(path) for path in (group.backing, clone.backing, mirror.backing)]
    assert (clone.state, clone.delta()) == ("fractured", {3, 9})
    mirror.wait("synchronized")
    assert_same(mirror.path.read_bytes(), source, "the mirror")


def test_another_volume_that_has_had_the_same_backings(mount: Mount, end: End) -> None:
    """What it has done to them is in no map of the first: one of its groups is in doubt, and the
    other, which the second volume has never had, is not."""
    group, clone, mirror = split_and_written(mount)
    untouched = mount.add_group(data=GOOD)
    kept = untouched.add_fractured()
    write(untouched.source, 5 * EXTENT, b"x")
    end(mount)
    own = mount.work / "own"
    mount.meta.rename(own)
    format_volume(mount.meta, size=MiB, force=False)
    mount.start()
    mount.control("add_group").write(f"{group.name} {group.backing}")
    write(group.source, 17 * EXTENT, RUIN[17 * EXTENT :][: 4 * KiB])
    source = group.source.read_bytes()
    mount.umount()
    mount.meta.rename(mount.work / "other")
    own.rename(mount.meta)
    start_and_hear(mount, f"{group.name}: {group.backing} has been in use with another metadata")
    assert (kept.state, kept.delta()) == ("fractured", {5})
    check_in_doubt(group, clone, mirror, source)


# Backings that are not what they were ------------------------------------------------------------


@pytest.mark.parametrize("whose", ["source", "clone"])
def test_a_backing_that_was_replaced(mount: Mount, whose: str) -> None:
    """By another file of its size, or by a copy that has not kept the attributes: nobody knows what is
    in it, so that the group is in doubt, once."""
    group = mount.add_group(data=GOOD)
    clone, mirror = group.add_fractured(), group.add_clone("mirror")
    mirror.wait("synchronized")
    mount.umount()
    backing = group.backing if whose == "source" else clone.backing
    backing.unlink()
    backing.write_bytes(RUIN)
    start_and_hear(mount, f"{backing} has lost the attribute")
    assert (clone.state, mirror.state) == ("fractured", "out-of-sync")
    assert clone.delta() == mirror.delta() == ALL
    assert "replaced" in mirror.control("error").read()
    mount.umount()
    start_in_silence(mount)


def test_a_backing_that_was_moved_with_its_attributes_is_what_it_was(mount: Mount) -> None:
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    mount.umount()
    away = clone.backing.with_name("away")
    run("cp", "--archive", clone.backing, away)
    away.rename(clone.backing)
    start_in_silence(mount)
    assert (clone.state, clone.delta()) == ("fractured", set())
