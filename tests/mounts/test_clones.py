"""Sync and fracture: what is in a clone when, and which command is allowed in which state."""

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts.load import Host, Writer
from tests.mounts.mount import (
    EXTENT,
    Clone,
    Group,
    KiB,
    MiB,
    Mount,
    assert_same,
    differing,
    digest,
    noise,
    opened,
    read,
    run,
    touched,
    wait_for,
    write,
)

SIZE = 4 * MiB

# Copies ------------------------------------------------------------------------------------------


def test_a_clone_is_a_copy_of_the_instant_at_which_it_was_fractured(shared: Mount) -> None:
    data = noise("data", SIZE)
    group = shared.add_group(data=data)
    clone = group.add_clone()
    assert clone.status()["fractured_at"] is None
    write(group.source, 1000, b"before")
    clone.fracture()
    expected = data[:1000] + b"before" + data[1006:]
    write(group.source, 1000, b"after!")
    assert_same(clone.path.read_bytes(), expected, "the clone")
    assert_same(clone.backing.read_bytes(), expected, "its backing")
    assert read(group.source, 1000, 6) == b"after!"
    assert clone.status()["fractured_at"] is not None
    assert clone.delta() == {0}


def test_a_sync_copies_only_what_differs(shared: Mount) -> None:
    """One side or the other was written to: the Source wins, and nothing else is copied."""
    group = shared.add_group(data=noise("data", SIZE))
    clone = group.add_fractured()
    assert clone.control("progress").read() == "64/64"
    write(group.source, 5 * EXTENT - 1, b"two extents of the Source")
    write(group.source, 20 * EXTENT, noise("three", 3 * EXTENT))
    write(clone.path, 22 * EXTENT + 17, b"an extent of both")
    write(clone.path, 40 * EXTENT, b"an extent of the clone")
    assert clone.delta() == {4, 5, 20, 21, 22, 40}
    clone.sync()
    clone.wait("synchronized")
    assert clone.control("progress").read() == "6/6"
    assert clone.delta() == set()
    assert clone.status()["written"] is False
    assert_same(clone.path.read_bytes(), group.source.read_bytes(), "the clone")
    clone.fracture()
    clone.sync()
    clone.wait("synchronized")
    assert clone.control("progress").read() == "0/0"


def test_then_fracture_splits_off_by_itself(shared: Mount) -> None:
    data = noise("data", SIZE)
    group = shared.add_group(data=data)
    clone = group.add_clone("nightly", sync=False)
    assert (clone.state, len(clone.delta())) == ("out-of-sync", 64)
    clone.sync("then-fracture")
    clone.wait("fractured")
    write(group.source, 0, b"after")
    assert_same(clone.path.read_bytes(), data, "the clone")
    clone.sync()
    clone.wait("synchronized")
    write(group.source, 0, b"at it")
    clone.sync("then-fracture")
    assert clone.state == "fractured"
    assert read(clone.path, 0, 5) == b"at it"


def test_then_fracture_can_be_asked_for_while_it_synchronizes(shared: Mount) -> None:
    clone = shared.add_group(data=noise("data", SIZE)).add_clone("nightly", sync=False)
    clone.rate(1)
    clone.sync()
    clone.sync("then-fracture")
    clone.sync()
    assert clone.state == "synchronizing"
    clone.rate("max")
    clone.wait("fractured")
    assert_same(clone.path.read_bytes(), clone.group.source.read_bytes(), "the clone")


def test_fracturing_too_early_leaves_no_copy_and_the_next_sync_copies_the_rest(
    shared: Mount,
) -> None:
    group = shared.add_group(data=noise("data", SIZE))
    clone = group.add_clone("nightly", sync=False)
    clone.rate(1)
    clone.sync()
    clone.wait_for_the_one_extent()
    clone.fracture()
    assert (clone.state, clone.control("condition").read()) == (
        "out-of-sync",
        "administratively-fractured",
    )
    left = clone.delta()
    assert left == set(range(1, 64))
    assert differing(clone.backing.read_bytes(), group.backing.read_bytes(), EXTENT) == left
    with shared.refuses(errno.EBUSY, f"{group.name}/nightly", "out-of-sync", "sync"):
        clone.restore()
    write(group.source, 0, b"meanwhile")
    clone.rate("max")
    clone.sync()
    clone.wait("synchronized")
    total = len(left | {0})
    assert clone.control("progress").read() == f"{total}/{total}"
    clone.fracture()
    assert_same(clone.path.read_bytes(), group.source.read_bytes(), "the clone")


