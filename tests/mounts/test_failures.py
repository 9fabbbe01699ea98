"""What happens when things go wrong: devices that fail, disks that are full, backings that are not
what they were.

Each failure must be seen in the files of the tree, in a sentence that names the device, and lose
nothing. The devices are those of `tests/mounts/faulty.py`; what is on them is read behind their back.
"""

import contextlib
import ctypes
import errno
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from clonefs.volume import format_volume, was_closed_cleanly
from tests.mounts.faulty import FaultyDevice
from tests.mounts.mount import (
    EXTENT,
    WITHOUT_CHECKPOINTS,
    Clone,
    Group,
    MiB,
    Mount,
    assert_same,
    attach,
    differing,
    mount_disk,
    mounted,
    noise,
    opened,
    read,
    run,
    wait_for,
    write,
)

SIZE = 1 * MiB
EXTENTS = SIZE // EXTENT
GOOD, RUIN, NEW = noise("good", SIZE), noise("ruin", SIZE), noise("new", SIZE)


@pytest.fixture
def mount(mount_above: Mount) -> Mount:
    """A mount whose volume is sound, and is put away before the device."""
    return mount_above


def group_on(mount: Mount, directory: Path, data: bytes = GOOD) -> Group:
    """A new group with its Source, and its clones, in that directory."""
    name = mount.new_name()
    group = Group(mount, name, directory / f"{name}-source.img")
    group.backing.write_bytes(data)
    mount.control("add_group").write(f"{name} {group.backing}")
    return group


def fails(number: int, action: Callable[[], object]) -> None:
    """Calling it is an OSError with this errno."""
    with pytest.raises(OSError) as failure:
        action()
    assert errno.errorcode[failure.value.errno or 0] == errno.errorcode[number]


def sync(path: Path) -> None:
    """fsync an LU."""
    with opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)


def seen(thing: Clone | Group) -> tuple[str, str, str]:
    """State, condition (of a clone) and error: what the files say, status.json and the table too."""
    status = thing.status()
    name = thing.name if isinstance(thing, Group) else f"{thing.group.name}/{thing.name}"
    mount = thing.mount if isinstance(thing, Group) else thing.group.mount
    state, error = thing.control("state").read(), thing.control("error").read()
    condition = thing.control("condition").read() if isinstance(thing, Clone) else ""
    assert (status["state"], status.get("condition", "")) == (state, condition)
    assert error == (status["error"] or "")
    assert not error or f"{name}: {error}" in mount.control("status").read().splitlines()
    return state, condition, error


def check_seen(thing: Clone | Group, state: str, condition: str, *words: str) -> None:
    """That is its state and condition, and its error has these words; without any, none."""
    found = seen(thing)
    assert found[:2] == (state, condition)
    assert [word for word in words if word not in found[2]] == [], found[2]
    assert bool(words) == bool(found[2])


def check_event(mount: Mount, *words: str) -> None:
    """There is an event with all these words in it."""
    lines = mount.control("events").read().splitlines()
    assert any(all(word in line for word in words) for line in lines), lines


FRACTURED, SPLIT = ("fractured", "administratively-fractured"), ("out-of-sync", "system-fractured")
TIMES = pytest.mark.parametrize("times", [1, None], ids=["once", "lasting"])


# Steady state ------------------------------------------------------------------------------------


@TIMES
def test_a_source_that_cannot_be_read_in_one_place(
    mount: Mount, device: FaultyDevice, times: int | None
) -> None:
    mount.expect_in_log("source: read at 131072: cannot read 10 bytes")
    group = group_on(mount, device.path)
    mirror, split = group.add_clone("mirror"), group.add_fractured("split")
    fault = device.fail(group.backing, "read", first=2 * EXTENT, stop=3 * EXTENT, times=times)
    fails(errno.EIO, lambda: read(group.source, 2 * EXTENT, 10))
    assert_same(read(group.source, 0, 2 * EXTENT), GOOD[: 2 * EXTENT], "what can be read")
    check_seen(group, "normal", "", str(group.backing), "cannot read", "Input/output error")
    check_event(mount, f"{group.name}/source: cannot read", str(group.backing))
    check_seen(mirror, "synchronized", "normal")
    check_seen(split, *FRACTURED)
    fault.mend()
    assert_same(group.source.read_bytes(), GOOD, "the Source")


@TIMES
def test_a_source_that_cannot_be_written_is_the_hosts_error(
    mount: Mount, device: FaultyDevice, times: int | None
) -> None:
    """Nobody knows how much of it was written, so mirrored clones are made equal again."""
    mount.expect_in_log("source: write at 131072: cannot write 65536 bytes")
    group = group_on(mount, device.path)
    mirror, split = group.add_clone("mirror"), group.add_fractured("split")
    fault = device.fail(group.backing, "write", first=2 * EXTENT, stop=3 * EXTENT, times=times)
    fails(errno.EIO, lambda: write(group.source, 2 * EXTENT, NEW[:EXTENT]))
    check_seen(group, "normal", "", str(group.backing), "cannot write", "Input/output error")
    check_event(mount, f"{group.name}/source: cannot write", str(group.backing))
    check_event(mount, f"{group.name}/mirror synchronized -> synchronizing")
    mirror.wait("synchronized")
    assert_same(mirror.backing.read_bytes(), group.backing.read_bytes(), "the mirror")
    check_seen(split, *FRACTURED)
    assert split.delta() == {2}
    fault.mend()
    write(group.source, 2 * EXTENT, NEW[:EXTENT])
    assert_same(read(mirror.path, 2 * EXTENT, EXTENT), NEW[:EXTENT], "mirrored again")
    assert_same(split.path.read_bytes(), GOOD, "the clone that is split off")


