"""Recovery: a group as the volume has it (D9).

Same boot, or closed cleanly: the live maps as they stand. Otherwise they are lost, and filled from
the durable maps. Nothing is written here but live maps, so recovery that is cut off starts again.
"""

from dataclasses import dataclass

from clonefs.engines.durability import runs
from clonefs.group import CloneGroup, transitions
from clonefs.volume import DurableMap, GroupRecord, MetadataVolume


@dataclass(frozen=True, slots=True)
class Loaded:
    """A group with its durable maps: `delta` is the PDM, `protected` the PPRM."""

    group: CloneGroup
    delta: DurableMap
    protected: DurableMap


def load(volume: MetadataVolume, record: GroupRecord) -> Loaded:
    """The group of `record`, its maps filled and its states set right. The record is not committed."""
    group = CloneGroup(record, volume.map)
    delta, protected = volume.durable_maps(record, group.geometry.extents)
    if not volume.trusted:
        for clone in group.clones.values():
            clone.delta.fill_from(delta.bits)
        group.protected.clear_all()
        if group.restoring is not None:
            group.protected.fill_from(protected.bits)
    counts = {name: clone.delta.count for name, clone in group.clones.items()}
    if volume.trusted:
        group.adopt(transitions.recovered(record, counts))
    else:
        lost = bool(protected.damaged)
        group.adopt(transitions.without_trust(record, counts, lost=lost))
    if group.restoring is not None:
        unknown = group.protected.bits[: group.geometry.extents] & ~protected.bits
        group.newly_protected = dict.fromkeys(runs(unknown))
    return Loaded(group, delta, protected)
