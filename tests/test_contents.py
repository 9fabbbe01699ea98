"""What an open control file shows: extent lists piece by piece, and the log of events."""

import random
from functools import partial

import trio
from bitarray import bitarray

from clonefs.extents import ExtentMap, extent_list
from clonefs.fuse.contents import EventLog, EventReader, Pieces, cpulist, snapshot


def some_map(seed: int, extents: int, share: float) -> bitarray:
    rng = random.Random(seed)
    bits = bitarray(-(-extents // 64) * 64, endian="little")
    at = 0
    while at < extents:
        length = rng.randint(1, 9)
        if rng.random() < share:
            bits[at : min(at + length, extents)] = 1
        at += length
    return bits


def expected(bits: bitarray, extents: int) -> bytes:
    return f"{extent_list(ExtentMap(bits, extents))}\n".encode()


def list_of(bits: bitarray, extents: int) -> Pieces:
    return Pieces(partial(cpulist, bits, extents))


async def read_all(text: Pieces, size: int) -> bytes:
    found = b""
    while piece := await text.read(len(found), size):
        assert len(piece) <= size
        found += piece
    return found


async def test_an_extent_list_is_the_same_in_pieces_of_any_size() -> None:
    for seed in range(30):
        extents = random.Random(seed).choice([1, 63, 64, 65, 1000, 20000])
        bits = some_map(seed, extents, random.Random(seed).choice([0.0, 0.01, 0.5, 1.0]))
        for size in (1, 7, 4096, 1 << 20):
            if size > 1 or extents < 2000:
                found = await read_all(list_of(bits, extents), size)
                assert found == expected(bits, extents), (seed, size)


async def test_an_extent_list_is_read_from_any_offset_and_by_several_at_once() -> None:
    bits = some_map(1, 50000, 0.5)
    text, whole = list_of(bits, 50000), expected(bits, 50000)
    rng = random.Random(2)

    async def look() -> None:
        for _ in range(20):
            offset = rng.randrange(len(whole) + 100)
            assert await text.read(offset, 5000) == whole[offset : offset + 5000]

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(look)


async def test_long_gaps_and_long_runs() -> None:
    extents = 3 << 24
    bits = bitarray(extents, endian="little")
    for first, stop in (
        (0, 1),
        (5, 1 << 24),
        ((1 << 24) + 1, (2 << 24) + 7),
        (extents - 1, extents),
    ):
        bits[first:stop] = 1
    found = await read_all(list_of(bits, extents), 1 << 16)
    assert found == expected(bits, extents)


async def test_others_go_on_while_an_extent_list_is_written() -> None:
    bits = bitarray(1 << 20, endian="little")
    bits[::2] = 1
    steps = 0

    async def count() -> None:
        nonlocal steps
        while True:
            steps += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await list_of(bits, len(bits)).read(0, 1 << 20)
        nursery.cancel_scope.cancel()
    assert steps > 200


async def test_a_snapshot_is_a_copy() -> None:
    for length in (8, 1000, (1 << 20) + 1, 1 << 22):
        bits = bitarray(length, endian="little")
        bits[::3] = 1
        copy = await snapshot(bits)
        before = bits.copy()
        bits.setall(1)
        assert copy[:length] == before
        assert not copy[length:].any()


# The log


def lines(first: int, stop: int) -> list[str]:
    return [f"{number:09}" for number in range(first, stop)]


def log_of(count: int, kept: int = 1000) -> EventLog:
    log = EventLog(kept)
    for line in lines(0, count):
        log.append(line)
    return log


async def everything(reader: EventReader, size: int = 64, offset: int = 0) -> list[str]:
    found = b""
    while piece := await reader.read(offset + len(found), size):
        found += piece
    return found.decode().splitlines()


async def test_the_log_keeps_the_last_lines_and_its_size_only_grows() -> None:
    log = log_of(100_000)
    assert log.end == 1_000_000
    assert log.start % 10 == 0
    assert 1000 <= log.end - log.start <= 2010
    assert await everything(EventReader(log)) == lines(log.start // 10, 100_000)


async def test_a_reader_that_follows_gets_every_line_once() -> None:
    log = log_of(150)
    reader = EventReader(log)
    found = await everything(reader)
    assert found == lines(0, 150)
    at = 1500
    for number in range(150, 2000):
        log.append(f"{number:09}")
        assert log.end > at
        if number % 50 == 0:
            more = await everything(reader, offset=at)
            found += more
            at += 10 * len(more)
    found += await everything(reader, offset=at)
    assert found == lines(0, 2000)


async def test_a_reader_that_begins_after_lines_were_dropped_follows_too() -> None:
    log = log_of(1000)
    reader = EventReader(log)
    found = await everything(reader)
    assert found == lines(log.start // 10, 1000)
    log.append("new")
    assert await everything(reader, offset=10 * len(found)) == ["new"]


async def test_a_reader_that_was_too_slow_goes_on_with_what_is_there() -> None:
    log = log_of(100)
    reader = EventReader(log)
    assert await reader.read(0, 500) == "".join(f"{line}\n" for line in lines(0, 50)).encode()
    for line in lines(100, 1000):
        log.append(line)
    assert await everything(reader, offset=500) == lines(log.start // 10, 1000)


async def test_who_comes_from_the_end_finds_the_last_lines_and_empty_ones_before() -> None:
    log = log_of(1000)
    reader = EventReader(log)
    assert await reader.read(log.end - 20, 100) == b"000000998\n000000999\n"
    piece = await reader.read(log.start - 100, 110)
    assert piece == b"\n" * 100
    assert await reader.read(log.start, 10) == f"{log.start // 10:09}\n".encode()
