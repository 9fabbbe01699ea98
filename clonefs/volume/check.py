"""Whether a volume that nobody has mounted is sound, and what can be mended without a guess.

`examine` looks and changes nothing. What it finds carries its own cure, if there is a safe one: the
bytes to be written and where. A cure is safe if it can only make maps claim more difference than
there is, or restores a copy of what is there, or replaces what counts for nothing.

Invariant: `repair` writes what the findings say and not a byte more. Stopped anywhere, it leaves a
volume that is no worse than before and can be repaired again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from bitarray import bitarray

from clonefs.errors import ClonefsError
from clonefs.extents import Geometry
from clonefs.volume import layout
from clonefs.volume.dump import (
    Contents,
    RecordSlot,
    list_of,
    listed,
    live_map,
    read_contents,
    reader,
    sectors_of,
    shortened,
)
from clonefs.volume.durable import (
    PERSISTENT_DELTA_MAP,
    PERSISTENT_PROTECTED_RESTORE_MAP,
    Place,
    Sector,
    load_durable_maps,
    pack_sector,
    starts_of_maps,
)
from clonefs.volume.layout import (
    DURABLE_SECTOR,
    PAGE,
    DamagedError,
    Superblock,
)
from clonefs.volume.medium import Medium
from clonefs.volume.record import CloneRecord, CloneState, GroupRecord, MapSlot, Record

Writes = tuple[tuple[int, bytes], ...]


class Severity(StrEnum):
    """How bad a finding is."""

    NOTE = "note"  # a crash may leave it, and the next mount knows what to do
    WRONG = "wrong"


class Fault(StrEnum):
    """What kind of thing is the matter."""

    SUPERBLOCK = "superblock"
    CUT_SHORT = "cut short"
    RECORD_SLOT = "record slot"
    NO_RECORD = "no record"
    STRUCTURE = "structure"
    MAP_SLOT = "map slot"
    BITS_BEYOND_THE_END = "bits beyond the end"
    LIVE_MAPS = "live maps"
    NOT_EQUAL = "not equal"
    LEFT_PROTECTED = "left protected"
    PENDING_UNMARKED = "pending unmarked"
    DELTA_SECTOR = "delta sector"
    DELTA_BITS = "delta bits"
    PROTECTED_COPY = "protected copy"
    PROTECTED_COPY_BEHIND = "protected copy behind"
    PROTECTED_COPIES_DIFFER = "protected copies differ"
    PROTECTED_SECTOR = "protected sector"
    PROTECTED_BITS = "protected bits"
    EPOCH = "epoch"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is to be said, as a sentence in `text`. `where` names the part: the volume, a
    record slot, a group or a clone. `writes` mend it: bytes at offsets, in this order."""

    fault: Fault
    severity: Severity
    where: str
    text: str
    writes: Writes = ()

    @property
    def repairable(self) -> bool:
        """Whether it can be mended without a guess."""
        return bool(self.writes)


def _wrong(fault: Fault, where: str, text: str, writes: Writes = ()) -> Finding:
    return Finding(fault, Severity.WRONG, where, text, writes)


def _note(fault: Fault, where: str, text: str, writes: Writes = ()) -> Finding:
    return Finding(fault, Severity.NOTE, where, text, writes)


def examine(medium: Medium, boot_id: str) -> tuple[Finding, ...]:
    """All that there is to say of the volume on `medium`, in this boot of the machine."""
    return tuple(_examine(medium, boot_id))


def repair(medium: Medium, findings: Iterable[Finding]) -> None:
    """Mend what can be mended. Blocks. Raises ClonefsError (EIO). Examine again afterwards."""
    for finding in findings:
        for offset, data in finding.writes:
            medium.write_durably(offset, data)


def _examine(medium: Medium, boot_id: str) -> Iterator[Finding]:
    contents = read_contents(medium)
    if contents.why is not None:
        text = f"{contents.why}; it is not repaired, for nothing else says what belongs into it"
        yield _wrong(Fault.SUPERBLOCK, "the volume", text)
        return
    if contents.superblock.size > medium.size:
        yield _wrong(
            Fault.CUT_SHORT,
            "the volume",
            f"it has been cut short: it has {medium.size} bytes and should have "
            f"{contents.superblock.size}",
        )
        return
    yield from _examine_slots(contents)
    newest = contents.newest
    if newest is None or newest.record is None:
        yield _wrong(
            Fault.NO_RECORD,
            "the volume",
            "no record is left that can be relied on: groups and states are lost, and are not "
            "guessed (clonefs dump shows what can still be read)",
        )
        return
    structure = list(_structure(contents.superblock, newest.record))
    yield from structure
    if structure:
        return  # what such a record says of the maps means nothing
    for group in newest.record.groups:
        trusted = newest.record.trusts_live_maps(boot_id)
        yield from _Group(medium, contents.superblock, newest.record, group, trusted).examine()


