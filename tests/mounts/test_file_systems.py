"""Real file systems on a Source: ruined, restored, checked and used while the restore runs."""

import contextlib
import hashlib
import os
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounts.mount import (
    Clone,
    Group,
    KiB,
    MiB,
    Mount,
    assert_same,
    attach,
    digest,
    mount_disk,
    noise,
    opened,
    read,
    run,
    write,
)

RUIN = noise("ruin", 24 * MiB)


@dataclass(frozen=True)
class Disk:
    """A kind of file system: how it is made and checked, and options of mount."""

    kind: str
    size: int
    make: tuple[str, ...]
    check: tuple[str, ...]
    options: str = "defaults"


EXT4 = Disk("ext4", 64 * MiB, ("mkfs.ext4", "-q"), ("fsck.ext4", "-fn"))
XFS = Disk("xfs", 320 * MiB, ("mkfs.xfs", "-q"), ("xfs_repair", "-n"), "nouuid")
BTRFS = Disk("btrfs", 320 * MiB, ("mkfs.btrfs", "-q"), ("btrfs", "check"))


def fill(where: Path, seed: str) -> dict[str, str]:
    """Put files of many sizes into a directory; their digests by name."""
    found = {}
    for number in range(60):
        data = noise(f"{seed} {number}", (number * 7919) % (200 * KiB))
        path = where / f"directory {number % 7}" / f"{seed} {number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        found[str(path.relative_to(where))] = hashlib.sha256(data).hexdigest()
    return found


def digests(where: Path) -> dict[str, str]:
    """The digests of all files below a directory by name."""
    return {
        str(path.relative_to(where)): digest(path) for path in where.rglob("*") if path.is_file()
    }


class Production:
    """A file system on the Source of a group, through a loop device."""

    def __init__(
        self, group: Group, disk: Disk, cleanup: contextlib.ExitStack, *, direct: bool
    ) -> None:
        self.group = group
        self.disk = disk
        self.where = group.mount.work / f"{group.name}-disk"
        self._cleanup = cleanup
        self._direct = direct

    def attach(self) -> None:
        """A new loop device: one that lived through a restore may remember what was before."""
        self.loop = attach(self._cleanup, self.group.source, direct=self._direct)

    def mount(self) -> None:
        self.unmount = mount_disk(
            self._cleanup, self.loop.path, self.where, self.disk.kind, self.disk.options
        )

    def check(self) -> None:
        """What the file system's own checker says; it writes nothing."""
        run(*self.disk.check, self.loop.path)

    def put_away(self) -> None:
        self.unmount()
        self.loop.detach()


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("disk", [EXT4, XFS, BTRFS], ids=lambda disk: disk.kind)
def test_a_ruined_file_system_is_good_again_at_once(
    mount: Mount, cleanup: contextlib.ExitStack, disk: Disk, direct: bool
) -> None:
    group = mount.add_group(disk.size)
    production = Production(group, disk, cleanup, direct=direct)
    production.attach()
    run(*disk.make, production.loop.path)
    clone = group.add_clone("nightly", sync=False)
    clone.sync()
    production.mount()
    files = fill(production.where, "good")
    run("sync", "--file-system", production.where)
    production.put_away()
    clone.wait("synchronized")
    clone.fracture()
    before = digest(clone.backing)

    _ruin(production)
    production.attach()
    with pytest.raises(AssertionError, match="mount"):
        production.mount()
    production.loop.detach()

    clone.rate(256 * KiB)
    clone.restore()
    production.attach()
    production.check()
    production.mount()
    assert digests(production.where) == files
    files |= fill(production.where, "written during the restore")
    run("sync", "--file-system", production.where)
    assert group.restore_status()["pending"] > 100
    assert group.restore_status()["cod_copies"] > 0
    assert digests(production.where) == files

    _go_on_to_the_end(clone)
    assert digests(production.where) == files
    production.unmount()
    production.check()
    production.mount()
    assert digests(production.where) == files
    production.put_away()
    assert digest(clone.backing) == before

    _restore_once_more(production, clone, before)


def _ruin(production: Production) -> None:
    """Delete and overwrite files; then noise over the beginning, where the superblock is."""
    production.attach()
    production.mount()
    for path in list(production.where.rglob("*1")):
        if path.is_file():
            path.unlink()
    fill(production.where, "later")
    production.put_away()
    write(production.group.source, 0, RUIN)


def _go_on_to_the_end(clone: Clone) -> None:
    clone.rate("max")
    clone.wait("fractured")


def _restore_once_more(production: Production, clone: Clone, before: str) -> None:
    """What was written during the first restore is gone, and what the clone has is there."""
    write(production.group.source, 0, RUIN)
    clone.restore()
    production.attach()
    production.mount()
    names = set(digests(production.where))
    assert len(names) == 60
    assert not [name for name in names if "during" in name or "later" in name]
    production.put_away()
    clone.wait("fractured")
    assert digest(clone.backing) == before


def test_a_clone_of_a_mounted_file_system_is_what_a_power_cut_would_leave(
    mount: Mount, cleanup: contextlib.ExitStack
) -> None:
    """And with the file system frozen around the fracture it is clean. The clone is a disk that
    can be mounted while production goes on."""
    group = mount.add_group(EXT4.size)
    production = Production(group, EXT4, cleanup, direct=True)
    production.attach()
    run(*EXT4.make, production.loop.path)
    clone = group.add_clone()
    production.mount()
    files = fill(production.where, "good")
    run("sync", "--file-system", production.where)
    clone.fracture()
    fill(production.where, "later")
    copy = mount.work / "copy"
    copy_loop = attach(cleanup, clone.path, direct=True)
    unmount = mount_disk(cleanup, copy_loop.path, copy, "ext4")
    assert digests(copy) == files
    unmount()
    copy_loop.detach()
    run(*EXT4.check[:1], "-fp", clone.path)

    clone.sync()
    clone.wait("synchronized")
    run("fsfreeze", "--freeze", production.where)
    try:
        clone.fracture()
    finally:
        run("fsfreeze", "--unfreeze", production.where)
    files = digests(production.where)
    (production.where / "after").write_bytes(b"after")
    read_only = attach(cleanup, clone.path, direct=True)
    unmount = mount_disk(cleanup, read_only.path, copy, "ext4")
    assert digests(copy) == files
    unmount()
    read_only.detach()
    production.put_away()


