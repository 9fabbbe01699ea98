"""The simulator is tested itself: each rule is broken in one place, and it must notice.

A mutant is a patch of the real code. For each, seeds are run until one of them finds it; a mutant
that survives them all means that the simulator would not notice that rule being broken.
"""

import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sized
from contextlib import asynccontextmanager
from dataclasses import replace as replace_plan
from typing import Any

import pytest
import trio
from bitarray import bitarray
from msgspec.structs import replace

from clonefs.engines import GroupServer, Recorder, SourceLu, StorageSystem, recovery
from clonefs.engines.cod import CodEngine
from clonefs.engines.durability import Durability
from clonefs.engines.gate import Gate
from clonefs.engines.verify import Verification
from clonefs.extents import ExtentMap
from clonefs.group import Claim, Clone, CloneGroup, CodScoreboard, Route, transitions
from clonefs.group.writes_in_flight import WritesInFlight
from clonefs.testing import SCENARIOS, Blow, Plan, Simulation, plan_of, random_plan
from clonefs.testing.world import SimulatedUnit
from clonefs.units import Buffer, FlushFailure, LogicalUnit
from clonefs.volume import DurableMap, GroupRecord, MapSlot, MetadataVolume, Record
from clonefs.volume.layout import DURABLE_SECTOR

RUNS = 1200
DEATHS = (Blow.KILL, Blow.POWER_CUT)

Most = Callable[[int], int]
Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]


def source_write_unmarked(patch: Patch) -> None:
    """L1: a host write to the Source does not mark the split clones."""

    def admit(self: CloneGroup, offset: int, length: int) -> bool:
        return not self.mirrored and self.restoring is None

    patch.setattr(CloneGroup, "admit_simple_write", admit)


def clone_write_unmarked(patch: Patch) -> None:
    """L1: a host write to a fractured clone does not mark it."""
    patch.setattr(CloneGroup, "mark_clone_write", lambda self, clone, offset, length: None)


def mirrored_write_unmarked(patch: Patch) -> None:
    """L2: D[c] is not set before the two writes."""
    original = CloneGroup._mark_mirrors

    def mark(self: CloneGroup, ticket: Any) -> None:
        saved = [(clone.delta, clone.delta.snapshot()) for clone in ticket.mirrors]
        original(self, ticket)
        for delta, before in saved:
            for extent in range(ticket.first, ticket.stop):
                if not before[extent]:
                    delta.clear(extent, extent + 1)

    patch.setattr(CloneGroup, "_mark_mirrors", mark)


def mirrored_write_forgets(patch: Patch) -> None:
    """L2: D[c] is cleared although it was set before."""
    original = CloneGroup._mark_mirrors

    def mark(self: CloneGroup, ticket: Any) -> None:
        original(self, ticket)
        ticket.marked.clear()

    patch.setattr(CloneGroup, "_mark_mirrors", mark)


def overlapping_writes_pass(patch: Patch) -> None:
    """L2: overlapping writes to a mirrored extent are not serialised."""
    patch.setattr(WritesInFlight, "overlaps", lambda self, offset, end: False)


def claims_do_not_hold(patch: Patch) -> None:
    """L3: host writes do not wait for claimed extents."""
    original = CloneGroup.admit_write

    def admit(self: CloneGroup, offset: int, length: int) -> Any:
        overlapping = CodScoreboard.overlapping
        with pytest.MonkeyPatch.context() as inner:
            # The claims of the write itself must still be possible.
            inner.setattr(
                CodScoreboard,
                "overlapping",
                lambda board, first, stop: (
                    None
                    if not self.next_pending(first, stop) >= 0
                    else overlapping(board, first, stop)
                ),
            )
            return original(self, offset, length)

    patch.setattr(CloneGroup, "admit_write", admit)