@TIMES
def test_a_fractured_clone_that_cannot_be_read_or_written(
    mount: Mount, device: FaultyDevice, times: int | None
) -> None:
    mount.expect_in_log("nightly: (read|write) at")
    group = group_on(mount, device.path)
    clone = group.add_fractured()
    faults = [device.fail(clone.backing, each, times=times) for each in ("read", "write")]
    fails(errno.EIO, lambda: read(clone.path, 5 * EXTENT, 10))
    check_seen(clone, *FRACTURED, str(clone.backing), "cannot read")
    check_event(mount, f"{group.name}/nightly: cannot read", str(clone.backing))
    fails(errno.EIO, lambda: write(clone.path, 5 * EXTENT, NEW[:EXTENT]))
    check_seen(clone, *FRACTURED, str(clone.backing), "cannot write")
    assert clone.delta() == {5}
    check_seen(group, "normal", "")
    assert_same(group.source.read_bytes(), GOOD, "the Source")
    for fault in faults:
        fault.mend()
    clone.restore()
    clone.wait("fractured")
    check_seen(clone, *FRACTURED)
    assert_same(group.source.read_bytes(), GOOD, "the Source")


@TIMES
def test_a_mirrored_clone_that_cannot_be_written_is_split_off(
    mount: Mount, device: FaultyDevice, times: int | None
) -> None:
    mount.expect_in_log("is split off")
    group = group_on(mount, device.path)
    clone, other = group.add_clone("nightly"), group.add_clone("other")
    fault = device.fail(clone.backing, "write", times=times)
    write(group.source, 3 * EXTENT, NEW[: 2 * EXTENT])
    check_seen(clone, *SPLIT, str(clone.backing), "cannot write", "Input/output error")
    check_event(mount, f"{group.name}/nightly synchronized -> out-of-sync")
    check_seen(group, "normal", "")
    check_seen(other, "synchronized", "normal")
    assert {3, 4} <= clone.delta()
    expected = GOOD[: 3 * EXTENT] + NEW[: 2 * EXTENT] + GOOD[5 * EXTENT :]
    assert_same(group.source.read_bytes(), expected, "the Source")
    assert_same(other.path.read_bytes(), expected, "the other mirror")
    fault.mend()
    clone.sync()
    clone.wait("synchronized")
    check_seen(clone, "synchronized", "normal")
    assert_same(clone.backing.read_bytes(), expected, "copied again")


# Sync --------------------------------------------------------------------------------------------


@TIMES
def test_a_sync_from_a_source_with_an_extent_that_cannot_be_read(
    mount: Mount, device: FaultyDevice, times: int | None
) -> None:
    mount.expect_in_log("cannot read|source: read at")
    group = group_on(mount, device.path)
    clone = group.add_clone("nightly", sync=False)
    fault = device.fail(group.backing, "read", first=7 * EXTENT, stop=7 * EXTENT + 1, times=times)
    clone.sync()
    if times is None:
        wait_for(lambda: clone.delta() == {7}, "for all but one extent")
        wait_for(lambda: clone.control("condition").read() == "faulted", "for it to say so")
        check_seen(clone, "synchronizing", "faulted", str(group.backing), "cannot read")
        fails(errno.EIO, lambda: read(group.source, 7 * EXTENT, 10))
        assert_same(read(clone.path, 0, 7 * EXTENT), GOOD[: 7 * EXTENT], "what was copied")
        write(group.source, 9 * EXTENT, b"mirrored meanwhile")
        assert read(clone.path, 9 * EXTENT, 18) == b"mirrored meanwhile"
        fault.mend()
    clone.wait("synchronized")
    wait_for(lambda: clone.control("condition").read() == "normal", "for it to be mended")
    assert clone.control("error").read() == ""
    assert_same(clone.backing.read_bytes(), group.backing.read_bytes(), "the clone")


@TIMES
def test_a_sync_to_a_clone_that_cannot_be_written(
    mount: Mount, device: FaultyDevice, times: int | None
) -> None:
    mount.expect_in_log("is split off|cannot write")
    group = group_on(mount, device.path)
    clone = group.add_clone("nightly", sync=False)
    fault = device.fail(clone.backing, "write", first=7 * EXTENT, stop=7 * EXTENT + 1, times=times)
    clone.sync()
    if times is None:
        clone.wait("out-of-sync")
        check_seen(clone, *SPLIT, str(clone.backing), "cannot write")
        assert differing(clone.backing.read_bytes(), GOOD, EXTENT) <= clone.delta()
        with mount.refuses(errno.EBUSY, f"{group.name}/nightly", "no complete copy"):
            clone.restore()
        fault.mend()
        clone.sync()
    clone.wait("synchronized")
    check_seen(clone, "synchronized", "normal")
    assert_same(clone.backing.read_bytes(), GOOD, "the clone")


# Restore -----------------------------------------------------------------------------------------


def ruined(mount: Mount, device: FaultyDevice) -> tuple[Group, Clone]:
    """A group whose clone is GOOD and whose Source is RUIN, in every extent."""
    group = group_on(mount, device.path)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    return group, clone


def test_a_clone_that_could_not_be_read_once_while_it_is_restored_from(
    mount: Mount, device: FaultyDevice
) -> None:
    group, clone = ruined(mount, device)
    fault = device.fail(clone.backing, "read", first=EXTENT, stop=EXTENT + 1, times=1)
    clone.restore()
    clone.wait("fractured")
    assert fault.hits == 1
    check_seen(clone, *FRACTURED)
    assert_same(group.backing.read_bytes(), GOOD, "the Source")


