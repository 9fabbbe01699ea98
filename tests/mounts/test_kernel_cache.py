"""No read returns data older than the last command or write that has returned.

Whoever reads through the mount sees it at once, with a descriptor as old as may be. A loop device
has a page cache of its own above the mount, which the mount cannot reach: with direct I/O on the
device it is passed by, and otherwise it has to be told to forget (`blockdev --flushbufs`).
"""

import contextlib
import itertools
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clonefs.volume import format_volume
from tests.mounts.faulty import FaultyDevice
from tests.mounts.load import Host, Reader
from tests.mounts.mount import (
    DEADLINE_S,
    EXTENT,
    Clone,
    Group,
    Loop,
    MiB,
    Mount,
    assert_same,
    attach,
    mounted,
    noise,
    opened,
    read,
    wait_for,
    write,
)

SIZE = 4 * MiB
GOOD, RUIN = noise("good", SIZE), noise("ruin", SIZE)

Read = Callable[[int, int], bytes]


@pytest.fixture(scope="module")
def _cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with mounted(tmp_path_factory.mktemp("cached") / "work", options="cached") as mount:
        yield mount


@pytest.fixture
def cached(_cached: Mount) -> Mount:
    """A mount of the module with the mount option `cached`."""
    _cached.start_if_dead()
    return _cached


@pytest.fixture(params=["", "cached"])
def either(request: pytest.FixtureRequest) -> Mount:
    """A mount without and one with the mount option `cached`."""
    found: Mount = request.getfixturevalue("cached" if request.param else "shared")
    return found


def ruined(mount: Mount) -> tuple[Group, Clone]:
    """A group whose clone is GOOD and whose Source is RUIN, in every extent."""
    group = mount.add_group(data=GOOD)
    clone = group.add_fractured()
    write(group.source, 0, RUIN)
    clone.rate(1)
    return group, clone


def to_the_end(clone: Clone) -> None:
    clone.rate("max")
    clone.wait("fractured")


def _aligned_read(fd: int, offset: int, length: int) -> bytes:
    """Read past the page cache; offset and length are multiples of the sector size."""
    with mmap.mmap(-1, length) as buffer:
        done = os.preadv(fd, [buffer], offset)
        return buffer[:done]


# Readers of the Source, and what makes each of them.


def _old_descriptor(path: Path, cleanup: contextlib.ExitStack) -> Read:
    fd = cleanup.enter_context(opened(path, os.O_RDONLY))
    return lambda offset, length: os.pread(fd, length, offset)


def _old_direct_descriptor(path: Path, cleanup: contextlib.ExitStack) -> Read:
    fd = cleanup.enter_context(opened(path, os.O_RDONLY | os.O_DIRECT))
    return lambda offset, length: _aligned_read(fd, offset, length)


def _another_process(path: Path, cleanup: contextlib.ExitStack) -> Read:
    reader = Reader(path)
    cleanup.callback(reader.close)
    return reader.read


def _loop(
    path: Path, cleanup: contextlib.ExitStack, *, direct: bool, flags: int
) -> tuple[Loop, int]:
    loop = attach(cleanup, path, direct=direct, read_only=True)
    return loop, cleanup.enter_context(opened(loop.path, os.O_RDONLY | flags))


def _direct_loop(path: Path, cleanup: contextlib.ExitStack) -> Read:
    _, fd = _loop(path, cleanup, direct=True, flags=os.O_DIRECT)
    return lambda offset, length: _aligned_read(fd, offset, length)


def _buffered_loop_read_directly(path: Path, cleanup: contextlib.ExitStack) -> Read:
    _, fd = _loop(path, cleanup, direct=False, flags=os.O_DIRECT)
    return lambda offset, length: _aligned_read(fd, offset, length)


def _loop_told_to_forget(path: Path, cleanup: contextlib.ExitStack) -> Read:
    loop, fd = _loop(path, cleanup, direct=False, flags=0)

    def read_again(offset: int, length: int) -> bytes:
        loop.forget_pages()
        return os.pread(fd, length, offset)

    return read_again


READERS = [
    _old_descriptor,
    _old_direct_descriptor,
    _another_process,
    _direct_loop,
    _buffered_loop_read_directly,
    _loop_told_to_forget,
]


