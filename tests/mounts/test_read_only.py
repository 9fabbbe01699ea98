"""Read-only mounts: they show what a mount would, and change nothing.

What lies on disk is compared before and after, volume and backings, bytes and times: of volumes that
were closed, and of volumes whose daemon was killed in a sync and in a restore.
"""

import contextlib
import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clonefs.volume import open_volume
from tests.mounts.mount import (
    EXTENT,
    Clone,
    Group,
    MiB,
    Mount,
    assert_same,
    attach,
    copied_by_reading,
    digest,
    noise,
    read,
    run,
    write,
)

SIZE = 2 * MiB
OLD, NEW = noise("old", SIZE), noise("new", SIZE)
EXTENTS = SIZE // EXTENT


def on_disk(mount: Mount) -> dict[str, tuple[str, int, int, int]]:
    """Every file of the mount but the log: what it holds, its times, and its size."""
    found = {}
    for path in sorted(mount.work.iterdir()):
        if path.is_file() and path != mount.log:
            about = path.stat()
            found[path.name] = (digest(path), about.st_mtime_ns, about.st_ctime_ns, about.st_size)
    assert len(found) >= 2
    return found


@contextlib.contextmanager
def read_only(mount: Mount) -> Iterator[None]:
    """Mount read-only what nobody has mounted; at the end nothing may have changed on disk."""
    before = on_disk(mount)
    mount.options = "ro"
    mount.start()
    try:
        yield
    finally:
        mount.umount()
        mount.options = ""
    assert on_disk(mount) == before


@contextlib.contextmanager
def beside(mount: Mount, work: Path, options: str) -> Iterator[Mount]:
    """Another mount of the same volume, not started."""
    other = Mount(work, options)
    other.meta = mount.meta
    try:
        yield other
    finally:
        other.close()


def refused(action: Callable[[], object]) -> None:
    with pytest.raises(OSError) as failure:
        action()
    assert errno.errorcode[failure.value.errno or 0] == "EROFS"


def assert_nothing_can_be_changed(mount: Mount, group: Group, clone: Clone) -> None:
    status = mount.status()
    refused(lambda: write(group.source, 0, b"new"))
    refused(lambda: write(clone.path, 0, b"new"))
    refused(lambda: group.source.open("r+b"))
    refused(lambda: os.truncate(group.source, 0))
    refused((mount.mountpoint / "new").mkdir)
    refused(group.source.unlink)
    for place, name, command in (
        ("", "add_group", f"new {mount.work}/new size=1M"),
        ("", "remove_group", group.name),
        ("", "fracture", f"{group.name}/{clone.name}"),
        (group.name, "add_clone", f"new {mount.work}/new"),
        (group.name, "remove_clone", clone.name),
        (f"{group.name}/{clone.name}", "sync", "1"),
        (f"{group.name}/{clone.name}", "fracture", "force"),
        (f"{group.name}/{clone.name}", "protected_restore", "1"),
        (f"{group.name}/{clone.name}", "rate", "1M"),
    ):
        refused(lambda: mount.control(f"{place}/{name}").write(command))  # noqa: B023
        assert "is mounted read-only: unmount it" in mount.control(f"{place}/error").read()
    assert not (mount.work / "new").exists()
    assert mount.status() == status


def test_a_clean_volume(mount: Mount) -> None:
    group = mount.add_group(data=OLD)
    clone = group.add_fractured()
    write(group.source, 0, NEW[:EXTENT])
    write(clone.path, SIZE - EXTENT, NEW[:EXTENT])
    fractured_at = clone.status()["fractured_at"]
    mount.umount()
    with read_only(mount):
        assert_same(group.source.read_bytes(), NEW[:EXTENT] + OLD[EXTENT:])
        assert_same(clone.path.read_bytes(), OLD[:-EXTENT] + NEW[:EXTENT])
        assert (clone.state, clone.delta()) == ("fractured", {0, EXTENTS - 1})
        assert clone.status()["fractured_at"] == fractured_at
        assert mount.status()["daemon"]["read_only"] is True
        for lu in (group.source, clone.path):
            assert stat.S_IMODE(lu.stat().st_mode) == 0o400
        assert os.statvfs(mount.mountpoint).f_flag & os.ST_RDONLY
        assert_nothing_can_be_changed(mount, group, clone)
    mount.start()
    assert mount.status()["daemon"]["read_only"] is False
    write(clone.path, 0, b"again")


def killed_in_a_restore(mount: Mount) -> tuple[Group, Clone]:
    """One extent is copied, one is read, one the host's, one the host's in part; then the daemon
    dies."""
    group = mount.add_group(data=OLD)
    clone = group.add_fractured()
    write(group.source, 0, NEW)
    clone.rate(1)
    clone.restore()
    clone.wait_for_the_one_extent()
    copied_by_reading(clone, 3)
    write(group.source, 5 * EXTENT, NEW[:EXTENT])
    write(group.source, 7 * EXTENT + 512, NEW[:512])
    mount.kill()
    return group, clone