def test_a_clone_that_cannot_be_read_in_places_while_it_is_restored_from(
    mount: Mount, device: FaultyDevice
) -> None:
    mount.expect_in_log("cannot read")
    group, clone = ruined(mount, device)
    bad = (3, 9, 10)
    faults = [
        device.fail(clone.backing, "read", first=extent * EXTENT + 100, stop=extent * EXTENT + 101)
        for extent in bad
    ]
    clone.restore()
    wait_for(lambda: group.restore_status()["pending"] == 3, "for all that can be read")
    wait_for(lambda: clone.control("condition").read() == "faulted", "for it to say so")
    check_seen(clone, "restoring", "faulted", str(clone.backing), "cannot read")
    check_seen(group, "normal", "")
    for extent in range(EXTENTS):
        at = extent * EXTENT
        if extent in bad:
            assert_same(read(group.source, at, 100), GOOD[at : at + 100], "what is beside it")
            fails(errno.EIO, partial(read, group.source, at + 50, 100))
            fails(errno.EIO, partial(write, group.source, at, b"x"))
        else:
            assert_same(read(group.source, at, EXTENT), GOOD[at : at + EXTENT], "what is good")
    write(group.source, 9 * EXTENT, NEW[:EXTENT])
    assert_same(read(group.source, 9 * EXTENT, EXTENT), NEW[:EXTENT], "a whole extent")
    assert group.restore_status()["pending"] == 2
    for fault in faults:
        fault.mend()
    clone.wait("fractured")
    check_seen(clone, *FRACTURED)
    expected = GOOD[: 9 * EXTENT] + NEW[:EXTENT] + GOOD[10 * EXTENT :]
    assert_same(group.source.read_bytes(), expected, "the Source")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    assert clone.delta() == {9}


@TIMES
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_source_that_cannot_be_written_while_it_is_restored(
    mount: Mount, device: FaultyDevice, number: int, times: int | None
) -> None:
    """Reads have the clone's bytes all the same."""
    mount.expect_in_log("cannot write|no space left")
    group, clone = ruined(mount, device)
    at = 6 * EXTENT
    fault = device.fail(group.backing, "write", number, first=at + 100, stop=at + 101, times=times)
    clone.restore()
    if times is None:
        wait_for(lambda: group.restore_status()["pending"] == 1, "for all others")
        wait_for(lambda: clone.control("condition").read() == "faulted", "for it to say so")
        check_seen(clone, "restoring", "faulted", str(group.backing))
        assert_same(group.source.read_bytes(), GOOD, "the Source as hosts see it")
        fails(number, lambda: write(group.source, at, b"x"))
        fails(number, lambda: write(group.source, at, NEW[:EXTENT]))
        check_seen(group, "normal", "", str(group.backing))
        assert_same(group.source.read_bytes(), GOOD, "and after writes that failed")
        fault.mend()
    clone.wait("fractured")
    check_seen(clone, *FRACTURED)
    assert_same(group.source.read_bytes(), GOOD, "the Source")
    assert_same(group.backing.read_bytes(), GOOD, "its backing")
    assert clone.delta() == set()


# Flushes (D10) -----------------------------------------------------------------------------------


def umount_with_a_failure(mount: Mount) -> None:
    """Unmount; the daemon says that not all is on disk."""
    run("umount", mount.mountpoint)
    assert mount.wait_for_end() == 1
    if mount.meta.exists():  # its device may have gone away
        assert not was_closed_cleanly(mount.meta)


def test_a_flush_of_the_source_that_failed_is_never_believed(
    mount: Mount, device: FaultyDevice
) -> None:
    """Nobody knows what of the Source is left: all maps are full, and nothing is copied from it
    until it has been mounted again. The mirror would only lose what the Source has lost."""
    mount.expect_in_log("flushing|clonefs: ")
    group = group_on(mount, device.path)
    mirror, split = group.add_clone("mirror"), group.add_fractured("split")
    write(group.source, 0, b"later")
    fault = device.fail(group.backing, "fsync", times=1)
    fails(errno.EIO, lambda: sync(group.source))
    assert fault.hits == 1
    words = (str(group.backing), "flushing", "Input/output error", "mount again")
    check_seen(group, "faulted", "", *words)
    check_event(mount, f"{group.name}/source: flushing", str(group.backing))
    check_event(mount, f"{group.name}/mirror synchronized -> synchronizing")
    wait_for(lambda: mirror.control("condition").read() == "faulted", "for it to say so")
    check_seen(mirror, "synchronizing", "faulted", *words)
    check_seen(split, *FRACTURED)
    for _ in range(2):  # it would succeed now
        fails(errno.EIO, lambda: sync(group.source))
        assert mirror.delta() == split.delta() == set(range(EXTENTS))
    assert mirror.status()["progress"]["done"] == 0
    write(group.source, EXTENT, b"still written")
    assert read(mirror.path, EXTENT, 13) == b"still written"
    umount_with_a_failure(mount)

    mount.start()
    check_seen(group, "normal", "")
    mirror.wait("synchronized")
    assert_same(mirror.backing.read_bytes(), group.backing.read_bytes(), "the mirror")
    assert split.delta() == set(range(EXTENTS))
    sync(group.source)
    split.restore()
    split.wait("fractured")
    assert_same(group.source.read_bytes(), GOOD, "restored")