@pytest.mark.parametrize("reader", READERS)
def test_the_source_after_writes_and_a_restore(
    either: Mount,
    cleanup: contextlib.ExitStack,
    reader: Callable[[Path, contextlib.ExitStack], Read],
) -> None:
    group, clone = ruined(either)
    look = reader(group.source, cleanup)
    assert_same(look(0, SIZE), RUIN, "before")
    write(group.source, 8192, GOOD[:4096])
    assert_same(look(8192, 4096), GOOD[:4096], "after a write")
    clone.restore()
    assert_same(look(SIZE - 8192, 8192), GOOD[-8192:], "the end, at once")
    write(group.source, 8192, RUIN[:4096])
    assert clone.state == "restoring"
    assert_same(look(0, 16384), GOOD[:8192] + RUIN[:4096] + GOOD[12288:16384], "after a write")
    clone.restore()
    assert_same(look(0, 16384), GOOD[:16384], "after the restore has begun again")
    write(group.source, 8192, RUIN[:4096])
    expected = GOOD[:8192] + RUIN[:4096] + GOOD[12288:]
    assert_same(look(0, SIZE), expected, "all of it")
    to_the_end(clone)
    assert_same(look(0, SIZE), expected, "at the end")


@pytest.mark.parametrize("reader", READERS)
def test_a_clone_while_it_is_mirrored_and_after(
    either: Mount,
    cleanup: contextlib.ExitStack,
    reader: Callable[[Path, contextlib.ExitStack], Read],
) -> None:
    group = either.add_group(data=GOOD)
    clone = group.add_fractured()
    look = reader(clone.path, cleanup)
    assert_same(look(0, SIZE), GOOD, "fractured")
    write(clone.path, 4096, RUIN[:4096])
    assert_same(look(0, 8192), GOOD[:4096] + RUIN[:4096], "after a write of its own")
    write(group.source, 0, RUIN)
    clone.sync()
    clone.wait("synchronized")
    assert_same(look(0, SIZE), RUIN, "synchronized")
    for extent in range(0, 64, 5):
        write(group.source, extent * EXTENT + 4096, GOOD[:4096])
        assert_same(look(extent * EXTENT + 4096, 4096), GOOD[:4096], "after a mirrored write")
    clone.fracture()
    expected = group.source.read_bytes()
    write(group.source, 0, GOOD)
    assert_same(look(0, SIZE), expected, "fractured again")


def test_breaking_a_restore_off_shows_what_the_source_has_again(
    either: Mount, cleanup: contextlib.ExitStack
) -> None:
    """What was copied stays; nothing else of the clone is to be seen."""
    group, clone = ruined(either)
    look = _old_descriptor(group.source, cleanup)
    clone.restore()
    assert_same(look(10 * EXTENT, EXTENT), GOOD[10 * EXTENT : 11 * EXTENT], "read")
    clone.fracture("force")
    copied = set(range(64)) - clone.delta()
    expected = b"".join(
        (GOOD if extent in copied else RUIN)[extent * EXTENT : (extent + 1) * EXTENT]
        for extent in range(64)
    )
    assert_same(look(0, SIZE), expected, "part old, part clone")


def test_a_file_that_was_truncated_by_another_is_as_long_as_ever(either: Mount) -> None:
    """O_TRUNC makes the kernel believe for a moment that the file is empty."""
    group = either.add_group(data=GOOD)
    reader = Reader(group.source)
    try:
        for number in range(20):
            with opened(group.source, os.O_WRONLY | os.O_TRUNC) as fd:
                os.pwrite(fd, b"%08d" % number, 0)
                assert reader.read(0, 8) == b"%08d" % number
                assert_same(reader.read(SIZE - 100, 200), GOOD[-100:], "the end")
                assert group.source.stat().st_size == SIZE
    finally:
        reader.close()


def test_a_group_that_comes_again_by_the_same_name_is_another_file(either: Mount) -> None:
    """What the kernel has cached of the first must not show in the second."""
    group = either.add_group(data=GOOD)
    assert_same(group.source.read_bytes(), GOOD, "the first")
    either.control("remove_group").write(group.name)
    other = either.work / f"{group.name}-other.img"
    other.write_bytes(RUIN)
    either.control("add_group").write(f"{group.name} {other}")
    assert_same(group.source.read_bytes(), RUIN, "the second")


