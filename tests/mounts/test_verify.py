"""Verification: it finds what somebody else has done to a backing, and nothing else, whatever hosts
and engines do meanwhile."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounts.faulty import faulty_device
from tests.mounts.load import Host, Writer
from tests.mounts.mount import (
    DEADLINE_S,
    EXTENT,
    Clone,
    Group,
    KiB,
    MiB,
    Mount,
    mount_disk,
    mounted,
    noise,
    opened,
    parse_extent_list,
    run,
    wait_for,
    write,
)

SIZE = 4 * MiB
FOUND = "and no map has it"
GOOD, RUIN = noise("good", SIZE), noise("ruin", SIZE)


def begin(clone: Clone, word: str = "1") -> None:
    """Begin to verify a clone."""
    clone.control("verify").write(word)


def stage(clone: Clone) -> str:
    """The first word of what `verify` shows."""
    return clone.control("verify").read().partition(" ")[0]


def verified(clone: Clone) -> str:
    """Verify a clone; the last line of `verify`."""
    begin(clone)
    wait_for(lambda: stage(clone) != "running", "for the verification")
    return clone.control("verify").read()


def differences(clone: Clone) -> set[int]:
    """What the last verification has found."""
    return parse_extent_list(clone.control("differences").read())


def behind(backing: Path, offset: int, data: bytes) -> None:
    """Write into a backing behind clonefs' back."""
    with opened(backing, os.O_WRONLY) as fd:
        assert os.pwrite(fd, data, offset) == len(data)


def sound(clone: Clone) -> None:
    """A verification that looks at everything finds nothing."""
    total = clone.group.status()["extents"]
    assert verified(clone) == f"done {total}/{total} 0 differ 0 unreadable"
    assert clone.control("differences").read() == ""


# What it finds -----------------------------------------------------------------------------------


def test_what_was_written_behind_its_back_is_found_exactly(shared: Mount) -> None:
    shared.expect_in_log(FOUND)
    group = shared.add_group(data=GOOD)
    clone = group.add_fractured()
    assert clone.control("verify").read() == "idle"
    assert clone.status()["verify"] is None
    sound(clone)
    assert clone.control("error").read() == ""
    write(group.source, 5 * EXTENT - 1, b"ab")  # 4 and 5: the map has these
    behind(clone.backing, 3 * EXTENT + 77, b"x")
    behind(clone.backing, 11 * EXTENT - 1, b"yz")
    behind(group.backing, SIZE - 1, b"\0" if GOOD[-1] else b"\1")
    behind(clone.backing, 4 * EXTENT + 5, b"the map has this")
    events = len(shared.control("events").read())
    assert verified(clone) == "done 64/64 4 differ 0 unreadable"
    assert differences(clone) == {3, 10, 11, 63}
    assert clone.delta() == {4, 5}
    told = shared.control("events").read()[events:]
    assert f"{group.name}/{clone.name}: extent 3 differs from the Source" in told
    assert "verified (done): 64 of 64 extents, 4 differ" in told
    assert "3,10-11,63" in clone.control("error").read()
    assert clone.status()["verify"] == {
        "state": "done",
        "done": 64,
        "total": 64,
        "different": 4,
        "unreadable": 0,
        "differences": "3,10-11,63",
    }
    # Hosts overwrite some of it; the next one forgets what the last one has found.
    write(group.source, 10 * EXTENT, noise("new", 2 * EXTENT))
    assert verified(clone) == "done 64/64 2 differ 0 unreadable"
    assert differences(clone) == {3, 63}


@pytest.mark.parametrize("state", ["synchronizing", "restoring", "reverse-synchronizing"])
def test_it_knows_what_is_yet_to_be_copied(shared: Mount, state: str) -> None:
    """With a rate of 1 one extent is copied, and the rest is not. That one, and those that hosts
    have completed, are looked at."""
    shared.expect_in_log(FOUND)
    group = shared.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 10 * EXTENT, RUIN[: 20 * EXTENT])
    clone.rate(1)
    word = {"synchronizing": "sync", "restoring": "protected_restore"}.get(state, "reverse_sync")
    clone.control(word).write("1")
    clone.wait_for_the_one_extent()
    write(group.source, 12 * EXTENT, noise("whole", EXTENT))
    write(group.source, 15 * EXTENT + 5, b"part of one")
    sound(clone)
    assert clone.state == state
    behind(clone.backing, 10 * EXTENT, b"copied, and ruined")
    behind(group.backing, 40 * EXTENT, b"equal, and ruined")
    behind(group.backing, 20 * EXTENT, b"yet to be copied")
    behind(group.backing, 12 * EXTENT, b"a host's")
    verified(clone)
    # A mirrored write of a whole extent leaves it equal only if it was equal before.
    assert differences(clone) == {10, 40}
    clone.fracture("force")