def _file_on(device: FaultyDevice, cleanup: contextlib.ExitStack, where: Path) -> tuple[Path, int]:
    """A file on an ext4 on that device, with GOOD in it, and where on the device that lies, in one
    piece."""
    disk = device.behind / "disk"
    disk.write_bytes(bytes(32 * MiB))
    loop = attach(cleanup, device.path / "disk")
    run("mkfs.ext4", "-q", "-b", "4096", loop.path)
    mount_disk(cleanup, loop.path, where, "ext4")
    file = where / "file.img"
    file.write_bytes(GOOD)
    sync(file)
    extents = re.findall(
        r"^ *0: +0\.\. *(\d+): +(\d+)\.\.", run("filefrag", "-e", file), re.MULTILINE
    )
    ((last, start),) = extents
    assert (int(last) + 1) * 4096 == SIZE
    return file, int(start) * 4096


@pytest.mark.parametrize("failing", ["source", "nightly"])
def test_what_a_failed_flush_has_lost_is_not_believed_by_the_next_daemon(
    device: FaultyDevice, cleanup: contextlib.ExitStack, mount: Mount, tmp_path: Path, failing: str
) -> None:
    """The kernel still shows what it could not write, tells nobody any more, and would let it be copied;
    a power cut would then leave the copy, and not what it is a copy of."""
    mount.expect_in_log("flushing|no checkpoint|clonefs: ")
    here, start = _file_on(device, cleanup, tmp_path / "fs")
    there = tmp_path / "there.img"
    there.write_bytes(GOOD)
    source, backing = (here, there) if failing == "source" else (there, here)
    group = Group(mount, mount.new_name(), source)
    mount.control("add_group").write(f"{group.name} {source}")
    group.control("add_clone").write(f"nightly {backing}")
    clone = group.clone("nightly")
    clone.wait("synchronized")
    if failing == "nightly":
        clone.fracture()
    written = group.source if failing == "source" else clone.path
    sync(written)
    write(written, 2 * EXTENT, NEW[: 3 * EXTENT])
    device.fail(device.path / "disk", "write", first=start, stop=start + SIZE)
    fails(errno.EIO, lambda: sync(written))
    assert read(written, 2 * EXTENT, EXTENT) == NEW[:EXTENT]
    mount.kill()
    device.mend()
    assert here.read_bytes() != GOOD  # the kernel shows what is not on the disk
    mount.start()
    check_event(mount, f"{group.name}/{failing}: a flush of it had failed")
    assert_same(written.read_bytes(), GOOD, "what is on the disk")
    if failing == "source":
        clone.wait("synchronized")
    else:
        clone.restore()
        clone.wait("fractured")
    sync(group.source)
    assert_same((device.behind / "disk").read_bytes()[start : start + SIZE], GOOD, "the disk")
    assert_same(there.read_bytes(), GOOD, "the other one")
    mount.remount()
    check_seen(group, "normal", "")
    assert "had failed" not in mount.control("events").path.read_text()
    write(written, 0, NEW[:EXTENT])
    sync(written)
    assert (device.behind / "disk").read_bytes()[start : start + EXTENT] == NEW[:EXTENT]


def test_a_flush_of_the_source_that_fails_in_a_restore(mount: Mount, device: FaultyDevice) -> None:
    """What hosts wrote stays theirs, and everything else is copied again."""
    mount.expect_in_log("flushing|no checkpoint|clonefs: ")
    group, clone = ruined(mount, device)
    clone.rate(1)
    clone.restore()
    write(group.source, 4 * EXTENT, NEW[:EXTENT])
    expected = GOOD[: 4 * EXTENT] + NEW[:EXTENT] + GOOD[5 * EXTENT :]
    device.fail(group.backing, "fsync", times=1)
    fails(errno.EIO, lambda: sync(group.source))
    check_seen(group, "faulted", "", str(group.backing), "flushing")
    assert group.protected() == {4}
    assert group.restore_status()["pending"] == EXTENTS - 1
    clone.rate("max")
    wait_for(lambda: clone.control("condition").read() == "faulted", "for it to say so")
    check_seen(clone, "restoring", "faulted", str(group.backing), "flushing")
    assert_same(group.source.read_bytes(), expected, "the Source")
    umount_with_a_failure(mount)

    mount.start()
    clone.wait("fractured")
    assert_same(group.source.read_bytes(), expected, "the Source")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    assert clone.delta() == {4}


def test_a_flush_of_a_mirrored_clone_that_failed_splits_it_off(
    mount: Mount, device: FaultyDevice
) -> None:
    """The host's fsync succeeds, for the Source has it all. The clone can be removed, and added
    again, though its device fails for good: that is how to be rid of it without an unmount."""
    mount.expect_in_log("flushing|is split off")
    group = group_on(mount, device.path)
    clone = group.add_clone("nightly")
    write(group.source, 0, b"later")
    fault = device.fail(clone.backing, "fsync")
    sync(group.source)
    check_seen(clone, *SPLIT, str(clone.backing), "flushing", "Input/output error")
    check_event(mount, f"{group.name}/nightly: flushing", str(clone.backing))
    check_event(mount, f"{group.name}/nightly synchronized -> out-of-sync")
    check_seen(group, "normal", "")
    assert clone.delta() == set(range(EXTENTS))
    group.control("remove_clone").write("nightly")
    fault.mend()
    group.add_clone("nightly")
    check_seen(clone, "synchronized", "normal")
    sync(group.source)
    assert_same(clone.backing.read_bytes(), group.backing.read_bytes(), "the clone")


