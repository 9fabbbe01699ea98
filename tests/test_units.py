"""Backings: files and block devices, holes, locks, errors."""

import errno
import fcntl
import math
import os
import random
from pathlib import Path

import pytest

from clonefs.errors import ClonefsError, DeviceError
from clonefs.units import BackingUnit, MissingUnit, open_backing
from clonefs.units.backing import InlineWrites

MIB = 1 << 20


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def held(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture
def units(tmp_path: Path) -> "list[BackingUnit]":
    return [open_backing(tmp_path / name, create_size=8 * MIB) for name in ("one", "two")]


async def test_what_is_written_is_read(
    units: list[BackingUnit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InlineWrites, "SLOW", math.inf)  # whatever else the machine does
    unit = units[0]
    data = pattern(MIB + 512)
    await unit.write(512, data)
    assert await unit.read(512, len(data)) == data
    assert unit.write_now(0, data[:512])
    found = unit.read_now(0, 512)
    assert found is None or found == data[:512]
    await unit.flush()


async def test_a_created_backing_is_sparse_and_discarded_with_its_command(tmp_path: Path) -> None:
    path = tmp_path / "new"
    unit = open_backing(path, create_size=1 << 40)
    assert (path.stat().st_size, held(path), unit.allocated()) == (1 << 40, 0, 0)
    unit.discard()
    assert not path.exists()
    path.write_bytes(bytes(4096))
    open_backing(path, create_size=4096).discard()
    assert path.exists()


async def test_holes_stay_holes(units: list[BackingUnit], tmp_path: Path) -> None:
    one, two = units
    await one.write(3 * MIB, pattern(MIB))
    await two.write(0, pattern(8 * MIB, 2))
    await two.copy_from(one, [(0, 8 * MIB)], share=True)
    assert await two.read(0, 8 * MIB) == bytes(3 * MIB) + pattern(MIB) + bytes(4 * MIB)
    await two.flush()
    assert held(tmp_path / "two") <= MIB + 65536
    assert await one.data_from(0) == 3 * MIB
    assert await one.data_from(4 * MIB) == 8 * MIB


async def test_a_copy_touches_nothing_else(units: list[BackingUnit]) -> None:
    one, two = units
    await one.write(0, pattern(8 * MIB))
    await two.write(0, pattern(8 * MIB, 2))
    await two.copy_from(one, [(MIB + 512, 512 * 7)], share=True)
    expected = bytearray(pattern(8 * MIB, 2))
    expected[MIB + 512 : MIB + 512 * 8] = pattern(8 * MIB)[MIB + 512 : MIB + 512 * 8]
    assert await two.read(0, 8 * MIB) == expected


async def test_a_copy_without_copy_file_range(
    units: list[BackingUnit], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> int:
        raise OSError(errno.EXDEV, "other file systems")

    monkeypatch.setattr(os, "copy_file_range", refused)
    one, two = units
    await one.write(MIB, pattern(3 * MIB))
    await two.copy_from(one, [(0, 8 * MIB)], share=True)
    assert await two.read(0, 8 * MIB) == await one.read(0, 8 * MIB)


async def test_a_backing_that_was_cut_short_is_no_hole(units: list[BackingUnit]) -> None:
    one, two = units
    await one.write(0, pattern(8 * MIB))
    await two.write(0, pattern(8 * MIB, 2))
    os.truncate(one.name, 2 * MIB)
    with pytest.raises(DeviceError, match="cut it short") as caught:
        await two.copy_from(one, [(4 * MIB, MIB)], share=True)
    assert caught.value.unit == one.name
    with pytest.raises(DeviceError, match="cut it short"):
        await one.read(4 * MIB, 512)
    assert await two.read(0, 8 * MIB) == pattern(8 * MIB, 2)


async def test_a_failed_flush_stays_failed(
    units: list[BackingUnit], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        with pytest.raises(DeviceError, match="flushing"):
            await units[0].flush()
    with pytest.raises(DeviceError, match="flushing"):
        await units[0].flush()
    await units[1].flush()


async def test_whose_error_it_is(units: list[BackingUnit], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = units
    await one.write(0, pattern(MIB))
    original = os.preadv

    def bad_reads(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        if fd == one.fd:
            raise OSError(errno.EIO, "Input/output error")
        return original(fd, buffers, offset, flags)  # type: ignore[arg-type]

    def refused(*args: object) -> int:
        raise OSError(errno.EIO, "one of the two")

    monkeypatch.setattr(os, "copy_file_range", refused)
    monkeypatch.setattr(os, "preadv", bad_reads)
    with pytest.raises(DeviceError) as caught:
        await two.copy_from(one, [(0, MIB)], share=True)
    assert (caught.value.unit, caught.value.errno) == (one.name, errno.EIO)


def test_locks(tmp_path: Path, units: list[BackingUnit]) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one")
    hard = tmp_path / "hard"
    hard.hardlink_to(tmp_path / "one")
    for path in (tmp_path / "one", link, hard):
        with pytest.raises(ClonefsError, match="in use") as caught:
            open_backing(path)
        assert caught.value.errno == errno.EBUSY
    units[0].close()
    open_backing(hard).close()


def test_a_lock_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(ClonefsError, match="in use"):
            open_backing(path)


def test_what_is_no_backing(tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(b"x" * 513)
    empty = tmp_path / "empty"
    empty.touch()
    for path, number in (
        (tmp_path, errno.EINVAL),
        (Path("/dev/null"), errno.EINVAL),
        (odd, errno.EINVAL),
        (empty, errno.EINVAL),
        (tmp_path / "nothing", errno.ENOENT),
    ):
        with pytest.raises(ClonefsError) as caught:
            open_backing(path)
        assert caught.value.errno == number
    with pytest.raises(ClonefsError, match="at least") as caught:
        open_backing(odd, size=1024)
    with pytest.raises(ClonefsError, match="directory does not exist"):
        open_backing(tmp_path / "no" / "where", create_size=512)


async def test_a_missing_unit_fails_with_its_reason() -> None:
    unit = MissingUnit("/gone", 512, "/gone does not exist")
    for call in (unit.read(0, 1), unit.write(0, b"x"), unit.flush(), unit.data_from(0)):
        with pytest.raises(DeviceError, match="does not exist"):
            await call


def test_slow_writes_go_to_threads_for_a_while(
    units: list[BackingUnit], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("clonefs.units.backing.time.monotonic", lambda: now)
    inline = units[0]._inline
    assert inline.allowed(4096)
    assert not inline.allowed(inline.LARGEST + 1)
    inline.took(inline.SLOW * 2)
    assert not inline.allowed(4096)
    now += inline.PENALTY
    assert inline.allowed(4096)
    inline.took(inline.SLOW * 2)
    now += inline.PENALTY / 2
    inline.took(inline.SLOW * 2)  # in a thread by now
    now += inline.PENALTY / 2
    assert not inline.allowed(4096)
    now += inline.PENALTY / 2
    assert inline.allowed(4096)
    assert not InlineWrites(possible=False).allowed(512)
