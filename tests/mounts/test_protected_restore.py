"""Protected Restore: in effect at once, and what hosts write during it stays.

With a rate of 1 the Sync Engine copies one extent and then, for as long as a test lasts, no more:
what is right in the Source then is so without the sweep.
"""

import contextlib
import errno
import itertools
import os
import random
import signal
import threading
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
    attach,
    copied_by_reading,
    differing,
    digest,
    mounted,
    noise,
    opened,
    read,
    run,
    touched,
    wait_for,
    write,
)

SIZE = 4 * MiB
GOOD, RUIN = noise("good", SIZE), noise("ruin", SIZE)


def ruined(mount: Mount, *, extent: int = EXTENT) -> tuple[Group, Clone]:
    """A group whose clone is GOOD and whose Source is RUIN, in every extent."""
    group = mount.add_group(data=GOOD, extent=extent)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    return group, clone


def slowly(clone: Clone) -> None:
    """Restore, so slowly that the sweep does not matter."""
    clone.rate(1)
    clone.restore()


def to_the_end(clone: Clone) -> None:
    """Let the restore go on to its end."""
    clone.rate("max")
    clone.wait("fractured")
    assert clone.group.status()["restore"] is None
    assert clone.group.protected() == set()


# At once -----------------------------------------------------------------------------------------


def test_the_next_read_shows_the_clone(shared: Mount) -> None:
    group, clone = ruined(shared)
    before = digest(clone.backing)
    with opened(group.source, os.O_RDONLY) as old:
        assert_same(os.pread(old, SIZE, 0), RUIN, "before")
        slowly(clone)
        last = os.pread(old, 100, SIZE - 100)
        assert last == GOOD[-100:]
        assert group.restore_status()["pending"] >= 60
        assert_same(os.pread(old, SIZE, 0), GOOD, "through an old descriptor")
    assert_same(group.source.read_bytes(), GOOD, "through a new one")
    copied_by_reading(clone, *range(64))
    clone.wait("fractured")  # nothing is left to copy, so no rate can hold it up
    assert_same(group.source.read_bytes(), GOOD, "at the end")
    assert_same(group.backing.read_bytes(), GOOD, "the Source's backing")
    assert digest(clone.backing) == before
    assert clone.delta() == set()


def test_a_restore_of_nothing_is_done_at_once(shared: Mount) -> None:
    group = shared.add_group(data=GOOD)
    clone = group.add_fractured()
    clone.restore()
    clone.wait("fractured")
    assert clone.control("progress").read() == "0/0"
    assert_same(group.source.read_bytes(), GOOD, "the Source")


def test_only_what_differs_is_copied(shared: Mount) -> None:
    group = shared.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 10 * EXTENT - 1, RUIN[: 2 * EXTENT])
    write(group.source, 30 * EXTENT, RUIN[:10])
    slowly(clone)
    assert clone.status()["progress"]["total"] == len({9, 10, 11, 30})
    to_the_end(clone)
    assert clone.control("progress").read() == "4/4"
    assert_same(group.source.read_bytes(), GOOD, "the Source")


def test_what_was_written_to_the_clone_while_it_was_fractured_is_restored_too(
    shared: Mount,
) -> None:
    group, clone = ruined(shared)
    write(clone.path, 100, b"amended")
    write(clone.path, SIZE - 7, b"at end.")
    expected = GOOD[:100] + b"amended" + GOOD[107:-7] + b"at end."
    slowly(clone)
    assert_same(group.source.read_bytes(), expected, "the Source")
    to_the_end(clone)
    assert_same(group.source.read_bytes(), expected, "at the end")
    assert_same(clone.path.read_bytes(), expected, "the clone")


# Writes during it --------------------------------------------------------------------------------