# Mappings ----------------------------------------------------------------------------------------


def test_a_shared_mapping_shows_the_clone_after_a_restore(cached: Mount) -> None:
    group, clone = ruined(cached)
    with (
        opened(group.source, os.O_RDWR) as fd,
        mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as pages,
    ):
        assert_same(pages[:], RUIN, "before")
        write(group.source, 70000, b"written")
        assert pages[70000:70007] == b"written"
        clone.restore()
        assert pages[SIZE - 100 :] == GOOD[-100:]
        assert_same(pages[:], GOOD, "after the restore")
        write(group.source, 70000, b"written")
        assert pages[70000:70007] == b"written"
        to_the_end(clone)
        assert_same(pages[:], GOOD[:70000] + b"written" + GOOD[70007:], "at the end")
        assert clone.delta() == {1}


def test_what_is_stored_to_a_mapping_during_a_restore_stays(cached: Mount) -> None:
    group, clone = ruined(cached)
    with opened(group.source, os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as pages:
        clone.restore()
        pages[5 * EXTENT + 10 : 5 * EXTENT + 16] = b"stored"
        pages.flush()
        os.fsync(fd)
        assert 5 in group.protected()
        assert read(group.source, 5 * EXTENT + 10, 6) == b"stored"
        to_the_end(clone)
        expected = GOOD[: 5 * EXTENT + 10] + b"stored" + GOOD[5 * EXTENT + 16 :]
        assert_same(pages[:], expected, "the mapping")
    assert_same(group.source.read_bytes(), expected, "the Source")
    assert_same(group.backing.read_bytes(), expected, "its backing")
    assert clone.delta() == {5}
    assert_same(clone.path.read_bytes(), GOOD, "the clone")


def test_a_clone_of_a_mapped_source_has_what_was_flushed(cached: Mount) -> None:
    group = cached.add_group(data=GOOD)
    clone = group.add_clone()
    with opened(group.source, os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as pages:
        pages[:4096] = RUIN[:4096]
        pages.flush()
        clone.fracture()
        pages[4096:8192] = RUIN[:4096]
        pages.flush()
    assert_same(read(clone.path, 0, 8192), RUIN[:4096] + GOOD[4096:8192], "the clone")
    assert_same(read(group.source, 0, 8192), RUIN[:4096] + RUIN[:4096], "the Source")


# Pages that stay -----------------------------------------------------------------------------------


def _reads(group: Group) -> int:
    status = json.loads(group.mount.control("status.json").read())
    reads: int = status["groups"][group.name]["host_io"]["reads"]
    return reads


def test_what_is_cached_stays_cached_when_hosts_write_elsewhere(cached: Mount) -> None:
    """The kernel drops all pages of a file when it sees another time of modification."""
    group = cached.add_group(data=GOOD)
    with opened(group.source, os.O_RDWR) as fd:
        assert_same(os.pread(fd, SIZE, 0), GOOD, "all of it")
        before, modified = _reads(group), os.fstat(fd).st_mtime_ns
        for at in range(0, 4 * EXTENT, EXTENT):
            os.pwrite(fd, RUIN[at : at + 4096], at)
            assert os.pread(fd, 4096, at + 4096) == GOOD[at + 4096 : at + 8192]
        assert _reads(group) == before
        assert os.fstat(fd).st_mtime_ns == modified
        with opened(group.source, os.O_RDONLY) as other:
            assert os.pread(other, 4096, SIZE - 4096) == GOOD[-4096:]
        assert _reads(group) == before
    wait_for(lambda: group.source.stat().st_mtime_ns > modified, "for the time of the last write")


def _requests(mount: Mount) -> int:
    """How many times the daemon has read something, requests for the most part."""
    assert mount.process is not None
    counted = Path(f"/proc/{mount.process.pid}/io").read_text()
    return int(dict(line.split(": ") for line in counted.splitlines())["syscr"])


def test_the_kernel_does_not_ask_before_it_reads_what_it_has(cached: Mount) -> None:
    """Not even whether the file has changed, but once in a while."""
    group = cached.add_group(data=GOOD)
    with opened(group.source, os.O_RDONLY) as fd:
        assert_same(os.pread(fd, SIZE, 0), GOOD, "all of it")
        before = _requests(cached)
        for at in range(0, SIZE, 4096):
            os.pread(fd, 4096, at)
        assert _requests(cached) - before < SIZE // 4096 // 4


def test_a_write_that_waits_while_a_restore_takes_effect_is_seen_when_it_is_done(
    tmp_path: Path, device: FaultyDevice
) -> None:
    """Its page is dropped with the others, and read again before it has been written."""
    mount = Mount(tmp_path / "work", "cached")
    mount.meta = device.path / "mapped-volume"
    format_volume(device.behind / mount.meta.name, size=4 * MiB, force=False)
    mount.start()
    with contextlib.ExitStack() as stack:
        stack.callback(mount.close)
        stack.callback(device.mend)
        backing = device.path / "source.img"
        backing.write_bytes(GOOD)
        mount.control("add_group").write(f"g {backing}")
        group = Group(mount, "g", backing)
        clone = group.add_fractured()
        write(group.source, 0, RUIN)
        clone.rate(1)
        fd = stack.enter_context(opened(group.source, os.O_RDWR))
        commit = device.hang(mount.meta, "write")
        restore = _thread(clone.restore)
        commit.wait_for_a_hang()
        on_disk = device.hang(backing, "write")
        writer = _thread(lambda: os.pwrite(fd, b"W" * 4096, 4096))
        wait_for(lambda: "request" in _where_it_waits(writer), "for the write to be under way")
        commit.mend()
        restore.join()
        assert writer.is_alive()
        seen: list[bytes] = []
        reader = _thread(lambda: seen.append(os.pread(fd, 4096, 4096)))
        reader.join(DEADLINE_S)
        assert seen == [GOOD[4096:8192]]
        on_disk.mend()
        writer.join()
        assert os.pread(fd, 4096, 4096) == b"W" * 4096
        assert read(group.source, 4096, 4096) == b"W" * 4096


def _thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _where_it_waits(thread: threading.Thread) -> str:
    return Path(f"/proc/self/task/{thread.native_id}/wchan").read_text()


def test_what_was_shown_of_the_clone_is_gone_when_a_restore_is_broken_off(cached: Mount) -> None:
    """Not all that was read has been copied: copies for reads have a small share of the time."""
    size = 128 * MiB
    group = cached.add_group(data=b"G" * size)
    clone = group.add_fractured()
    with (
        opened(group.source, os.O_RDWR) as fd,
        opened(group.source, os.O_RDONLY | os.O_DIRECT) as direct,
    ):
        os.pwrite(fd, b"R" * size, 0)
        clone.rate(1)
        clone.restore()
        assert_same(os.pread(fd, size, 0), b"G" * size, "in the restore")
        assert group.restore_status()["pending"] > 0
        clone.fracture("force")
        there = mmap.mmap(-1, size)
        assert os.preadv(direct, [there], 0) == size
        assert_same(os.pread(fd, size, 0), there[:], "broken off")


# Several at once ---------------------------------------------------------------------------------


def test_several_processes_see_their_own_writes_during_a_sync_and_a_restore(
    cached: Mount, cleanup: contextlib.ExitStack, rng_seed: str
) -> None:
    """Without `cached` the tests of clones and of the restore do the same."""
    group, clone = ruined(cached)
    good = cached.work / "good"
    good.write_bytes(GOOD)
    borders = [0, 1 * MiB, 2 * MiB + 100, 3 * MiB - 4096, SIZE]
    hosts = [
        Host(group.source, start, stop, f"{rng_seed} {start}", good)
        for start, stop in itertools.pairwise(borders)
    ]
    for host in hosts:
        cleanup.callback(host.close)
    other = group.add_fractured("weekly")
    clone.rate("4M")
    clone.restore()
    for host in hosts:
        host.go()
    other.sync()
    to_the_end(clone)
    other.wait("synchronized")
    other.fracture()
    data = b"".join(host.end() for host in hosts)
    assert_same(group.source.read_bytes(), data, "the Source")
    assert_same(group.backing.read_bytes(), data, "its backing")
    assert_same(clone.path.read_bytes(), GOOD, "the clone")