def rest_of_a_batch_counts(patch: Patch) -> None:
    """L3: runs that were to be copied after one that failed count as copied."""
    original = SimulatedUnit.copy_from

    async def copy_from(self: SimulatedUnit, origin: Any, ranges: Any, *, share: bool) -> int:
        await original(self, origin, ranges, share=share)
        return len(ranges)

    patch.setattr(SimulatedUnit, "copy_from", copy_from)


def failed_copy_counts(patch: Patch) -> None:
    """L3: a copy that failed, or was cut off, clears the Delta Map all the same."""
    original = CloneGroup.end_copy

    def end(self: CloneGroup, claim: Claim, *, copied: bool) -> None:
        original(self, claim, copied=True)

    patch.setattr(CloneGroup, "end_copy", end)


def copied_at_once_though_not_written(patch: Patch) -> None:
    """L5: a copy for a read counts as made although the Source could not take it in one step."""

    def copy(self: CodEngine, claim: Claim, offset: int, length: int) -> bool:
        data = self._server.units[claim.clone].read_now(offset, length)
        if data is None:
            return False
        self._server.source.write_now(offset, data)
        return True

    patch.setattr(CodEngine, "_copy_in_one_step", copy)


def intent_under_way_is_believed(patch: Patch) -> None:
    """D1: what is being written to the Persistent Delta Map counts as if it were there."""
    original = DurableMap.begin_write

    def begin(self: DurableMap) -> Any:
        batch = original(self)
        self._under_way = {}
        return batch

    patch.setattr(DurableMap, "begin_write", begin)


def cleared_before_the_copy(patch: Patch) -> None:
    """L4: D[c] is cleared before the copy is complete."""
    original = CloneGroup.claim_restore

    def claim(self: CloneGroup, start: int, most: Most) -> Claim | None:
        made = original(self, start, most)
        if made is not None and self.restoring is not None:
            self.restoring.delta.clear(made.first, made.stop)
        return made

    patch.setattr(CloneGroup, "claim_restore", claim)


def write_not_protected(patch: Patch) -> None:
    """L4: a host write during a restore does not set P."""

    def protect(self: CloneGroup, first: int, stop: int) -> None:
        if self.restoring is not None:
            self.restoring.delta.clear(first, stop)

    patch.setattr(CloneGroup, "_protect", protect)


def protected_before_written(patch: Patch) -> None:
    """L4: a whole-extent write protects the extent before all of it has been written."""
    original = CloneGroup._claim_whole

    def claim(self: CloneGroup, first: int, stop: int) -> tuple[Claim, ...]:
        claims = original(self, first, stop)
        for each in claims:
            self._protect(each.first, each.stop)
        return claims

    patch.setattr(CloneGroup, "_claim_whole", claim)


def partial_write_not_copied(patch: Patch) -> None:
    """L4: a write that covers a pending extent in part does not wait for its copy."""
    patch.setattr(CloneGroup, "pending_in_part", lambda self, offset, length: [])


def reads_the_source(patch: Patch) -> None:
    """L5: a read that meets a pending extent gets the Source's bytes."""

    def read_now(self: SourceLu, offset: int, length: int) -> Buffer | None:
        return None if self._gate.held else self._unit.read_now(offset, length)

    patch.setattr(SourceLu, "read_now", read_now)


def delta_not_spread(patch: Patch) -> None:
    """L6: a restore does not mark the other clones."""
    patch.setattr(CloneGroup, "spread_delta", lambda self, name: None)


def sync_passes_a_restore(patch: Patch) -> None:
    """L6: a mirrored clone is copied to from extents that are still pending."""
    original = CloneGroup.claim_sync

    def claim(self: CloneGroup, clone: Clone, start: int, most: Most) -> Claim | None:
        restoring, self.restoring = self.restoring, None
        try:
            return original(self, clone, start, most)
        finally:
            self.restoring = restoring

    patch.setattr(CloneGroup, "claim_sync", claim)