# Records


def _examine_slots(contents: Contents) -> Iterator[Finding]:
    newest = contents.newest
    for slot in contents.slots:
        where = f"record slot {slot.letter}"
        if slot.why is not None:
            yield _wrong(
                Fault.RECORD_SLOT,
                where,
                f"it is damaged: {slot.why}{_claim(slot, newest)}",
                () if _may_be_newer(slot, newest) else _copy_into(contents, slot, newest),
            )
        elif newest is None or newest.generation is None or slot.generation is None:
            continue
        elif slot.generation % 2 != slot.number:
            yield _wrong(
                Fault.RECORD_SLOT,
                where,
                f"its record has generation {slot.generation}, which belongs into the other slot",
                _move_out_of(contents, slot, newest),
            )
        elif slot is not newest and slot.generation != newest.generation - 1:
            yield _wrong(
                Fault.RECORD_SLOT,
                where,
                f"its record has generation {slot.generation}, and slot {newest.letter} has "
                f"{newest.generation}: one between them has never arrived",
                _copy_into(contents, slot, newest),
            )


def _may_be_newer(slot: RecordSlot, newest: RecordSlot | None) -> bool:
    """A damaged record that claims to be newer was being written when the machine stopped, or it was
    the truth: then what can still be read of it is all that is left of the last change of state."""
    if newest is None or newest.generation is None or slot.generation is None:
        return False
    return slot.generation > newest.generation


def _claim(slot: RecordSlot, newest: RecordSlot | None) -> str:
    if not _may_be_newer(slot, newest):
        return ""
    return (
        f"; it claims to be newer than the other (generation {slot.generation}). If a crash cut its "
        f"commit off, the other is right; if it went bad later, the last change of state is lost. "
        f"That is not guessed: the next mount takes the other, and writes over this one"
    )


def _copy_into(contents: Contents, slot: RecordSlot, newest: RecordSlot | None) -> Writes:
    """A second copy of the newest record in `slot`; the newest itself is never touched. The copy is
    the older one: if the slot held a newer record once, backings know its number, and must go on to
    miss it."""
    if newest is None or newest.generation is None or newest is slot:
        return ()
    generation = newest.generation - 1
    if generation % 2 != slot.number:
        generation = newest.generation + 2  # the newest lies in the wrong slot
    data = layout.pack_record(contents.superblock, generation, newest.payload)
    return ((slot.offset, data),)


def _move_out_of(contents: Contents, slot: RecordSlot, newest: RecordSlot) -> Writes:
    """The record in `slot` is in the wrong one: if it is the newest, copy it to the other first."""
    if newest is not slot:
        return _copy_into(contents, slot, newest)
    assert newest.generation is not None
    other = contents.slots[1 - slot.number]
    return tuple(
        (each.offset, layout.pack_record(contents.superblock, generation, newest.payload))
        for each, generation in ((other, newest.generation + 2), (slot, newest.generation + 3))
    )


# What the record says


def _structure(superblock: Superblock, record: Record) -> Iterator[Finding]:
    yield from _names(record)
    slots: list[tuple[str, MapSlot, int]] = []
    for group in record.groups:
        try:
            extents = Geometry(group.size, group.extent_size).extents
        except ClonefsError as error:
            yield _wrong(Fault.STRUCTURE, group.name, f"its geometry is impossible: {error.reason}")
            continue
        live, durable = layout.live_map_length(extents), layout.durable_maps_length(extents)
        slots.append((f"{group.name}: the Protected Restore Map", group.protected, live))
        slots.append((f"{group.name}: the durable maps", group.durable, durable))
        slots += [(f"{group.name}/{c.name}: the Delta Map", c.delta, live) for c in group.clones]
    yield from _slots(superblock, slots)


def _names(record: Record) -> Iterator[Finding]:
    for name in _twice(group.name for group in record.groups):
        yield _wrong(Fault.STRUCTURE, name, "there are two groups of this name")
    for group in record.groups:
        for name in _twice(clone.name for clone in group.clones):
            where = f"{group.name}/{name}"
            yield _wrong(Fault.STRUCTURE, where, "there are two clones of this name")
        restores = (CloneState.RESTORING, CloneState.REVERSE_SYNCHRONIZING)
        restoring = [c.name for c in group.clones if c.state in restores]
        if len(restoring) > 1:
            text = f"restores from {' and '.join(restoring)} are running, and there can be one only"
            yield _wrong(Fault.STRUCTURE, group.name, text)