WRITES = {
    "a part": (5 * EXTENT + 100, 1000),
    "a whole extent": (7 * EXTENT, EXTENT),
    "several whole extents": (10 * EXTENT, 4 * EXTENT),
    "across a border": (20 * EXTENT - 3, 6),
    "a part, whole ones, a part": (25 * EXTENT - 10, 3 * EXTENT + 20),
    "the first byte": (0, 1),
    "the last byte": (SIZE - 1, 1),
    "all but the end": (0, SIZE - 2 * EXTENT),
}


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("read_before", [False, True], ids=["pending", "copied"])
def test_a_write_stays_and_makes_the_delta_map(shared: Mount, kind: str, read_before: bool) -> None:
    """And nothing else is in the Delta Map at the end; and the same restore gives GOOD again."""
    offset, length = WRITES[kind]
    data = noise(kind, length)
    expected = GOOD[:offset] + data + GOOD[offset + length :]
    group, clone = ruined(shared)
    slowly(clone)
    if read_before:
        assert_same(read(group.source, offset, length), GOOD[offset : offset + length], "before")
    write(group.source, offset, data)
    assert group.protected() == touched(offset, length)
    assert_same(read(group.source, offset, length), data, "what was written")
    assert_same(group.source.read_bytes(), expected, "all of it")
    to_the_end(clone)
    assert_same(group.source.read_bytes(), expected, "at the end")
    assert_same(group.backing.read_bytes(), expected, "the Source's backing")
    assert_same(clone.backing.read_bytes(), GOOD, "the clone")
    assert clone.delta() == touched(offset, length)
    clone.restore()
    assert_same(group.source.read_bytes(), GOOD, "after the second restore")
    clone.wait("fractured")
    assert clone.delta() == set()
    assert_same(group.backing.read_bytes(), GOOD, "at the end of the second")


def test_a_host_that_overwrites_everything_ends_the_restore(shared: Mount) -> None:
    """Nothing is left to copy, so it is done, and every extent differs."""
    group, clone = ruined(shared)
    slowly(clone)
    write(group.source, 0, RUIN)
    clone.wait("fractured")
    assert clone.delta() == set(range(64))
    assert_same(group.source.read_bytes(), RUIN, "the Source")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")


def test_writes_into_a_short_last_extent(shared: Mount) -> None:
    """It is covered whole by a write that goes to its end, though shorter than an extent."""
    size = 3 * EXTENT + 1536
    good, ruin = GOOD[:size], RUIN[:size]
    group = shared.add_group(data=good)
    clone = group.add_fractured()
    for offset, length in (
        (3 * EXTENT, 1536),
        (3 * EXTENT + 512, 512),
        (size - 1, 1),
        (1, size - 1),
    ):
        write(group.source, 0, ruin)
        slowly(clone)
        data = noise(offset, length)
        write(group.source, offset, data)
        expected = good[:offset] + data + good[offset + length :]
        assert_same(group.source.read_bytes(), expected, f"{offset}+{length}")
        to_the_end(clone)
        assert clone.delta() == touched(offset, length)
        assert_same(group.backing.read_bytes(), expected, f"{offset}+{length} at the end")
        clone.restore()
        clone.wait("fractured")
        assert_same(group.backing.read_bytes(), good, "restored again")


def test_the_delta_map_is_exactly_what_was_written_while_everything_runs(
    shared: Mount, rng_seed: str
) -> None:
    """Writers of all sizes against the sweep at a moderate speed, then the same restore again."""
    group, clone = ruined(shared, extent=16 * KiB)
    before = digest(clone.backing)
    for number in range(3):
        clone.rate("4M")
        clone.restore()
        writer = Writer(group.source, GOOD, f"{rng_seed} {number}", 16 * KiB)
        writer.start()
        writer.wait_for_more(60)
        clone.rate("max")
        writer.wait_for_more(20)
        writer.stop()
        clone.wait("fractured")
        assert_same(group.source.read_bytes(), writer.expected, "the Source")
        assert digest(clone.backing) == before
        assert differing(writer.expected, GOOD, 16 * KiB) <= clone.delta() <= writer.written


