"""Durable maps: what recovery fills the live maps from when the page cache is gone.

A durable map lies in sectors of 512 bytes, each with a checksum, a generation and the number of the
restore that it belongs to, once or in two copies. A sector is written whole or not at all (an
assumption that docs/crash-safety.md states), and is on stable storage before anybody relies on it.

Invariants: a bit that `covers` vouches for is on stable storage; a bit that is set in memory and
not yet there belongs to a sector in `unwritten` or `writing`, and to a run that is remembered with the
sector; what a sector is going to have besides does not take away what it has, for it is written whole or
not at all. Copies are written one after the other.
"""

import mmap
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from bitarray import bitarray

from clonefs.volume.layout import (
    DURABLE_MAPS,
    DURABLE_SECTOR,
    EXTENTS_PER_DURABLE_SECTOR,
    DamagedError,
)
from clonefs.volume.record import GroupRecord, MapSlot

PERSISTENT_DELTA_MAP = 1
PERSISTENT_PROTECTED_RESTORE_MAP = 2

_HEADER = struct.Struct("<IBBHQII8s")
_LARGE = 1 << 20  # extents
SECTORS_AT_ONCE = 1024  # that are packed in one step: about ten milliseconds
_NEVER_WRITTEN = bytes(DURABLE_SECTOR)
_LOADED_AT_ONCE = 2048  # sectors: a mebibyte
_ALL_NEVER_WRITTEN = bytes(_LOADED_AT_ONCE * DURABLE_SECTOR)
_NO_BITS = bytes(DURABLE_SECTOR - _HEADER.size)

assert _HEADER.size == 32

Read = Callable[[int, int], bytes]
Write = Callable[[int, bytes], None]