def test_no_more_than_the_first_thousand_runs_are_kept(mount: Mount) -> None:
    mount.expect_in_log(FOUND)
    size = 4096
    group = mount.add_group(16 * MiB, extent=size)
    clone = group.add_fractured()
    for extent in range(0, 16 * MiB // size, 2):
        behind(clone.backing, extent * size, b"x")
    assert verified(clone) == "done 4096/4096 2048 differ 0 unreadable"
    assert differences(clone) == set(range(0, 2048, 2))
    assert "0,2,4,6,8,10,12,14,..." in clone.control("error").read()


@pytest.mark.parametrize("whose", ["the Source", "the clone"])
def test_what_cannot_be_read_is_counted_and_the_rest_is_compared(
    cleanup: contextlib.ExitStack, tmp_path: Path, whose: str
) -> None:
    device = cleanup.enter_context(faulty_device(tmp_path / "faulty"))
    mount = cleanup.enter_context(mounted(tmp_path / "work"))
    mount.expect_in_log(f"{FOUND}|verification ends")
    path = device.path / "disk.img"
    path.write_bytes(GOOD)
    group = mount.group("g")
    if whose == "the Source":
        group = Group(mount, "g", path)
        clone = Clone(group, "nightly", tmp_path / "nightly.img")
    else:
        group.backing.write_bytes(GOOD)
        clone = Clone(group, "nightly", path)
    mount.control("add_group").write(f"g {group.backing}")
    group.control("add_clone").write(f"nightly {clone.backing}")
    clone.wait("synchronized")
    other = clone.backing if whose == "the Source" else group.backing
    behind(other, 30 * EXTENT, b"x")
    device.fail(path, "read", first=5 * EXTENT, stop=7 * EXTENT)
    assert verified(clone) == "done 64/64 1 differ 2 unreadable"
    assert differences(clone) == {30}
    device.fail(path, "read")
    assert re.fullmatch(r"failed 63/64 0 differ 64 unreadable", verified(clone))
    assert str(path) in clone.control("error").read()
    device.mend()
    assert verified(clone) == "done 64/64 1 differ 0 unreadable"


# Nothing else ------------------------------------------------------------------------------------


@pytest.fixture
def under_load(
    shared: Mount, cleanup: contextlib.ExitStack, rng_seed: str
) -> Callable[[Group], contextlib.AbstractContextManager[list[Writer]]]:
    """Hosts that write to a Source from three sides: one anywhere, two all the time to the same few
    extents; and a process that reads what it has written."""

    @contextlib.contextmanager
    def load(group: Group) -> Iterator[list[Writer]]:
        size, hot = group.source.stat().st_size, 4 * group.status()["extent_size"]
        old = shared.work / "old"
        old.write_bytes(group.source.read_bytes())
        data = old.read_bytes()
        extent = hot // 4
        host = Host(group.source, 0, size // 4, f"{rng_seed} host", old)
        cleanup.callback(host.close)
        areas = [(size // 4, size - 2 * hot), (size - 2 * hot, size - hot), (size - hot, size)]
        writers = [
            Writer(group.source, data[start:stop], f"{rng_seed} {start}", extent, start=start)
            for start, stop in areas
        ]
        host.go()
        for writer in writers:
            writer.start()
        try:
            yield writers
        finally:
            for writer in writers:
                writer.stop()
            host.end()

    return load


Load = Callable[[Group], contextlib.AbstractContextManager[list[Writer]]]
TURNS = 12


def test_no_false_alarm_while_clones_are_mirrored(shared: Mount, under_load: Load) -> None:
    group = shared.add_group(data=GOOD, extent=16 * KiB)
    clones = [group.add_clone("one"), group.add_clone("two")]
    with under_load(group) as writers:
        for turn in range(TURNS):
            sound(clones[turn % 2])
            writers[0].wait_for_more(1)
    assert {clone.state for clone in clones} <= {"synchronized", "synchronizing"}


def test_no_false_alarm_during_syncs(shared: Mount, under_load: Load) -> None:
    group = shared.add_group(data=GOOD, extent=16 * KiB)
    clone, other = group.add_fractured("one"), group.add_fractured("other")
    with under_load(group) as writers:
        for _ in range(TURNS):
            writers[0].wait_for_more(10)
            clone.rate("8M")
            clone.sync()
            sound(clone)
            sound(other)
            clone.fracture()


@pytest.mark.parametrize("command", ["protected_restore", "reverse_sync"])
def test_no_false_alarm_during_restores(shared: Mount, under_load: Load, command: str) -> None:
    """From one of two clones; the other one is synced meanwhile."""
    group = shared.add_group(data=GOOD, extent=16 * KiB)
    clone, other = group.add_fractured("one"), group.add_fractured("other")
    clone.rate("8M")
    for _ in range(TURNS // 3):
        write(group.source, 0, RUIN)
        clone.control(command).write("1")
        other.sync()
        with under_load(group):
            for _ in range(3):
                sound(clone)
                sound(other)
        clone.rate("max")
        clone.wait("fractured" if command == "protected_restore" else "synchronized")
        clone.rate("8M")
        clone.fracture()
        wait_for(lambda: other.state == "synchronized", "for the other clone")
        other.fracture()


def test_no_false_alarm_while_hosts_write_to_both_sides(
    shared: Mount, under_load: Load, rng_seed: str
) -> None:
    group = shared.add_group(data=GOOD, extent=16 * KiB)
    clone = group.add_fractured()
    writer = Writer(clone.path, clone.path.read_bytes(), f"{rng_seed} clone", 16 * KiB)
    with under_load(group):
        writer.start()
        for _ in range(TURNS):
            sound(clone)
        writer.stop()


def test_no_false_alarm_while_the_state_changes(shared: Mount, rng_seed: str) -> None:
    """It goes on through every state; with a rate one verification meets all of them."""
    group = shared.add_group(data=GOOD, extent=16 * KiB)
    clone = group.add_clone()
    writer = Writer(group.source, GOOD, rng_seed, 16 * KiB)  # a restore drops what it has written
    writer.start()
    begin(clone, "64K")
    for words in ("fracture 1", "protected_restore 1", "fracture force", "reverse_sync 1"):
        writer.wait_for_more(10)
        name, _, word = words.partition(" ")
        with contextlib.suppress(OSError):  # the restore may have come to its end
            clone.control(name).write(word)
        assert stage(clone) == "running"
    clone.wait("synchronized")
    begin(clone, "max")
    wait_for(lambda: stage(clone) == "done", "for the verification")
    writer.stop()
    assert clone.control("verify").read() == "done 256/256 0 differ 0 unreadable"


# Beginning and ending ----------------------------------------------------------------------------


def test_the_rate_bounds_it_and_hosts_go_on(shared: Mount) -> None:
    """At 2 bytes a second one extent is read, and then no more for as long as the test lasts."""
    group = shared.add_group(data=GOOD)
    clone = group.add_clone()
    begin(clone, "2")
    wait_for(lambda: clone.control("verify").read() == "running 1/64 0 differ 0 unreadable")
    write(group.source, 0, b"hosts go on")
    clone.fracture()
    begin(clone, "2")
    assert clone.control("verify").read() == "running 1/64 0 differ 0 unreadable"
    clone.control("verify").write("stop")
    assert clone.control("verify").read() == "stopped 1/64 0 differ 0 unreadable"
    clone.control("verify").write("stop")
    begin(clone, "2")
    begin(clone, "max")
    wait_for(lambda: clone.control("verify").read() == "done 64/64 0 differ 0 unreadable")


@pytest.mark.parametrize("word", ["0", "-1", "start", "stop 1", "1 1", "", "64MB"])
def test_what_is_no_command(shared: Mount, word: str) -> None:
    clone = shared.add_group(1 * MiB).add_clone()
    with shared.refuses(errno.EINVAL, f"{clone.group.name}/{clone.name}"):
        begin(clone, word)


def test_a_clone_is_removed_and_a_mount_unmounted_under_it(mount: Mount) -> None:
    group = mount.add_group(data=GOOD)
    one, two = group.add_clone("one"), group.add_clone("two")
    for clone in (one, two):
        begin(clone, "2")
    group.control("remove_clone").write("one")
    assert group.add_clone("one").control("verify").read() == "idle"
    mount.remount()
    assert two.control("verify").read() == "idle"
    begin(two, "2")
    mount.kill()
    mount.start()
    assert two.control("verify").read() == "idle"
    sound(two)


def test_a_clone_whose_backing_is_missing_is_not_verified(mount: Mount) -> None:
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    mount.umount()
    clone.backing.rename(clone.backing.with_suffix(".away"))
    mount.start()
    with mount.refuses(errno.EIO, f"{group.name}/{clone.name}", str(clone.backing)):
        begin(clone)
    clone.backing.with_suffix(".away").rename(clone.backing)
    mount.kill()
    mount.start()
    sound(clone)


def test_a_sparse_terabyte_takes_the_time_of_what_is_in_it(
    cleanup: contextlib.ExitStack, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    mount_disk(cleanup, Path("tmpfs"), disk, "tmpfs")
    mount = cleanup.enter_context(mounted(tmp_path / "work", volume_size=64 * MiB))
    mount.expect_in_log(FOUND)
    group = Group(mount, "g", disk / "g-source.img")
    mount.control("add_group").write(f"g {group.backing} size=1T extent=1M")
    clone = group.add_clone()
    write(group.source, 500 << 30, GOOD)
    sound(clone)
    behind(clone.backing, (700 << 30) + 5, b"x")
    verified(clone)
    assert differences(clone) == {700 << 10}


# The command -------------------------------------------------------------------------------------


def clonefs(*words: str | Path) -> "subprocess.Popen[str]":
    """`clonefs` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "clonefs", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_prints_each_run_and_its_exit_status_tells(shared: Mount) -> None:
    shared.expect_in_log(FOUND)
    group = shared.add_group(data=GOOD)
    clone = group.add_fractured()
    assert run(sys.executable, "-m", "clonefs", "verify", clone.path) == ""
    behind(clone.backing, 3 * EXTENT + 77, b"x")
    behind(clone.backing, 11 * EXTENT - 1, b"yz")
    process = clonefs("verify", "--rate", "64M", clone.path)
    output, complaint = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert output.splitlines() == [
        f"extents 3: bytes {3 * EXTENT} to {4 * EXTENT - 1} differ",
        f"extents 10-11: bytes {10 * EXTENT} to {12 * EXTENT - 1} differ",
    ]
    assert len(complaint.splitlines()) == 1
    assert "3 extents differ from the Source" in complaint
    process = clonefs("verify", "--json", clone.path)
    output, complaint = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, len(complaint.splitlines())) == (1, 1)
    verification = clone.status()["verify"]
    assert json.loads(output) == {"clone": f"{group.name}/{clone.name}"} | verification | {
        "extent_size": EXTENT
    }
    assert verification["differences"] == "3,10-11"


def test_the_command_that_is_interrupted_stops_it(shared: Mount) -> None:
    clone = shared.add_group(data=GOOD).add_fractured()
    process = clonefs("verify", "--rate", "2", clone.path)
    wait_for(lambda: stage(clone) == "running", "for the verification")
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 130
    assert stage(clone) == "stopped"
    process.communicate()
    process = clonefs("verify", "--rate", "2", clone.path)
    wait_for(lambda: stage(clone) == "running", "for the verification")
    begin(clone, "stop")  # somebody else
    _, complaint = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, len(complaint.splitlines())) == (1, 1)
    assert "stopped" in complaint


def test_the_command_refuses_what_is_no_rate(shared: Mount) -> None:
    clone = shared.add_group(1 * MiB).add_clone()
    process = clonefs("verify", "--rate", "fast", clone.path)
    _, complaint = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "'fast' is not a rate" in complaint