def test_several_processes_write_and_read_during_a_restore(
    shared: Mount, cleanup: contextlib.ExitStack, rng_seed: str
) -> None:
    group, clone = ruined(shared, extent=16 * KiB)
    before = digest(clone.backing)
    good = shared.work / "good"
    good.write_bytes(GOOD)
    borders = [0, 1 * MiB, 2 * MiB + 100, 3 * MiB - 4096, SIZE]
    hosts = [
        Host(group.source, start, stop, f"{rng_seed} {start}", good)
        for start, stop in itertools.pairwise(borders)
    ]
    for host in hosts:
        cleanup.callback(host.close)
    clone.rate("4M")
    clone.restore()
    for host in hosts:
        host.go()
    # It may be over before we look.
    wait_for(
        lambda: (restore := group.status()["restore"]) is None or restore["pending"] < 150,
        "for most of it",
    )
    to_the_end(clone)
    data = b"".join(host.end() for host in hosts)
    assert_same(group.source.read_bytes(), data, "the Source")
    assert digest(clone.backing) == before
    assert differing(data, GOOD, 16 * KiB) <= clone.delta()


# What can be seen of it --------------------------------------------------------------------------


def test_the_counts_add_up(shared: Mount) -> None:
    group, clone = ruined(shared)
    slowly(clone)
    clone.wait_for_the_one_extent()
    assert group.restore_status() == {
        "clone": "nightly",
        "protected": True,
        "pending": 63,
        "protected_extents": 0,
        "sync_copies": 1,
        "cod_copies": 0,
        "cod_queue": 0,
    }
    copied_by_reading(clone, *range(10, 15))
    write(group.source, 20 * EXTENT - 1, b"xx")
    write(group.source, 30 * EXTENT, RUIN[: 2 * EXTENT])
    status = group.restore_status()
    assert (status["pending"], status["protected_extents"]) == (63 - 5 - 2 - 2, 4)
    assert (status["sync_copies"], status["cod_copies"]) == (1, 7)
    assert group.control("protected_restore_map").read() == "19-20,30-31"
    assert clone.control("delta_map").read() == "1-9,15-18,21-29,32-63"
    assert clone.control("progress").read() == "10/64"
    assert f"restoring from {clone.name}" in group.control("status").read()
    read(group.source, 10 * EXTENT, 5 * EXTENT)
    assert group.restore_status()["cod_copies"] == 7
    to_the_end(clone)


def test_who_waits_and_what_is_being_copied_can_be_read(
    shared: Mount, tmp_path: Path, cleanup: contextlib.ExitStack
) -> None:
    """The clone's device does not answer for a while: one of another mount, which is stopped. Who
    needs it waits; nobody else does, neither in this group nor in another."""
    group, bystander = shared.add_group(data=GOOD), shared.add_group(data=GOOD)
    with mounted(tmp_path / "slow") as slow:
        device = slow.add_group(SIZE)
        clone = Clone(group, "nightly", device.source)
        group.control("add_clone").write(f"nightly {clone.backing}")
        clone.wait("synchronized")
        clone.fracture()
        write(group.source, 0, RUIN)
        slowly(clone)
        clone.wait_for_the_one_extent()
        write(group.source, 40 * EXTENT, RUIN[:EXTENT])
        found: list[bytes] = []

        def read_there() -> None:
            found.append(read(group.source, 5 * EXTENT - 50, 100))

        def write_there() -> None:
            write(group.source, 9 * EXTENT + 5, b"part")

        reader, writer = (threading.Thread(target=work) for work in (read_there, write_there))
        slow.signal(signal.SIGSTOP)
        try:
            reader.start()
            wait_for(lambda: group.restore_status()["cod_queue"] == 1, "for the read to wait")
            assert group.control("cod_scoreboard").read() == "4-5 cod nightly"
            assert group.control("cod_queue").read() == f"read {5 * EXTENT - 50}+100 4-5"
            write(group.source, 50 * EXTENT, RUIN[:EXTENT])
            writer.start()
            wait_for(lambda: group.restore_status()["cod_queue"] == 2, "for the write to wait")
            board = group.control("cod_scoreboard").read()
            assert board.splitlines() == ["4-5 cod nightly", "9 cod nightly"]
            queue = group.control("cod_queue").read()
            assert queue.splitlines()[1] == f"write {9 * EXTENT + 5}+4 9"
            assert_same(read(group.source, 40 * EXTENT, EXTENT), RUIN[:EXTENT], "a host's own")
            assert_same(read(group.source, 0, EXTENT), GOOD[:EXTENT], "what is there")
            write(bystander.source, 0, b"the other group")
            assert read(bystander.source, 0, 15) == b"the other group"
        finally:
            slow.signal(signal.SIGCONT)
            for thread in (reader, writer):
                if thread.ident is not None:
                    thread.join()
        assert found == [GOOD[5 * EXTENT - 50 : 5 * EXTENT + 50]]
        assert group.protected() == {9, 40, 50}
        to_the_end(clone)
        assert clone.delta() == {9, 40, 50}
        assert group.control("cod_scoreboard").read() == group.control("cod_queue").read() == ""
        group.control("remove_clone").write("nightly")