@pytest.mark.parametrize("state", ["fractured", "synchronized"])
def test_a_flush_that_failed_as_a_clone_was_to_be_removed(
    mount: Mount, device: FaultyDevice, state: str
) -> None:
    """What it has lost is known from then on, as after any other flush. It is removed only when
    somebody who has been told says so again, and it is no copy by then."""
    mount.expect_in_log("flushing|clonefs: |is split off")
    group = group_on(mount, device.path)
    clone = group.add_fractured() if state == "fractured" else group.add_clone("nightly")
    write(clone.path if state == "fractured" else group.source, 0, b"by a host")
    device.fail(clone.backing, "fsync", times=1)
    fails(errno.EIO, lambda: group.control("remove_clone").write("nightly"))
    assert clone.delta() == set(range(EXTENTS))
    if state == "fractured":
        check_seen(clone, "fractured", "faulted", str(clone.backing), "flushing", "mount again")
        umount_with_a_failure(mount)
        mount.start()
        assert clone.delta() == set(range(EXTENTS))
    else:
        check_seen(clone, *SPLIT, str(clone.backing), "flushing", "Input/output error")
        group.control("remove_clone").write("nightly")
        assert not group.status()["clones"]


def test_a_flush_that_failed_as_a_group_was_to_be_removed(
    mount: Mount, device: FaultyDevice
) -> None:
    mount.expect_in_log("flushing|clonefs: ")
    group = group_on(mount, device.path)
    write(group.source, 0, b"by a host")
    device.fail(group.backing, "fsync", times=1)
    remove = mount.mountpoint / "control/remove_group"
    fails(errno.EIO, lambda: remove.write_text(group.name))
    check_seen(group, "faulted", "", str(group.backing), "flushing", "mount again")
    umount_with_a_failure(mount)
    mount.start()
    check_event(mount, "recovery", f"{group.name}/source: a flush of it had failed")


def test_a_flush_of_a_fractured_clone_that_failed(mount: Mount, device: FaultyDevice) -> None:
    mount.expect_in_log("flushing|clonefs: ")
    group = group_on(mount, device.path)
    clone = group.add_fractured()
    write(clone.path, 0, b"by a host")
    device.fail(clone.backing, "fsync", times=1)
    for _ in range(2):
        fails(errno.EIO, lambda: sync(clone.path))
        check_seen(clone, "fractured", "faulted", str(clone.backing), "flushing", "mount again")
    assert clone.delta() == set(range(EXTENTS))
    check_seen(group, "normal", "")
    sync(group.source)
    with mount.refuses(errno.EIO, f"{group.name}/nightly", str(clone.backing), "flushing"):
        clone.restore()
    umount_with_a_failure(mount)
    mount.start()
    check_seen(clone, *FRACTURED)
    sync(clone.path)
    clone.restore()
    clone.wait("fractured")
    assert_same(group.source.read_bytes(), b"by a host" + GOOD[9:], "restored")


# The metadata volume -----------------------------------------------------------------------------


@pytest.fixture
def on_device(tmp_path: Path, device: FaultyDevice) -> Iterator[Mount]:
    """A mount whose volume is on the device that fails, and whose backings are sound. No checkpoint
    comes in between, and meets the failure first."""
    mount = Mount(tmp_path / "work", program=WITHOUT_CHECKPOINTS)
    mount.meta = device.path / "mapped-volume"
    format_volume(device.behind / mount.meta.name, size=4 * MiB, force=False)
    mount.start()
    try:
        yield mount
    finally:
        device.mend()
        mount.close()


@TIMES
def test_a_volume_that_cannot_be_written(
    on_device: Mount, device: FaultyDevice, times: int | None
) -> None:
    """Also when it happens once: which of the two records is on disk is not known then."""
    mount = on_device
    mount.expect_in_log("metadata volume cannot be written")
    group = mount.add_group(data=GOOD)
    split, mirror = group.add_fractured("split"), group.add_clone("mirror")
    write(group.source, 2 * EXTENT, b"before")
    fault = device.fail(mount.meta, "write", times=times)
    words = ("metadata volume cannot be written", str(mount.meta), "mounted again")
    with mount_that_breaks(mount):
        fails(errno.EIO, mirror.fracture)
    assert [word for word in words if word not in mirror.control("error").read()] == []
    assert mount.status()["volume"]["error"] == mount.control("error").read()
    assert mount.control("error").read() in mount.control("status").read().splitlines()
    check_event(mount, *words)
    assert (mirror.state, split.state) == ("synchronized", "fractured")

    fails(errno.EIO, lambda: write(group.source, 3 * EXTENT, b"mirrored"))
    assert read(group.source, 2 * EXTENT, 6) == b"before"
    assert_same(split.path.read_bytes(), GOOD, "the clone")
    fails(errno.EIO, lambda: write(split.path, 0, b"for the first time"))
    fails(errno.EIO, split.restore)
    fault.mend()
    fails(errno.EIO, mirror.fracture)
    umount_with_a_failure(mount)

    mount.start()
    assert mount.status()["volume"]["error"] is None
    assert 2 in split.delta()
    mirror.wait("synchronized")
    write(group.source, 3 * EXTENT, b"mirrored")
    expected = bytearray(GOOD)
    expected[2 * EXTENT : 2 * EXTENT + 6] = b"before"
    expected[3 * EXTENT : 3 * EXTENT + 8] = b"mirrored"
    assert_same(mirror.path.read_bytes(), expected, "the mirror")
    split.restore()
    assert_same(group.source.read_bytes(), GOOD, "restored")


@contextlib.contextmanager
def mount_that_breaks(mount: Mount) -> Iterator[None]:
    """Before the body nothing is wrong with the volume; nothing else changes in it."""
    before = mount.status()
    assert before["volume"]["error"] is None
    yield
    after = mount.status()
    assert after["volume"].pop("error")
    del before["volume"]["error"]
    assert after == before


