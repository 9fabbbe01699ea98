"""The COD Engine: "coordinates and performs all COD".

It copies the extents that a host request needs from the Clone to the Source, while the request
waits in the COD Queue. It must never copy what it has not claimed.

A write needs the copy. A read could do without, for a pending extent reads as the clone does; it
copies so that what is in use is restored first. So it has its answer before the copy, if that can
be made in one step then; and copies for reads have a share of the time, beyond which reads are only
answered: many hosts that read are not slowed down by copies that the Sync Engine makes at a lower
price.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import trio
from trio.lowlevel import RunVar

from clonefs.engines.server import GroupServer
from clonefs.errors import ClonefsError, DeviceError
from clonefs.group import Claim, WaitingRequest
from clonefs.units import Buffer, LogicalUnit

SHARE = 0.02  # of the time, for copies that reads ask for
IN_ADVANCE = 0.02  # seconds of it, after a time without

AFTERWARDS: RunVar[Callable[[Callable[[], None]], None]] = RunVar("clonefs.engines.afterwards")
"""Does something once the request that is being answered has its answer, and before the next one is
begun. Set by whoever brings the requests; where nobody has, it is done at once."""


class CodEngine:
    """Copy On Demand for one group."""

    def __init__(self, server: GroupServer) -> None:
        self._server = server
        self._credit = IN_ADVANCE  # seconds that copies for reads may take, at `_credit_at`
        self._credit_at = trio.current_time()
        self.in_one_step = True
        """Whether a copy needs no waiting, as far as the last one could tell."""

    def may_copy(self) -> bool:
        """Whether a read that meets a pending extent copies it."""
        now = trio.current_time()
        self._credit = min(IN_ADVANCE, self._credit + (now - self._credit_at) * SHARE)
        self._credit_at = now
        return self._credit > 0

    @contextmanager
    def _on_credit(self) -> Iterator[None]:
        started = trio.current_time()
        try:
            yield
        finally:
            took = trio.current_time() - started
            self._credit = max(self._credit - took, -IN_ADVANCE)  # a device that hung is no debt

    @contextmanager
    def queued(self, verb: str, offset: int, length: int) -> Iterator[None]:
        """A host request stands in the COD Queue while the body runs."""
        group = self._server.group
        request = WaitingRequest(verb, offset, length, *group.geometry.extents_of(offset, length))
        group.cod_queue.add(request)
        started = time.perf_counter_ns()
        try:
            yield
        finally:
            group.cod_queue.remove(request)
            waited = time.perf_counter_ns() - started
            self._server.counters.cod_wait.done(length, waited)

    async def complete_ends(self, offset: int, length: int) -> None:
        """Copy what a write needs: the pending extents that it covers in part.

        Returns after one of them has been copied, or after something has changed: look again.
        Raises ClonefsError if a copy fails.
        """
        group = self._server.group
        with self.queued("write", offset, length):
            for extent in group.pending_in_part(offset, length):
                claim = group.claim_pending(extent)
                if claim is not None:
                    await self.copy(claim)
                    return
            await self._server.progress()

    async def copy(self, claim: Claim) -> Buffer:
        """Copy the extents of `claim` from the clone to the Source, and end the claim.

        Returns their bytes. Raises ClonefsError; then they are pending as before.
        """
        server = self._server
        clone = server.units[claim.clone]
        offset, length = server.group.geometry.bytes_of(claim.first, claim.stop)
        copied = False
        try:
            with server.counters.cod_copy.timed(length):
                data = await self._copy(clone, offset, length)
            copied = True
            return data
        except DeviceError as error:
            server.counters.clone(claim.clone).cod.errors += 1
            server.fault(claim.clone, error.reason)
            raise
        finally:
            self._end(claim, length, copied=copied)

    def _end(self, claim: Claim, length: int, *, copied: bool) -> None:
        server = self._server
        if copied:
            server.counts.cod += claim.stop - claim.first
            server.counters.clone(claim.clone).cod.copied(claim.stop - claim.first, length)
        server.group.end_copy(claim, copied=copied)
        server.wake()

    async def _copy(self, clone: LogicalUnit, offset: int, length: int) -> Buffer:
        source = self._server.source
        await self._server.durability.cover(offset, length)
        data = clone.read_now(offset, length)
        if data is None:
            data = await clone.read(offset, length)
        if not any_byte(data):  # holes stay holes
            await source.copy_from(clone, [(offset, length)], share=False)
        else:
            self.in_one_step = source.write_now(offset, data)
            if not self.in_one_step:
                await source.write(offset, data)
        return data

    async def read(self, claim: Claim, offset: int, length: int) -> Buffer:
        """Bytes of extents that `claim` has, for a host read: copied on the way (L5)."""
        try:
            with self._on_credit(), self.queued("read", offset, length):
                data = await self.copy(claim)
        except ClonefsError:
            # The Source may be what failed; the clone has the bytes all the same.
            return await self._server.units[claim.clone].read(offset, length)
        return self._part(claim, data, offset, length)

    def copy_afterwards(self, first: int, stop: int) -> None:
        """Copy what is pending of [first, stop) once the request that is being answered has its
        answer, and before the next one is begun. In one step, or not at all."""
        try:
            afterwards = AFTERWARDS.get()
        except LookupError:
            self._copy_now(first, stop)
        else:
            afterwards(partial(self._copy_now, first, stop))

    def _copy_now(self, first: int, stop: int) -> None:
        server = self._server
        if server.gate.held or server.group.restoring is None:
            return
        claim = server.group.route_read(first, stop, copy=True)[2]
        if claim is None:
            return
        offset, length = server.group.geometry.bytes_of(claim.first, claim.stop)
        copied = False
        try:
            with self._on_credit():
                copied = self.in_one_step = self._copy_in_one_step(claim, offset, length)
        finally:
            self._end(claim, length, copied=copied)

    def _copy_in_one_step(self, claim: Claim, offset: int, length: int) -> bool:
        server = self._server
        if server.durability.covers(offset, length):
            started = time.perf_counter_ns()
            # The next read waits for its copy, and is told what fails.
            with suppress(ClonefsError):
                data = server.units[claim.clone].read_now(offset, length)
                if data and any_byte(data) and server.source.write_now(offset, data):
                    server.counters.cod_copy.done(length, time.perf_counter_ns() - started)
                    return True
        return False

    def _part(self, claim: Claim, data: Buffer, offset: int, length: int) -> Buffer:
        start, _ = self._server.group.geometry.bytes_of(claim.first, claim.stop)
        return memoryview(data)[offset - start : offset - start + length]


def any_byte(data: Buffer) -> bool:
    """Whether a byte of `data` is not zero. Data that is not all zeros seldom costs a look."""
    return bool(data[0] or data[-1]) or bytes(data).count(0) != len(data)
