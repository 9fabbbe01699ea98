"""Reads through io_uring: what they bring, what they do when they cannot, and that nobody waits."""

import ctypes
import errno
import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from clonefs.errors import DeviceError
from clonefs.units import BackingUnit, backing, open_backing
from clonefs.units import ring as module
from clonefs.units.ring import ENTRIES, Ring, ring
from tests.mounts.faulty import FaultyDevice, faulty_device

SIZE = 8 << 20
DATA = random.Random(1).randbytes(SIZE)
F_SETPIPE_SZ, PAGE = 1031, 4096


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def fd(file: Path) -> Iterator[int]:
    number = os.open(file, os.O_RDONLY)
    yield number
    os.close(number)


@pytest.fixture
def unit(file: Path) -> Iterator[BackingUnit]:
    made = open_backing(file)
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    fcntl.fcntl(ends[1], F_SETPIPE_SZ, 1 << 20)
    yield ends
    for end in ends:
        os.close(end)


def here() -> Ring:
    found = ring(local=True)
    assert found is not None, "this kernel does not allow io_uring"
    return found


def not_cached(fd: int) -> None:
    """The look itself begins to read, and finds a page when the disk was quicker."""
    for _ in range(20):
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(fd, [bytearray(PAGE)], SIZE // 2, os.RWF_NOWAIT)
        except BlockingIOError:
            return
    pytest.fail("what is to be forgotten stays cached")


async def test_it_reads_what_is_cached_and_what_is_not(fd: int) -> None:
    for prepare in (not_cached, lambda fd: os.pread(fd, SIZE, 0)):
        prepare(fd)
        data = bytearray(SIZE - 512)
        assert await here().read(fd, 512, data)
        assert data == DATA[512:]


async def test_many_at_a_time(fd: int) -> None:
    not_cached(fd)
    wrong: list[int] = []

    async def reader(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            offset, length = rng.randrange(SIZE // 512) * 512, rng.choice([512, PAGE, 65536])
            length = min(length, SIZE - offset)
            data = bytearray(length)
            if not await here().read(fd, offset, data) or data != DATA[offset : offset + length]:
                wrong.append(offset)

    async with trio.open_nursery() as nursery:
        for seed in range(ENTRIES):
            nursery.start_soon(reader, seed)
    assert not wrong


async def test_what_it_cannot_read_is_not_read(fd: int, pipe: tuple[int, int]) -> None:
    assert not await here().read(fd, SIZE - 100, bytearray(PAGE))  # there is less
    with pytest.raises(OSError, match="Bad file descriptor"):
        await here().read(pipe[1], 0, bytearray(1))  # not open for reading
    os.write(pipe[1], b"there")
    assert not await here().read(pipe[0], 0, bytearray(PAGE))


async def test_nobody_waits_for_one_that_waits(fd: int, pipe: tuple[int, int]) -> None:
    """A full ring is said to be so; all come to an end, whatever the order."""
    ended: list[int] = []

    async def wait(number: int) -> None:
        data = bytearray(1)
        assert await here().read(pipe[0], 0xFFFF_FFFF_FFFF_FFFF, data)
        ended.append(data[0])

    async with trio.open_nursery() as nursery:
        for number in range(ENTRIES - 1):
            nursery.start_soon(wait, number)
        await trio.testing.wait_all_tasks_blocked()
        data = bytearray(PAGE)
        assert await here().read(fd, PAGE, data)
        assert data == DATA[PAGE : 2 * PAGE]
        nursery.start_soon(wait, ENTRIES)
        await trio.testing.wait_all_tasks_blocked()
        assert not await here().read(fd, PAGE, data)
        assert not ended
        os.write(pipe[1], bytes(range(256)))
    assert sorted(ended) == list(range(256))
    assert await here().read(fd, 0, data)


async def test_one_that_waits_is_not_given_up(pipe: tuple[int, int]) -> None:
    """The kernel still writes to its buffer."""
    data = bytearray(1)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                assert await here().read(pipe[0], 0xFFFF_FFFF_FFFF_FFFF, data)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            os.write(pipe[1], b"x")
    assert data == b"x"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.ENOMEM])
async def test_without_a_ring_threads_read(
    unit: BackingUnit, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*arguments: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "_call", refused)
    assert await unit.read(512, PAGE) == DATA[512 : 512 + PAGE]
    assert ring(local=True) is None
    assert ring(local=False) is None


async def test_a_unit_reads_through_it_what_is_small(
    unit: BackingUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    read = Ring.read

    async def seen(self: Ring, fd: int, offset: int, data: bytearray) -> bool:
        lengths.append(len(data))
        return await read(self, fd, offset, data)

    monkeypatch.setattr(Ring, "read", seen)
    for length in (PAGE, backing.RING_LARGEST, backing.RING_LARGEST + 512):
        assert await unit.read(0, length) == DATA[:length]
    assert lengths == [PAGE, backing.RING_LARGEST]


def _unit_on(device: FaultyDevice) -> BackingUnit:
    (device.behind / "file").write_bytes(DATA)
    return open_backing(device.path / "file")


async def test_who_never_answers_keeps_nobody_else_waiting(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit has only so many places in the ring."""

    def no_thread(*arguments: object) -> bytearray:
        raise AssertionError("read by a thread")

    monkeypatch.setattr(BackingUnit, "_read", no_thread)
    with faulty_device(tmp_path / "hangs") as bad, faulty_device(tmp_path / "answers") as good:
        hanging, answering, local = _unit_on(bad), _unit_on(good), open_backing(file)
        hang = bad.hang(bad.path / "file", "read")
        read: list[int] = []

        async def reader(offset: int) -> None:
            assert await hanging.read(offset, PAGE) == DATA[offset : offset + PAGE]
            read.append(offset)

        offsets = range(0, SIZE, SIZE // (2 * backing.THREADS))
        async with trio.open_nursery() as nursery:
            try:
                for offset in offsets:
                    nursery.start_soon(reader, offset)
                await trio.testing.wait_all_tasks_blocked()
                hang.wait_for_a_hang(backing.THREADS)
                assert await answering.read(512, PAGE) == DATA[512 : 512 + PAGE]
                assert await local.read(512, PAGE) == DATA[512 : 512 + PAGE]
                assert hang.hanging == backing.THREADS
                assert not read
            finally:
                bad.mend()
        assert sorted(read) == list(offsets)
        for unit in (hanging, answering, local):
            unit.close()


async def test_there_is_a_worker_for_each_read_that_may_hang() -> None:
    """What they read may be on a file system of which each read keeps one (this kernel has more than it
    says for FUSE, so that it cannot be shown by reads that hang)."""
    made = ring(local=False)
    assert made is not None
    workers = (ctypes.c_uint * 2)(0, 0)  # 0: only tell
    made.limit_workers(workers)
    assert workers[0] > ENTRIES


async def test_an_error_is_told_as_threads_tell_it(unit: BackingUnit) -> None:
    os.truncate(unit.name, SIZE // 2)
    with pytest.raises(DeviceError, match="cut it short"):
        await unit.read(SIZE - PAGE, PAGE)


async def test_what_the_kernel_does_not_take_is_not_waited_for(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = here()
    data = bytearray(PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_syscall", lambda *arguments: -1)
        assert not await made.read(fd, 0, data)
    assert await made.read(fd, PAGE, data)
    assert data == DATA[PAGE : 2 * PAGE]