def after_the_restore() -> bytes:
    expected = bytearray(OLD)
    expected[5 * EXTENT : 6 * EXTENT] = NEW[:EXTENT]
    expected[7 * EXTENT + 512 : 7 * EXTENT + 1024] = NEW[:512]
    return bytes(expected)


def test_a_volume_whose_daemon_was_killed_in_a_restore(mount: Mount) -> None:
    group, clone = killed_in_a_restore(mount)
    raw = group.backing.read_bytes()
    with read_only(mount):
        assert (clone.state, group.protected()) == ("restoring", {5, 7})
        for _ in range(2):  # nothing is copied by the first
            assert_same(group.source.read_bytes(), after_the_restore())
            assert group.restore_status()["pending"] == EXTENTS - 4
            assert group.restore_status()["cod_copies"] == 0
        assert clone.control("progress").read() == f"4/{EXTENTS}"
        assert clone.control("condition").read() == "waiting"
        assert "mount it without ro" in clone.control("error").read()
        assert group.control("cod_scoreboard").read() == ""
        assert_same(clone.path.read_bytes(), OLD)
        assert_nothing_can_be_changed(mount, group, clone)
        waited = cli("wait", clone.path)
        assert (waited.returncode, "mount it without ro" in waited.stderr) == (1, True)
    assert_same(group.backing.read_bytes(), raw)
    mount.start()
    clone.rate("max")
    clone.wait("fractured")
    assert_same(group.source.read_bytes(), after_the_restore())
    assert clone.delta() == {5, 7}