def test_the_rate_bounds_a_copy_and_can_be_changed_while_it_runs(shared: Mount) -> None:
    group = shared.add_group(data=noise("data", SIZE))
    clone = group.add_clone("nightly", sync=False)
    for said, shown in (("65536", "64K"), ("3m", "3M"), ("100", "100"), ("max", "max")):
        clone.control("rate").write(said)
        assert clone.control("rate").read() == shown
    clone.rate("1M")
    assert clone.status()["rate"] == 1 * MiB
    clone.rate(1)
    clone.sync()
    clone.wait_for_the_one_extent()
    assert clone.control("progress").read() == "1/64"
    clone.rate("max")
    clone.wait("synchronized")


def test_many_clones_of_many_instants(shared: Mount) -> None:
    """Each keeps its own instant, and the Source goes back to any of them, and forth again."""
    group = shared.add_group(data=noise("start", SIZE))
    instants: dict[str, bytes] = {}
    for number in range(5):
        write(group.source, number * 10 * EXTENT + 99, noise(number, 2 * EXTENT))
        clone = group.add_clone(f"c{number}")
        clone.fracture()
        instants[clone.name] = group.source.read_bytes()
    for name in ("c1", "c4", "c0", "c3"):
        clone = group.clone(name)
        clone.restore()
        assert_same(group.source.read_bytes(), instants[name], f"restored from {name}")
        clone.wait("fractured")
        for other, expected in instants.items():
            assert_same(group.clone(other).path.read_bytes(), expected, f"{other} after {name}")
            different = differing(expected, instants[name], EXTENT)
            assert different <= group.clone(other).delta(), f"{other} after {name}"


# What is allowed ---------------------------------------------------------------------------------


def _ruin(clone: Clone) -> None:
    write(clone.group.source, 0, noise("ruin", SIZE))


def _to_synchronizing(clone: Clone) -> None:
    _ruin(clone)
    clone.rate(1)
    clone.sync()
    clone.wait_for_the_one_extent()


def _to_synchronized(clone: Clone) -> None:
    clone.sync()
    clone.wait("synchronized")


def _to_out_of_sync(clone: Clone) -> None:
    _to_synchronizing(clone)
    clone.fracture()


def _to_restoring(clone: Clone) -> None:
    _ruin(clone)
    clone.rate(1)
    clone.restore()
    clone.wait_for_the_one_extent()


def _to_reverse_out_of_sync(clone: Clone) -> None:
    _to_restoring(clone)
    clone.fracture("force")


SYNC, THEN = "sync 1", "sync then-fracture"
FRACTURE, FORCE = "fracture 1", "fracture force"
RESTORE, REMOVE = "protected_restore 1", "remove"

# For each state: what leads to it from fractured, which commands are EBUSY, which change nothing.
STATES: dict[str, tuple[Callable[[Clone], None], set[str], set[str]]] = {
    "synchronizing": (_to_synchronizing, {RESTORE, REMOVE}, {SYNC}),
    "synchronized": (_to_synchronized, {RESTORE}, {SYNC}),
    "fractured": (lambda clone: None, set(), {FRACTURE, FORCE}),
    "out-of-sync": (_to_out_of_sync, {FRACTURE, RESTORE}, set()),
    "restoring": (_to_restoring, {SYNC, THEN, FRACTURE, REMOVE}, set()),
    "reverse-out-of-sync": (_to_reverse_out_of_sync, {SYNC, THEN, FRACTURE}, set()),
}