def _twice(names: Iterable[str]) -> list[str]:
    held = list(names)
    return sorted({name for name in held if held.count(name) > 1})


def _slots(superblock: Superblock, slots: list[tuple[str, MapSlot, int]]) -> Iterator[Finding]:
    """Each map has room, in whole pages inside of the volume, and shares them with no other."""
    end, before = superblock.first_map_byte, "the records"
    for owner, slot, needed in sorted(slots, key=lambda each: each[1].offset):
        what = f"{owner}: its {slot.length} bytes from byte {slot.offset}"
        if slot.offset % PAGE or slot.length % PAGE or slot.length <= 0:
            yield _wrong(Fault.MAP_SLOT, "the record", f"{what} are not whole pages")
        elif slot.length < needed:
            yield _wrong(Fault.MAP_SLOT, "the record", f"{what} are too few: it needs {needed}")
        if slot.offset < end:
            yield _wrong(Fault.MAP_SLOT, "the record", f"{what} overlap {before}")
        if slot.offset + slot.length > superblock.size:
            yield _wrong(Fault.MAP_SLOT, "the record", f"{what} end outside of the volume")
        if slot.offset + slot.length > end:
            end, before = slot.offset + slot.length, owner


# The maps of a group


class _Group:
    """The maps of one group, against each other and against the record."""

    def __init__(
        self,
        medium: Medium,
        superblock: Superblock,
        record: Record,
        group: GroupRecord,
        trusted: bool,
    ) -> None:
        self._medium = medium
        self._uuid = superblock.uuid
        self._clean = record.clean
        self._group = group
        # Whether the next mount takes the live maps as they stand.
        self._trusted = trusted and not self._overwritten()
        self._extents = Geometry(group.size, group.extent_size).extents
        self._restoring = next((c for c in group.clones if c.state is CloneState.RESTORING), None)
        self._starts = starts_of_maps(group.durable)
        self._delta, self._protected = load_durable_maps(
            reader(medium), self._uuid, group, self._extents
        )
        self._count = self._delta.sectors

    def examine(self) -> Iterator[Finding]:
        beyond = tuple(self._beyond_the_end())
        yield from beyond
        if self._overwritten() and not beyond:
            text = (
                "its live maps are not what the volume was closed with; the next mount fills them "
                "from the durable ones"
            )
            yield _wrong(Fault.LIVE_MAPS, self._group.name, text)
        yield from self._delta_sectors()
        yield from self._protected_sectors()
        if self._trusted:
            yield from self._live_maps()
        yield from self._missing_in_delta()

    # Live maps

    def _live(self, slot: MapSlot) -> bitarray:
        return live_map(self._medium, slot)[: self._extents]

    def _overwritten(self) -> bool:
        found = layout.live_checksum(self._medium.view, self._group.live_slots())
        return self._clean and self._group.live_checksum not in (None, found)

    def _beyond_the_end(self) -> Iterator[Finding]:
        name = self._group.name
        maps = [(name, "the Protected Restore Map", self._group.protected)]
        maps += [(f"{name}/{c.name}", "the Delta Map", c.delta) for c in self._group.clones]
        for where, what, slot in maps:
            bits = live_map(self._medium, slot)
            beyond = bits.count(1, self._extents)
            if beyond:
                text = (
                    f"{what} has {beyond} bits beyond the last extent: its pages were overwritten"
                )
                at = self._extents // 8
                tail = bits[at * 8 :]
                tail[self._extents - at * 8 :] = 0
                writes = ((slot.offset + at, tail.tobytes()),)
                yield _wrong(Fault.BITS_BEYOND_THE_END, where, text, writes)

    def _live_maps(self) -> Iterator[Finding]:
        """What must be true of maps that the next mount will take as they stand."""
        protected = self._live(self._group.protected)
        if self._group.void:  # the next mount empties it
            protected.setall(0)
        if self._restoring is not None:
            yield from self._restore(self._restoring, protected)
        elif protected.any():
            yield self._left_protected(protected)
        for clone in self._group.clones:
            if clone.state is CloneState.SYNCHRONIZED:
                yield from self._equal(clone)

    def _equal(self, clone: CloneRecord) -> Iterator[Finding]:
        count = self._live(clone.delta).count()
        if count:
            text = (
                f"it is called synchronized, and {_extents(count)} may differ: the next mount copies "
                f"them again"
            )
            # A mirrored write was under way when the daemon died; but a stop waits for those.
            make = _wrong if self._clean else _note
            yield make(Fault.NOT_EQUAL, f"{self._group.name}/{clone.name}", text)

    def _left_protected(self, protected: bitarray) -> Finding:
        found = (
            f"the Protected Restore Map has {_extents(protected.count())} and no restore is running "
            f"({shortened(listed(protected))})"
        )
        if self._clean:
            text = "a change of state may have been lost, and differences with it"
            return _wrong(Fault.LEFT_PROTECTED, self._group.name, f"{found}: {text}")
        text = (
            "as a daemon that died in a change of state leaves it; the next mount counts them as "
            "differences of every clone, if they are not those of a Reverse Sync"
        )
        return _note(Fault.LEFT_PROTECTED, self._group.name, f"{found}, {text}")

    def _restore(self, restoring: CloneRecord, protected: bitarray) -> Iterator[Finding]:
        pending = self._live(restoring.delta) & ~protected
        for clone in self._group.clones:
            missing = pending & ~self._live(clone.delta)
            if clone is not restoring and missing.any():
                yield _wrong(
                    Fault.PENDING_UNMARKED,
                    f"{self._group.name}/{clone.name}",
                    f"the restore from {restoring.name} will change {_extents(missing.count())} that "
                    f"its Delta Map does not have ({shortened(listed(missing))})",
                )
        more = self._protected.bits[: self._extents] & ~protected
        if more.any():
            yield _wrong(
                Fault.PROTECTED_BITS,
                self._group.name,
                f"the Persistent Protected Restore Map has {_extents(more.count())} that the "
                f"Protected Restore Map does not have ({shortened(listed(more))})",
            )

    # The Persistent Delta Map

    def _delta_sectors(self) -> Iterator[Finding]:
        damaged = self._delta.damaged
        if damaged:
            yield _wrong(
                Fault.DELTA_SECTOR,
                self._group.name,
                f"{_sectors(damaged)} of the Persistent Delta Map cannot be read: every extent "
                f"there counts as different",
                tuple(self._delta_write(each, 1, self._all_ones(each)) for each in damaged),
            )

    def _missing_in_delta(self) -> Iterator[Finding]:
        """D1: what any map has that recovery may go by, the Persistent Delta Map must have."""
        union = bitarray(self._extents, endian="little")
        if self._trusted:
            union |= self._live(self._group.protected)
            for clone in self._group.clones:
                union |= self._live(clone.delta)
        elif self._restoring is not None:
            union |= self._protected.bits[: self._extents]
        missing = union & ~self._delta.bits[: self._extents]
        if missing.any():
            which = "the live maps" if self._trusted else "the Persistent Protected Restore Map"
            yield _wrong(
                Fault.DELTA_BITS,
                self._group.name,
                f"the Persistent Delta Map lacks {_extents(missing.count())} that {which} have: a "
                f"power cut would lose these differences ({shortened(listed(missing))})",
                tuple(self._with_missing(missing)),
            )

    def _with_missing(self, missing: bitarray) -> Iterator[tuple[int, bytes]]:
        start = self._starts[0]
        held = sectors_of(self._medium, self._uuid, PERSISTENT_DELTA_MAP, 0, start, self._count)
        for number, sector in enumerate(held):
            first, stop = self._delta.range_of(number)
            if isinstance(sector, Sector) and missing[first:stop].any():
                bits = self._delta.bits[first:stop] | missing[first:stop]
                yield self._delta_write(number, sector.generation + 1, bits)

    def _delta_write(self, number: int, generation: int, bits: bitarray) -> tuple[int, bytes]:
        place = Place(PERSISTENT_DELTA_MAP, self._uuid, 0, number)
        data = pack_sector(place, Sector(generation, 0, bits.tobytes()))
        return self._starts[0] + number * DURABLE_SECTOR, data

    def _all_ones(self, number: int) -> bitarray:
        first, stop = self._delta.range_of(number)
        bits = bitarray(stop - first, endian="little")
        bits.setall(1)
        return bits

    # The Persistent Protected Restore Map

    def _protected_sectors(self) -> Iterator[Finding]:
        first, second = (
            sectors_of(
                self._medium,
                self._uuid,
                PERSISTENT_PROTECTED_RESTORE_MAP,
                copy,
                self._starts[1 + copy],
                self._count,
            )
            for copy in (0, 1)
        )
        pairs = list(zip(first, second, strict=True))
        for copy, one in enumerate((first, second)):
            yield from self._one_copy_bad(copy, one, pairs)
        yield from self._copies_behind(pairs)
        both = [n for n, pair in enumerate(pairs) if not any(isinstance(s, Sector) for s in pair)]
        if both:
            yield self._both_bad(both)
        yield from self._epochs(pairs)

    def _one_copy_bad(
        self,
        copy: int,
        one: list[Sector | DamagedError],
        pairs: list[tuple[Sector | DamagedError, Sector | DamagedError]],
    ) -> Iterator[Finding]:
        bad, writes = [], []
        for number, (sector, pair) in enumerate(zip(one, pairs, strict=True)):
            other = pair[1 - copy]
            if not isinstance(sector, Sector) and isinstance(other, Sector):
                bad.append(number)
                writes.append(self._protected_write(copy, number, other))
        if bad:
            text = (
                f"{_sectors(bad)} of the Persistent Protected Restore Map cannot be read in copy "
                f"{copy + 1}; the other copy can"
            )
            yield _wrong(Fault.PROTECTED_COPY, self._group.name, text, tuple(writes))

    def _copies_behind(
        self, pairs: list[tuple[Sector | DamagedError, Sector | DamagedError]]
    ) -> Iterator[Finding]:
        behind, writes, differ = [], [], []
        for number, (first, second) in enumerate(pairs):
            if not isinstance(first, Sector) or not isinstance(second, Sector) or first == second:
                continue
            if first.generation == second.generation:
                differ.append(number)
                continue
            behind.append(number)
            older = 0 if first.generation < second.generation else 1
            writes.append(self._protected_write(older, number, pairs[number][1 - older]))
        name = self._group.name
        if behind:
            text = (
                f"{_sectors(behind)} of the Persistent Protected Restore Map are older in one copy, "
                f"as a crash between the two leaves them; the newer counts"
            )
            yield _note(Fault.PROTECTED_COPY_BEHIND, name, text, tuple(writes))
        if differ:
            text = (
                f"{_sectors(differ)} of the Persistent Protected Restore Map differ in the two "
                f"copies, and neither is newer; which is right is not guessed"
            )
            yield _wrong(Fault.PROTECTED_COPIES_DIFFER, name, text)

    def _both_bad(self, both: list[int]) -> Finding:
        text = (
            f"{_sectors(both)} of the Persistent Protected Restore Map cannot be read in any copy"
        )
        if self._restoring is None:
            text += "; no restore is running, so they count for nothing"
            empty = Sector(1, self._group.epoch, b"")
            writes = [self._protected_write(copy, n, empty) for copy in (0, 1) for n in both]
            return _wrong(Fault.PROTECTED_SECTOR, self._group.name, text, tuple(writes))
        if self._trusted:
            text += (
                f"; the next mount goes on with the restore from {self._restoring.name} by the live "
                f"map, but after a power cut only starting it again would be left"
            )
        else:
            text += (
                f"; what hosts have written there is not guessed: the restore from "
                f"{self._restoring.name} can only be started again, which drops it"
            )
        return _wrong(Fault.PROTECTED_SECTOR, self._group.name, text)

    def _epochs(
        self, pairs: list[tuple[Sector | DamagedError, Sector | DamagedError]]
    ) -> Iterator[Finding]:
        later = [
            number
            for number, pair in enumerate(pairs)
            if any(isinstance(each, Sector) and each.epoch > self._group.epoch for each in pair)
        ]
        if later:
            yield _wrong(
                Fault.EPOCH,
                self._group.name,
                f"{_sectors(later)} of the Persistent Protected Restore Map belong to a later restore "
                f"than number {self._group.epoch}, the last that the record knows: a newer record "
                f"has been lost",
            )

    def _protected_write(
        self, copy: int, number: int, sector: Sector | DamagedError
    ) -> tuple[int, bytes]:
        assert isinstance(sector, Sector)
        offset = self._starts[1 + copy] + number * DURABLE_SECTOR
        if not sector.generation:
            return offset, bytes(DURABLE_SECTOR)
        place = Place(PERSISTENT_PROTECTED_RESTORE_MAP, self._uuid, copy, number)
        return offset, pack_sector(place, sector)


def _extents(count: int) -> str:
    return "1 extent" if count == 1 else f"{count} extents"


def _sectors(numbers: list[int]) -> str:
    return f"sectors {shortened(list_of(numbers))}" if len(numbers) > 1 else f"sector {numbers[0]}"
