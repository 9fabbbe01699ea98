"""What lies on a volume, as far as it can be read: for people, and for `check`.

Nothing here gives up because of damage, as opening the volume does: what cannot be read has a `why`
in its place, and what is only likely says so. It never changes anything, and it must never be what a
mount relies on.
"""

import dataclasses
import uuid as uuid_module
from dataclasses import dataclass
from typing import Any

import msgspec
from bitarray import bitarray

from clonefs.errors import ClonefsError
from clonefs.extents import ExtentMap, Geometry, extent_list
from clonefs.volume import layout
from clonefs.volume.durable import (
    PERSISTENT_DELTA_MAP,
    PERSISTENT_PROTECTED_RESTORE_MAP,
    Place,
    Read,
    Sector,
    load_durable_maps,
    starts_of_maps,
    unpack_sector,
)
from clonefs.volume.layout import DURABLE_SECTOR, PAGE, DamagedError, Superblock
from clonefs.volume.medium import Medium
from clonefs.volume.record import CloneRecord, GroupRecord, MapSlot, Record, decode_record

_LONGEST_LIST = 60


@dataclass(frozen=True, slots=True)
class RecordSlot:
    """One of the two record slots. `why` it is not valid, or None; then the rest is what it claims
    to hold, and None where it claims nothing."""

    number: int
    offset: int
    generation: int | None
    payload: bytes
    record: Record | None
    why: str | None

    @property
    def letter(self) -> str:
        """Its name."""
        return "AB"[self.number]


@dataclass(frozen=True, slots=True)
class Contents:
    """The fixed parts of a volume. `why` the superblock is damaged, or None; if it is, `superblock`
    is a guess that suits a volume that fills the whole of its file."""

    superblock: Superblock
    why: str | None
    slots: tuple[RecordSlot, RecordSlot]

    @property
    def newest(self) -> RecordSlot | None:
        """The slot whose record a mount takes."""
        return _newest([slot for slot in self.slots if slot.why is None])

    @property
    def likeliest(self) -> RecordSlot | None:
        """The newest; without one, a damaged slot whose record can still be read, for what it is
        worth."""
        return self.newest or _newest([slot for slot in self.slots if slot.record is not None])


def _newest(slots: list[RecordSlot]) -> RecordSlot | None:
    return max(slots, key=lambda slot: slot.generation or 0, default=None)


def read_contents(medium: Medium) -> Contents:
    """The fixed parts of the volume on `medium`."""
    page = bytes(medium.view[:PAGE])
    why = None
    try:
        superblock = Superblock.unpack(page)
    except DamagedError as damage:
        superblock, why = _guessed(medium, page), str(damage)
    first, second = (_read_slot(medium, superblock, number) for number in (0, 1))
    return Contents(superblock, why, (first, second))


def _guessed(medium: Medium, page: bytes) -> Superblock:
    """A superblock for a look at a volume that has none. Where its second record begins tells how large
    each of them is, which in a volume that was grown does not follow from its size."""
    planned = layout.plan(medium.size, page[12:28])
    for size in range(layout.MINIMUM_RECORD_SIZE, layout.MAXIMUM_RECORD_SIZE + 1, PAGE):
        at = PAGE + size
        if medium.view[at : at + len(layout.RECORD_MAGIC)] == layout.RECORD_MAGIC:
            return dataclasses.replace(planned, record_size=size)
    return planned