# Breaking it off, beginning again ----------------------------------------------------------------


def test_breaking_off_leaves_the_source_part_old_part_clone_and_restoring_again_mends_it(
    shared: Mount,
) -> None:
    group, clone = ruined(shared)
    before = digest(clone.backing)
    slowly(clone)
    clone.wait_for_the_one_extent()
    assert_same(read(group.source, 10 * EXTENT, 2 * EXTENT), GOOD[10 * EXTENT : 12 * EXTENT])
    copied_by_reading(clone, 10, 11)
    write(group.source, 20 * EXTENT + 5, b"by a host")
    with shared.refuses(errno.EBUSY, f"{group.name}/nightly", "restoring", "force"):
        clone.fracture()
    clone.fracture("force")
    assert (clone.state, clone.control("condition").read()) == ("reverse-out-of-sync", "waiting")
    mixed = bytearray(RUIN)
    for first, stop in ((0, 1), (10, 12), (20, 21)):
        mixed[first * EXTENT : stop * EXTENT] = GOOD[first * EXTENT : stop * EXTENT]
    mixed[20 * EXTENT + 5 : 20 * EXTENT + 14] = b"by a host"
    assert_same(group.source.read_bytes(), mixed, "part old, part clone")
    assert clone.delta() == set(range(64)) - {0, 10, 11}
    write(group.source, 11 * EXTENT, b"after")
    assert clone.delta() == set(range(64)) - {0, 10}
    slowly(clone)
    assert_same(group.source.read_bytes(), GOOD, "restored again")
    to_the_end(clone)
    assert digest(clone.backing) == before


def test_beginning_again_drops_what_hosts_have_written_since(shared: Mount) -> None:
    group, clone = ruined(shared)
    slowly(clone)
    write(group.source, 3 * EXTENT, RUIN[: 2 * EXTENT])
    write(group.source, 50 * EXTENT + 9, b"a part")
    assert group.protected() == {3, 4, 50}
    clone.restore()
    assert group.protected() == set()
    assert clone.state == "restoring"
    assert_same(group.source.read_bytes(), GOOD, "the Source")
    to_the_end(clone)
    assert clone.delta() == set()


def test_a_second_restore_waits_until_the_first_is_done(shared: Mount) -> None:
    group, clone = ruined(shared)
    other = group.add_fractured("weekly")
    slowly(clone)
    clone.wait_for_the_one_extent()
    with shared.refuses(errno.EBUSY, f"{group.name}/weekly", f"{group.name}/nightly"):
        other.restore()
    to_the_end(clone)
    assert_same(group.source.read_bytes(), GOOD, "the Source")
    slowly(other)
    other.wait_for_the_one_extent()
    with shared.refuses(errno.EBUSY, f"{group.name}/nightly", f"{group.name}/weekly"):
        clone.restore()
    assert_same(group.source.read_bytes(), RUIN, "restored from the other")
    to_the_end(other)
    assert_same(clone.path.read_bytes(), GOOD, "the first clone")


