"""The record: all that the volume remembers besides the maps.

It is small, immutable and replaced whole: a change of state is a new record, committed in one
piece or not at all. It is kept as JSON, so that a person can read it on a broken volume.
"""

from collections.abc import Iterator
from enum import StrEnum

import msgspec


class CloneState(StrEnum):
    """The states of a clone, in the words of its `state` file."""

    SYNCHRONIZING = "synchronizing"
    SYNCHRONIZED = "synchronized"
    FRACTURED = "fractured"
    OUT_OF_SYNC = "out-of-sync"
    RESTORING = "restoring"
    REVERSE_SYNCHRONIZING = "reverse-synchronizing"
    REVERSE_OUT_OF_SYNC = "reverse-out-of-sync"


class SplitBy(StrEnum):
    """Who split a clone off: a person, or an I/O error."""

    ADMINISTRATOR = "administratively-fractured"
    SYSTEM = "system-fractured"


class MapSlot(msgspec.Struct, frozen=True):
    """Pages of the volume: `offset` and `length` in bytes, both multiples of the page size."""

    offset: int
    length: int


class CloneRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A clone. Times are seconds since the epoch; `rate` is bytes a second, None for no limit.

    `stamped`: its backing has had a stamp on stable storage (clonefs/engines/stamps.py). `unflushed`: a
    flush of it has failed, so that the page cache may show what is not on its disk.
    `copy_total` is how many extents the running copy, or the last one, had to copy when it began.
    """

    name: str
    backing: str
    state: CloneState
    delta: MapSlot
    split_by: SplitBy | None = None
    reason: str | None = None
    fractured_at: float | None = None
    written: bool = False
    then_fracture: bool = False
    rate: int | None = None
    copy_total: int = 0
    stamped: bool = False
    unflushed: bool = False


class GroupRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Clone Group: its Source, the slot of its Protected Restore Map, and its clones.

    `durable` are the pages that belong to the group's durable maps (data-format.md). `epoch` is the
    number of the last restore: sectors of the PPRM with another number count as empty. `void`: a
    restore has begun again, and what the live map in `protected` says is of the time before.
    `live_checksum` is that of the live maps when the volume was closed cleanly, else None. `stamped`
    and `unflushed` are of the Source's backing what they are of a clone's. `full_copies`: a copy has
    blocks of its own, also where the file system could let both files share them.
    """

    name: str
    backing: str
    size: int
    extent_size: int
    protected: MapSlot
    durable: MapSlot
    clones: tuple[CloneRecord, ...] = ()
    epoch: int = 0
    void: bool = False
    live_checksum: int | None = None
    stamped: bool = False
    unflushed: bool = False
    full_copies: bool = False

    def clone(self, name: str) -> CloneRecord:
        """The clone of that name. Raises KeyError."""
        for clone in self.clones:
            if clone.name == name:
                return clone
        raise KeyError(name)

    def with_clone(self, clone: CloneRecord) -> "GroupRecord":
        """This group with `clone` in the place of the one of its name, or as its last."""
        names = [each.name for each in self.clones]
        clones = list(self.clones)
        if clone.name in names:
            clones[names.index(clone.name)] = clone
        else:
            clones.append(clone)
        return msgspec.structs.replace(self, clones=tuple(clones))

    def without_clone(self, name: str) -> "GroupRecord":
        """This group without that clone."""
        kept = tuple(clone for clone in self.clones if clone.name != name)
        return msgspec.structs.replace(self, clones=kept)

    def slots(self) -> Iterator[MapSlot]:
        """Every slot that the group owns."""
        yield self.durable
        yield from self.live_slots()

    def live_slots(self) -> Iterator[MapSlot]:
        """The slots of its live maps."""
        yield self.protected
        for clone in self.clones:
            yield clone.delta


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole record. `clean`: the volume was closed, and all of it is on stable storage.

    `boot_id` is the machine's boot at which the volume was mounted last: while it is still the same,
    the page cache has every store to the live maps. `doubtful`: except that a write to the volume
    has failed since, so that the kernel may have dropped some.
    """

    clean: bool = True
    boot_id: str = ""
    doubtful: bool = False
    groups: tuple[GroupRecord, ...] = ()

    def trusts_live_maps(self, boot_id: str) -> bool:
        """Whether in this boot of the machine the live maps are as they were left, bit for bit."""
        return self.clean or self.boot_id == boot_id

    def with_group(self, group: GroupRecord) -> "Record":
        """This record with `group` in the place of the one of its name, or added by name."""
        groups = {each.name: each for each in self.groups}
        groups[group.name] = group
        ordered = tuple(groups[name] for name in sorted(groups))
        return msgspec.structs.replace(self, groups=ordered)

    def without_group(self, name: str) -> "Record":
        """This record without that group."""
        kept = tuple(group for group in self.groups if group.name != name)
        return msgspec.structs.replace(self, groups=kept)

    def slots(self) -> Iterator[MapSlot]:
        """Every slot in use."""
        for group in self.groups:
            yield from group.slots()


def encode_record(record: Record) -> bytes:
    """The bytes that `decode_record` reads again."""
    return msgspec.json.encode(record)


def decode_record(data: bytes) -> Record:
    """Raises msgspec.DecodeError or msgspec.ValidationError for anything else than a record."""
    return msgspec.json.decode(data, type=Record)