def test_readers_of_pending_extents_do_not_disturb_each_other(mount: Mount) -> None:
    group, _ = killed_in_a_restore(mount)
    wrong: list[str] = []

    def look(start: int) -> None:
        for number in range(200):
            offset = (start + number * 4099) % (SIZE - 3 * EXTENT)
            if read(group.source, offset, 2 * EXTENT) != expected[offset : offset + 2 * EXTENT]:
                wrong.append(f"at {offset}")

    expected = after_the_restore()
    with read_only(mount):
        threads = [threading.Thread(target=look, args=(n * 9973,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_a_volume_whose_daemon_was_killed_in_a_sync(mount: Mount) -> None:
    group = mount.add_group(data=OLD)
    clone = group.add_clone(sync=False)
    other = group.add_clone("equal")
    clone.rate(1)
    clone.sync()
    clone.wait_for_the_one_extent()
    write(group.source, SIZE - 1, b"x")
    mount.kill()
    with read_only(mount):
        assert_same(group.source.read_bytes(), OLD[:-1] + b"x")
        assert (clone.state, len(clone.delta())) == ("synchronizing", EXTENTS - 1)
        assert clone.control("condition").read() == "waiting"
        assert (other.state, other.delta()) == ("synchronized", set())
        assert other.control("error").read().endswith("mount it without ro")
        assert group.control("persistent_delta_map").read() == f"0-{EXTENTS - 1}"
        assert_nothing_can_be_changed(mount, group, clone)
    mount.start()
    clone.rate("max")
    clone.wait("synchronized")


def test_a_volume_of_another_boot_is_shown_as_recovery_would_set_it(mount: Mount) -> None:
    """As after a power cut: the record has a boot id that is gone."""
    group = mount.add_group(data=OLD)
    clone = group.add_clone()
    mount.kill()
    volume = open_volume(mount.meta, boot_id="another")
    volume.commit(volume.opened())
    volume.close(clean=False)
    with read_only(mount):
        assert clone.state == "synchronizing"
        assert clone.delta() == set(range(EXTENTS))
        assert "recovery: the machine went down" in mount.control("events").read()
    with read_only(mount):  # it has not been recovered by the first
        assert clone.state == "synchronizing"
    mount.start()
    clone.wait("synchronized")


def test_missing_backings(mount: Mount) -> None:
    group = mount.add_group(data=OLD)
    clone, missing = group.add_clone(), group.add_clone("missing")
    mount.umount()
    missing.backing.rename(missing.backing.with_suffix(".away"))
    with read_only(mount):
        assert (clone.state, missing.state) == ("synchronized", "out-of-sync")
        assert missing.control("condition").read() == "faulted"
        assert "does not exist" in missing.control("error").read()
        assert_same(clone.path.read_bytes(), OLD)
        with pytest.raises(OSError) as failure:
            missing.path.read_bytes()
        assert failure.value.errno == errno.EIO
    missing.backing.with_suffix(".away").rename(missing.backing)
    mount.start()
    assert missing.state == "synchronized"
    mount.expect_in_log("read at 0")


def test_two_at_once_share_and_one_that_writes_does_not(mount: Mount, tmp_path: Path) -> None:
    group = mount.add_group(data=OLD)
    group.add_fractured()
    with beside(mount, tmp_path / "second", "ro") as second:
        assert f"{mount.meta} is in use: it is mounted" in refusal_to_mount(second)
        mount.umount()
        with read_only(mount):
            second.start()
            assert_same((second.mountpoint / group.name / "source").read_bytes(), OLD)
            assert second.status()["groups"] == mount.status()["groups"]
            assert cli("check", mount.meta).returncode == 0
            second.umount()
            second.options = "rw"
            assert "is in use" in refusal_to_mount(second)
            assert_same(group.source.read_bytes(), OLD)
            # A backing alone, of another volume that writes.
            second.meta = second.work / "meta"
            second.format()
            second.start()
            with second.refuses(errno.EBUSY, ""):
                second.control("add_group").write(f"new {group.backing}")


def cli(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "clonefs", *words], check=False, capture_output=True, text=True
    )


def refusal_to_mount(mount: Mount) -> str:
    result = cli("mount", "-f", "-o", mount.options or "rw", mount.meta, mount.mountpoint)
    assert result.returncode == 1
    return result.stderr.splitlines()[-1]


def test_remounting_the_mount_point_with_rw_opens_nothing(mount: Mount) -> None:
    """The kernel's flag can be taken away without asking the daemon."""
    group = mount.add_group(data=OLD)
    clone = group.add_fractured()
    mount.umount()
    with read_only(mount):
        run("mount", "-i", "-o", "remount,rw", mount.mountpoint)
        assert not os.statvfs(mount.mountpoint).f_flag & os.ST_RDONLY
        status = mount.status()
        refused(lambda: write(group.source, 0, b"new"))
        refused(lambda: write(clone.path, 0, b"new"))
        for command in (clone.sync, clone.restore, clone.fracture, lambda: clone.rate(1)):
            refused(command)
        refused(lambda: mount.control("add_group").write(f"new {mount.work}/new size=1M"))
        assert mount.status() == status
        assert not (mount.work / "new").exists()


def test_commands_of_the_shell(mount: Mount) -> None:
    """Mounted and unmounted with the commands, twice: the second finds the backings free."""
    group = mount.add_group(data=OLD)
    clone = group.add_fractured()
    mount.umount()
    before = on_disk(mount)
    for _ in range(2):
        done = cli("mount", "-o", "ro", mount.meta, mount.mountpoint)
        assert (done.returncode, done.stderr) == (0, "")
        refusal = cli("restore", clone.path)
        assert refusal.returncode == 1
        assert "is mounted read-only: unmount it, and mount it without ro" in refusal.stderr
        done = cli("umount", mount.mountpoint)
        assert (done.returncode, done.stderr) == (0, "")
    assert on_disk(mount) == before
    mount.start()
    clone.restore()
    clone.wait("fractured")


def test_a_loop_device_on_the_source_is_read_only(
    mount: Mount, cleanup: contextlib.ExitStack
) -> None:
    group = mount.add_group(data=OLD)
    mount.umount()
    with read_only(mount):
        loop = attach(cleanup, group.source)
        assert run("blockdev", "--getro", loop.path).strip() == "1"
        assert_same(loop.path.read_bytes(), OLD)
        loop.detach()


def test_block_devices(mount: Mount, cleanup: contextlib.ExitStack, tmp_path: Path) -> None:
    """Volume, Source and clone are devices: several read them, and nobody beside them writes."""
    mount.umount()
    devices = []
    for name, data in (("meta", bytes(4 * MiB)), ("source", OLD), ("clone", bytes(SIZE))):
        path = tmp_path / f"{name}.img"
        path.write_bytes(data)
        devices.append(attach(cleanup, path).path)
    mount.meta = devices[0]
    run(sys.executable, "-m", "clonefs", "format", mount.meta)
    mount.start()
    group = Group(mount, "g", devices[1])
    clone = Clone(group, "c", devices[2])
    mount.control("add_group").write(f"g {devices[1]}")
    group.control("add_clone").write(f"c {devices[2]}")
    clone.wait("synchronized")
    clone.fracture()
    with beside(mount, tmp_path / "second", "ro") as second:
        assert "is in use" in refusal_to_mount(second)
        mount.remount("ro")
        before = [digest(device) for device in devices]
        second.start()
        shown = mount.status()["groups"]["g"]
        assert (shown["state"], clone.status()["error"]) == ("normal", None)
        assert second.status()["groups"]["g"] == shown
        assert_same(group.source.read_bytes(), OLD)
        assert_same(clone.path.read_bytes(), OLD)
        second.umount()
        second.options = "rw"
        assert "is in use" in refusal_to_mount(second)
    mount.umount()
    assert [digest(device) for device in devices] == before