def test_groups_restore_independently(shared: Mount) -> None:
    pairs = [ruined(shared) for _ in range(3)]
    for _, clone in pairs:
        slowly(clone)
    for group, _ in pairs:
        assert_same(group.source.read_bytes(), GOOD, group.name)
    for _, clone in pairs:
        to_the_end(clone)


# Other clones of the group -----------------------------------------------------------------------


def test_mirrored_clones_are_split_off_at_the_instant_of_the_restore(shared: Mount) -> None:
    """One that was equal keeps what the Source was; one that was not yet is no copy."""
    group, clone = ruined(shared)
    equal, late = group.add_clone("equal"), group.add_clone("late", sync=False)
    late.rate(1)
    late.sync()
    write(group.source, 100, b"the last write")
    at_the_instant = RUIN[:100] + b"the last write" + RUIN[114:]
    slowly(clone)
    assert (equal.state, late.state) == ("fractured", "out-of-sync")
    assert_same(equal.path.read_bytes(), at_the_instant, "the clone that was equal")
    assert equal.delta() == set(range(64))
    write(group.source, 5 * EXTENT, b"during")
    assert_same(equal.path.read_bytes(), at_the_instant, "after a write")
    to_the_end(clone)
    slowly(equal)
    assert_same(group.source.read_bytes(), at_the_instant, "restored from what was split off")
    to_the_end(equal)
    assert_same(clone.path.read_bytes(), GOOD, "the clone of the first restore")


def test_another_clone_is_synced_during_a_restore(shared: Mount) -> None:
    """It becomes equal to the Source as hosts see it: the clone's data, and what they write."""
    group, clone = ruined(shared)
    other = group.add_fractured("weekly")
    slowly(clone)
    other.sync()
    expected = bytearray(GOOD)
    for offset in (7 * EXTENT + 11, 33 * EXTENT, SIZE - 5):
        write(group.source, offset, b"12345")
        expected[offset : offset + 5] = b"12345"
    assert_same(group.source.read_bytes(), expected, "the Source")
    to_the_end(clone)
    other.wait("synchronized")
    other.fracture()
    assert_same(other.path.read_bytes(), expected, "the other clone")
    assert_same(clone.path.read_bytes(), GOOD, "the clone that was restored from")
    assert clone.delta() == {7, 33, 63}


def test_a_clone_that_is_synced_during_a_restore_that_is_broken_off(shared: Mount) -> None:
    """It becomes what the Source is then; and when the restore begins again, it is split off as
    what it is: no copy. Whatever happens, its map has every difference."""
    group, clone = ruined(shared)
    other = group.add_fractured("weekly")
    slowly(clone)
    read(group.source, 20 * EXTENT, 5 * EXTENT)
    other.sync()
    write(group.source, 40 * EXTENT + 1, b"by a host")
    clone.fracture("force")
    mixed = group.source.read_bytes()
    assert differing(mixed, GOOD, EXTENT) <= clone.delta()
    other.wait("synchronized")
    assert_same(other.path.read_bytes(), mixed, "the other clone")
    slowly(clone)
    assert other.state == "fractured"
    other.sync()
    clone.restore()
    assert other.state == "out-of-sync"
    to_the_end(clone)
    assert differing(other.path.read_bytes(), GOOD, EXTENT) <= other.delta()
    assert_same(group.source.read_bytes(), GOOD, "the Source")
    other.sync()
    other.wait("synchronized")
    assert_same(other.path.read_bytes(), GOOD, "the other clone at the end")


def test_a_fractured_clone_can_be_written_to_while_another_is_restored_from(shared: Mount) -> None:
    group, clone = ruined(shared)
    other = group.add_fractured("weekly")
    slowly(clone)
    write(other.path, 9 * EXTENT, b"written")
    assert_same(group.source.read_bytes(), GOOD, "the Source")
    to_the_end(clone)
    expected = RUIN[: 9 * EXTENT] + b"written" + RUIN[9 * EXTENT + 7 :]
    assert_same(other.path.read_bytes(), expected, "the other clone")
    assert 9 in other.delta()


# Devices that fail -------------------------------------------------------------------------------