def test_a_map_that_cannot_be_made_durable_is_the_hosts_error(
    on_device: Mount, device: FaultyDevice
) -> None:
    """In a restore an fsync has to record what hosts have written. What was written stays."""
    mount = on_device
    mount.expect_in_log("metadata volume cannot be written|source: write at")
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    clone.rate(1)
    clone.restore()
    write(group.source, 4 * EXTENT, NEW[:EXTENT])
    device.fail(mount.meta, "fsync", times=1)
    fails(errno.EIO, lambda: sync(group.source))
    fails(errno.EIO, lambda: write(group.source, 5 * EXTENT, NEW[:EXTENT]))
    write(group.source, 4 * EXTENT + 5, b"its map need not change")
    expected = bytearray(GOOD)
    expected[4 * EXTENT : 5 * EXTENT] = NEW[:EXTENT]
    expected[4 * EXTENT + 5 : 4 * EXTENT + 28] = b"its map need not change"
    assert_same(group.source.read_bytes(), expected, "the Source")
    mount.kill()
    mount.start()
    assert group.protected() == {4}
    assert_same(group.source.read_bytes(), expected, "after a kill")
    clone.rate("max")
    clone.wait("fractured")
    assert_same(group.source.read_bytes(), expected, "at the end")


@pytest.mark.parametrize("first", [0, 4096, 135168], ids=["superblock", "records", "maps"])
def test_a_volume_that_cannot_be_read_is_not_mounted_and_says_so(
    on_device: Mount, device: FaultyDevice, first: int
) -> None:
    mount = on_device
    group = mount.add_group(data=GOOD)
    group.add_fractured()
    mount.umount()
    # Of another file the kernel has no pages.
    run("cp", device.behind / mount.meta.name, device.behind / "mapped-cold")
    mount.meta = device.path / "mapped-cold"
    fault = device.fail(mount.meta, "read", first=first, stop=first + 1)
    with pytest.raises(AssertionError, match=r"clonefs: reading .* failed: Input/output"):
        mount.start()
    assert fault.hits
    assert mount.wait_for_end() == 1
    fault.mend()
    mount.start()
    assert_same(group.clone("nightly").path.read_bytes(), GOOD, "the clone")


def _page_out(pid: int, path: Path) -> None:
    """Do what the kernel does when memory is short: drop the pages of a mapping that are clean."""
    line = next(
        line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if path.name in line
    )
    first, stop = (int(number, 16) for number in line.split()[0].split("-"))
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        for at in range(first, stop, 4096):  # locked pages are refused
            piece = (ctypes.c_size_t * 2)(at, 4096)
            libc.syscall(440, pidfd, ctypes.byref(piece), ctypes.c_size_t(1), 21, 0)
    finally:
        os.close(pidfd)


def test_maps_that_could_not_be_written_back_are_not_lost(
    on_device: Mount, device: FaultyDevice
) -> None:
    """The kernel believes a page to be clean once it has failed to write it, and may drop it. The
    live maps that a daemon uses stay in memory; the next one takes what is on disk with them."""
    mount = on_device
    mount.expect_in_log("metadata volume cannot be written")
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    run("sync", "--file-system", device.path)
    write(group.source, 5 * EXTENT, RUIN[:EXTENT])
    fault = device.fail(mount.meta, "write")
    # The durable map has it already. The page of the first write may have been written back by now.
    write(group.source, 6 * EXTENT, RUIN[:EXTENT])
    with contextlib.suppress(AssertionError):  # it says that it failed
        run("sync", "--file-system", device.path)
    assert fault.hits
    fault.mend()
    assert mount.process is not None
    _page_out(mount.process.pid, mount.meta)
    assert clone.delta() == {5, 6}
    fails(errno.EIO, clone.sync)
    assert "cannot be written" in clone.control("error").read()
    assert clone.delta() == {5, 6}
    umount_with_a_failure(mount)
    with mount.meta.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    mount.start()
    check_event(mount, "recovery", "metadata volume")
    assert {5, 6} <= clone.delta()
    clone.restore()
    assert_same(group.source.read_bytes(), GOOD, "the Source")


# Backings that are not what they were ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["too small", "a FIFO", "unreadable", "not to be opened"])
@pytest.mark.parametrize("which", ["source", "clone"])
def test_a_backing_that_is_no_good_at_the_mount(
    mount: Mount, device: FaultyDevice, which: str, kind: str
) -> None:
    group = group_on(mount, device.path)
    clone = group.add_fractured()
    other = mount.add_group(data=GOOD)
    mount.umount()
    path = group.backing if which == "source" else clone.backing
    behind = device.behind / path.name
    away = behind.rename(behind.with_suffix(".away"))
    words = {"too small": "at least 1M", "a FIFO": "neither", "unreadable": "Permission denied"}
    if kind == "too small":
        behind.write_bytes(GOOD[:-512])
    elif kind == "a FIFO":
        os.mkfifo(behind)
    else:
        behind.write_bytes(RUIN)
        device.fail(path, "open", errno.EACCES if kind == "unreadable" else errno.EIO)
    mount.expect_in_log("is faulted|is split off|: read at 0")
    mount.start()
    check_seen(other, "normal", "")
    thing: Group | Clone = group if which == "source" else clone
    state = ("faulted", "") if which == "source" else ("fractured", "faulted")
    check_seen(thing, *state, str(path), words.get(kind, "Input/output error"))
    check_event(mount, str(path), "is faulted")
    lu = group.source if which == "source" else clone.path
    fails(errno.EIO, lambda: read(lu, 0, 10))
    with mount.refuses(errno.EIO, f"{group.name}/nightly", str(path)):
        clone.restore()
    mount.umount()
    device.mend()
    behind.unlink()
    away.rename(behind)
    mount.start()
    check_seen(group, "normal", "")
    check_seen(clone, *FRACTURED)
    assert_same(group.source.read_bytes(), GOOD, "the Source")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")


