"""The Clone Group: "a collection of a Source and all of its Clones".

It decides; it does no I/O and never waits. Every method is one step: what it sees in the maps is
true until it returns, and the bits that it sets are set together. It knows no event loop, no files
and no FUSE, so that the engines, the simulator and the tests all drive the same decisions.

Invariants (rule numbers are those of the design; docs/crash-safety.md repeats them):

- `pending` = D[c] and not P is the only expression for what a restore from c still has to copy.
- An extent that is claimed on the scoreboard is copied by its claimant alone; no host write to it
  is admitted (L3).
- While an extent is pending, D[k] has its bit for every other clone k (L6), and no Sync Engine
  copies it to a mirrored clone.
- What the record says of states and map slots changes only by `adopt`, with the group held and
  drained; the one exception is a clone that fails, which is split off at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice

from bitarray import bitarray

from clonefs.extents import ExtentMap, Geometry, Run
from clonefs.group.cod_queue import CodQueue
from clonefs.group.scoreboard import Claim, CodScoreboard, Engine
from clonefs.group.transitions import MIRRORED, RESTORES
from clonefs.group.writes_in_flight import WritesInFlight
from clonefs.volume import CloneRecord, CloneState, GroupRecord, MapSlot

MapOf = Callable[[MapSlot, int], ExtentMap]
Most = Callable[[int], int]

MANY_RUNS = 4096


@dataclass(slots=True, eq=False)
class Clone:
    """A clone with its Delta Map."""

    record: CloneRecord
    delta: ExtentMap

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def state(self) -> CloneState:
        return self.record.state


class Route(Enum):
    """Where the bytes of a host read come from during a restore."""

    SOURCE = auto()  # complete there
    COPY = auto()  # pending: who reads copies the extents, and answers from what was copied
    CLONE = auto()  # pending, and being copied or written to by somebody else: the clone has it


class Obstacle(Enum):
    """Why a host write cannot begin now."""

    CLAIMED = auto()  # an extent is being copied, or overlapping bytes are being mirrored
    PENDING = auto()  # an extent that is covered in part has to be copied first


@dataclass(slots=True, eq=False)
class WriteTicket:
    """A host write to the Source that has been admitted: bytes [offset, end), extents [first, stop).

    `mirrors` are the clones that are written to as well; `marked` are the extents, with the clone,
    whose bits were set before. `claims` hold the pending extents that the write covers whole: they stay
    pending until all of it has been written. Before anybody else runs it is ended, or `under_way`.
    """

    offset: int
    end: int
    first: int
    stop: int
    mirrors: tuple[Clone, ...]
    claims: tuple[Claim, ...]
    marked: list[tuple[int, str]] = field(default_factory=list)
    under_way: bool = False


class CloneGroup:
    """A Clone Group with its maps. `map_of` gives the live map in a slot, always the same object."""

    def __init__(self, record: GroupRecord, map_of: MapOf) -> None:
        self._map_of = map_of
        self.geometry = Geometry(record.size, record.extent_size)
        self.scoreboard = CodScoreboard()
        self.cod_queue = CodQueue()
        self.writes = WritesInFlight()
        # For the durable maps: extents of P that the PPRM does not have yet, and extents that have
        # been written to and are equal again, noted while a checkpoint runs.
        self.newly_protected: dict[tuple[int, int], None] = {}  # an ordered set
        self.touched: list[tuple[int, int]] | None = None
        self._not_believed: set[Claim] = set()  # copies under way when a flush failed
        self.beginning: str | None = None  # the clone whose restore a record is about to begin
        self.adopt(record)

    def adopt(self, record: GroupRecord) -> None:
        """`record` is the truth now; everything else here follows from it."""
        extents = self.geometry.extents
        self.record = record
        self.clones = {
            clone.name: Clone(clone, self._map_of(clone.delta, extents)) for clone in record.clones
        }
        clones = self.clones.values()
        self.protected = self._map_of(record.protected, extents)
        # The clone that the Source is being made equal to. In a Protected Restore what hosts write is
        # protected from it; in a Reverse Sync it is written to both, as with any mirrored clone.
        self.restoring = next((c for c in clones if c.state in RESTORES), None)
        self.protecting = self.restoring is not None and (
            self.restoring.state is CloneState.RESTORING
        )
        self.mirrored = tuple(
            c for c in clones if c.state in MIRRORED or c.state is CloneState.REVERSE_SYNCHRONIZING
        )
        self.split = tuple(c for c in clones if c.state not in MIRRORED | RESTORES)

    # What is pending

    def is_pending(self, extent: int) -> bool:
        """Whether the restore that is running still has to copy `extent`."""
        restoring = self.restoring
        return (
            restoring is not None and restoring.delta[extent] == 1 and self.protected[extent] == 0
        )

    def next_pending(self, start: int, stop: int) -> int:
        """The first pending extent of [start, stop), or -1."""
        if self.restoring is None:
            return -1
        delta, protected = self.restoring.delta, self.protected
        extent = delta.next_set(start, stop)
        while extent >= 0 and protected[extent]:
            extent = delta.next_set(protected.next_clear(extent, stop), stop)
        return extent

    def pending_run(self, first: int, stop: int) -> Run:
        """The pending extents from `first`, which is one, to the first that is not, or `stop`."""
        assert self.restoring is not None
        end = self.restoring.delta.next_clear(first, stop)
        protected = self.protected.next_set(first, end)
        return Run(first, end if protected < 0 else protected)

    def pending_count(self) -> int:
        """How many extents are pending."""
        if self.restoring is None:
            return 0
        delta, protected = self.restoring.delta, self.protected
        return delta.count - delta.count_common(protected)

    # Host reads of the Source

    def route_read(self, extent: int, stop: int, *, copy: bool) -> tuple[Route, int, Claim | None]:
        """How to read the Source from `extent` on: the route, where it ends (at most `stop`), and
        for COPY the claim of those extents, made here. Only if `copy` it may be that."""
        pending = self.next_pending(extent, stop)
        if pending != extent:
            return Route.SOURCE, stop if pending < 0 else pending, None
        run = self.pending_run(extent, stop)
        if not copy:
            return Route.CLONE, run.stop, None
        free = self._free_run(*run)
        if free.stop > free.first:
            return Route.COPY, free.stop, self._claim_from_clone(free, Engine.COD)
        return Route.CLONE, min(self._after_claim(extent), run.stop), None

    def _free_run(self, first: int, stop: int) -> Run:
        """The part of [first, stop) before the first extent that is claimed, or being written to
        together with a mirrored clone: a copy of that could be of half a write."""
        free = self.scoreboard.free_run(first, stop)
        return Run(first, self.writes.first_in(first, free.stop))

    def _claim_from_clone(self, run: Run, engine: Engine) -> Claim:
        assert self.restoring is not None
        return self.scoreboard.claim(run.first, run.stop, engine, self.restoring.name)

    # Host writes to the Source

    def admit_simple_write(self, offset: int, length: int) -> bool:
        """Admit a write that needs nothing but bits: no copy, no second write, nobody waited for.

        True: the maps are set (L1; L4 for extents that are not pending), issue it. The path of most
        writes, so it is as short as it can be.
        """
        if self.mirrored:
            return False
        first, stop = self.geometry.extents_of(offset, length)
        if self.protecting:
            if self.next_pending(first, stop) >= 0:
                return False
            self._protect(first, stop)
        for clone in self.split:
            clone.delta.mark(first, stop)
        return True

    def admit_write(self, offset: int, length: int) -> WriteTicket | Obstacle:
        """Admit a write, or say what stands in its way; then nothing has changed.

        An admitted write has its bits (L1, L2, L4). It must be ended by `end_at_once` in this very
        step, or `put_under_way` in it and ended by `end_write` later.
        """
        first, stop = self.geometry.extents_of(offset, length)
        if self.scoreboard.overlapping(first, stop) is not None:
            return Obstacle.CLAIMED
        if self.mirrored and self.writes.overlaps(offset, offset + length):
            return Obstacle.CLAIMED
        if self.pending_in_part(offset, length):
            return Obstacle.PENDING
        ticket = WriteTicket(
            offset, offset + length, first, stop, self.mirrored, self._claim_whole(first, stop)
        )
        if self.protecting:
            at = first
            for claim in ticket.claims:
                self._protect(at, claim.first)
                at = claim.stop
            self._protect(at, stop)
        for clone in self.split:
            clone.delta.mark(first, stop)
        if self.mirrored:
            self._mark_mirrors(ticket)
        return ticket

    def pending_in_part(self, offset: int, length: int) -> list[int]:
        """The pending extents that the bytes cover in part, and that have to be copied before: at
        most the first and the last. In a Reverse Sync none: the clone gets the bytes too."""
        if not self.protecting:
            return []
        first, stop = self.geometry.extents_of(offset, length)
        whole_first, whole_stop = self.geometry.whole_extents_of(offset, length)
        return [
            extent
            for extent in sorted({first, stop - 1})
            if not whole_first <= extent < whole_stop and self.is_pending(extent)
        ]

    def _claim_whole(self, first: int, stop: int) -> tuple[Claim, ...]:
        if not self.protecting:
            return ()
        claims = []
        extent = self.next_pending(first, stop)
        while extent >= 0:
            run = self.pending_run(extent, stop)
            claims.append(self._claim_from_clone(run, Engine.HOST))
            extent = self.next_pending(run.stop, stop)
        return tuple(claims)

    def _protect(self, first: int, stop: int) -> None:
        """L4: the Source is complete in [first, stop), and belongs to the host from now on."""
        assert self.restoring is not None
        if first < stop:
            if self.protected.next_clear(first, stop) < stop:
                self.newly_protected[first, stop] = None
            self.protected.mark(first, stop)
            self.restoring.delta.clear(first, stop)

    def _mark_mirrors(self, ticket: WriteTicket) -> None:
        """L2: set D[c] before the first of the two writes, and remember where it was set."""
        if self.touched is not None:
            self.touched.append((ticket.first, ticket.stop))
        for clone in ticket.mirrors:
            for extent in range(ticket.first, ticket.stop):
                if clone.delta[extent]:
                    ticket.marked.append((extent, clone.name))
                else:
                    clone.delta.mark(extent, extent + 1)

    def end_at_once(self, ticket: WriteTicket) -> None:
        """The write has ended, everywhere and in full, in the step in which it was admitted."""
        self._end_claims(ticket, written=True)
        for clone in ticket.mirrors:
            if not ticket.marked:
                clone.delta.clear(ticket.first, ticket.stop)
                continue
            for extent in range(ticket.first, ticket.stop):
                if (extent, clone.name) not in ticket.marked:
                    clone.delta.clear(extent, extent + 1)

    def put_under_way(self, ticket: WriteTicket) -> None:
        """The write goes on while others run. Once is enough."""
        if ticket.under_way or not ticket.mirrors:
            return
        ticket.under_way = True
        fresh = self.writes.begin(ticket.offset, ticket.end, ticket.first, ticket.stop)
        for extent, name in ticket.marked:
            if extent in fresh:
                self.writes.keep(extent, name)

    def end_write(self, ticket: WriteTicket, *, written: bool, unequal: Iterable[str]) -> None:
        """The write, which is under way, has ended. `written`: all of it is in the Source. `unequal`:
        clones that may not have it."""
        self._end_claims(ticket, written=written)
        if not ticket.mirrors:
            return
        unequal = list(unequal)
        # What a Reverse Sync has to copy again changes the Source under every clone (L6).
        copied_again = self.restoring is not None and self.restoring.name in unequal
        all_differ = not written or copied_again
        different = [clone.name for clone in ticket.mirrors] if all_differ else unequal
        for extent in range(ticket.first, ticket.stop):
            for name in different:
                self.writes.keep(extent, name)
        for extent, keep in self.writes.end(ticket.offset, ticket.end, ticket.first, ticket.stop):
            for clone in ticket.mirrors:
                if clone.name not in keep:
                    clone.delta.clear(extent, extent + 1)

    def _end_claims(self, ticket: WriteTicket, *, written: bool) -> None:
        for claim in ticket.claims:
            if written:
                self._protect(claim.first, claim.stop)
            self.scoreboard.release(claim)

    # Host writes to a clone

    def clone_write_changes_maps(self, clone: Clone, offset: int, length: int) -> bool:
        """Whether a host write to the clone would have to change a map, or the record."""
        first, stop = self.geometry.extents_of(offset, length)
        return not clone.record.written or clone.delta.next_clear(first, stop) < stop

    def mark_clone_write(self, clone: Clone, offset: int, length: int) -> None:
        """L1 for a host write to a fractured clone."""
        clone.delta.mark(*self.geometry.extents_of(offset, length))

    # Copies

    def claim_pending(self, extent: int) -> Claim | None:
        """Claim one pending extent for the COD Engine; None if it is claimed or pending no more."""
        if not self.is_pending(extent) or self.scoreboard.overlapping(extent, extent + 1):
            return None
        return self._claim_from_clone(Run(extent, extent + 1), Engine.COD)

    def claim_restore(self, start: int, most: Most) -> Claim | None:
        """Claim the next pending extents from `start` for the Sync Engine: a run of at most
        `most(its first extent)`."""
        at = start
        while (at := self.next_pending(at, self.geometry.extents)) >= 0:
            run = self.pending_run(at, min(at + most(at), self.geometry.extents))
            free = self._free_run(*run)
            if free.stop > free.first:
                return self._claim_from_clone(free, Engine.SYNC)
            at = self._after_claim(at)
        return None

    def claim_sync(self, clone: Clone, start: int, most: Most) -> Claim | None:
        """Claim the next extents from `start` that differ, to be copied to `clone`: a run of at most
        `most(its first extent)`.

        Extents that are pending, claimed, or being written to are passed over.
        """
        at = start
        while (at := clone.delta.next_set(at, self.geometry.extents)) >= 0:
            stop = clone.delta.next_clear(at, min(at + most(at), self.geometry.extents))
            stop = self._free_run(at, stop).stop
            pending = self.next_pending(at, stop)
            stop = stop if pending < 0 else pending
            if stop > at:
                return self.scoreboard.claim(at, stop, Engine.SYNC, clone.name)
            at = self._after_claim(at)
        return None

    def _after_claim(self, extent: int) -> int:
        claim = self.scoreboard.overlapping(extent, extent + 1)
        return extent + 1 if claim is None else claim.stop

    def end_copy(self, claim: Claim, *, copied: bool) -> None:
        """The copy of a claim has ended. L4, L5: it is complete, then the bits are cleared; a copy
        that failed, or was cancelled, leaves them (L3), and so does one to a clone that has been
        split off meanwhile: hosts have written to the Source since without looking at claims."""
        clone = self.clones.get(claim.clone)
        believed = claim not in self._not_believed
        self._not_believed.discard(claim)
        if copied and believed and clone is not None and clone not in self.split:
            if self.touched is not None:
                self.touched.append((claim.first, claim.stop))
            clone.delta.clear(claim.first, claim.stop)
        self.scoreboard.release(claim)

    # Verification

    def equal_run(self, clone: Clone, start: int, stop: int, most: int) -> Run:
        """The first extents of [start, stop), at most `most`, that are equal in `clone` and the
        Source, if the maps are right; empty, at `stop`, if there are none."""
        maps = [clone.delta]
        if clone is self.restoring and self.protecting:
            maps.append(self.protected)
        first = start
        while (at := max(each.next_clear(first, stop) for each in maps)) > first:
            first = at
        end = min(first + most, stop)
        ends = [each.next_set(first, end) for each in maps]
        return Run(first, min((each for each in ends if each >= 0), default=end))

    def claim_to_verify(self, name: str, extent: int) -> Claim | None:
        """Claim an extent so that it can be compared with the clone `name`; None if it is claimed.

        From now on nobody copies it, no write of it is mirrored, and no transition takes place, so
        that no bit of it is cleared. A write that is not mirrored may come at any time, and sets the
        bit first (L1, L4). If no map has the extent, no mirrored write is under way either (L2).
        """
        if self.scoreboard.overlapping(extent, extent + 1) is not None:
            return None
        return self.scoreboard.claim(extent, extent + 1, Engine.VERIFY, name)

    def end_verify(self, claim: Claim) -> None:
        """The comparison has ended."""
        self._not_believed.discard(claim)
        self.scoreboard.release(claim)

    # Around transitions

    def equal(self) -> frozenset[str]:
        """The clones whose Delta Map is empty."""
        return frozenset(name for name, clone in self.clones.items() if not clone.delta.count)

    def spread_delta(self, name: str) -> None:
        """L6: a restore from `name` will change the Source under every other clone."""
        delta = self.clones[name].delta
        runs = list(islice(delta.runs(), MANY_RUNS))
        for other in self.clones.values():
            if other.name == name:
                continue
            if len(runs) == MANY_RUNS:
                other.delta.mark_from(delta)
                continue
            for run in runs:  # much less than all the pages of a large map
                other.delta.mark(*run)

    def fold_protected(self, name: str) -> None:
        """D[c] |= P: what hosts wrote during the restore from `name` is a difference too."""
        self.clones[name].delta.mark_from(self.protected)

    def drop_protected_delta(self) -> None:
        """Nothing is pending: bits of D that are left belong to the host (P has them), and D
        becomes the next Protected Restore Map, which must be empty."""
        assert self.restoring is not None
        assert self.next_pending(0, self.geometry.extents) < 0
        self.restoring.delta.clear_all()

    def drop_protected(self) -> None:
        """P is empty but in a Protected Restore: what is in it comes from a command that was cut
        off, or from a restore whose record is lost, and then it is a difference of every clone. In
        a Reverse Sync it is the former: nobody is protected from it."""
        if self.protecting:
            return
        if self.restoring is None:
            for clone in self.clones.values():
                clone.delta.mark_from(self.protected)
        self.protected.clear_all()

    def being_copied(self, clone: Clone) -> bool:
        """Whether somebody has claimed an extent that still differs in `clone`."""
        return any(clone.delta.next_set(claim.first, claim.stop) >= 0 for claim in self.scoreboard)

    def live_maps(self) -> list[tuple[ExtentMap, MapSlot]]:
        """The live maps, and where on the volume they lie."""
        maps = [(self.protected, self.record.protected)]
        return maps + [(clone.delta, clone.record.delta) for clone in self.clones.values()]

    def live_union(self, start: int, stop: int) -> bitarray:
        """What any Delta Map or the Protected Restore Map has in [start, stop)."""
        union = self.protected.bits[start:stop]
        for clone in self.clones.values():
            union |= clone.delta.bits[start:stop]
        return union

    def distrust(self, name: str | None) -> None:
        """A flush has failed, of the clone `name` or of the Source (None): nobody knows what of the
        bytes is left, so every extent may differ (D10), also where a copy or a write is under way.
        P is left alone: what a host wrote during a restore may be lost, but must not be overwritten.

        A clone that is restored from had been flushed when that began, and has not been written to
        but in a Reverse Sync; there the Source is what is right where its bits are clear.
        """
        if name is not None and self.restoring is self.clones.get(name):
            return
        if name == self.beginning:  # L6: its Delta Map is spread, and the record is being written
            name = None
        for clone in sorted(self.clones.values(), key=lambda clone: clone.name == self.beginning):
            if name is None or clone.name == name:
                clone.delta.mark_all()
                self.writes.keep_all(clone.name)
        self._not_believed |= {
            claim for claim in self.scoreboard if name is None or claim.clone == name
        }

    def changes_maps(self, offset: int, length: int) -> bool:
        """Whether a host write to the Source would have to change a map."""
        first, stop = self.geometry.extents_of(offset, length)
        if self.mirrored or self.next_pending(first, stop) >= 0:
            return True
        maps = [clone.delta for clone in self.split]
        if self.protecting:
            maps.append(self.protected)
        return any(each.next_clear(first, stop) < stop for each in maps)

    def split_off(self, record: GroupRecord, name: str) -> None:
        """A mirrored clone has failed and is split off at once, with writes under way: what they
        touch stays marked, for later writes will not know of them."""
        self.writes.keep_all(name)
        self.adopt(record)