def _cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def test_what_the_clone_cannot_give_is_an_error_and_the_rest_goes_on(shared: Mount) -> None:
    """The clone's backing has been cut short: what was behind the cut is nowhere any more, until
    somebody puts it back. Zeros in its place would be a lie."""
    shared.expect_in_log("has cut it short")
    group, clone = ruined(shared)
    kept = 40 * EXTENT
    _cut(clone.backing, kept)
    clone.restore()
    wait_for(lambda: group.restore_status()["pending"] == 24, "for all that is there")
    assert_same(read(group.source, 0, kept), GOOD[:kept], "what is there")
    with opened(group.source, os.O_RDWR) as fd:
        for request in (
            lambda: os.pread(fd, 10, kept),
            lambda: os.pread(fd, 10, SIZE - 10),
            lambda: os.pwrite(fd, b"a part", kept + 7),
        ):
            with pytest.raises(OSError) as failure:
                request()
            assert failure.value.errno == errno.EIO
        write(group.source, 50 * EXTENT, RUIN[:EXTENT])
        assert_same(os.pread(fd, EXTENT, 50 * EXTENT), RUIN[:EXTENT], "a whole extent")
    wait_for(lambda: clone.control("condition").read() == "faulted", "for it to say so")
    assert "cut it short" in clone.control("error").read()
    assert clone.state == "restoring"
    with clone.backing.open("r+b") as file:
        file.seek(kept)
        file.write(GOOD[kept:])
    clone.wait("fractured")
    assert clone.control("condition").read() == "administratively-fractured"
    expected = GOOD[: 50 * EXTENT] + RUIN[:EXTENT] + GOOD[51 * EXTENT :]
    assert_same(group.source.read_bytes(), expected, "the Source")
    assert clone.delta() == {50}


def test_an_error_of_the_clones_device_is_the_hosts_where_it_needs_it(
    shared: Mount, cleanup: contextlib.ExitStack
) -> None:
    """The same with a block device that gives errors."""
    shared.expect_in_log("Input/output error")
    image = shared.work / "clone-image"
    image.write_bytes(bytes(SIZE))
    loop = attach(cleanup, image)
    group = shared.add_group(data=GOOD)
    clone = Clone(group, "nightly", loop.path)
    group.control("add_clone").write(f"nightly {loop.path}")
    cleanup.callback(lambda: group.control("remove_clone").write("nightly"))
    clone.wait("synchronized")
    clone.fracture()
    write(group.source, 0, RUIN)
    run("sync", clone.path)
    _cut(image, 40 * EXTENT)
    loop.forget_pages()
    clone.restore()
    wait_for(lambda: group.restore_status()["pending"] == 24, "for all that is there")
    with opened(group.source, os.O_RDONLY) as fd, pytest.raises(OSError) as failure:
        os.pread(fd, 10, 45 * EXTENT)
    assert failure.value.errno == errno.EIO
    assert_same(read(group.source, 0, 40 * EXTENT), GOOD[: 40 * EXTENT], "what is there")
    wait_for(lambda: clone.control("condition").read() == "faulted", "for it to say so")
    for extent in range(40, 64):
        write(group.source, extent * EXTENT, RUIN[:EXTENT])
    clone.wait("fractured")
    assert clone.delta() == set(range(40, 64))
    with contextlib.suppress(OSError), image.open("r+b") as file:
        file.truncate(SIZE)


def test_a_random_read_never_shows_anything_but_the_clone(
    shared: Mount, rng: random.Random
) -> None:
    """While the sweep runs through at its own speed."""
    group, clone = ruined(shared, extent=4 * KiB)
    clone.rate("8M")
    clone.restore()
    with opened(group.source, os.O_RDONLY) as fd:
        while clone.state == "restoring":
            offset = rng.randrange(SIZE)
            length = min(rng.choice((1, 4096, 100000, 1 * MiB)), SIZE - offset)
            found = os.pread(fd, length, offset)
            assert_same(found, GOOD[offset : offset + length], f"{offset}+{length}")
    assert clone.delta() == set()
