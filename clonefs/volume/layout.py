"""Where what lies on a metadata volume, and how the fixed parts look.

    byte 0                superblock                      one page
    PAGE                  record slot A                   record_size bytes
    PAGE + record_size    record slot B                   record_size bytes
    ... to the end        map slots, whole pages, handed out first fit:
                            a live map     one bit an extent, little endian, mapped shared
                            durable maps   of a group: the PDM and two copies of the PPRM,
                                           sectors of 512 bytes with 3840 extents each

    superblock            record slot                     durable sector (durable.py)
     0  8  magic           0   8  magic                    0   4  CRC-32 of the rest
     8  4  format version  8   8  generation               4   1  kind of map   5  1  which copy
    12 16  uuid           16   4  length of the payload    8   8  generation
    28  8  size           20   4  CRC-32 of header        16   4  number of the sector
    36  8  record_size           (this field zero),       20   4  number of the restore (epoch)
    44  4  CRC-32                uuid and payload         24   8  first bytes of the uuid
                                                          32 480  bits
                          24      payload (JSON)

Everything is little endian. This module packs and unpacks; it does no I/O.
"""

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from clonefs.errors import ClonefsError, failed, full
from clonefs.volume.record import MapSlot

PAGE = 4096
VERSION = 1
DEFAULT_SIZE = 64 << 20
MINIMUM_SIZE = 1 << 20
MINIMUM_RECORD_SIZE = 64 << 10
MAXIMUM_RECORD_SIZE = 16 << 20

SUPERBLOCK_MAGIC = b"CLONEFS\0"
RECORD_MAGIC = b"CFSRECRD"
_SUPERBLOCK = struct.Struct("<8sI16sQQI")
_RECORD_HEADER = struct.Struct("<8sQII")

DURABLE_SECTOR = 512
DURABLE_HEADER = 32
EXTENTS_PER_DURABLE_SECTOR = (DURABLE_SECTOR - DURABLE_HEADER) * 8
DURABLE_MAPS = 3  # the Persistent Delta Map, and the Persistent Protected Restore Map twice

assert _SUPERBLOCK.size == 48
assert _RECORD_HEADER.size == 24
assert EXTENTS_PER_DURABLE_SECTOR == 3840