def command(clone: Clone, words: str) -> None:
    """Give a clone the command that `words` are."""
    if words == REMOVE:
        clone.group.control("remove_clone").write(clone.name)
    else:
        name, _, word = words.partition(" ")
        clone.control(name).write(word)


@pytest.mark.parametrize("state", STATES)
def test_which_command_is_refused_in_which_state(shared: Mount, state: str) -> None:
    reach, refused, without_effect = STATES[state]
    group = shared.add_group(data=noise("data", SIZE))
    clone = group.add_fractured()
    reach(clone)
    assert clone.state == state
    contents = digest(clone.backing), digest(group.backing)
    delta = clone.delta()
    for words in sorted(refused):
        place = group.name if words == REMOVE else f"{group.name}/{clone.name}"
        with shared.refuses(errno.EBUSY, place, f"{group.name}/{clone.name}", state):
            command(clone, words)
    for words in sorted(without_effect):
        before = clone.status()
        command(clone, words)
        assert clone.status() == before
    with shared.refuses(errno.EBUSY, "", group.name):
        shared.control("remove_group").write(group.name)
    assert (clone.state, clone.delta()) == (state, delta)
    assert (digest(clone.backing), digest(group.backing)) == contents


@pytest.mark.parametrize(
    "state", ["synchronized", "fractured", "out-of-sync", "reverse-out-of-sync"]
)
def test_a_clone_that_nothing_is_copied_to_or_from_can_be_removed(
    shared: Mount, state: str
) -> None:
    group = shared.add_group(data=noise("data", SIZE))
    clone = group.add_fractured()
    STATES[state][0](clone)
    source_bytes, clone_bytes = group.source.read_bytes(), clone.path.read_bytes()
    command(clone, REMOVE)
    assert group.status()["clones"] == {}
    write(group.source, 0, b"after")
    assert_same(group.source.read_bytes(), b"after" + source_bytes[5:], "the Source")
    assert_same(clone.backing.read_bytes(), clone_bytes, "the backing that was a clone")
    again = group.add_clone("nightly", sync=False)
    assert (again.state, len(again.delta())) == ("out-of-sync", 64)
    again.sync("then-fracture")
    again.wait("fractured")
    assert_same(again.path.read_bytes(), group.source.read_bytes(), "the clone that came again")
    command(again, REMOVE)
    shared.control("remove_group").write(group.name)


def test_a_fracture_of_what_cannot_be_fractured_leaves_all_of_them(shared: Mount) -> None:
    group, other = shared.add_group(data=noise("data", SIZE)), shared.add_group(SIZE)
    good, late = group.add_clone("good"), other.add_clone("late", sync=False)
    with shared.refuses(errno.EBUSY, "", f"{other.name}/late", "out-of-sync"):
        shared.control("fracture").write(f"{group.name}/good {other.name}/late")
    assert good.state == "synchronized"
    command(late, THEN)
    late.wait("fractured")
    shared.control("fracture").write(f"{group.name}/good {other.name}/late")
    assert good.state == "fractured"


# One instant -------------------------------------------------------------------------------------


def test_what_was_acknowledged_before_a_fracture_is_in_the_clone_and_nothing_after(
    shared: Mount,
) -> None:
    group = shared.add_group(SIZE)
    for number in range(5):
        clone = group.add_clone(f"c{number}")
        first, last = _count_during(group.source, clone.fracture)
        found = int.from_bytes(read(clone.path, 0, 8), "big")
        assert first <= found <= last
        at_the_end = int.from_bytes(read(clone.path, SIZE - 8, 8), "big")
        assert found - 1 <= at_the_end <= found, "writes are in the clone in the order of the host"


