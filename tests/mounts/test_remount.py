"""What a remount brings back, and what is missing then.

Most tests here say the same of a clean unmount and of a kill, since neither may lose anything.
"""

import errno
import os
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest

from clonefs.volume import grow_volume
from tests.mounts.mount import (
    EXTENT,
    Clone,
    Group,
    MiB,
    Mount,
    assert_same,
    copied_by_reading,
    digest,
    noise,
    opened,
    read,
    write,
)

SIZE = 4 * MiB
GOOD, RUIN = noise("good", SIZE), noise("ruin", SIZE)


def _kill(mount: Mount) -> None:
    mount.kill()


def _umount(mount: Mount) -> None:
    mount.umount()


@pytest.fixture(params=[_umount, _kill], ids=["unmounted", "killed"])
def end(request: pytest.FixtureRequest) -> Callable[[Mount], None]:
    """What ends a mount."""
    found: Callable[[Mount], None] = request.param
    return found


def test_groups_clones_states_maps_and_rates_come_back(
    mount: Mount, end: Callable[[Mount], None]
) -> None:
    group = mount.add_group(data=GOOD)
    other = mount.add_group(256 * 1024 + 512, extent=4096)
    fractured, written = group.add_fractured("fractured"), group.add_fractured("written")
    mirror, late = group.add_clone("mirror"), group.add_clone("late", sync=False)
    write(written.path, 7 * EXTENT, b"by a host")
    write(group.source, 3 * EXTENT - 1, b"two extents")
    for clone, rate in ((fractured, "64M"), (written, "3K"), (mirror, "max"), (late, "1")):
        clone.rate(rate)
    status, maps = mount.status(), [clone.delta() for clone in (fractured, written, mirror, late)]
    assert maps == [{2, 3}, {2, 3, 7}, set(), set(range(64))]
    contents = [digest(clone.path) for clone in (fractured, written, mirror)]
    assert mirror.state == "synchronized"

    end(mount)
    mount.start()

    assert _without_the_daemon(mount.status()) == _without_the_daemon(status)
    assert [clone.delta() for clone in (fractured, written, mirror, late)] == maps
    assert [digest(clone.path) for clone in (fractured, written, mirror)] == contents
    assert read(group.source, 3 * EXTENT - 1, 11) == b"two extents"
    assert other.source.stat().st_size == 256 * 1024 + 512
    write(group.source, 20 * EXTENT, b"still mirrored")
    assert read(mirror.path, 20 * EXTENT, 14) == b"still mirrored"
    assert 20 in fractured.delta()


def _without_the_daemon(status: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in status.items() if key not in ("daemon", "recovery")}


def test_a_sync_goes_on_with_what_is_left(mount: Mount, end: Callable[[Mount], None]) -> None:
    group = mount.add_group(data=GOOD)
    clone = group.add_clone("nightly", sync=False)
    clone.rate(1)
    clone.sync("then-fracture")
    clone.wait_for_the_one_extent()
    write(group.source, 40 * EXTENT, b"mirrored meanwhile")
    end(mount)
    mount.start()
    assert (clone.state, clone.control("rate").read()) == ("synchronizing", "1")
    assert 60 < len(clone.delta()) < 64
    clone.rate("max")
    clone.wait("fractured")
    assert clone.control("progress").read() == "64/64"
    assert_same(clone.path.read_bytes(), group.source.read_bytes(), "the clone")
    assert read(clone.path, 40 * EXTENT, 18) == b"mirrored meanwhile"


def test_a_restore_goes_on_and_keeps_what_hosts_wrote(
    mount: Mount, end: Callable[[Mount], None]
) -> None:
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    clone.rate(1)
    clone.restore()
    write(group.source, 10 * EXTENT - 2, b"across")
    write(group.source, 30 * EXTENT, RUIN[:EXTENT])
    copied_by_reading(clone, 50)
    expected = bytearray(GOOD)
    expected[10 * EXTENT - 2 : 10 * EXTENT + 4] = b"across"
    expected[30 * EXTENT : 31 * EXTENT] = RUIN[:EXTENT]
    for _ in range(2):
        end(mount)
        mount.start()
        assert clone.state == "restoring"
        assert group.protected() == {9, 10, 30}
        assert 50 not in clone.delta()
        assert_same(read(group.source, 20 * EXTENT, EXTENT), GOOD[20 * EXTENT : 21 * EXTENT])
        assert_same(read(group.source, 30 * EXTENT, EXTENT), RUIN[:EXTENT], "the host's own")
    assert_same(group.source.read_bytes(), expected, "the Source")
    clone.rate("max")
    clone.wait("fractured")
    assert_same(group.source.read_bytes(), expected, "at the end")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
    assert clone.delta() == {9, 10, 30}