class DamagedError(Exception):
    """Bytes that do not have the form that they should have; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """What format decides; only `size` changes later, when a volume is grown. Sizes in bytes."""

    uuid: bytes
    size: int
    record_size: int

    @property
    def first_map_byte(self) -> int:
        """Where the map slots begin."""
        return PAGE + 2 * self.record_size

    def record_slot(self, generation: int) -> int:
        """The byte at which the record of that generation lies: slots are written in turn."""
        return PAGE + (generation % 2) * self.record_size

    def pack(self) -> bytes:
        """The first page of the volume."""
        body = _SUPERBLOCK.pack(
            SUPERBLOCK_MAGIC, VERSION, self.uuid, self.size, self.record_size, 0
        )
        checksum = zlib.crc32(body)
        return (body[:-4] + struct.pack("<I", checksum)).ljust(PAGE, b"\0")

    @classmethod
    def unpack(cls, page: bytes) -> "Superblock":
        """Raises DamagedError."""
        if len(page) < _SUPERBLOCK.size or not page.startswith(SUPERBLOCK_MAGIC):
            raise DamagedError("there is no superblock: this is not a clonefs metadata volume")
        _, version, uuid, size, record_size, checksum = _SUPERBLOCK.unpack_from(page)
        if zlib.crc32(page[: _SUPERBLOCK.size - 4] + bytes(4)) != checksum:
            raise DamagedError("the superblock is damaged: its checksum is wrong")
        if version != VERSION:
            raise DamagedError(
                f"it has format version {version}, and this clonefs knows version {VERSION} only"
            )
        return cls(uuid, size, record_size)


def plan(size: int, uuid: bytes) -> Superblock:
    """The superblock of a new volume of `size` bytes."""
    record_size = min(max(MINIMUM_RECORD_SIZE, size // 32 // PAGE * PAGE), MAXIMUM_RECORD_SIZE)
    return Superblock(uuid, size // PAGE * PAGE, record_size)


def pack_record(superblock: Superblock, generation: int, payload: bytes) -> bytes:
    """A record slot. Raises ClonefsError (ENOSPC) if the record has outgrown it."""
    room = superblock.record_size - _RECORD_HEADER.size
    if len(payload) > room:
        raise full(
            f"the metadata volume is full: its record of groups and clones would need "
            f"{len(payload)} bytes and has {room}, as it was formatted; remove some, or give a second "
            f"volume to the next ones"
        )
    return _record_header(superblock, generation, payload) + payload


def _record_header(superblock: Superblock, generation: int, payload: bytes) -> bytes:
    bare = _RECORD_HEADER.pack(RECORD_MAGIC, generation, len(payload), 0)
    checksum = zlib.crc32(payload, zlib.crc32(superblock.uuid, zlib.crc32(bare)))
    return bare[:-4] + struct.pack("<I", checksum)


def unpack_record(superblock: Superblock, slot: bytes) -> tuple[int, bytes]:
    """(generation, payload) of a record slot. Raises DamagedError."""
    magic, generation, length, _ = _RECORD_HEADER.unpack_from(slot)
    if magic != RECORD_MAGIC:
        raise DamagedError("no record has been written there")
    payload = slot[_RECORD_HEADER.size : _RECORD_HEADER.size + length]
    if length > len(slot) - _RECORD_HEADER.size or (
        _record_header(superblock, generation, payload) != slot[: _RECORD_HEADER.size]
    ):
        raise DamagedError("its checksum is wrong, or it belongs to another volume")
    return generation, payload


def glance_at_record(slot: bytes) -> tuple[int, bytes] | None:
    """What a record slot claims to hold, as (generation, payload), whether or not it is damaged;
    None if there is not even the beginning of a record. For people who look at a damaged volume."""
    if len(slot) < _RECORD_HEADER.size or not slot.startswith(RECORD_MAGIC):
        return None
    _, generation, length, _ = _RECORD_HEADER.unpack_from(slot)
    return generation, slot[_RECORD_HEADER.size : _RECORD_HEADER.size + length]


def live_map_length(extents: int) -> int:
    """Bytes that the slot of a live map of that many extents takes: whole pages."""
    return _pages((extents + 7) // 8)


def live_checksum(view: memoryview, slots: Iterable[MapSlot]) -> int:
    """The CRC-32 of the live maps in `slots`, in that order. `view`: the whole volume."""
    checksum = 0
    for slot in slots:
        with view[slot.offset : slot.offset + slot.length] as pages:
            checksum = zlib.crc32(pages, checksum)
    return checksum


def durable_maps_length(extents: int) -> int:
    """Bytes that the durable maps of a group of that many extents take: whole pages each."""
    sectors = -(-extents // EXTENTS_PER_DURABLE_SECTOR)
    return DURABLE_MAPS * _pages(sectors * DURABLE_SECTOR)


def _pages(length: int) -> int:
    return -(-length // PAGE) * PAGE


def free_slot(superblock: Superblock, used: list[MapSlot], length: int) -> MapSlot:
    """The first `length` free bytes. Raises ClonefsError (ENOSPC).

    What is free is derived from what the record says is used: there is no allocation table.
    """
    start = superblock.first_map_byte
    for slot in sorted(used, key=lambda slot: slot.offset):
        if slot.offset - start >= length:
            break
        start = max(start, slot.offset + slot.length)
    if start + length > superblock.size:
        raise full(
            f"the metadata volume is full: a map needs {length} bytes in one piece; remove a clone "
            f"or a group, use larger extents, or unmount it and make it larger (clonefs grow)"
        )
    return MapSlot(start, length)


def check_slots(superblock: Superblock, used: list[MapSlot]) -> None:
    """Raises ClonefsError (EIO) if slots overlap, or lie outside of the volume."""
    end = superblock.first_map_byte
    for slot in sorted(used, key=lambda slot: slot.offset):
        if slot.offset < end or slot.offset % PAGE or slot.length % PAGE or slot.length <= 0:
            raise _impossible(slot)
        end = slot.offset + slot.length
        if end > superblock.size:
            raise _impossible(slot)


def _impossible(slot: MapSlot) -> ClonefsError:
    return failed(
        f"the metadata volume is damaged: its record has a map at byte {slot.offset} that overlaps "
        f"another or lies outside of the volume"
    )