# Full disks --------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path, mount: Mount, cleanup: contextlib.ExitStack) -> Path:
    """A file system with room for four extents. The mount of the test lets go of it first."""
    where = tmp_path / "tiny"
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={4 * EXTENT}", "tmpfs", where)
    cleanup.callback(run, "umount", "--lazy", where)
    return where


def make_room(where: Path) -> None:
    """The file system has room for everything."""
    run("mount", "-o", f"remount,size={2 * SIZE}", where)


def test_a_full_disk_under_a_source(mount: Mount, tiny: Path) -> None:
    """Hosts get ENOSPC, as from a file on that disk; the mirror stays equal."""
    mount.expect_in_log("thin/source: write at .*: no space left")
    group = Group(mount, "thin", tiny / "source.img")
    mount.control("add_group").write(f"thin {group.backing} size={SIZE}")
    clone = Clone(group, "nightly", mount.work / "nightly.img")
    group.control("add_clone").write(f"nightly {clone.backing}")
    clone.wait("synchronized")
    write(group.source, 0, NEW[: 2 * EXTENT])
    fails(errno.ENOSPC, lambda: write(group.source, 8 * EXTENT, NEW[: 4 * EXTENT]))
    check_seen(group, "normal", "", str(group.backing), "no space left", "make room")
    check_event(mount, "thin/source: no space left", str(group.backing))
    assert_same(read(group.source, 0, 2 * EXTENT), NEW[: 2 * EXTENT], "what was written before")
    clone.wait("synchronized")
    assert_same(clone.path.read_bytes(), group.source.read_bytes(), "the mirror")
    make_room(tiny)
    write(group.source, 8 * EXTENT, NEW[: 4 * EXTENT])
    assert_same(read(clone.path, 8 * EXTENT, 4 * EXTENT), NEW[: 4 * EXTENT], "with room")


def test_a_restore_onto_a_full_disk(mount: Mount, tiny: Path) -> None:
    """The Source shows the clone though there is no room for it, and the restore goes on when
    there is."""
    mount.expect_in_log("no space left")
    group = Group(mount, "thin", tiny / "source.img")
    mount.control("add_group").write(f"thin {group.backing} size={SIZE}")
    clone = Clone(group, "nightly", mount.work / "nightly.img")
    group.control("add_clone").write(f"nightly {clone.backing}")
    clone.wait("synchronized")
    clone.fracture()
    write(clone.path, 0, GOOD)
    clone.restore()
    assert_same(group.source.read_bytes(), GOOD, "the Source at once")
    wait_for(lambda: clone.control("condition").read() == "faulted", "for it to say so")
    check_seen(clone, "restoring", "faulted", str(group.backing), "no space left", "make room")
    assert_same(group.source.read_bytes(), GOOD, "the Source")
    make_room(tiny)
    clone.wait("fractured")
    check_seen(clone, *FRACTURED)
    assert_same(group.backing.read_bytes(), GOOD, "its backing")


@pytest.mark.parametrize("end", [Mount.kill, Mount.umount], ids=["killed", "unmounted"])
def test_a_restore_begins_again_on_a_full_volume(
    tmp_path: Path, end: Callable[[Mount], None]
) -> None:
    """There is no room for one map more, and none is needed. So with breaking it off."""
    with mounted(tmp_path / "work", volume_size=1 * MiB) as mount:
        group = mount.add_group(1 << 30, extent=4096)
        write(group.source, 0, GOOD)
        clone = group.add_fractured()
        fill(mount, group)
        write(group.source, 0, RUIN)
        clone.rate(1)
        clone.restore()
        for again in (NEW, RUIN):
            write(group.source, 3 * EXTENT, again[:4096])
            assert group.protected() == {48}
            clone.restore()
            assert group.protected() == set()
            at = 3 * EXTENT - 4096
            assert_same(read(group.source, at, 12288), GOOD[at : at + 12288], "begun again")
        write(group.source, 5 * EXTENT, NEW[:4096])
        end(mount)
        mount.start()
        assert group.protected() == {80}
        clone.fracture("force")
        assert (clone.state, group.protected()) == ("reverse-out-of-sync", set())
        assert 80 in clone.delta()
        assert_same(read(group.source, 5 * EXTENT, 4096), NEW[:4096], "broken off")
        end(mount)
        mount.start()
        clone.rate("max")
        clone.restore()
        clone.wait("fractured")
        assert_same(read(group.source, 0, SIZE), GOOD, "the Source")
        assert clone.delta() == set()


def fill(mount: Mount, group: Group) -> None:
    """Add clones until the volume is full. What is refused changes nothing, and what is removed
    makes room."""
    number = 0
    with contextlib.suppress(OSError):
        for number in range(100):
            group.add_clone(f"c{number}", sync=False)
    assert 2 < number < 99
    with mount.refuses(errno.ENOSPC, group.name, "metadata volume is full", "remove a clone"):
        group.add_clone("never", sync=False)
    assert not group.clone("never").backing.exists()
    group.control("remove_clone").write("c0")
    group.add_clone("instead", sync=False)


# The same bytes twice ----------------------------------------------------------------------------


def test_a_loop_device_over_a_backing_in_use_is_ebusy(
    mount: Mount, cleanup: contextlib.ExitStack
) -> None:
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    for file in (group.backing, clone.backing, mount.meta):
        loop = attach(cleanup, file)
        with mount.refuses(errno.EBUSY, "", str(file), "in use"):
            mount.control("add_group").write(f"never {loop.path}")
        with mount.refuses(errno.EBUSY, group.name, str(file), "in use"):
            group.control("add_clone").write(f"never {loop.path}")
    image = mount.work / "image"
    image.write_bytes(GOOD)
    device = attach(cleanup, image)
    mount.control("add_group").write(f"device {device.path}")
    with mount.refuses(errno.EBUSY, "", str(image), "in use"):
        mount.control("add_group").write(f"never {image}")
    mount.control("remove_group").write("device")
    mount.control("add_group").write(f"file {image}")


