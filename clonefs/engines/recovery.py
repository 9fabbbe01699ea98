"""Recovery: a group as the volume has it (D9).

Same boot, or closed cleanly: the live maps as they stand. Otherwise they are lost, and filled from
the durable maps. Nothing is written here but live maps, so recovery that is cut off starts again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from clonefs.engines.durability import runs
from clonefs.group import CloneGroup, transitions
from clonefs.volume import CloneRecord, CloneState, DurableMap, GroupRecord, MetadataVolume

OVERWRITTEN = (
    "its live maps are not what the volume was closed with; they are filled from the durable ones"
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A group with its durable maps: `delta` is the PDM, `protected` the PPRM."""

    group: CloneGroup
    delta: DurableMap
    protected: DurableMap


def load(volume: MetadataVolume, record: GroupRecord) -> Loaded:
    """The group of `record`, its maps filled and its states set right. The record is not committed."""
    record = replace(record, live_checksum=None)  # they change from now on
    trusted = volume.trusts(record)
    group = CloneGroup(record, volume.map)
    delta, protected = volume.durable_maps(record, group.geometry.extents)
    if not trusted:
        for clone in group.clones.values():
            clone.delta.fill_from(delta.bits)
        group.protected.clear_all()
        if group.restoring is not None:
            group.protected.fill_from(protected.bits)
    counts = {name: clone.delta.count for name, clone in group.clones.items()}
    if trusted:
        group.adopt(transitions.recovered(record, counts))
    else:
        lost = bool(protected.damaged)
        group.adopt(transitions.without_trust(record, counts, lost=lost))
        if group.restoring is None:
            group.protected.clear_all()  # D has it all, and only a restore has a P
    if group.restoring is not None:
        unknown = group.protected.bits[: group.geometry.extents] & ~protected.bits
        group.newly_protected = dict.fromkeys(runs(unknown))
    return Loaded(group, delta, protected)


def foretell(volume: MetadataVolume, doubts: Mapping[str, str]) -> list[str]:
    """What the next mount in this boot will do, in words. It is the recovery itself that says so, so
    `volume` must be on a medium that keeps stores to itself. `doubts`: groups that will not be
    believed, and why (clonefs/engines/stamps.py)."""
    told = [_whence(volume)]
    for record in volume.record.groups:
        if record.name in doubts:
            told.append(f"{record.name}: {doubts[record.name]}; every extent is taken to differ")
            continue
        if record.name in volume.overwritten:
            told.append(f"{record.name}: {OVERWRITTEN}")
        group = load(volume, record).group
        for clone in record.clones:
            told += _fate(group, clone)
    return told


def _whence(volume: MetadataVolume) -> str:
    if volume.record.clean:
        return "the volume was closed cleanly: the live maps are taken as they stand"
    if volume.trusted:
        return "only the daemon has died: the live maps are taken as they stand"
    return "the machine went down: the live maps are filled from the durable ones"


def _fate(group: CloneGroup, before: CloneRecord) -> list[str]:
    after = group.clones[before.name]
    name = f"{group.record.name}/{before.name}"
    changed = "" if before.state is after.state else f"{before.state} -> "
    if after.state is CloneState.SYNCHRONIZING:
        return [f"{name}: {changed}synchronizing, {after.delta.count} extents to copy"]
    if after.state is CloneState.RESTORING:
        pending, protected = group.pending_count(), group.protected.count
        return [f"{name}: the restore goes on, {pending} extents pending, {protected} protected"]
    return [f"{name}: {changed}{after.state}: {after.record.reason}"] if changed else []