@dataclass(frozen=True, slots=True)
class Batch:
    """Runs of sectors to be written in this order, as (byte offset, bytes)."""

    writes: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Sector:
    """What a sector says that is not damaged. Generation 0: it has never been written."""

    generation: int
    epoch: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Which sector of which copy of which map of which volume: no sector passes for another."""

    kind: int
    uuid: bytes
    copy: int
    sector: int


_RunsBySector = dict[int, list[tuple[int, int]]]

_EMPTY = Sector(0, 0, _NO_BITS)


def unpack_sector(place: Place, data: bytes) -> Sector:
    """Raises DamagedError for what is damaged, or of another place."""
    if data == _NEVER_WRITTEN:
        return _EMPTY
    if len(data) < DURABLE_SECTOR:
        raise DamagedError("it lies beyond the end of the volume")
    checksum, kind, copy, _, generation, sector, epoch, uuid = _HEADER.unpack_from(data)
    if checksum != zlib.crc32(data[4:]):
        raise DamagedError("its checksum is wrong")
    if (kind, uuid, copy, sector) != (place.kind, place.uuid[:8], place.copy, place.sector):
        raise DamagedError("it belongs to another place, or to another volume")
    return Sector(generation, epoch, data[_HEADER.size :])


def pack_sector(place: Place, sector: Sector) -> bytes:
    """The bytes that `unpack_sector` reads again."""
    header = _HEADER.pack(
        0,
        place.kind,
        place.copy,
        0,
        sector.generation,
        place.sector,
        sector.epoch,
        place.uuid[:8],
    )
    data = header[4:] + sector.payload.ljust(DURABLE_SECTOR - _HEADER.size, b"\0")
    return struct.pack("<I", zlib.crc32(data)) + data


def starts_of_maps(slot: MapSlot) -> tuple[int, int, int]:
    """The bytes at which the PDM and the two copies of the PPRM begin."""
    length = slot.length // DURABLE_MAPS
    return slot.offset, slot.offset + length, slot.offset + 2 * length


def load_durable_maps(
    read: Read, uuid: bytes, group: GroupRecord, extents: int
) -> "tuple[DurableMap, DurableMap]":
    """The PDM and the PPRM of a group; see MetadataVolume.durable_maps."""
    first, second, third = starts_of_maps(group.durable)
    delta = DurableMap(PERSISTENT_DELTA_MAP, uuid, (first,), extents, 0)
    protected = DurableMap(
        PERSISTENT_PROTECTED_RESTORE_MAP, uuid, (second, third), extents, group.epoch
    )
    delta.load(read, damaged_as=1)
    protected.load(read, damaged_as=0)
    return delta, protected


def _zeros(extents: int) -> bitarray:
    """That many bits, all clear. Where they are many there are up to seven more, never set, and they
    take memory only where some are set."""
    if extents < _LARGE:
        return bitarray(extents, endian="little")
    pages = mmap.mmap(-1, -(-extents // 8), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return bitarray(buffer=pages, endian="little")


class DurableMap:
    """A map of `extents` extents, of kind `kind`, in copies that begin at the bytes `offsets`. There may
    be a few more `bits`.

    `epoch` is the number of the restore that the bits belong to; 0 where that does not matter.
    `damaged` are the sectors of which no copy could be read, `single` those of which only one could;
    `newest_epoch` is the highest number that was found: one above the record's means that the record
    which began that restore is lost.

    `extents_per_sector` is what the format says; the simulator has so few extents that it puts fewer
    into a sector, to have several.
    """

    extents_per_sector: ClassVar[int] = EXTENTS_PER_DURABLE_SECTOR

    def __init__(
        self, kind: int, uuid: bytes, offsets: tuple[int, ...], extents: int, epoch: int
    ) -> None:
        self.kind = kind
        self.extents = extents
        self.epoch = epoch
        self.sectors = -(-extents // self.extents_per_sector)
        self.bits = _zeros(extents)
        self.unwritten: set[int] = set()
        self.writing: set[int] = set()
        # By sector, the runs of set bits that are not on stable storage: until the next batch, and
        # in this one.
        self._new: _RunsBySector = {}
        self._under_way: _RunsBySector = {}
        self.damaged: list[int] = []
        self.newest_epoch = epoch  # that any sector has
        self.single: list[int] = []
        self._uuid = uuid
        self._offsets = offsets
        self._generations = [0] * self.sectors

    def load(self, read: Read, *, damaged_as: int) -> None:
        """Fill the map from the medium; a sector of which no copy is sound gets `damaged_as`."""
        for first in range(0, self.sectors, _LOADED_AT_ONCE):
            sectors = range(first, min(first + _LOADED_AT_ONCE, self.sectors))
            at, length = first * DURABLE_SECTOR, len(sectors) * DURABLE_SECTOR
            copies = [read(offset + at, length) for offset in self._offsets]
            if all(copy == _ALL_NEVER_WRITTEN[:length] for copy in copies):
                continue
            for sector, at in zip(sectors, range(0, length, DURABLE_SECTOR), strict=True):
                held = [copy[at : at + DURABLE_SECTOR] for copy in copies]
                if not self._load_as_expected(sector, held):
                    self._load_sector(sector, held, damaged_as)

    def _load_as_expected(self, sector: int, copies: list[bytes]) -> bool:
        """Load a sector of which all copies are sound and the same, as nearly all are; there may be
        a hundred thousand. False, and nothing is loaded, if that is not so."""
        if copies.count(_NEVER_WRITTEN) == len(copies):
            return True
        if min(map(len, copies)) < DURABLE_SECTOR:
            return False
        generation, epoch = _HEADER.unpack_from(copies[0])[4:7:2]
        payload = copies[0][_HEADER.size :]
        for number, copy in enumerate(copies):
            place = (self.kind, number, 0, generation, sector, epoch, self._uuid[:8])
            expected = (zlib.crc32(copy[4:]), *place)
            if _HEADER.unpack_from(copy) != expected or copy[_HEADER.size :] != payload:
                return False
        self._generations[sector] = generation
        self.newest_epoch = max(self.newest_epoch, epoch)
        if epoch == self.epoch and payload != _NO_BITS:
            self._fill(sector, payload)
        return True

    def _fill(self, sector: int, payload: bytes) -> None:
        start, stop = self.range_of(sector)
        bits = bitarray(endian="little")
        bits.frombytes(payload)
        self.bits[start:stop] = bits[: stop - start]

    def _load_sector(self, sector: int, copies: list[bytes], damaged_as: int) -> None:
        found = [self._unpack(sector, number, copy) for number, copy in enumerate(copies)]
        sound = [each for each in found if each is not None]
        if not sound:
            start, stop = self.range_of(sector)
            self.damaged.append(sector)
            self.bits[start:stop] = damaged_as
            if damaged_as:
                self._distrust(sector)
            return
        if None in found:
            self.single.append(sector)
        newest = max(sound, key=lambda each: each.generation)
        if any(each != newest for each in found):
            self._distrust(sector)  # one copy is bad, or a write was cut off between them
        self._generations[sector] = newest.generation
        self.newest_epoch = max(self.newest_epoch, newest.epoch)
        if newest.epoch == self.epoch:
            self._fill(sector, newest.payload)

    def _unpack(self, sector: int, copy: int, data: bytes) -> Sector | None:
        try:
            return unpack_sector(Place(self.kind, self._uuid, copy, sector), data)
        except DamagedError:
            return None

    def _pack(self, sector: int, copy: int) -> bytes:
        start, stop = self.range_of(sector)
        held = Sector(self._generations[sector], self.epoch, self.bits[start:stop].tobytes())
        return pack_sector(Place(self.kind, self._uuid, copy, sector), held)

    def range_of(self, sector: int) -> tuple[int, int]:
        """The extents of a sector, as (first, stop)."""
        first = sector * self.extents_per_sector
        return first, min(first + self.extents_per_sector, self.extents)

    def covers(self, first: int, stop: int) -> bool:
        """Whether all of [first, stop) is set, on stable storage."""
        if self.bits.find(0, first, stop) >= 0:
            return False
        if not self._new and not self._under_way:
            return True
        per_sector = self.extents_per_sector
        return all(
            start >= stop or end <= first
            for sector in range(first // per_sector, (stop - 1) // per_sector + 1)
            for runs in (self._new, self._under_way)
            for start, end in runs.get(sector, ())
        )

    def mark(self, first: int, stop: int) -> None:
        """Set [first, stop), to be written."""
        at = self.bits.find(0, first, stop)
        while at >= 0:
            sector = at // self.extents_per_sector
            end = min(stop, self.range_of(sector)[1])
            self.bits[at:end] = 1
            self.unwritten.add(sector)
            self._new.setdefault(sector, []).append((at, end))
            at = self.bits.find(0, end, stop) if end < stop else -1

    def _distrust(self, sector: int) -> None:
        """What the sector has on stable storage is not known: it has to be written."""
        self.unwritten.add(sector)
        self._new[sector] = [self.range_of(sector)]

    def clear(self, bits: bitarray, start: int) -> None:
        """Clear what is set in `bits`, which begin at extent `start`, to be written."""
        stop = start + len(bits)
        common = self.bits[start:stop] & bits
        if not common.any():
            return
        per_sector = self.extents_per_sector
        for sector in range(start // per_sector, (stop - 1) // per_sector + 1):
            low, high = self.range_of(sector)
            if common[max(low, start) - start : min(high, stop) - start].any():
                self.unwritten.add(sector)
        self.bits[start:stop] &= ~bits

    def begin_epoch(self, epoch: int) -> None:
        """All is clear for the restore number `epoch`, once the record says that number: sectors of
        another one count as empty."""
        self.epoch = epoch
        self.bits = _zeros(self.extents)
        self.unwritten.clear()
        self._new.clear()
        self.mend()

    def mend(self) -> None:
        """What is in memory is right for the sectors that are damaged, in all copies or in one, too:
        let them be written."""
        self.unwritten.update(self.damaged, self.single)
        self.damaged.clear()
        self.single.clear()

    def rest(self) -> None:
        """If nothing is set, it takes no memory from now on."""
        if not self.bits.any():
            self.bits = _zeros(self.extents)

    def begin_write(self) -> Batch:
        """What has to be written now, or a part of it: to pack all of a large map takes long. One
        batch at a time; `end_write` must follow."""
        assert not self.writing
        sectors = sorted(islice(self.unwritten, SECTORS_AT_ONCE))
        self.writing = set(sectors)
        self.unwritten -= self.writing
        self._under_way = {each: self._new.pop(each) for each in sectors if each in self._new}
        for sector in sectors:
            self._generations[sector] += 1
        writes = []
        for copy, offset in enumerate(self._offsets):
            run: list[bytes] = []
            for index, sector in enumerate(sectors):
                run.append(self._pack(sector, copy))
                if index + 1 == len(sectors) or sectors[index + 1] != sector + 1:
                    first = sector + 1 - len(run)
                    writes.append((offset + first * DURABLE_SECTOR, b"".join(run)))
                    run = []
        return Batch(tuple(writes))

    def end_write(self, *, written: bool) -> None:
        """The batch is on stable storage; or nobody knows, and it has to be written again."""
        if not written:
            for sector in self.writing:
                self._distrust(sector)
        self.writing = set()
        self._under_way = {}