def _count_during(path: Path, fracture: Callable[[], None]) -> tuple[int, int]:
    """Write numbers to the begin and the end of the LU while it is fractured. Returns the last one
    that was acknowledged before, and the last one that was begun before it returned."""
    begun = done = int.from_bytes(read(path, 0, 8), "big")
    stop = threading.Event()

    def count() -> None:
        nonlocal begun, done
        with opened(path, os.O_WRONLY) as fd:
            while not stop.is_set():
                begun += 1
                os.pwrite(fd, begun.to_bytes(8, "big"), 0)
                os.pwrite(fd, begun.to_bytes(8, "big"), SIZE - 8)
                done = begun

    writer = threading.Thread(target=count)
    start = done
    writer.start()
    try:
        wait_for(lambda: done > start + 20, "for some writes")
        first = done
        fracture()
        last = begun
        wait_for(lambda: done > last + 20, "for some more writes")
    finally:
        stop.set()
        writer.join()
    return first, last


def test_clones_of_two_groups_are_fractured_at_one_instant(shared: Mount) -> None:
    """A database writes to its log, then to its data. In no copy is the data ahead of the log."""
    data, log = shared.add_group(SIZE), shared.add_group(SIZE)
    stop = threading.Event()
    written = 0

    def work() -> None:
        nonlocal written
        with opened(log.source, os.O_WRONLY) as to_log, opened(data.source, os.O_WRONLY) as to_data:
            while not stop.is_set():
                written += 1
                os.pwrite(to_log, written.to_bytes(8, "big"), 4096)
                os.pwrite(to_data, written.to_bytes(8, "big"), SIZE - 4096)

    for group in (data, log):
        for number in range(4):
            group.add_clone(f"c{number}")
    database = threading.Thread(target=work)
    database.start()
    try:
        for number in range(4):
            goal = written + 20
            wait_for(lambda goal=goal: written > goal, "for some writes")  # type: ignore[misc]
            names = [f"{group.name}/c{number}" for group in (data, log)]
            shared.control("fracture").write(" ".join(names if number % 2 else reversed(names)))
    finally:
        stop.set()
        database.join()
    for number in range(4):
        in_log = int.from_bytes(read(log.clone(f"c{number}").path, 4096, 8), "big")
        in_data = int.from_bytes(read(data.clone(f"c{number}").path, SIZE - 4096, 8), "big")
        assert 0 <= in_log - in_data <= 1, f"clone {number}: log {in_log}, data {in_data}"


# Under load --------------------------------------------------------------------------------------


def test_clones_come_and_go_while_hosts_write(shared: Mount, rng_seed: str) -> None:
    """At each fracture the writer stops, so that it is known what must be in the clone."""
    data = noise("data", SIZE)
    group = shared.add_group(data=data)
    one, two = group.add_clone("one"), group.add_clone("two")
    for number in range(4):
        writer = Writer(group.source, data, f"{rng_seed} {number}", EXTENT)
        writer.start()
        writer.wait_for_more(10)
        one.fracture()
        writer.wait_for_more(10)
        one.sync()
        writer.wait_for_more(10)
        writer.stop()
        data = bytes(writer.expected)
        one.wait("synchronized")
        shared.control("fracture").write(f"{group.name}/one {group.name}/two")
        assert_same(group.source.read_bytes(), data, "the Source")
        for clone in (one, two):
            assert_same(clone.path.read_bytes(), data, clone.name)
            assert clone.delta() == set()
            clone.sync()


def test_several_processes_write_and_read_while_clones_synchronize(
    shared: Mount, cleanup: contextlib.ExitStack, rng_seed: str
) -> None:
    data = noise("data", SIZE)
    group = shared.add_group(data=data, extent=16 * KiB)
    clone = group.add_clone("nightly", sync=False)
    old = shared.work / "old"
    old.write_bytes(data)
    borders = [0, 1 * MiB, 2 * MiB + 100, 3 * MiB - 4096, SIZE]
    hosts = [
        Host(group.source, start, stop, f"{rng_seed} {start}", old)
        for start, stop in itertools.pairwise(borders)
    ]
    for host in hosts:
        cleanup.callback(host.close)
        host.go()
    for _ in range(3):
        clone.sync()
        clone.wait("synchronized")
        clone.fracture()
    clone.sync()
    data = b"".join(host.end() for host in hosts)
    clone.wait("synchronized")
    assert_same(group.source.read_bytes(), data, "the Source")
    assert_same(clone.path.read_bytes(), data, "the clone")