def nobody_is_drained(patch: Patch) -> None:
    """D3, D4: requests under way are not waited for."""

    @asynccontextmanager
    async def hold(self: Gate, scoreboard: Sized) -> AsyncIterator[None]:
        self.held = True
        try:
            await trio.sleep(0.0001)  # virtual time: a loop of holds must not stand still
            yield
        finally:
            self.held = False
            self._arrivals.unpark_all()

    patch.setattr(Gate, "hold", hold)


def not_split_at_a_restore(patch: Patch) -> None:
    """D4: mirrored clones stay mirrored when a restore begins."""
    original = transitions.begin_restore

    def begin(group: GroupRecord, name: str, **facts: Any) -> GroupRecord:
        kept = {clone.name: clone for clone in group.clones if clone.name != name}
        after = original(group, name, **facts)
        for clone in kept.values():
            after = after.with_clone(clone)
        return after

    patch.setattr(transitions, "begin_restore", begin)


def protected_map_dropped(patch: Patch) -> None:
    """D7: the Protected Restore Map does not become the Delta Map."""
    original = StorageSystem._complete_restore

    async def complete(self: StorageSystem, server: Any, name: str) -> None:
        server.group.protected.clear_all()
        await original(self, server, name)

    patch.setattr(StorageSystem, "_complete_restore", complete)


def restart_drops_early(patch: Patch) -> None:
    """A restore that begins again drops the Protected Restore Map before the record says so."""
    original = StorageSystem._empty_protected

    def empty(self: StorageSystem, server: Any) -> Any:
        slot = original(self, server)
        protected: ExtentMap = server.group.protected
        protected.clear_all()
        return slot

    patch.setattr(StorageSystem, "_empty_protected", empty)


def intent_not_awaited(patch: Patch) -> None:
    """D1: writes are issued before the PDM has them on stable storage."""
    patch.setattr(
        DurableMap, "covers", lambda self, first, stop: self.bits.find(0, first, stop) < 0
    )


