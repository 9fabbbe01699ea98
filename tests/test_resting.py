"""Pieces of live maps that rest: what they read as, how they wake, and that nothing is lost."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitarray import bitarray

from clonefs.errors import ClonefsError
from clonefs.extents import ExtentMap, extent_list, maps
from clonefs.volume import FileMedium, GroupRecord, MapSlot, MetadataVolume, Record, format_volume
from clonefs.volume.medium import PIECE

MiB = 1 << 20
EXTENTS = 3 * PIECE * 8 + 100  # three pieces and a bit


# A map over pieces -------------------------------------------------------------------------------


class Pieces:
    """Eight extents each; what is stored to those that rest is noticed."""

    size = 8

    def __init__(self, bits: bitarray) -> None:
        self.bits = bits
        self.resting: set[int] = set()
        self.woken = 0
        self.full = False

    def rest(self, piece: int) -> None:
        self.resting.add(piece)
        self.look()

    def wake(self, piece: int) -> None:
        self.look()
        if self.full:
            raise ClonefsError(5, "nothing wakes")
        self.resting.remove(piece)
        self.woken += 1

    def look(self) -> None:
        for piece in self.resting:
            assert not self.bits[8 * piece : 8 * piece + 8].any()


@pytest.mark.parametrize("short", [0, maps._SHORT])
def test_a_map_whose_pieces_rest_against_one_without(
    short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "_SHORT", short)
    rng = random.Random(1)
    bits = bitarray(56, endian="little")
    pieces = Pieces(bits)
    extents, plain, other = ExtentMap(bits, 50, pieces), ExtentMap.empty(50), ExtentMap.empty(50)
    rested = 0
    for _ in range(20_000):
        first = rng.randrange(50)
        stop = rng.randint(first + 1, min(50, first + rng.choice([1, 4, 50])))
        match rng.randrange(10):
            case 0 | 1:
                extents.mark(first, stop)
                plain.mark(first, stop)
            case 2 | 3 | 4 | 5:
                extents.clear(first, stop)
                plain.clear(first, stop)
            case 6:
                other.clear_all()
                other.mark(first, stop)
                extents.mark_from(other)
                plain.mark_from(other)
            case 7:
                other.clear_all()
                other.mark(first, stop)
                extents.fill_from(other.bits)
                plain.fill_from(other.bits)
            case 8:
                extents.begin_rest()
            case _:
                extents.end_rest(flushed=rng.random() < 0.8)
        pieces.look()
        rested += len(pieces.resting)
        assert extents.bits[:50] == plain.bits[:50]
        assert extents.count == plain.count == extents.bits.count()
        assert extents.next_set(first, 50) == plain.next_set(first, 50)
        assert extents.next_clear(first, 50) == plain.next_clear(first, 50)
        assert list(extents.runs()) == list(plain.runs())
    assert rested > 10_000
    assert pieces.woken > 500


def test_only_what_stays_clear_rests() -> None:
    bits = bitarray(32, endian="little")
    pieces = Pieces(bits)
    extents = ExtentMap(bits, 32, pieces)
    extents.mark(31, 32)
    assert extents.begin_rest()
    extents.mark(8, 9)
    extents.clear(8, 9)  # its page may be on disk as it was in between
    extents.end_rest(flushed=True)
    assert pieces.resting == {0, 2}
    assert extents.begin_rest()
    extents.end_rest(flushed=False)
    assert pieces.resting == {0, 2}
    extents.clear_all()
    assert extents.begin_rest()
    extents.end_rest(flushed=True)
    assert pieces.resting == {0, 1, 2, 3}
    assert not extents.begin_rest()


def test_what_cannot_wake_is_not_set() -> None:
    bits = bitarray(32, endian="little")
    pieces = Pieces(bits)
    extents = ExtentMap(bits, 32, pieces, range(4))
    pieces.rest(2)
    pieces.full = True
    for stop in (17, 20):
        with pytest.raises(ClonefsError, match="nothing wakes"):
            extents.mark(16, stop)
        assert not bits.any()
        assert extents.count == 0
    pieces.full = False
    extents.mark(16, 20)
    assert extents.count == bits.count() == 4


# The pages of a volume ---------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pages"
    path.write_bytes(bytes(2 * MiB) + b"\xff" * MiB)
    return path


@pytest.fixture
def medium(file: Path) -> Iterator[FileMedium]:
    made = FileMedium(os.open(file, os.O_RDWR), str(file))
    yield made
    made.close()


def locked() -> int:
    """Bytes that this process has locked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def test_pages_that_rest_take_no_memory_and_wake_as_the_files(
    file: Path, medium: FileMedium
) -> None:
    before = locked()
    medium.keep(0, 2 * MiB)
    assert locked() == before + 2 * MiB
    medium.view[MiB] = 7
    medium.flush_part(MiB, PIECE)
    medium.view[MiB] = 0
    medium.flush_part(MiB, PIECE)
    medium.rest(MiB, PIECE)
    assert locked() == before + 2 * MiB - PIECE
    assert not any(medium.view[MiB : MiB + PIECE])
    medium.flush()
    medium.wake(MiB, PIECE)
    assert locked() == before + 2 * MiB
    medium.view[MiB] = 9
    assert file.read_bytes()[: 2 * MiB] == bytes(MiB) + b"\x09" + bytes(MiB - 1)
    medium.view[MiB] = 0
    medium.rest(MiB, PIECE)
    medium.forget(MiB, 2 * PIECE)
    assert locked() == before + 2 * MiB - 2 * PIECE
    medium.view[MiB + PIECE - 1] = 5
    assert file.read_bytes()[MiB + PIECE - 1] == 5