def test_a_file_system_goes_on_while_clones_come_and_go(
    mount: Mount, cleanup: contextlib.ExitStack
) -> None:
    """mkfs, a mount, files, fsck: all of it while the Source is being copied, split off, synced."""
    group = mount.add_group(EXT4.size)
    production = Production(group, EXT4, cleanup, direct=True)
    production.attach()
    clone = group.add_clone("nightly", sync=False)
    clone.sync("then-fracture")
    run(*EXT4.make, production.loop.path)
    production.mount()
    files: dict[str, str] = {}
    for number in range(3):
        files |= fill(production.where, f"round {number}")
        clone.wait("fractured")
        clone.sync("then-fracture")
        assert digests(production.where) == files
    production.unmount()
    production.check()
    clone.wait("fractured")
    clone.sync("then-fracture")
    clone.wait("fractured")
    copy = attach(cleanup, clone.path, direct=True)
    run(*EXT4.check, copy.path)
    copy.detach()
    production.loop.detach()


def test_a_database_survives_the_daemon(mount: Mount, cleanup: contextlib.ExitStack) -> None:
    """It runs on ext4 on a Source that is just being restored, and the daemon is killed. Whatever
    was committed is there after the next mount, and the database and the file system are whole."""
    group = mount.add_group(EXT4.size)
    production = Production(group, EXT4, cleanup, direct=True)
    production.attach()
    run(*EXT4.make, production.loop.path)
    production.mount()
    assert _commit_rows(production.where / "database", lambda count: count >= 20) == 20
    production.put_away()
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    clone.rate(256 * KiB)
    clone.restore()
    production.attach()
    production.mount()

    def kill_it_later(count: int) -> bool:
        if count == 60:
            mount.kill()
        return False

    committed = _commit_rows(production.where / "database", kill_it_later)
    assert committed >= 60
    production.unmount()
    production.loop.detach()
    mount.start()
    assert clone.state == "restoring"
    production.attach()
    production.mount()
    with contextlib.closing(sqlite3.connect(production.where / "database")) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
        rows = [
            number for (number,) in database.execute("select number from story order by number")
        ]
    assert rows[:committed] == list(range(committed))
    assert len(rows) <= committed + 1
    production.put_away()
    production.attach()
    production.check()
    production.loop.detach()
    _go_on_to_the_end(clone)


def _commit_rows(path: Path, enough: Callable[[int], bool]) -> int:
    """Commit one row after the other, from where the database is. How many have been committed."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        # A commit is the removal of the journal: "extra" makes that survive as well.
        database.execute("pragma synchronous = extra")
        database.execute("create table if not exists story (number integer, text blob)")
        (count,) = database.execute("select count(*) from story").fetchone()
        try:
            while not enough(count):
                with database:
                    row = (count, noise(count, 3000))
                    database.execute("insert into story values (?, ?)", row)
                count += 1
        except sqlite3.Error:
            pass
        return int(count)


def test_umount_while_a_loop_device_is_attached_is_refused(
    mount: Mount, cleanup: contextlib.ExitStack
) -> None:
    """The device would lose its disk."""
    group = mount.add_group(1 * MiB)
    loop = attach(cleanup, group.source)
    with pytest.raises(AssertionError, match="busy"):
        run("umount", mount.mountpoint)
    assert group.source.stat().st_size == 1 * MiB
    loop.detach()


# Both backings on a file system that can share blocks ---------------------------------------------


def _shares(clone: Clone) -> bool:
    """Whether a block of the clone is the Source's too."""
    for path in (clone.group.source, clone.path):
        with opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)
    return re.search(r"[ ,]shared\b", run("filefrag", "-v", clone.backing)) is not None


@pytest.mark.parametrize("disk", [XFS, BTRFS], ids=lambda disk: disk.kind)
def test_copies_share_blocks_unless_the_group_wants_full_ones(
    mount: Mount, cleanup: contextlib.ExitStack, disk: Disk
) -> None:
    image, where = mount.work / "image", mount.work / "disk"
    with image.open("wb") as file:
        file.truncate(disk.size)
    run(*disk.make, image)
    mount_disk(cleanup, attach(cleanup, image).path, where, disk.kind)
    cleanup.callback(mount.umount)  # before the file system under it
    good, new = noise("good", 8 * MiB), noise("new", 8 * MiB)
    groups = [Group(mount, name, where / name) for name in ("sharing", "full")]
    for group, word, other in zip(groups, ("auto", "full"), ("full", "auto"), strict=True):
        group.backing.write_bytes(good)
        mount.control("add_group").write(f"{group.name} {group.backing} copy={word}")
        assert group.control("copy").read() == word
        clone = group.add_fractured()
        assert _shares(clone) is (word == "auto")
        group.control("copy").write(other)
        write(group.source, 0, new)
        clone.sync("then-fracture")
        clone.wait("fractured")
        assert _shares(clone) is (other == "auto")
        clone.restore()
        assert_same(read(group.source, 0, 8 * MiB), new, "the Source")
        assert_same(read(clone.path, 0, 8 * MiB), new, "the clone")