def test_commands_from_many_sides_at_once(shared: Mount) -> None:
    """Whatever is refused is EBUSY, and in the end the clones are what the Source is."""
    group = shared.add_group(data=noise("data", 1 * MiB))
    clones = [group.add_clone(f"c{number}") for number in range(3)]
    failures: list[BaseException] = []

    def work(clone: Clone, number: int) -> None:
        try:
            for turn in range(10):
                write(group.source, number * 4096 + turn * EXTENT, b"%d %d" % (number, turn))
                for words in (FRACTURE, RESTORE if turn % 5 == 4 else FRACTURE, THEN):
                    try:
                        command(clone, words)
                    except OSError as error:
                        assert error.errno == errno.EBUSY, error  # noqa: PT017 - some may pass
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(c, n)) for n, c in enumerate(clones)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for clone in clones:
        _settle(clone)
    for clone in clones:
        clone.sync()
    for clone in clones:
        _settle(clone)
        assert clone.state in ("synchronized", "fractured")  # by a then-fracture that was left
        assert_same(clone.path.read_bytes(), group.source.read_bytes(), clone.name)


def _settle(clone: Clone) -> None:
    """Return when nothing is being copied to or from the clone."""
    wait_for(lambda: clone.state not in ("restoring", "synchronizing"), f"for {clone.name}")


# Devices that fail -------------------------------------------------------------------------------


@pytest.fixture
def tiny(shared: Mount, cleanup: contextlib.ExitStack) -> Path:
    """A file system with no room for a clone."""
    where = shared.work / "tiny"
    where.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", where)
    cleanup.callback(run, "umount", "--lazy", where)
    return where


def _clone_in(group: Group, directory: Path) -> Clone:
    clone = Clone(group, "nightly", directory / f"{group.name}.img")
    group.control("add_clone").write(f"nightly {clone.backing}")
    return clone


def test_a_clone_that_cannot_be_written_is_split_off_and_hosts_notice_nothing(
    shared: Mount, tiny: Path
) -> None:
    shared.expect_in_log("no space left under|is split off")
    group = shared.add_group(1 * MiB)
    clone = _clone_in(group, tiny)
    clone.wait("synchronized")
    healthy = group.add_clone("healthy")
    data = noise("too much", 1 * MiB)
    write(group.source, 0, data)
    assert_same(group.source.read_bytes(), data, "the Source")
    assert_same(healthy.path.read_bytes(), data, "the other clone")
    assert (clone.state, clone.control("condition").read()) == ("out-of-sync", "system-fractured")
    assert "no space left" in clone.control("error").read()
    assert differing(clone.path.read_bytes(), data, EXTENT) <= clone.delta()
    with shared.refuses(errno.EBUSY, f"{group.name}/nightly", "out-of-sync"):
        clone.restore()
    group.control("remove_clone").write("nightly")


def test_a_sync_that_cannot_write_splits_its_clone_off_and_can_be_tried_again(
    shared: Mount, tiny: Path
) -> None:
    shared.expect_in_log("no space left under|is split off")
    data = noise("too much", 1 * MiB)
    group = shared.add_group(data=data)
    clone = _clone_in(group, tiny)
    clone.wait("out-of-sync")
    assert clone.control("condition").read() == "system-fractured"
    assert differing(clone.path.read_bytes(), data, EXTENT) <= clone.delta()
    assert_same(group.source.read_bytes(), data, "the Source")
    run("mount", "-o", "remount,size=4m", tiny)
    clone.sync()
    clone.wait("synchronized")
    assert (clone.control("condition").read(), clone.control("error").read()) == ("normal", "")
    assert_same(clone.path.read_bytes(), data, "the clone")
    group.control("remove_clone").write("nightly")


def test_touched_extents_are_counted_as_the_geometry_does() -> None:
    """The tests' own arithmetic."""
    assert touched(0, 1) == touched(EXTENT - 1, 1) == {0}
    assert touched(EXTENT - 1, 2) == {0, 1}
    assert touched(2 * EXTENT, 3 * EXTENT) == {2, 3, 4}
