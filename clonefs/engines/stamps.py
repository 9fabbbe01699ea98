"""Stamps: what the backings know of the metadata volume, so that an old copy of it is noticed.

A stamp lies with a backing and says which volume it serves, which record of that volume was committed
last, and the state that the clone had in it. The rule: a stamp is written *after* the commit that it
tells of. So a volume whose newest record is older than a stamp of its own is not what the last daemon
left: no crash can do that, only an older copy in its place, or a record that went bad. Then its maps
are worth nothing, and so is what it says of copies that run (docs/decisions/volume-and-backings.md).

Never must anything be copied, in either direction, because a volume in doubt says so.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from clonefs.engines.recorder import Recorder
from clonefs.engines.recovery import Loaded, in_doubt, load
from clonefs.group import transitions
from clonefs.units import STAMP, MissingUnit, read_stamp
from clonefs.volume import CloneState, GroupRecord, MetadataVolume

SOURCE = "source"  # stands where a clone has its state


@dataclass(frozen=True, slots=True)
class Stamp:
    """A volume, the generation of the newest of its records that is known to be durable, and the
    state of the clone in that record, or SOURCE."""

    uuid: str
    generation: int
    word: str

    def __str__(self) -> str:
        return f"{self.uuid} {self.generation} {self.word}"

    @classmethod
    def of(cls, unit: "Stamped") -> "Stamp | None":
        """The stamp of a backing; None if there is none that can be read."""
        uuid, generation, word = (*(unit.stamp() or "").split(" "), "", "", "")[:3]
        return cls(uuid, int(generation), word) if generation.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why groups cannot be what the volume says, by their names. `newest`: the newest record of the
    volume that a backing knows of, if that is newer than the volume itself; else 0. `states`: what
    newer stamps say of clones, by their backings."""

    reasons: dict[str, str]
    newest: int
    states: dict[str, CloneState]


class Stamped(Protocol):
    """What has a name and may have a stamp."""

    @property
    def name(self) -> str:
        """What people call it."""

    def stamp(self) -> str | None:
        """See LogicalUnit.stamp."""


@dataclass(frozen=True, slots=True)
class _Path:
    """A backing that nobody has opened."""

    name: str

    def stamp(self) -> str | None:
        return read_stamp(self.name)


def look_offline(volume: MetadataVolume) -> Doubt:
    """The same as `look`, of a volume that is not mounted, and without opening its backings."""
    backings = {
        group.name: [_Path(group.backing), *(_Path(clone.backing) for clone in group.clones)]
        for group in volume.record.groups
    }
    return look(volume, backings)


def look(volume: MetadataVolume, units: Mapping[str, Iterable[Stamped]]) -> Doubt:
    """Compare the stamps of the backings, by group, with `volume`, as it was opened.

    One stamp that is newer than the volume tells of all of it; one of another volume, or one that was
    there and is gone, tells of its group.
    """
    reasons: dict[str, str] = {}
    states: dict[str, CloneState] = {}
    newest, older = 0, ""
    for group, those in units.items():
        for unit, expected in zip(those, _stamped(volume, group), strict=False):
            stamp = Stamp.of(unit)
            if stamp is None:
                if expected and _is_there(unit):
                    reasons[group] = (
                        f"{unit.name} has lost the attribute {STAMP} that was left with it: it was "
                        f"replaced, or copied without its attributes"
                    )
                continue
            if stamp.uuid != volume.uuid:
                reasons[group] = (
                    f"{unit.name} has been in use with another metadata volume ({stamp.uuid})"
                )
            elif stamp.generation > volume.generation:
                if stamp.word in set(CloneState):
                    states[unit.name] = CloneState(stamp.word)
                newest = max(newest, stamp.generation)
                older = (
                    f"the metadata volume {volume.name} is older than {unit.name}, which was in use "
                    f"with its record {stamp.generation}: the volume has record "
                    f"{volume.generation}, so it was replaced by an older copy, or its last record "
                    f"was damaged"
                )
    return Doubt(dict.fromkeys(units, older) if newest else reasons, newest, states)


def _stamped(volume: MetadataVolume, group: str) -> Iterator[bool]:
    """Which backings of a group must have a stamp: the Source, and the clones in their order."""
    for record in volume.record.groups:
        if record.name == group:
            yield record.stamped
            yield from (clone.stamped for clone in record.clones)
    yield from itertools.repeat(False)


def _is_there(unit: "Stamped") -> bool:
    return not isinstance(unit, MissingUnit) and (
        not isinstance(unit, _Path) or Path(unit.name).exists()
    )


def remember(record: GroupRecord, units: Iterable[Stamped]) -> GroupRecord:
    """The record, knowing which backings have a stamp: the Source's and the clones' in their order.
    These must be on stable storage before it is."""
    source, *others = (
        None if isinstance(unit, MissingUnit) else Stamp.of(unit) is not None for unit in units
    )
    clones = (
        clone if has is None else replace(clone, stamped=has)
        for clone, has in zip(record.clones, others, strict=True)
    )
    stamped = record.stamped if source is None else source
    return replace(record, stamped=stamped, clones=tuple(clones))


def disbelieve(
    volume: MetadataVolume,
    record: GroupRecord,
    reason: str,
    states: Mapping[str, CloneState],
    now: float,
) -> Loaded:
    """The group of `record` without belief in its maps or in what it says of copies that run.
    `states`: by their backings, those of clones of which something newer is known. Nothing is
    written but live maps; see `distrust_durably`."""
    loaded = load(volume, record)
    group = loaded.group
    loaded.delta.mark(0, loaded.delta.extents)
    for clone in group.clones.values():
        clone.delta.mark_all()
    loaded.protected.begin_epoch(record.epoch)
    group.protected.clear_all()
    last = {each.name: states.get(each.backing, each.state) for each in record.clones}
    record = replace(record, live_checksum=None)
    group.adopt(transitions.in_doubt(record, reason, last=last, now=now))
    group.newly_protected = {}
    return dataclasses.replace(loaded, damage=(), told=(in_doubt(record.name, reason),))


async def distrust_durably(recorder: Recorder, loaded: Loaded) -> None:
    """Every extent may differ, durably, before a record says so. Nothing is served yet: a crash
    anywhere in here leaves a group that claims more difference than there is, and is in doubt
    again. Raises ClonefsError."""
    batch = loaded.delta.begin_write()
    await recorder.write_durably(batch.writes)
    loaded.delta.end_write(written=True)
    await recorder.forget_protected(loaded.group.record)