def test_a_store_to_what_rests_ends_the_process(file: Path) -> None:
    script = (
        "import os, sys; from clonefs.volume import FileMedium\n"
        "medium = FileMedium(os.open(sys.argv[1], os.O_RDWR), 'pages')\n"
        "medium.rest(0, 65536)\n"
        "print(medium.view[0], flush=True)\n"
        "medium.view[0] = 1\n"
    )
    done = subprocess.run([sys.executable, "-c", script, file], stdout=subprocess.PIPE, check=False)
    assert done.stdout == b"0\n"
    assert done.returncode == -signal.SIGSEGV


# A volume ----------------------------------------------------------------------------------------


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    path = tmp_path / "meta"
    format_volume(path, size=16 * MiB, force=False)
    return path


def opened(meta: Path) -> MetadataVolume:
    return MetadataVolume(FileMedium(os.open(meta, os.O_RDWR), str(meta)), "boot")


def closed_with(meta: Path, *extents: int) -> MapSlot:
    """Close a volume in order that has a group with these in a live map."""
    volume = opened(meta)
    protected = volume.new_map_slot(EXTENTS)
    durable = volume.new_durable_slot(EXTENTS, beside=(protected,))
    group = GroupRecord("g", "/source", EXTENTS * 4096, 4096, protected, durable)
    volume.clear_durably(durable)
    volume.commit(Record(clean=False, groups=(group,)))
    for extent in extents:
        volume.map(protected, EXTENTS).mark(extent, extent + 1)
    volume.close(clean=True)
    return protected


def test_what_is_clear_rests_after_the_volume_was_closed(meta: Path) -> None:
    last = EXTENTS - 1
    slot = closed_with(meta, 5, last)
    before = locked()
    volume = opened(meta)
    extents = volume.map(slot, EXTENTS)
    assert locked() - before < 2 * PIECE
    assert extent_list(extents) == f"5,{last}"
    middle = PIECE * 8 + 3
    extents.mark(middle, middle + 1)
    assert locked() - before < 3 * PIECE
    volume.close(clean=False)  # as if it had been killed
    volume = opened(meta)
    assert extent_list(volume.map(slot, EXTENTS)) == f"5,{middle},{last}"
    volume.close(clean=True)
    volume = opened(meta)
    assert not volume.overwritten
    assert extent_list(volume.map(slot, EXTENTS)) == f"5,{middle},{last}"
    volume.close(clean=True)


def test_nothing_rests_at_once_after_a_death(meta: Path) -> None:
    slot = closed_with(meta, 5)
    volume = opened(meta)
    volume.commit(volume.opened())
    volume.close(clean=False)
    before = locked()
    volume = opened(meta)
    extents = volume.map(slot, EXTENTS)
    assert locked() - before == slot.length
    assert extents.begin_rest()
    volume.flush_map(slot)
    extents.end_rest(flushed=True)
    assert locked() - before == PIECE
    volume.close(clean=False)


def test_a_slot_that_rested_is_used_again(meta: Path) -> None:
    """By a map and by durable maps that begin in the middle of its pieces."""
    slot = closed_with(meta)
    volume = opened(meta)
    volume.map(slot, EXTENTS)
    volume.commit(Record(clean=False))
    durable = volume.new_durable_slot(1000)
    volume.clear_durably(durable)
    volume.write_durably(durable.offset, b"d" * 512)
    again = volume.new_map_slot(EXTENTS, beside=(durable,))
    assert durable.offset == slot.offset
    assert again.offset < slot.offset + slot.length
    extents = volume.map(again, EXTENTS)
    assert not extents.count
    extents.mark_all()
    volume.close(clean=False)
    data = meta.read_bytes()
    assert data[durable.offset :][:512] == b"d" * 512
    assert data[again.offset :][: EXTENTS // 8] == b"\xff" * (EXTENTS // 8)


def test_what_cannot_be_woken_breaks_the_volume(
    meta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = closed_with(meta)
    volume = opened(meta)
    extents = volume.map(slot, EXTENTS)
    original = os.pwritev

    def refused(fd: int, data: tuple[bytes, ...], offset: int, flags: int = 0) -> int:
        if not flags:
            raise OSError(28, os.strerror(28))
        return original(fd, data, offset, flags)

    monkeypatch.setattr(os, "pwritev", refused)
    with pytest.raises(ClonefsError, match="cannot be written"):
        extents.mark(7, 8)
    assert not extents.count
    assert volume.broken is not None
    volume.close(clean=False)
