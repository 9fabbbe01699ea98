"""Recovery by itself: what it makes of maps that are not simply what the daemon left."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from clonefs.engines.recovery import load
from clonefs.volume import (
    CloneRecord,
    CloneState,
    GroupRecord,
    MetadataVolume,
    Record,
    format_volume,
    open_volume,
)

EXTENTS = 16


@dataclass(frozen=True)
class Found:
    """What recovery has made of the group: the extents of its maps, and whether P counts as void."""

    delta: set[int]
    protected: set[int]
    void: bool


def recovered(
    meta: Path, state: CloneState, change: Callable[[Record], Record] = lambda record: record
) -> Found:
    """A daemon has died with D = {1, 2, 5} and P = {5, 6} in the live maps, and with 1 to 3 and 5 in
    both durable maps. `change`: how its last record differs from an ordinary one."""
    format_volume(meta, size=None, force=False)
    volume = open_volume(meta)
    volume.commit(change(volume.opened().with_group(_group(volume, state))))
    group = volume.record.groups[0]
    for slot, extents in ((group.clones[0].delta, (1, 2, 5)), (group.protected, (5, 6))):
        for extent in extents:
            volume.map(slot, EXTENTS).mark(extent, extent + 1)
    for durable in volume.durable_maps(group, EXTENTS):
        durable.mark(1, 4)
        durable.mark(5, 6)
        for offset, data in durable.begin_write().writes:
            volume.write_durably(offset, data)
        durable.end_write(written=True)
    volume.close(clean=False)

    volume = open_volume(meta)
    try:
        assert volume.trusted
        loaded = load(volume, volume.record.groups[0]).group
        bits = [
            {extent for extent in range(EXTENTS) if extents[extent]}
            for extents in (loaded.clones["nightly"].delta, loaded.protected)
        ]
        return Found(bits[0], bits[1], loaded.record.void)
    finally:
        del loaded
        volume.close(clean=False)


def _group(volume: MetadataVolume, state: CloneState) -> GroupRecord:
    protected = volume.new_map_slot(EXTENTS)
    durable = volume.new_durable_slot(EXTENTS, beside=(protected,))
    group = GroupRecord(
        name="payroll",
        backing="/source",
        size=EXTENTS << 16,
        extent_size=1 << 16,
        protected=protected,
        durable=durable,
    )
    delta = volume.new_map_slot(EXTENTS, beside=(protected, durable))
    return group.with_clone(CloneRecord("nightly", "/nightly", state, delta))


def test_maps_stand_as_the_daemon_left_them(tmp_path: Path) -> None:
    found = recovered(tmp_path / "meta", CloneState.RESTORING)
    assert found == Found({1, 2, 5}, {5, 6}, void=False)


@pytest.mark.parametrize("state", [CloneState.RESTORING, CloneState.REVERSE_OUT_OF_SYNC])
def test_a_void_map_is_empty(tmp_path: Path, state: CloneState) -> None:
    """The restore has begun again, or was broken off, and the daemon died before it was emptied."""

    def change(record: Record) -> Record:
        return record.with_group(replace(record.groups[0], void=True))

    found = recovered(tmp_path / "meta", state, change)
    assert found == Found({1, 2, 5}, set(), void=False)


def test_doubtful_maps_get_what_the_durable_ones_have(tmp_path: Path) -> None:
    found = recovered(
        tmp_path / "meta", CloneState.RESTORING, lambda record: replace(record, doubtful=True)
    )
    assert found == Found({1, 2, 3, 5}, {1, 2, 3, 5, 6}, void=False)
