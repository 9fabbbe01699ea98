"""Reverse Sync: in effect at once like a restore, but what hosts write goes to the clone too.

With a rate of 1 the Sync Engine copies one extent and then, for as long as a test lasts, no more.
"""

import errno

import pytest

from tests.mounts.mount import (
    EXTENT,
    Clone,
    Group,
    MiB,
    Mount,
    assert_same,
    noise,
    read,
    run,
    write,
)

SIZE = 4 * MiB
GOOD, RUIN = noise("good", SIZE), noise("ruin", SIZE)


def reverse(mount: Mount) -> tuple[Group, Clone, bytes]:
    """A Reverse Sync that has hardly begun, with host writes in whole and in part; and what hosts
    are to read."""
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    clone.rate(1)
    clone.control("reverse_sync").write("1")
    expected = bytearray(GOOD)
    for offset, length in (
        (20 * EXTENT, EXTENT),
        (30 * EXTENT + 512, 1024),
        (40 * EXTENT - 512, 4096),
    ):
        data = noise(offset, length)
        write(group.source, offset, data)
        expected[offset : offset + length] = data
    return group, clone, bytes(expected)


def to_the_end(group: Group, clone: Clone, expected: bytes) -> None:
    clone.rate("max")
    clone.wait("synchronized")
    assert clone.delta() == set()
    assert group.status()["restore"] is None
    for path in (group.source, clone.path, group.backing, clone.backing):
        assert_same(path.read_bytes(), expected, str(path))
    assert clone.status()["condition"] == "normal"


def test_what_is_written_goes_to_both_and_the_clone_is_mirrored_in_the_end(mount: Mount) -> None:
    group, clone, expected = reverse(mount)
    assert clone.state == "reverse-synchronizing"
    assert group.restore_status()["protected"] is False
    assert_same(group.source.read_bytes(), expected, "the Source")
    assert_same(clone.path.read_bytes(), expected, "the clone")
    assert clone.path.stat().st_mode & 0o777 == 0o400
    to_the_end(group, clone, expected)
    write(group.source, 5, b"mirrored")
    assert read(clone.backing, 5, 8) == b"mirrored"
    clone.fracture()
    assert clone.state == "fractured"


def test_what_it_refuses(mount: Mount) -> None:
    group, clone, expected = reverse(mount)
    other = Clone(group, "other", mount.work / "other.img")
    group.control("add_clone").write(f"other {other.backing} sync=no")
    for name, words in (
        ("sync", ("reverse-synchronizing",)),
        ("fracture", ("reverse-synchronizing", "force")),
        ("protected_restore", ("reverse-synchronizing",)),
    ):
        with mount.refuses(errno.EBUSY, f"{group.name}/{clone.name}", *words):
            clone.control(name).write("1")
    with mount.refuses(errno.EBUSY, group.name, "reverse-synchronizing"):
        group.control("remove_clone").write(clone.name)
    clone.control("reverse_sync").write("1")  # it is what is asked for
    assert clone.state == "reverse-synchronizing"
    to_the_end(group, clone, expected)
    with mount.refuses(
        errno.EBUSY, f"{group.name}/{clone.name}", "synchronized", "fracture it first"
    ):
        clone.control("reverse_sync").write("1")


@pytest.mark.parametrize("end", [Mount.kill, Mount.umount], ids=["killed", "unmounted"])
def test_the_next_mount_goes_on_with_it(mount: Mount, end: object) -> None:
    group, clone, expected = reverse(mount)
    assert callable(end)
    end(mount)
    mount.start()
    assert clone.state == "reverse-synchronizing"
    assert_same(group.source.read_bytes(), expected, "the Source")
    to_the_end(group, clone, expected)


def test_breaking_it_off_leaves_the_source_mixed_and_it_can_be_restored_again(mount: Mount) -> None:
    group, clone, expected = reverse(mount)
    clone.fracture("force")
    assert clone.state == "reverse-out-of-sync"
    assert clone.status()["condition"] == "waiting"
    assert_same(clone.path.read_bytes(), expected, "the clone")
    write(group.source, 0, b"to the Source alone")
    assert_same(clone.path.read_bytes(), expected, "the clone")
    clone.rate("max")
    clone.restore()
    assert_same(group.source.read_bytes(), expected, "the Source")
    clone.wait("fractured")
    assert_same(group.backing.read_bytes(), expected, "its backing")


def test_mirrored_clones_are_split_off_at_that_instant(mount: Mount) -> None:
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    mirror = group.add_clone("mirror")
    mirror.wait("synchronized")
    write(group.source, 0, RUIN)
    clone.control("reverse_sync").write("1")
    assert mirror.state == "fractured"
    clone.wait("synchronized")
    assert_same(mirror.path.read_bytes(), RUIN, "the mirror")
    mirror.restore()
    assert_same(group.source.read_bytes(), RUIN, "the Source")
    assert clone.state == "fractured"
    assert_same(clone.path.read_bytes(), GOOD, "the clone")


def test_the_command_line(mount: Mount) -> None:
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    run("python3", "-m", "clonefs", "reverse-sync", "--wait", clone.path)
    assert clone.state == "synchronized"
    assert_same(group.source.read_bytes(), GOOD, "the Source")