def test_a_restore_that_was_broken_off_stays_so(mount: Mount, end: Callable[[Mount], None]) -> None:
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    clone.rate(1)
    clone.restore()
    write(group.source, 10 * EXTENT, b"by a host")
    clone.fracture("force")
    mixed, delta = group.source.read_bytes(), clone.delta()
    end(mount)
    mount.start()
    assert (clone.state, clone.control("condition").read()) == ("reverse-out-of-sync", "waiting")
    assert clone.delta() == delta
    assert_same(group.source.read_bytes(), mixed, "part old, part clone")
    clone.rate("max")
    clone.restore()
    assert_same(group.source.read_bytes(), GOOD, "restored again")


def test_what_was_removed_stays_removed_and_its_room_is_free(mount: Mount) -> None:
    group = mount.add_group(data=GOOD)
    used = mount.status()["volume"]["used"]
    group.add_fractured("gone")
    gone = mount.add_group(1 * MiB)
    group.control("remove_clone").write("gone")
    mount.control("remove_group").write(gone.name)
    mount.remount()
    assert list(mount.status()["groups"]) == [group.name]
    assert group.status()["clones"] == {}
    assert mount.status()["volume"]["used"] == used
    assert not (mount.mountpoint / gone.name).exists()


def test_the_events_begin_anew_and_the_uuid_stays(mount: Mount) -> None:
    uuid = mount.status()["volume"]["uuid"]
    group = mount.add_group(1 * MiB)
    assert f"{group.name} added" in mount.control("events").read()
    mount.umount()
    mount.start()
    assert mount.status()["volume"]["uuid"] == uuid


# What is missing ---------------------------------------------------------------------------------


@pytest.fixture
def three(mount: Mount) -> tuple[Mount, list[Group]]:
    """Three groups with GOOD, each with a fractured and a mirrored clone, and not mounted."""
    groups = [mount.add_group(data=GOOD) for _ in range(3)]
    for group in groups:
        group.add_fractured("split")
        group.add_clone("mirror")
        write(group.source, 5 * EXTENT, b"later")
    mount.umount()
    return mount, groups


LATER = GOOD[: 5 * EXTENT] + b"later" + GOOD[5 * EXTENT + 5 :]


def check_normal(group: Group, delta: AbstractSet[int] = frozenset({5})) -> None:
    """The group is as it was left. `delta`: what the clone that is split off may differ in."""
    split, mirror = group.clone("split"), group.clone("mirror")
    assert (group.status()["state"], group.status()["error"]) == ("normal", None)
    assert split.state == "fractured"
    assert split.delta() == delta
    mirror.wait("synchronized")
    assert mirror.control("condition").read() == "normal"
    assert_same(group.source.read_bytes(), LATER, "the Source")
    assert_same(split.path.read_bytes(), GOOD, "the clone that is split off")
    assert_same(mirror.path.read_bytes(), LATER, "the mirror")


def _away(path: Path) -> Path:
    """Move a backing away; where it is then."""
    return path.rename(path.with_suffix(".away"))


def _eio(path: Path, flags: int = 0) -> None:
    """Reading and writing give EIO, and so says the error of the group or clone."""
    with opened(path, flags) as fd:
        with pytest.raises(OSError) as failure:
            os.pread(fd, 10, 0)
        assert failure.value.errno == errno.EIO
        if flags:
            with pytest.raises(OSError) as failure:
                os.pwrite(fd, b"x", 0)
            assert failure.value.errno == errno.EIO


def test_a_missing_source_is_faulted_and_the_rest_is_normal(
    three: tuple[Mount, list[Group]],
) -> None:
    mount, (one, two, faulted) = three
    away = _away(faulted.backing)
    mount.expect_in_log("is faulted|does not exist|is split off")
    mount.start()
    check_normal(one)
    check_normal(two)
    assert faulted.control("state").read() == "faulted"
    assert str(faulted.backing) in faulted.control("error").read()
    assert str(faulted.backing) in faulted.status()["error"]
    _eio(faulted.source, os.O_RDWR)
    assert_same(faulted.clone("split").path.read_bytes(), GOOD, "its clone can be read")
    for name in ("sync", "protected_restore"):
        with mount.refuses(errno.EIO, f"{faulted.name}/split", str(faulted.backing)):
            faulted.clone("split").control(name).write("1")
    assert faulted.clone("split").state == "fractured"
    assert not faulted.backing.exists()
    mount.umount()
    away.rename(faulted.backing)
    mount.start()
    check_normal(one)
    check_normal(two)
    # A write that failed may have been written in part, so its extent counts as different.
    check_normal(faulted, frozenset({0, 5}))


