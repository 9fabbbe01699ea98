"""The COD Engine: "coordinates and performs all COD".

It copies the extents that a host request needs from the Clone to the Source, while the request
waits in the COD Queue. It must never copy what it has not claimed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from clonefs.engines.server import GroupServer
from clonefs.errors import ClonefsError, DeviceError
from clonefs.group import Claim, WaitingRequest
from clonefs.units import Buffer, LogicalUnit


class CodEngine:
    """Copy On Demand for one group."""

    def __init__(self, server: GroupServer) -> None:
        self._server = server

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
        counts = server.counters.clone(claim.clone).cod
        copied = False
        try:
            with server.counters.cod_copy.timed(length):
                data = await self._copy(clone, offset, length)
            copied = True
            server.counts.cod += claim.stop - claim.first
            counts.copied(claim.stop - claim.first, length)
            return data
        except DeviceError as error:
            counts.errors += 1
            server.fault(claim.clone, error.reason)
            raise
        finally:
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
        elif not source.write_now(offset, data):
            await source.write(offset, data)
        return data

    async def read(self, claim: Claim, offset: int, length: int) -> Buffer:
        """Bytes of extents that `claim` has, for a host read: copied on the way (L5)."""
        start, _ = self._server.group.geometry.bytes_of(claim.first, claim.stop)
        try:
            with self.queued("read", offset, length):
                data = await self.copy(claim)
        except ClonefsError:
            # The Source may be what failed; the clone has the bytes all the same.
            return await self._server.units[claim.clone].read(offset, length)
        return memoryview(data)[offset - start : offset - start + length]


def any_byte(data: Buffer) -> bool:
    """Whether a byte of `data` is not zero. Data that is not all zeros seldom costs a look."""
    return bool(data[0] or data[-1]) or bytes(data).count(0) != len(data)
