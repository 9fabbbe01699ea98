"""The Sync Engine: "copies data between a Source and a Clone".

One task for each clone. In a Protected Restore it works sequentially from the beginning of the LU to
its end and copies what is pending, and so it does in a Reverse Sync; for a mirrored clone it copies
what the Delta Map has, the other way. It claims a run of extents, copies it, ends the claim, and
looks again: the maps are its only memory, so it can be killed at any point.

It must never copy what it has not claimed, nor wait for anything but the copy while it has a claim:
hosts wait for claims, and so does every transition.
"""

import trio

from clonefs.engines.server import GroupServer
from clonefs.engines.transfers import Transfers
from clonefs.errors import ClonefsError, DeviceError
from clonefs.group import MIRRORED, RESTORES, Claim, Clone
from clonefs.units import LogicalUnit, MissingUnit
from clonefs.volume import CloneState

COPYING = RESTORES | {CloneState.SYNCHRONIZING}
HOLE_RUN = 1 << 30  # bytes that are passed over at a time where the origin has a hole, at first,
LONGEST_HOLE_RUN = 1 << 36  # and at the most
HOLE_HINT_EVERY = 16 << 20  # bytes after which to ask again for holes where there was none
A_MOMENT = 1e-6  # seconds; less than this is not worth waiting, or not to be told from nothing
QUICK, SLOW = 0.002, 0.008  # seconds for a run: then the next one is longer, or shorter
RUNS_AT_ONCE = 32
PATIENCE = 0.25  # seconds' worth of `rate` to copy at a time
ENOUGH_FAILURES = 64  # extents in one pass: the device is gone rather than bad in places
RETRY_FIRST, RETRY_LAST = 1.0, 30.0  # seconds between passes over extents that cannot be copied