def test_a_missing_clone_is_faulted_and_what_it_misses_is_remembered(
    three: tuple[Mount, list[Group]],
) -> None:
    """Both kinds: one that is split off keeps its state, one that is mirrored is split off."""
    mount, (one, two, faulted) = three
    split, mirror = faulted.clone("split"), faulted.clone("mirror")
    aways = [(_away(clone.backing), clone.backing) for clone in (split, mirror)]
    mount.expect_in_log("is faulted|does not exist|is split off")
    mount.start()
    check_normal(one)
    check_normal(two)
    assert faulted.control("state").read() == "normal"
    assert (split.state, mirror.state) == ("fractured", "out-of-sync")
    for clone in (split, mirror):
        assert clone.control("condition").read() == "faulted"
        assert str(clone.backing) in clone.control("error").read()
        _eio(clone.path)
        with pytest.raises(OSError) as failure:
            clone.restore()
        assert failure.value.errno in (errno.EIO, errno.EBUSY)
        with mount.refuses(errno.EIO, f"{faulted.name}/{clone.name}", str(clone.backing)):
            clone.sync()
    assert_same(faulted.source.read_bytes(), LATER, "the Source")
    write(faulted.source, 20 * EXTENT, b"unseen by the clones")
    assert 20 in split.delta()
    assert 20 in mirror.delta()
    mount.umount()
    for away, backing in aways:
        away.rename(backing)
    mount.start()
    assert (split.state, mirror.state) == ("fractured", "out-of-sync")
    assert split.control("condition").read() == "administratively-fractured"
    assert mirror.control("condition").read() == "system-fractured"
    assert_same(split.path.read_bytes(), GOOD, "the clone that is split off")
    mirror.sync()
    mirror.wait("synchronized")
    assert_same(mirror.path.read_bytes(), faulted.source.read_bytes(), "the mirror")
    split.restore()
    assert_same(faulted.source.read_bytes(), GOOD, "restored")


def test_a_restore_whose_clone_is_missing_goes_on_when_it_is_back(mount: Mount) -> None:
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    clone.rate(1)
    clone.restore()
    write(group.source, 30 * EXTENT, RUIN[:EXTENT])
    mount.umount()
    away = _away(clone.backing)
    mount.expect_in_log("is faulted|does not exist|cannot|nightly")
    mount.start()
    assert (clone.state, clone.control("condition").read()) == ("restoring", "faulted")
    assert_same(read(group.source, 30 * EXTENT, EXTENT), RUIN[:EXTENT], "the host's own")
    with pytest.raises(OSError) as failure:
        read(group.source, 40 * EXTENT, 10)
    assert failure.value.errno == errno.EIO
    write(group.source, 40 * EXTENT, RUIN[:EXTENT])
    assert_same(read(group.source, 40 * EXTENT, EXTENT), RUIN[:EXTENT], "written whole")
    mount.umount()
    away.rename(clone.backing)
    mount.start()
    expected = bytearray(GOOD)
    for extent in (30, 40):
        expected[extent * EXTENT : (extent + 1) * EXTENT] = RUIN[:EXTENT]
    assert_same(group.source.read_bytes(), expected, "the Source")
    clone.rate("max")
    clone.wait("fractured")
    assert clone.delta() == {30, 40}


@pytest.mark.parametrize("kind", ["too small", "a directory", "in use"])
def test_a_backing_that_is_no_good_any_more_is_faulted(mount: Mount, kind: str) -> None:
    group = mount.add_group(data=GOOD)
    other = mount.add_group(data=GOOD)
    clone: Clone = group.add_fractured()
    mount.umount()
    away = _away(clone.backing)
    if kind == "too small":
        clone.backing.write_bytes(GOOD[:-512])
    elif kind == "a directory":
        clone.backing.mkdir()
    else:
        clone.backing.hardlink_to(other.backing)
    mount.expect_in_log("is faulted")
    mount.start()
    assert_same(group.source.read_bytes(), GOOD, "the Source")
    faulted = [
        name
        for name, status in (
            ("other", other.status()["state"]),
            ("clone", clone.status()["condition"]),
        )
        if status == "faulted"
    ]
    assert len(faulted) == 1
    mount.umount()
    if kind == "a directory":
        clone.backing.rmdir()
    else:
        clone.backing.unlink()
    away.rename(clone.backing)
    mount.start()
    assert clone.control("condition").read() == "administratively-fractured"
    assert_same(clone.path.read_bytes(), GOOD, "the clone")


def test_a_volume_that_was_grown_in_the_middle_of_a_restore(
    mount: Mount, end: Callable[[Mount], None]
) -> None:
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    clone.rate(1)
    clone.restore()
    clone.wait_for_the_one_extent()
    write(group.source, 9 * EXTENT, b"by a host")
    maps, protected = clone.delta(), group.protected()
    end(mount)

    grow_volume(mount.meta, size=2 * mount.volume_size)
    mount.start()
    assert mount.status()["volume"]["size"] == 2 * mount.volume_size
    assert (clone.state, group.protected()) == ("restoring", protected)
    assert maps >= clone.delta() >= maps - {min(maps)}  # one more extent may have been copied
    clone.rate("max")
    clone.wait("fractured")
    expected = bytearray(GOOD)
    expected[9 * EXTENT : 9 * EXTENT + 9] = b"by a host"
    assert_same(read(group.source, 0, SIZE), expected, "the Source")
    assert clone.delta() == protected == {9}
