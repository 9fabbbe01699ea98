"""Recovery: a group as the volume has it (D9).

Same boot, or closed cleanly: the live maps as they stand. Otherwise they are lost, and filled from
the durable maps. Nothing is written here but live maps, so recovery that is cut off starts again.
"""

from collections.abc import Iterator, Mapping
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
    """A group with its durable maps: `delta` is the PDM, `protected` the PPRM. `damage`: what was
    found to be damaged, and `told`: what is done, one sentence each."""

    group: CloneGroup
    delta: DurableMap
    protected: DurableMap
    damage: tuple[str, ...]
    told: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recovery:
    """A recovery as it shows in events and status: when (seconds since the epoch), what was found,
    what of it is damaged, and what was done."""

    at: float
    found: str
    damage: tuple[str, ...]
    done: tuple[str, ...]

    def lines(self) -> tuple[str, ...]:
        """All of it, a sentence a line."""
        return (self.found, *self.damage, *self.done)


def load(volume: MetadataVolume, record: GroupRecord) -> Loaded:
    """The group of `record`, its maps filled and its states set right. The record is not committed."""
    record = replace(record, live_checksum=None)  # they change from now on
    trusted = volume.trusts(record)
    group = CloneGroup(record, volume.map)
    delta, protected = volume.durable_maps(record, group.geometry.extents)
    damage = tuple(_damage(record, delta, protected))
    lost = bool(protected.damaged) or protected.newest_epoch > record.epoch
    if not trusted:
        for clone in group.clones.values():
            clone.delta.fill_from(delta.bits)
        group.protected.clear_all()
        if group.protecting:
            group.protected.fill_from(protected.bits)
    elif volume.record.doubtful:
        _add_durable(group, delta, protected)
    after = record
    if record.void:
        group.protected.clear_all()
        after = transitions.protected_emptied(after)
    group.drop_protected()
    if protected.newest_epoch > record.epoch:  # that number must not come again
        after = replace(after, epoch=protected.newest_epoch + 1)
        protected.begin_epoch(after.epoch)
    counts = {name: clone.delta.count for name, clone in group.clones.items()}
    if trusted:
        after = transitions.recovered(after, counts)
    else:
        after = transitions.without_trust(after, counts, lost=lost)
    group.adopt(after)
    if not (trusted or group.protecting):
        group.protected.clear_all()  # D has it all, and only a Protected Restore has a P
    if group.protecting:
        extents = group.geometry.extents
        unknown = group.protected.bits[:extents] & ~protected.bits[:extents]
        group.newly_protected = dict.fromkeys(runs(unknown))
    fates = (line for clone in record.clones for line in _fate(group, clone))
    return Loaded(group, delta, protected, damage, tuple(fates))


def _damage(record: GroupRecord, delta: DurableMap, protected: DurableMap) -> Iterator[str]:
    pprm = "of the Persistent Protected Restore Map are damaged"
    for sectors, what in (
        (
            delta.damaged,
            "of the Persistent Delta Map are damaged: their extents are marked in it",
        ),
        (protected.single, f"{pprm} in one copy"),
        (protected.damaged, f"{pprm} in both copies"),
    ):
        if sectors:
            yield f"{record.name}: {len(sectors)} sectors {what}"
    if protected.newest_epoch > record.epoch:
        yield (
            f"{record.name}: the Persistent Protected Restore Map has restore number "
            f"{protected.newest_epoch} and the record {record.epoch}: the newest record is lost"
        )


def found(volume: MetadataVolume) -> str:
    """What the volume was found to be, in words."""
    if volume.trusted and volume.record.doubtful:
        return (
            "a write to the metadata volume has failed: the live maps are taken with what the "
            "durable ones have besides"
        )
    if volume.record.clean:
        return "the volume was closed cleanly: the live maps are taken as they stand"
    if volume.trusted:
        return "only the daemon has ended: the live maps are taken as they stand"
    return "the machine went down: the live maps are filled from the durable ones"


def _add_durable(group: CloneGroup, delta: DurableMap, protected: DurableMap) -> None:
    """Live maps that may have lost stores get what is on stable storage: more can only be copied."""
    extents = group.geometry.extents
    for first, stop in runs(delta.bits[:extents]):
        for clone in group.clones.values():
            clone.delta.mark(first, stop)
    if group.protecting:
        for first, stop in runs(protected.bits[:extents]):
            group.protected.mark(first, stop)


def foretell(volume: MetadataVolume, doubts: Mapping[str, str]) -> list[str]:
    """What the next mount in this boot will do, in words. It is the recovery itself that says so, so
    `volume` must be on a medium that keeps stores to itself. `doubts`: groups that will not be
    believed, and why (clonefs/engines/stamps.py)."""
    told = [found(volume), *volume.damage]
    for record in volume.record.groups:
        if record.name in doubts:
            told.append(in_doubt(record.name, doubts[record.name]))
            continue
        if record.name in volume.overwritten:
            told.append(f"{record.name}: {OVERWRITTEN}")
        if volume.record.boot_id == volume.boot_id:
            told += [lost_is_forgotten(record.name, name) for name in transitions.unflushed(record)]
        loaded = load(volume, record)
        told += [*loaded.damage, *loaded.told]
    return told


def lost_is_forgotten(group: str, name: str | None) -> str:
    """That a flush of an LU had failed, and what is done about it, as a sentence."""
    return (
        f"{group}/{name or 'source'}: a flush of it had failed: what the kernel has cached of it is "
        f"forgotten, and what its device has counts"
    )


def in_doubt(group: str, reason: str) -> str:
    """That a group is not believed, as a sentence."""
    return f"{group}: {reason}; every extent is taken to differ"


def _fate(group: CloneGroup, before: CloneRecord) -> list[str]:
    after = group.clones[before.name]
    name = f"{group.record.name}/{before.name}"
    changed = "" if before.state is after.state else f"{before.state} -> "
    if after.state is CloneState.SYNCHRONIZING:
        return [f"{name}: {changed}synchronizing, {after.delta.count} extents to copy"]
    if after.state is CloneState.RESTORING:
        pending, protected = group.pending_count(), group.protected.count
        return [f"{name}: the restore goes on, {pending} extents pending, {protected} protected"]
    if after.state is CloneState.REVERSE_SYNCHRONIZING:
        return [f"{name}: the reverse sync goes on, {group.pending_count()} extents pending"]
    return [f"{name}: {changed}{after.state}: {after.record.reason}"] if changed else []