class SyncEngine:
    """The copies of one clone, in either direction."""

    def __init__(self, server: GroupServer, name: str, transfers: Transfers) -> None:
        self._server = server
        self._group = server.group
        self._name = name
        self._transfers = transfers
        self._counts = server.counters.clone(name).sync
        self._begin_pass()
        self._owed = 0.0  # bytes copied that `rate` has not paid for at `_paid_at`
        self._paid_at = 0.0
        self._retry = RETRY_FIRST

    def _begin_pass(self) -> None:
        self._cursor = 0
        self._run = self._transfers.run  # bytes
        self._hole_run = HOLE_RUN
        self._failed = 0
        self._singly_before = 0
        self._hint_at = 0
        self._data_at = 0

    async def run(self) -> None:
        """Copy whatever there is to copy, until cancelled."""
        while True:
            await trio.lowlevel.checkpoint()
            clone = self._group.clones.get(self._name)
            if clone is None or clone.state not in COPYING:
                self._begin_pass()
                self._server.mended(self._name)
                await self._server.progress()
            elif self._server.gate.held:
                await self._server.progress()
            elif (delay := self._rate_delay(clone)) > A_MOMENT and self._is_left(clone):
                # What changes meanwhile may be the rate, so look again.
                with trio.move_on_after(delay):
                    await self._server.progress()
            else:
                await self._step(clone)

    def _is_left(self, clone: Clone) -> bool:
        """Whether there is anything to copy that the rate could hold up: hosts may have done it
        all."""
        if clone.state in RESTORES:
            return self._group.next_pending(0, self._group.geometry.extents) >= 0
        return clone.delta.count > 0

    def _rate_delay(self, clone: Clone) -> float:
        """Seconds until the rate allows to copy again."""
        if clone.record.rate is None:
            self._owed = 0.0
            return 0.0
        return self._owed / clone.record.rate - (trio.current_time() - self._paid_at)

    def _charge(self, clone: Clone, length: int) -> None:
        """`length` bytes have been copied."""
        if clone.record.rate is not None:
            self._owed = max(0.0, self._rate_delay(clone) * clone.record.rate) + length
            self._paid_at = trio.current_time()

    def _most(self, clone: Clone, at: int) -> int:
        """How many extents to claim at the most if the first one is `at`."""
        geometry = self._group.geometry
        offset = at << geometry.shift
        if at < self._singly_before:
            return 1
        if offset < self._data_at and self._target(clone).sparse:
            return max(1, min(self._data_at - offset, self._hole_run) >> geometry.shift)
        length = float(self._run)
        if clone.record.rate is not None:
            length = min(length, clone.record.rate * PATIENCE)
        return max(1, int(length) >> geometry.shift)

    def _transfer_took(self, seconds: float, *, in_hole: bool) -> None:
        """Runs are as long as can be copied in a few milliseconds: hosts that write to one wait for
        all of it, and what is shared rather than copied hardly takes time."""
        if in_hole:
            self._hole_run = _adapted(self._hole_run, seconds, HOLE_RUN, LONGEST_HOLE_RUN)
        else:
            self._run = _adapted(self._run, seconds, self._transfers.run, self._transfers.longest)

    async def _step(self, clone: Clone) -> None:
        origin = self._origin(clone)
        reason = self._why_not(origin, self._target(clone))
        if reason is not None:
            self._server.fault(self._name, reason)
            await self._server.progress()
            return
        await self._look_for_holes(origin)
        async with self._transfers.turn(self._server.name, self._name):
            clone_now = self._group.clones.get(self._name)
            if clone_now is not clone or self._server.gate.held:
                return
            if self._why_not(origin, self._target(clone)) is not None:
                return  # a flush has failed while others had their turn
            claims = [] if self._failed >= ENOUGH_FAILURES else self._claims(clone)
            if claims:
                await self._copy(claims, clone)
                return
        await self._end_of_pass(clone)

    def _why_not(self, *units: LogicalUnit) -> str | None:
        """What makes copying useless until the next mount: a backing that is missing, or a Source
        that could not be flushed, for nobody knows what of it is left (D10)."""
        for unit in units:
            if isinstance(unit, MissingUnit):
                return unit.reason
        return self._server.unflushed.get(self._server.source.name)

    def _origin(self, clone: Clone) -> LogicalUnit:
        if clone.state in RESTORES:
            return self._server.unit(clone)
        return self._server.source

    def _target(self, clone: Clone) -> LogicalUnit:
        if clone.state in RESTORES:
            return self._server.source
        return self._server.unit(clone)

    async def _look_for_holes(self, origin: LogicalUnit) -> None:
        offset = self._cursor << self._group.geometry.shift
        # In a hole it is asked each time: a host may have filled the rest of it.
        if offset < origin.size and (offset >= self._hint_at or offset < self._data_at):
            try:
                self._data_at = await origin.data_from(offset)
            except ClonefsError:
                self._data_at = offset  # the copy will say it better
            self._hint_at = offset + HOLE_HINT_EVERY

    def _claims(self, clone: Clone) -> list[Claim]:
        """The next runs to copy. Together they have at most as much data as one may have: where hosts
        have been, runs are short, and each hand-over to a thread costs more than to copy one."""
        claims: list[Claim] = []
        cursor, left = self._cursor, self._group.geometry.extents
        while left > 0 and len(claims) < RUNS_AT_ONCE:
            claim = self._claim(clone, cursor, left)
            if claim is None:
                break
            if claim.first << self._group.geometry.shift >= self._data_at:  # a hole costs nothing
                left = min(left, self._most(clone, claim.first)) - (claim.stop - claim.first)
            claims.append(claim)
            cursor = claim.stop
        return claims

    def _claim(self, clone: Clone, start: int, left: int) -> Claim | None:
        def most(at: int) -> int:
            return min(self._most(clone, at), left)

        if clone.state in RESTORES:
            return self._group.claim_restore(start, most)
        return self._group.claim_sync(clone, start, most)

    async def _copy(self, claims: list[Claim], clone: Clone) -> None:
        bytes_of = self._group.geometry.bytes_of
        ranges = [bytes_of(claim.first, claim.stop) for claim in claims]
        done = 0
        failure: ClonefsError | None = None
        try:
            for each in ranges:
                await self._server.durability.cover(*each)
            started = trio.current_time()
            done = await self._target(clone).copy_from(
                self._origin(clone), ranges, share=not self._group.record.full_copies
            )
            in_hole = ranges[0][0] < self._data_at
            self._transfer_took(trio.current_time() - started, in_hole=in_hole)
        except ClonefsError as error:
            failure = error
        finally:
            for number, claim in enumerate(claims):
                self._group.end_copy(claim, copied=number < done)
            self._server.wake()
        if failure is not None:
            await self._copy_failed(claims[0], clone, failure)
            return
        for claim, (offset, length) in zip(claims[:done], ranges, strict=False):
            self._copied(claim, clone, offset, length)

    def _copied(self, claim: Claim, clone: Clone, offset: int, length: int) -> None:
        self._server.counts.sync += claim.stop - claim.first
        self._counts.copied(claim.stop - claim.first, length)
        self._cursor = claim.stop
        if offset >= self._data_at:  # a hole costs nothing
            self._charge(clone, length)

    async def _copy_failed(self, claim: Claim, clone: Clone, error: ClonefsError) -> None:
        """Try a run again extent by extent; pass over an extent that fails by itself."""
        self._counts.errors += 1
        own = self._server.unit(clone).name
        if clone.state in MIRRORED and isinstance(error, DeviceError) and error.unit == own:
            await self._server.split_off(self._name, error)
        elif claim.stop - claim.first > 1:
            self._cursor, self._singly_before = claim.first, claim.stop
        else:
            self._failed += 1
            self._cursor = claim.stop
            self._server.fault(self._name, error.reason)

    async def _end_of_pass(self, clone: Clone) -> None:
        if self._failed:
            # It may be mended, or a host may overwrite it whole, or a person may step in.
            with trio.move_on_after(self._retry):
                while self._group.clones.get(self._name) is clone:
                    await self._server.progress()
            self._retry = min(2 * self._retry, RETRY_LAST)
            self._begin_pass()
            return
        self._retry = RETRY_FIRST
        if self._cursor:
            self._begin_pass()  # for what was passed over, or has come since
        elif self._is_done(clone):
            if await self._transfers.complete(self._server, self._name):
                self._server.copied(self._name)
        else:
            await self._server.progress()

    def _is_done(self, clone: Clone) -> bool:
        """Whether nothing is left but what writes under way have set: a transition drains these."""
        if clone.state is not CloneState.RESTORING and self._group.being_copied(clone):
            return False
        if clone.state is CloneState.REVERSE_SYNCHRONIZING:
            return True
        return self._group.next_pending(0, self._group.geometry.extents) < 0


def _adapted(length: int, seconds: float, least: int, longest: int) -> int:
    """How long the next run is if this one took so many seconds, in bytes."""
    if seconds < QUICK:
        return min((4 if seconds < QUICK / 4 else 2) * length, longest)
    return max(length // 2, least) if seconds > SLOW else length