def intent_of_the_first_sector_is_enough(patch: Patch) -> None:
    """D1: a write to extents of two sectors waits for the first of them."""
    original = DurableMap.covers

    def covers(self: DurableMap, first: int, stop: int) -> bool:
        within = min(stop, self.range_of(first // self.extents_per_sector)[1])
        return original(self, first, within) and self.bits.find(0, first, stop) < 0

    patch.setattr(DurableMap, "covers", covers)


def second_copies_are_not_read(patch: Patch) -> None:
    """D6: of the second copies of the PPRM only the first sector is read."""
    original = DurableMap.load

    def load(self: DurableMap, read: Any, *, damaged_as: int) -> None:
        def read_less(offset: int, length: int) -> bytes:
            data: bytes = read(offset, length)
            second = len(self._offsets) > 1 and offset >= self._offsets[1]
            return data[:DURABLE_SECTOR].ljust(length, b"?") if second else data

        original(self, read_less, damaged_as=damaged_as)

    patch.setattr(DurableMap, "load", load)


def trimmed_without_a_flush(patch: Patch) -> None:
    """D2: a checkpoint clears the PDM without flushing the units."""
    original = Durability.checkpoint

    async def nothing() -> None:
        pass

    async def checkpoint(self: Durability, flush: Any) -> None:
        await original(self, nothing)

    patch.setattr(Durability, "checkpoint", checkpoint)


def trimmed_though_protected(patch: Patch) -> None:
    """D2: a checkpoint clears what only the Protected Restore Map has."""

    def union(self: CloneGroup, start: int, stop: int) -> bitarray:
        bits = bitarray(stop - start, endian="little")
        for clone in self.clones.values():
            bits |= clone.delta.bits[start:stop]
        return bits

    patch.setattr(CloneGroup, "live_union", union)


def fractured_without_a_flush(patch: Patch) -> None:
    """D3: the clone is not flushed before the record says that it is fractured."""

    async def nothing(self: StorageSystem, server: Any, names: Any) -> None:
        pass

    patch.setattr(StorageSystem, "_flush_mirrored", nothing)


def restored_into_the_old_map(patch: Patch) -> None:
    """D4: a restore begins with the PPRM of the one before."""
    original = transitions.begin_restore

    def begin(group: GroupRecord, name: str, **facts: Any) -> GroupRecord:
        return replace(original(group, name, **facts), epoch=group.epoch)

    patch.setattr(transitions, "begin_restore", begin)


def protected_before_the_flush(patch: Patch) -> None:
    """D5: the PPRM gets an extent before the Source is flushed."""

    async def flush(self: Durability, flush: Any) -> None:
        for first, stop in list(self._group.newly_protected):
            self.protected.mark(first, stop)
        await self.settle(self.protected)
        await flush()

    patch.setattr(Durability, "flush", flush)


def flushed_without_the_map(patch: Patch) -> None:
    """D6: a host's flush does not let the PPRM have what P has."""

    async def flush(self: Durability, flush: Any) -> None:
        await flush()

    patch.setattr(Durability, "flush", flush)


def ended_without_a_flush(patch: Patch) -> None:
    """D7: a restore ends without a flush of the Source."""

    async def complete(self: StorageSystem, server: Any, name: str) -> None:
        async with server.held():
            if server.group.next_pending(0, server.group.geometry.extents) < 0:
                server.group.drop_protected_delta()
                await server.change(lambda record: transitions.complete_restore(record, name))

    patch.setattr(StorageSystem, "_complete_restore", complete)


def recovered_without_the_protected_map(patch: Patch) -> None:
    """D9: recovery does not fill P."""
    original = recovery.load

    def load(volume: MetadataVolume, record: GroupRecord) -> recovery.Loaded:
        loaded = original(volume, record)
        if not volume.trusted:
            loaded.group.protected.clear_all()
        return loaded

    patch.setattr("clonefs.engines.system.load", load)
    patch.setattr("clonefs.testing.simulation.load", load)


def forgets_what_was_touched(patch: Patch) -> None:
    """D2: a checkpoint clears extents that were written to, and are equal again, since it flushed."""

    async def checkpoint(self: Durability, flush: Any) -> None:
        chosen = [each async for each in self._clear_in_live_maps()]
        if chosen:
            await flush()
        for start, clear in chosen:
            self.delta.clear(clear & ~self._group.live_union(start, start + len(clear)), start)
        await self.settle(self.delta)

    patch.setattr(Durability, "checkpoint", checkpoint)


def does_not_look_again(patch: Patch) -> None:
    """D2: a checkpoint clears what was clear before its flush, whatever the maps say after it."""
    original = CloneGroup.live_union
    asked: dict[tuple[int, int, int], bitarray] = {}

    def union(self: CloneGroup, start: int, stop: int) -> bitarray:
        key = (id(self), start, stop)
        if self.touched is not None and key in asked:
            return asked.pop(key)
        found = asked[key] = original(self, start, stop)
        return found

    patch.setattr(CloneGroup, "live_union", union)


def new_clone_not_marked(patch: Patch) -> None:
    """D1: a new clone is named in the record before the PDM has all of it."""

    async def nothing(self: Durability) -> None:
        pass

    patch.setattr(Durability, "mark_all", nothing)


def protected_as_it_is_after_the_flush(patch: Patch) -> None:
    """D5: the PPRM gets what P has when the flush ends, and not what it had when the flush began."""

    async def flush(self: Durability, flush: Any) -> None:
        await flush()
        for first, stop in list(self._group.newly_protected):
            self.protected.mark(first, stop)
        await self.settle(self.protected)
        self._group.newly_protected = {}

    patch.setattr(Durability, "flush", flush)


def restored_without_a_flush_of_the_clone(patch: Patch) -> None:
    """D4: a restore begins from a clone that is not flushed."""
    original = StorageSystem._restore

    async def restore(self: StorageSystem, group: str, name: str, command: Any) -> None:
        server = self.server(group)
        with pytest.MonkeyPatch.context() as inner:
            flush = type(server).flush_clone

            async def flush_others(server: Any, each: str) -> None:
                if each != name:
                    await flush(server, each)

            inner.setattr(type(server), "flush_clone", flush_others)
            await original(self, group, name, command)

    patch.setattr(StorageSystem, "_restore", restore)


def mirrored_is_not_flushed(patch: Patch) -> None:
    """D8: a host's flush in a Reverse Sync does not flush the clone."""

    async def flush(self: SourceLu) -> None:
        await self._gate.enter()
        try:
            await self._server.flush_source()
        finally:
            self._gate.leave()

    patch.setattr(SourceLu, "flush", flush)


def reverse_reads_the_source(patch: Patch) -> None:
    """D8: in a Reverse Sync, what is being written to is read from the Source."""
    original = CloneGroup.route_read

    def route(self: CloneGroup, extent: int, stop: int, *, copy: bool) -> Any:
        found = original(self, extent, stop, copy=copy)
        return (Route.SOURCE, *found[1:]) if found[0] is Route.CLONE else found

    patch.setattr(CloneGroup, "route_read", route)


def reverse_writes_to_one(patch: Patch) -> None:
    """D8: in a Reverse Sync, hosts write to the Source alone."""
    original = CloneGroup.adopt

    def adopt(self: CloneGroup, record: GroupRecord) -> None:
        original(self, record)
        if self.restoring is not None:
            restoring = self.restoring
            self.mirrored = tuple(each for each in self.mirrored if each is not restoring)

    patch.setattr(CloneGroup, "adopt", adopt)


def copies_half_a_write(patch: Patch) -> None:
    """D8, L2: an extent that is being written to, with its clone, is copied."""
    patch.setattr(
        CloneGroup, "_free_run", lambda self, first, stop: self.scoreboard.free_run(first, stop)
    )


def reverse_ends_without_a_flush(patch: Patch) -> None:
    """D8: the Source is what others are copied from before it is flushed."""

    async def complete(self: StorageSystem, server: Any, name: str) -> None:
        async with server.held():
            await self._copy_hot_extents(server, name)
            if not server.group.clones[name].delta.count:
                await server.change(
                    lambda record: transitions.complete_reverse_sync(record, name, now=0.0)
                )

    patch.setattr(StorageSystem, "_complete_reverse_sync", complete)


def takes_effect_before_the_record(patch: Patch) -> None:
    """D3, D4, D8: a state is taken for changed before the record says so."""

    async def change(self: Recorder, *changes: Any) -> None:
        before = [group.record for group, _ in changes]
        for group, change in changes:
            group.adopt(change(group.record))

        def apply(record: Any) -> Any:
            for (_, change), old in zip(changes, before, strict=True):
                record = record.with_group(change(old))
            return record

        await self.commit(apply)

    patch.setattr(Recorder, "change", change)


def one_record_for_each_group(patch: Patch) -> None:
    """D3: clones of several groups that are fractured together are committed one after the other."""
    original = Recorder.change

    async def change(self: Recorder, *changes: Any) -> None:
        for each in changes:
            await original(self, each)

    patch.setattr(Recorder, "change", change)


def one_group_held_after_the_other(patch: Patch) -> None:
    """D3: groups whose clones are fractured together are not held at the same time."""
    original = StorageSystem._fracture

    async def fracture(self: StorageSystem, servers: Any) -> None:
        for each in servers:
            await original(self, [each])

    patch.setattr(StorageSystem, "_fracture", fracture)


def recovery_believes_the_state(patch: Patch) -> None:
    """D9: a mirrored clone that differs is still called synchronized."""
    patch.setattr(transitions, "recovered", lambda group, counts: group)


def recovered_with_the_live_maps(patch: Patch) -> None:
    """D9: the live maps are believed after a power cut."""
    patch.setattr(Record, "trusts_live_maps", lambda self, boot_id: True)


def flushed_again_and_believed(patch: Patch) -> None:
    """D10: a flush that failed is tried again, and believed."""
    patch.setattr(FlushFailure, "check", lambda self: None)


def failed_flush_leaves_the_maps(patch: Patch) -> None:
    """D10: after a flush that failed the maps say what they said before."""

    async def nothing(self: Durability) -> None:
        pass

    patch.setattr(CloneGroup, "distrust", lambda self, name: None)
    patch.setattr(GroupServer, "_distrust_durably", nothing)


def failed_volume_goes_on(patch: Patch) -> None:
    """D10: a write of a durable map that failed counts, and the volume goes on being written."""
    original = DurableMap.end_write
    patch.setattr(DurableMap, "end_write", lambda self, *, written: original(self, written=True))
    patch.setattr(Recorder, "check", lambda self: None)


def failed_record_stays(patch: Patch) -> None:
    """D10: a record that could not be written is left, for the next mount to find."""
    patch.setattr(MetadataVolume, "_doubt", lambda self: True)


def stamped_before_the_commit(patch: Patch) -> None:
    """D11: the backings learn of a record that may never be on disk."""
    original = Recorder._commit

    def commit(self: Recorder, record: Record, backings: Iterable[tuple[LogicalUnit, str]]) -> None:
        for unit, word in backings:
            stamp = f"{self.volume.uuid} {self.volume.generation + 1} {word}"
            unit.set_stamp(stamp, durable=False)
        original(self, record, backings)

    patch.setattr(Recorder, "_commit", commit)


def verified_without_a_claim(patch: Patch) -> None:
    """A verification reports what differs at a moment, without a claim."""
    patch.setattr(Verification, "_look_again", _report_it)


async def _report_it(self: Verification, extent: int) -> None:
    self._report(extent)


def verified_by_the_map_of_before(patch: Patch) -> None:
    """A verification looks at the maps before it reads, and not after."""
    patch.setattr(Verification, "_should_be_equal", lambda self, extent: True)


def remembers_a_stamp_that_is_not_durable(patch: Patch) -> None:
    """D11: the record remembers a stamp that a power cut may take."""
    original = Recorder._stamp

    def stamp(
        self: Recorder, backings: Iterable[tuple[LogicalUnit, str]], *, durable: bool
    ) -> None:
        original(self, backings, durable=False)

    patch.setattr(Recorder, "_stamp", stamp)


def stores_to_what_rests(patch: Patch) -> None:
    """A bit is set in a piece of a live map that rests."""
    patch.setattr(ExtentMap, "_touch", lambda self, first, stop: None)


def rests_though_marked(patch: Patch) -> None:
    """A piece of a live map rests in which a bit was set while it was flushed."""
    original = ExtentMap._touch

    def touch(self: ExtentMap, first: int, stop: int) -> None:
        to_rest = [piece for piece, rests in self._watched.items() if not rests]
        original(self, first, stop)
        self._watched.update(dict.fromkeys(to_rest, False))

    patch.setattr(ExtentMap, "_touch", touch)


def rests_without_a_flush(patch: Patch) -> None:
    """A piece of a live map rests, and is not clear on stable storage."""
    patch.setattr(MetadataVolume, "flush_map", lambda self, slot: None)


def rests_at_once(patch: Patch) -> None:
    """What is clear in the page cache rests from the beginning, also after a death."""
    original = MetadataVolume._pieces

    def pieces(self: MetadataVolume, slot: MapSlot, extents: int) -> Any:
        record = self.record
        self.record = replace(record, clean=True)
        try:
            return original(self, slot, extents)
        finally:
            self.record = record

    patch.setattr(MetadataVolume, "_pieces", pieces)


def forgets_that_a_flush_failed(patch: Patch) -> None:
    """D10: the record does not say that a flush has failed."""

    async def remember(self: GroupServer, name: str | None) -> None:
        pass

    patch.setattr(GroupServer, "_remember_failure", remember)


def believes_the_page_cache(patch: Patch) -> None:
    """D10: what a failed flush has lost is still there for the next daemon, which copies it."""

    async def forget(self: SimulatedUnit) -> None:
        pass

    patch.setattr(SimulatedUnit, "forget_cached", forget)


def copies_hot_extents_all_the_same(patch: Patch) -> None:
    """D10: at the end of a sync the last extents are copied from a Source whose flush has failed."""
    original = StorageSystem._copy_hot_extents

    async def copy(self: StorageSystem, server: GroupServer, name: str) -> None:
        saved, server.unflushed = server.unflushed, {}
        try:
            await original(self, server, name)
        finally:
            server.unflushed = {**saved, **server.unflushed}

    patch.setattr(StorageSystem, "_copy_hot_extents", copy)


MUTANTS: list[Mutant] = [
    forgets_that_a_flush_failed,
    believes_the_page_cache,
    copies_hot_extents_all_the_same,
    stores_to_what_rests,
    rests_though_marked,
    rests_without_a_flush,
    rests_at_once,
    source_write_unmarked,
    clone_write_unmarked,
    mirrored_write_unmarked,
    mirrored_write_forgets,
    overlapping_writes_pass,
    claims_do_not_hold,
    failed_copy_counts,
    rest_of_a_batch_counts,
    copied_at_once_though_not_written,
    cleared_before_the_copy,
    write_not_protected,
    protected_before_written,
    partial_write_not_copied,
    reads_the_source,
    delta_not_spread,
    sync_passes_a_restore,
    nobody_is_drained,
    not_split_at_a_restore,
    protected_map_dropped,
    restart_drops_early,
    intent_not_awaited,
    intent_under_way_is_believed,
    intent_of_the_first_sector_is_enough,
    second_copies_are_not_read,
    trimmed_without_a_flush,
    trimmed_though_protected,
    fractured_without_a_flush,
    restored_into_the_old_map,
    protected_before_the_flush,
    flushed_without_the_map,
    ended_without_a_flush,
    recovered_without_the_protected_map,
    forgets_what_was_touched,
    does_not_look_again,
    new_clone_not_marked,
    protected_as_it_is_after_the_flush,
    restored_without_a_flush_of_the_clone,
    mirrored_is_not_flushed,
    reverse_reads_the_source,
    reverse_writes_to_one,
    copies_half_a_write,
    reverse_ends_without_a_flush,
    takes_effect_before_the_record,
    one_record_for_each_group,
    one_group_held_after_the_other,
    recovery_believes_the_state,
    recovered_with_the_live_maps,
    flushed_again_and_believed,
    failed_flush_leaves_the_maps,
    failed_volume_goes_on,
    failed_record_stays,
    stamped_before_the_commit,
    remembers_a_stamp_that_is_not_durable,
    verified_without_a_claim,
    verified_by_the_map_of_before,
]


# Rules that only a few of the runs come near: the scenario and the blow that do, or a plan.
Focus = tuple[str, Blow] | Plan
MANY_EXTENTS = Plan(
    0, clones=2, extents=12, lives=4, points_a_life=1500, hosts=4, requests=40, commands=30
)
SMALL_AND_KILLED = Plan(
    0, clones=1, extents=3, lives=5, points_a_life=500, requests=12, commands=15, power_cuts=0.0
)
FAILING_VOLUME = replace_plan(
    MANY_EXTENTS, clones=1, extents=6, power_cuts=1.0, volume_fault_rate=0.01, lasting_rate=1.0
)
FAILING_FLUSHES = replace_plan(
    MANY_EXTENTS, extents=6, points_a_life=500, commands=10, flush_fault_rate=0.05, power_cuts=0.5
)
SEVERAL_SECTORS = replace_plan(MANY_EXTENTS, extents_per_sector=3, power_cuts=1.0, rot=0.7)
A_SECTOR_EACH = replace_plan(
    MANY_EXTENTS, extents=6, extents_per_sector=1, points_a_life=500, power_cuts=1.0
)
FOCUS: dict[Mutant, Focus] = {
    intent_of_the_first_sector_is_enough: A_SECTOR_EACH,
    second_copies_are_not_read: SEVERAL_SECTORS,
    forgets_that_a_flush_failed: FAILING_FLUSHES,
    believes_the_page_cache: FAILING_FLUSHES,
    copies_hot_extents_all_the_same: FAILING_FLUSHES,
    protected_before_written: SMALL_AND_KILLED,
    trimmed_though_protected: MANY_EXTENTS,
    forgets_what_was_touched: ("checkpoints", Blow.POWER_CUT),
    does_not_look_again: MANY_EXTENTS,
    protected_before_the_flush: ("protected_restore", Blow.POWER_CUT),
    protected_as_it_is_after_the_flush: ("protected_restore", Blow.POWER_CUT),
    flushed_without_the_map: ("protected_restore", Blow.POWER_CUT),
    recovered_without_the_protected_map: ("protected_restore", Blow.POWER_CUT),
    ended_without_a_flush: ("protected_restore", Blow.POWER_CUT),
    restored_without_a_flush_of_the_clone: ("a_clone_is_written_to", Blow.POWER_CUT),
    mirrored_is_not_flushed: ("reverse_sync", Blow.POWER_CUT),
    reverse_ends_without_a_flush: ("reverse_sync", Blow.POWER_CUT),
    copies_half_a_write: ("reverse_sync", Blow.KILL),
    takes_effect_before_the_record: ("reverse_sync", Blow.KILL),
    one_record_for_each_group: ("two_groups_at_one_instant", Blow.KILL),
    one_group_held_after_the_other: ("two_groups_at_one_instant", Blow.KILL),
    flushed_again_and_believed: ("protected_restore", Blow.ERROR_ONCE),
    failed_flush_leaves_the_maps: FAILING_FLUSHES,
    failed_volume_goes_on: FAILING_VOLUME,
    failed_record_stays: ("protected_restore", Blow.ERROR_FOR_EVER),
}


def plans(mutant: Mutant) -> Iterator[Plan]:
    """What comes near, if something is named, and random hosts and any scenario in turn, without
    end."""
    for number in itertools.count():
        rng = random.Random(number)
        for focus in [FOCUS[mutant]] * 3 if mutant in FOCUS else []:
            if isinstance(focus, Plan):
                yield replace_plan(focus, seed=rng.randrange(1 << 31))
            else:
                scenario, blow = focus
                yield plan_of(scenario, blow, _number(rng, blow), number)
        yield random_plan(number)
        blow = rng.choice(list(Blow))
        yield plan_of(rng.choice(list(SCENARIOS)), blow, _number(rng, blow), number)


def _number(rng: random.Random, blow: Blow) -> int:
    """A point of a scenario, or one of its I/Os."""
    return rng.randrange(1, 600 if blow in DEATHS else 180)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_simulator_notices(
    mutant: Mutant, monkeypatch: Patch, record_property: Callable[[str, object], None]
) -> None:
    mutant(monkeypatch)
    operations = 0
    for number, plan in enumerate(itertools.islice(plans(mutant), RUNS), 1):
        simulation = Simulation(plan)
        try:
            simulation.run()
        except Exception:  # a violation, or a daemon that fell over what it had done
            operations += simulation.operations()
            record_property("operations", operations)
            print(f"{mutant.__name__}: noticed by run {number}, after {operations} operations")
            return
        operations += simulation.operations()
    pytest.fail(f"{RUNS} runs did not notice: {mutant.__doc__}")