def test_a_loop_device_over_an_lu_of_this_mount_is_ebusy(
    mount: Mount, cleanup: contextlib.ExitStack
) -> None:
    """It would wait for itself."""
    group = mount.add_group(data=GOOD)
    group.add_fractured()
    loop = attach(cleanup, group.source)
    with mount.refuses(errno.EBUSY, "", str(loop.path), "this mount"):
        mount.control("add_group").write(f"never {loop.path}")
    with mount.refuses(errno.EBUSY, group.name, str(loop.path), "this mount"):
        group.control("add_clone").write(f"never {loop.path}")
    assert_same(group.source.read_bytes(), GOOD, "the Source")


def test_a_backing_in_use_by_way_of_another_mount_is_ebusy(
    mount: Mount, cleanup: contextlib.ExitStack
) -> None:
    group = mount.add_group(data=GOOD)
    beside = mount.work / "beside"
    beside.mkdir()
    run("mount", "--rbind", mount.work, beside)
    cleanup.callback(run, "umount", "--lazy", beside)
    for name in (group.backing.name, mount.meta.name):
        with mount.refuses(errno.EBUSY, "", str(beside / name), "in use"):
            mount.control("add_group").write(f"never {beside / name}")
    with mount.refuses(errno.EBUSY, "", "this mount"):
        mount.control("add_group").write(f"never {beside / 'mnt' / group.name / 'source'}")


# Devices that go away ----------------------------------------------------------------------------


def test_the_device_of_a_clone_goes_away(mount: Mount, device: FaultyDevice) -> None:
    mount.expect_in_log("is split off|not connected|flushing")
    group = mount.add_group(data=GOOD)
    split, mirror = group.add_fractured("split"), None
    mirror = Clone(group, "mirror", device.path / "mirror.img")
    group.control("add_clone").write(f"mirror {mirror.backing}")
    mirror.wait("synchronized")
    device.vanish()
    write(group.source, 0, b"later")
    check_seen(mirror, *SPLIT, str(mirror.backing), "not connected")
    check_seen(split, *FRACTURED)
    fails(errno.EIO, lambda: read(mirror.path, 0, 10))
    sync(group.source)
    group.control("remove_clone").write("mirror")
    split.restore()
    split.wait("fractured")
    assert_same(group.source.read_bytes(), GOOD, "restored from the other")


def test_the_device_of_a_source_goes_away(mount: Mount, device: FaultyDevice) -> None:
    mount.expect_in_log("not connected|flushing|no checkpoint|clonefs: ")
    group = group_on(mount, device.path)
    clone = Clone(group, "nightly", mount.work / "nightly.img")
    group.control("add_clone").write(f"nightly {clone.backing}")
    clone.wait("synchronized")
    clone.fracture()
    device.vanish()
    fails(errno.EIO, lambda: read(group.source, 0, 10))
    fails(errno.EIO, lambda: write(group.source, 0, b"x"))
    check_seen(group, "normal", "", str(group.backing), "not connected")
    fails(errno.EIO, lambda: sync(group.source))
    check_seen(group, "faulted", "", str(group.backing), "flushing")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    umount_with_a_failure(mount)
    mount.cleanly = False  # while the backing is missing
    mount.expect_in_log("is faulted")
    mount.start()
    check_seen(group, "faulted", "", str(group.backing))
    assert_same(clone.path.read_bytes(), GOOD, "the clone")


def test_the_device_of_the_volume_goes_away(on_device: Mount, device: FaultyDevice) -> None:
    mount = on_device
    mount.expect_in_log("metadata volume cannot be written")
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, b"later")
    device.vanish()
    assert read(group.source, 0, 5) == b"later"
    fails(errno.EIO, clone.restore)
    assert "not connected" in mount.status()["volume"]["error"]
    fails(errno.EIO, lambda: write(clone.path, 0, b"x"))
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    umount_with_a_failure(mount)
    last = mount.log.read_text().splitlines()[-1]
    assert last.startswith("clonefs: the metadata volume cannot be written")


# A device that hangs -----------------------------------------------------------------------------


@pytest.mark.parametrize("request_", ["read", "write", "fsync"])
def test_a_device_that_hangs_keeps_only_its_own_group_waiting(
    mount: Mount, device: FaultyDevice, request_: str
) -> None:
    """Reads that miss the page cache, writes that would not go there, and flushes wait in threads."""
    group, other = group_on(mount, device.path), mount.add_group(data=GOOD)
    hang = device.hang(group.backing, request_)

    def host() -> None:
        match request_:
            case "read":
                assert read(group.source, 0, 10) == GOOD[:10]
            case "write":
                write(group.source, 0, NEW)
            case _:
                sync(group.source)

    def others() -> None:
        write(other.source, 0, NEW)
        sync(other.source)
        assert_same(other.source.read_bytes(), NEW, "the other group")
        assert other.add_fractured().state == "fractured"

    with ThreadPoolExecutor(max_workers=2) as pool:
        try:
            waiting = pool.submit(host)
            hang.wait_for_a_hang()
            pool.submit(others).result(60)
            assert not waiting.done()
        finally:
            device.mend()
        waiting.result(60)
    check_seen(group, "normal", "")
    if request_ == "write":
        assert_same(read(group.source, 0, SIZE), NEW, "what was written")
