"""Many clones, many restores at once, and large LUs with little in them."""

import contextlib
import itertools
import os
import random
import time
from pathlib import Path

from tests.mounts.faulty import FaultyDevice
from tests.mounts.mount import (
    EXTENT,
    Clone,
    Group,
    MiB,
    Mount,
    assert_same,
    differing,
    mounted,
    noise,
    opened,
    read,
    wait_for,
    write,
)

TiB = 1 << 40
SIZE = 2 * MiB
AT_ONCE = 4  # runs that are copied at a time in a mount


# Clone after clone -------------------------------------------------------------------------------


def test_restores_from_clone_after_clone_older_and_newer(shared: Mount, rng: random.Random) -> None:
    """Twelve instants, and two clones that are mirrored. Each restore gives its clone's exact bytes,
    changes no other clone, and splits the mirrored ones off as they were at that instant."""
    group = shared.add_group(data=noise("start", SIZE))
    instants: dict[str, bytes] = {}
    for number in range(12):
        write(group.source, rng.randrange(SIZE - 3 * EXTENT), noise(number, 2 * EXTENT + 99))
        instants[group.add_fractured(f"c{number}").name] = group.source.read_bytes()
    mirrors = [group.add_clone("m1"), group.add_clone("m2")]
    order = [f"c{number}" for number in (11, 0, 5, 10, 4, 6, 1, 11, 2)]
    for turn, name in enumerate(order):
        clone = group.clone(name)
        write(group.source, rng.randrange(SIZE - 100), b"what the restore drops")
        before = group.source.read_bytes()
        clone.restore()
        assert_same(group.source.read_bytes(), instants[name], f"at once, from {name}")
        for mirror in mirrors:
            assert mirror.state == "fractured"
            assert_same(
                mirror.path.read_bytes(), before, f"{mirror.name} at the restore from {name}"
            )
        if turn % 2:  # a mirror comes back while the restore is running, or after it
            clone.wait("fractured")
        mirrors[0].sync()
        clone.wait("fractured")
        mirrors[1].sync()
        written = noise(f"after {name}", EXTENT)
        at = rng.randrange(SIZE - EXTENT)
        write(group.source, at, written)
        for mirror in mirrors:
            mirror.wait("synchronized")
        now = group.source.read_bytes()
        assert_same(
            now, instants[name][:at] + written + instants[name][at + EXTENT :], "the Source"
        )
        for other, expected in instants.items():
            assert_same(group.clone(other).path.read_bytes(), expected, f"{other} after {name}")
            assert differing(expected, now, EXTENT) <= group.clone(other).delta()
        for mirror in mirrors:
            assert_same(mirror.path.read_bytes(), now, mirror.name)


def test_a_restore_among_64_clones(mount: Mount, rng: random.Random) -> None:
    group = mount.add_group(data=noise("start", 1 * MiB))
    instants: dict[str, bytes] = {}
    for number in range(64):
        write(group.source, number * 10000, noise(number, 5000))
        instants[group.add_fractured(f"c{number}").name] = group.source.read_bytes()
    for name in ("c63", "c0", "c40", f"c{rng.randrange(64)}"):
        group.clone(name).restore()
        assert_same(group.source.read_bytes(), instants[name], f"from {name}")
        group.clone(name).wait("fractured")
    for name, expected in instants.items():
        assert_same(group.clone(name).path.read_bytes(), expected, name)


# Many at once ------------------------------------------------------------------------------------


def _group_over(mount: Mount, device: FaultyDevice, name: str) -> tuple[Group, Clone]:
    """A group whose clone lies on the device; its Source is ruined."""
    group = mount.group(name)
    group.backing.write_bytes(noise(name, SIZE))
    mount.control("add_group").write(f"{name} {group.backing}")
    clone = Clone(group, "nightly", device.path / f"{name}.img")
    group.control("add_clone").write(f"nightly {clone.backing}")
    clone.wait("synchronized")
    clone.fracture()
    write(group.source, 0, noise("ruin", SIZE))
    return group, clone