def _read_slot(medium: Medium, superblock: Superblock, number: int) -> RecordSlot:
    offset = superblock.record_slot(number)
    data = bytes(medium.view[offset : offset + superblock.record_size])
    glance = layout.glance_at_record(data)
    if glance is None:
        return RecordSlot(number, offset, None, b"", None, "no record has been written there")
    why = record = None
    try:
        layout.unpack_record(superblock, data)
    except DamagedError as damage:
        why = str(damage)
    generation, payload = glance
    try:
        record = decode_record(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as damage:
        why = why or str(damage)
    return RecordSlot(number, offset, generation, payload, record, why)


def reader(medium: Medium) -> Read:
    """Reads bytes of the medium; beyond its end there are none."""
    return lambda offset, length: bytes(medium.view[offset : offset + length])


def live_map(medium: Medium, slot: MapSlot) -> bitarray:
    """All bits of a live map's slot. They are the pages themselves: let go of them before the
    medium is closed."""
    pages = medium.view[slot.offset : slot.offset + slot.length]
    return bitarray(buffer=pages, endian="little")


def sectors_of(
    medium: Medium, uuid: bytes, kind: int, copy: int, start: int, count: int
) -> list[Sector | DamagedError]:
    """The `count` sectors of one copy of a durable map that begins at the byte `start`."""
    data = bytes(medium.view[start : start + count * DURABLE_SECTOR])
    found: list[Sector | DamagedError] = []
    for number in range(count):
        at = number * DURABLE_SECTOR
        try:
            place = Place(kind, uuid, copy, number)
            found.append(unpack_sector(place, data[at : at + DURABLE_SECTOR]))
        except DamagedError as damage:
            found.append(damage)
    return found


def listed(bits: bitarray) -> str:
    """The set bits in the form of an extent list."""
    return extent_list(ExtentMap(bits, len(bits)))


def list_of(numbers: list[int]) -> str:
    """Numbers in that form."""
    bits = bitarray(max(numbers, default=-1) + 1, endian="little")
    for number in numbers:
        bits[number] = 1
    return listed(bits)


def shortened(extents: str) -> str:
    """An extent list for people: the beginning of it, and how many runs there are more."""
    if len(extents) <= _LONGEST_LIST:
        return extents
    kept = extents[:_LONGEST_LIST].rpartition(",")[0]
    return f"{kept},... and {extents.count(',') - kept.count(',')} more"


def describe(medium: Medium, boot_id: str) -> dict[str, Any]:
    """All that can be said of the volume on `medium` in this boot of the machine, for JSON."""
    contents = read_contents(medium)
    superblock, source = contents.superblock, contents.likeliest
    record = None if source is None else source.record
    return {
        "volume": {
            "path": medium.name,
            "size": medium.size,
            "damage": contents.why or _cut_short(medium, superblock),
            "format_version": layout.VERSION,
            "uuid": str(uuid_module.UUID(bytes=superblock.uuid)),
            "formatted_size": superblock.size,
            "record_size": superblock.record_size,
            "first_map_byte": superblock.first_map_byte,
        },
        "record_slots": [
            {
                "slot": slot.letter,
                "offset": slot.offset,
                "generation": slot.generation,
                "valid": slot.why is None,
                "damage": slot.why,
                "newest": slot is contents.newest,
                "text": None if slot.why is None else slot.payload.decode(errors="replace"),
            }
            for slot in contents.slots
        ],
        "record": None
        if source is None or record is None
        else {
            "slot": source.letter,
            "generation": source.generation,
            "damaged": source.why is not None,
            "clean": record.clean,
            "boot_id": record.boot_id,
            "doubtful": record.doubtful,
            "same_boot": record.boot_id == boot_id,
            "live_maps_trusted": contents.newest is not None and record.trusts_live_maps(boot_id),
        },
        "groups": {
            group.name: _group(medium, superblock, group)
            for group in (() if record is None else record.groups)
        },
    }


def _cut_short(medium: Medium, superblock: Superblock) -> str | None:
    if superblock.size <= medium.size:
        return None
    return f"cut short: it has {medium.size} bytes and should have {superblock.size}"


def _group(medium: Medium, superblock: Superblock, group: GroupRecord) -> dict[str, Any]:
    try:
        extents = Geometry(group.size, group.extent_size).extents
    except ClonefsError as error:
        return {"damage": error.reason, "record": msgspec.to_builtins(group)}
    return {
        "damage": None,
        "backing": group.backing,
        "size": group.size,
        "extent_size": group.extent_size,
        "extents": extents,
        "epoch": group.epoch,
        "void": group.void,
        "protected_restore_map": _live(medium, group.protected, extents),
        "durable": _durable(medium, superblock, group, extents),
        "clones": {clone.name: _clone(medium, clone, extents) for clone in group.clones},
    }


def _clone(medium: Medium, clone: CloneRecord, extents: int) -> dict[str, Any]:
    told = msgspec.to_builtins(clone)
    del told["name"], told["delta"]
    return {**told, "delta_map": _live(medium, clone.delta, extents)}


def _slot(slot: MapSlot) -> dict[str, int]:
    return {"offset": slot.offset, "length": slot.length}


def _cannot_hold(medium: Medium, slot: MapSlot, length: int) -> str | None:
    if slot.offset < 0 or slot.offset + slot.length > medium.size:
        return "it lies outside of the volume"
    if slot.length < length:
        return f"it needs {length} bytes and has {slot.length}"
    return None


def _live(medium: Medium, slot: MapSlot, extents: int) -> dict[str, Any]:
    damage = _cannot_hold(medium, slot, layout.live_map_length(extents))
    if damage is not None:
        return {"slot": _slot(slot), "damage": damage}
    bits = live_map(medium, slot)[:extents]
    return {"slot": _slot(slot), "damage": None, "count": bits.count(), "extents": listed(bits)}


def _durable(
    medium: Medium, superblock: Superblock, group: GroupRecord, extents: int
) -> dict[str, Any]:
    damage = _cannot_hold(medium, group.durable, layout.durable_maps_length(extents))
    if damage is not None:
        return {"slot": _slot(group.durable), "damage": damage}
    delta, protected = load_durable_maps(reader(medium), superblock.uuid, group, extents)
    starts = starts_of_maps(group.durable)
    kinds = (
        (PERSISTENT_DELTA_MAP, 0),
        (PERSISTENT_PROTECTED_RESTORE_MAP, 0),
        (PERSISTENT_PROTECTED_RESTORE_MAP, 1),
    )
    copies = [
        _copy(start, sectors_of(medium, superblock.uuid, kind, copy, start, delta.sectors))
        for start, (kind, copy) in zip(starts, kinds, strict=True)
    ]
    return {
        "slot": _slot(group.durable),
        "damage": None,
        "persistent_delta_map": {
            "count": delta.bits.count(),
            "extents": listed(delta.bits),
            "damaged": list_of(delta.damaged),
            "copies": copies[:1],
        },
        "persistent_protected_restore_map": {
            "epoch": group.epoch,
            "count": protected.bits.count(),
            "extents": listed(protected.bits),
            "damaged": list_of(protected.damaged),
            "copies": copies[1:],
        },
    }


def _copy(start: int, sectors: list[Sector | DamagedError]) -> dict[str, Any]:
    written = [each for each in sectors if isinstance(each, Sector) and each.generation]
    generations = [each.generation for each in written]
    return {
        "offset": start,
        "sectors": len(sectors),
        "written": len(written),
        "generations": [min(generations), max(generations)] if generations else None,
        "epochs": sorted({each.epoch for each in written}),
        "damaged": list_of([at for at, each in enumerate(sectors) if not isinstance(each, Sector)]),
    }