def test_restores_beyond_the_bound_wait_for_their_turn_and_all_finish(
    mount_above: Mount, device: FaultyDevice
) -> None:
    """Ten groups are restored at once while their clones hang. Hosts of those that wait are served:
    what they need is copied for them."""
    groups = [_group_over(mount_above, device, f"g{number}") for number in range(10)]
    # The last extent is left alone, so that a host can have it.
    last = SIZE - EXTENT
    hangs = [device.hang(clone.backing, "read", stop=last) for _, clone in groups]
    for _, clone in groups:
        clone.restore()

    def conditions() -> list[str]:
        return [clone.control("condition").read() for _, clone in groups]

    wait_for(lambda: conditions().count("waiting") == len(groups) - AT_ONCE, "for those that wait")
    wait_for(lambda: sum(fault.hanging > 0 for fault in hangs) == AT_ONCE, "for those that copy")
    waiting = [group for group, clone in groups if clone.control("condition").read() == "waiting"]
    for group in waiting:
        assert_same(read(group.source, last, EXTENT), noise(group.name, SIZE)[last:], group.name)
        assert group.restore_status()["cod_copies"] == 1
    written = noise("a host's", EXTENT)
    write(waiting[0].source, last, written)
    assert conditions().count("waiting") == len(waiting)
    device.mend()
    for group, clone in groups:
        clone.wait("fractured")
        expected = noise(group.name, SIZE)
        assert clone.control("condition").read() == "administratively-fractured"
        assert_same(clone.path.read_bytes(), expected, f"the clone of {group.name}")
        if group is waiting[0]:
            expected = expected[:last] + written
            assert clone.delta() == {last // EXTENT}
        assert_same(group.source.read_bytes(), expected, group.name)


# Large and sparse --------------------------------------------------------------------------------

DATA = 64 * MiB


def held(*paths: Path) -> list[int]:
    """Bytes that files really hold, by st_blocks."""
    return [path.stat().st_blocks * 512 for path in paths]


def _scatter(path: Path, size: int, seed: str, shift: int = 0) -> dict[int, bytes]:
    """Write DATA bytes into 64 places of the file; what is where."""
    pieces = {}
    with opened(path, os.O_WRONLY) as fd:
        for number in range(64):
            at = number * (size // 64) + shift
            pieces[at] = noise(f"{seed} {number}", MiB)
            assert os.pwrite(fd, pieces[at], at) == MiB
        os.fsync(fd)
    return pieces


def _timed_sync(clone: Clone) -> float:
    """Seconds that the sync of a clone takes."""
    began = time.monotonic()
    clone.sync()
    clone.wait("synchronized")
    return time.monotonic() - began


def test_a_sparse_terabyte_costs_what_is_in_it(tmp_path: Path) -> None:
    """Its first sync takes about the time that a dense LU with as much data takes, and neither that
    nor a restore fills a hole."""
    with mounted(tmp_path / "work", volume_size=64 * MiB) as mount:
        dense = mount.add_group(DATA, extent=MiB)
        large = mount.add_group(TiB, extent=MiB)
        _scatter(dense.source, DATA, "dense")
        pieces = _scatter(large.source, TiB, "large")
        times: dict[str, float] = {}
        turns = itertools.product(("c1", "c2"), (dense, large))
        for name, group in turns:  # interleaved; the better one of two counts
            clone = group.add_clone(name, sync=False)
            seconds = _timed_sync(clone)
            times[group.name] = min(seconds, times.get(group.name, seconds))
        print(f"64 MiB dense: {times[dense.name]:.2f} s, in a terabyte: {times[large.name]:.2f} s")
        assert times[large.name] < 20 * times[dense.name] + 20  # hole by hole: minutes

        slack = 8 * MiB
        good, spare = large.clone("c1"), large.clone("c2")
        for path in (large.backing, good.backing, spare.backing, large.source, good.path):
            assert held(path)[0] < DATA + slack, path
        good.fracture()
        ruin = _scatter(large.source, TiB, "ruin", shift=5 * MiB)
        assert spare.state in ("synchronized", "synchronizing")
        spare.wait("synchronized")
        assert all(DATA < each < 2 * DATA + slack for each in held(large.backing, spare.backing))
        good.restore()
        for at, data in itertools.islice(ruin.items(), 3):
            assert not any(read(large.source, at, len(data)))
        good.wait("fractured")
        for path in (large.backing, good.backing, large.source):
            assert held(path)[0] < DATA + slack, path
        for at, data in pieces.items():
            assert_same(read(large.source, at, MiB), data, f"the Source at {at}")
        for at in ruin:
            assert not any(read(large.source, at, MiB))
        assert good.delta() == set()
        # What the mirrored clone was split off with is not part of the restore.
        assert spare.state == "fractured"
        spare.sync()
        spare.wait("synchronized")
        assert held(spare.backing)[0] < DATA + slack
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(p.open("rb")) for p in (large.backing, spare.backing)]
            for at in (*pieces, *ruin):
                one, other = (os.pread(file.fileno(), MiB, at) for file in files)
                assert_same(one, other, f"at {at}")


def _memory(mount: Mount, what: str) -> int:
    """Bytes of the daemon's memory, by its name in /proc/PID/status."""
    assert mount.process is not None
    for line in Path(f"/proc/{mount.process.pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(what)


def test_memory_is_what_differs(tmp_path: Path) -> None:
    """A terabyte in extents of 4 KiB has 32 MiB in each map. What of them is clear takes no memory, once
    a copy is over, and after a mount; and every bit is there, also after a kill."""
    with mounted(tmp_path / "work", volume_size=256 * MiB) as mount:
        group = mount.add_group(TiB - 4096, extent=4096)
        clone = group.add_clone("nightly")
        wait_for(lambda: _memory(mount, "VmLck") == 0, "for what was locked to be given up")
        clone.fracture()
        places = [0, 55 * (TiB >> 8), TiB // 2, TiB - 8192]
        for number, at in enumerate(places):
            write(group.source, at, noise(number, 4096))
        delta = {at // 4096 for at in places}
        assert clone.delta() == delta
        assert 0 < _memory(mount, "VmLck") <= MiB
        mount.kill()
        mount.start()
        assert clone.delta() == delta
        wait_for(lambda: 0 < _memory(mount, "VmLck") <= MiB, "for what is clear to be given up")
        assert clone.delta() == delta
        mount.remount()
        assert 0 < _memory(mount, "VmLck") <= MiB
        assert _memory(mount, "VmRSS") < 64 * MiB
        assert clone.delta() == delta
        write(group.source, places[1] - 4096, noise("later", 8192))
        clone.restore()
        for at in places:
            assert not any(read(group.source, at, 4096))
        clone.wait("fractured")
        assert clone.delta() == set()
        mount.remount()
        assert _memory(mount, "VmLck") == 0
        assert clone.delta() == set()
        write(group.source, places[3], b"x")
        assert clone.delta() == {places[3] // 4096}
