"""Host I/O: what a read, a write and a flush of an LU file do.

Each has two parts. `..._now` does the whole request in one step if it needs no waiting, and is as
short as a bare pass-through; None or False says that nothing has happened, and that the other part,
which may wait, has to do it.
"""

import errno
from typing import Protocol

from clonefs.engines.cod import CodEngine
from clonefs.engines.counters import SOURCE, LuCounters
from clonefs.engines.server import GroupServer
from clonefs.errors import ClonefsError, busy
from clonefs.group import Obstacle, Route, WriteTicket, transitions
from clonefs.units import Buffer, LogicalUnit
from clonefs.volume import CloneState


class HostLu(Protocol):
    """An LU as hosts use it. Offsets and lengths are bytes and lie within `size`. Who brings the
    requests of hosts counts them in `counters`."""

    size: int
    counters: LuCounters

    def writable(self) -> bool:
        """Whether the state allows writing now."""

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """The bytes, or None if they are not to be had without waiting."""

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes. Raises ClonefsError."""

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Write, or False if that cannot be done without waiting."""

    async def write(self, offset: int, data: Buffer) -> None:
        """Write. Raises ClonefsError."""

    async def flush(self) -> None:
        """All writes that were acknowledged survive a power cut. Raises ClonefsError."""

    def allocated(self) -> int:
        """Bytes that the backing really holds."""

    def modified(self) -> float | None:
        """When what it shows was last changed, in seconds since the epoch; None if nobody knows."""

    def refuse_write(self) -> ClonefsError:
        """Why the state does not allow writing."""


class SourceLu:
    """The Source of a group, in every state."""

    def __init__(self, server: GroupServer, cod: CodEngine) -> None:
        self._server = server
        self._group = server.group
        self._gate = server.gate
        self._unit = server.source
        self._volume = server.recorder.volume
        self._cod = cod
        self.size = server.group.geometry.size
        self.counters = server.counters.lu(SOURCE)

    def writable(self) -> bool:
        return True

    def refuse_write(self) -> ClonefsError:
        raise AssertionError("a Source can be written in every state")

    def allocated(self) -> int:
        return self._unit.allocated()

    def modified(self) -> float | None:
        return self._server.modified

    def read_now(self, offset: int, length: int) -> Buffer | None:
        if self._gate.held:
            return None
        group = self._group
        if group.restoring is not None:
            first, stop = group.geometry.extents_of(offset, length)
            route, until, _ = group.route_read(first, stop, copy=False)
            if until < stop:  # in pieces
                return None
            if route is Route.CLONE:
                return self._read_pending_now(offset, length, first, stop)
        return self._unit.read_now(offset, length)

    def _read_pending_now(self, offset: int, length: int, first: int, stop: int) -> Buffer | None:
        copies = self._cod.may_copy()
        if copies and not self._cod.in_one_step:
            return None
        assert self._group.restoring is not None
        data = self._server.unit(self._group.restoring).read_now(offset, length)
        if copies and data is not None:
            self._cod.copy_afterwards(first, stop)
        return data

    async def read(self, offset: int, length: int) -> Buffer:
        await self._gate.enter()
        try:
            return await self._read(offset, length)
        finally:
            self._gate.leave()

    async def _read(self, offset: int, length: int) -> Buffer:
        geometry = self._group.geometry
        pieces: list[Buffer] = []
        end = offset + length
        while offset < end:
            first, stop = geometry.extents_of(offset, end - offset)
            route, until, claim = self._group.route_read(first, stop, copy=self._cod.may_copy())
            piece = min(until << geometry.shift, end) - offset
            if claim is not None:
                pieces.append(await self._cod.read(claim, offset, piece))
            elif route is Route.SOURCE:
                pieces.append(await self._unit.read(offset, piece))
            else:
                assert self._group.restoring is not None
                clone = self._server.unit(self._group.restoring)
                pieces.append(await clone.read(offset, piece))
            offset += piece
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write_now(self, offset: int, data: Buffer) -> bool:
        if (
            not self._gate.held
            and self._volume.broken is None
            and self._server.durability.covers(offset, len(data))
            and self._group.admit_simple_write(offset, len(data))
            and self._unit.write_now(offset, data)
        ):
            self._server.modified = self._server.now()
            return True
        return False

    async def write(self, offset: int, data: Buffer) -> None:
        await self._gate.enter()
        try:
            if self._volume.broken is not None and (
                self._volume.uncertain or self._group.changes_maps(offset, len(data))
            ):
                raise self._volume.broken
            await self._server.durability.cover(offset, len(data))
            if self._group.admit_simple_write(offset, len(data)):
                await _write(self._unit, offset, data)
            else:
                await self._carry_out(await self._admit(offset, len(data)), data)
            self._server.modified = self._server.now()
        finally:
            self._gate.leave()

    async def _admit(self, offset: int, length: int) -> WriteTicket:
        """Wait in the COD Queue until the write, whose extents are covered, may begin."""
        while True:
            outcome = self._group.admit_write(offset, length)
            if isinstance(outcome, WriteTicket):
                return outcome
            if outcome is Obstacle.PENDING:
                await self._cod.complete_ends(offset, length)
            else:
                with self._cod.queued("write", offset, length):
                    await self._server.progress()
            await self._server.durability.cover(
                offset, length
            )  # a checkpoint may have cleared them

    async def _carry_out(self, ticket: WriteTicket, data: Buffer) -> None:
        """Write to the Source, then to each mirrored clone. A clone that fails is split off, and
        the host's write succeeds all the same; but one that is being reverse synchronized is where
        hosts read from what differs, so that the write fails."""
        written = False
        unequal = [clone.name for clone in ticket.mirrors]
        failures: list[tuple[str, ClonefsError]] = []
        try:
            await self._write(self._unit, ticket, data)
            written = True
            for clone in ticket.mirrors:
                try:
                    await self._write(self._server.unit(clone), ticket, data)
                    unequal.remove(clone.name)
                except ClonefsError as error:
                    failures.append((clone.name, error))
        finally:
            if written and not unequal and not ticket.under_way:
                self._group.end_at_once(ticket)
            else:
                self._group.put_under_way(ticket)
                self._group.end_write(ticket, written=written, unequal=unequal)
            if ticket.under_way or ticket.claims:
                self._server.wake()
            if not written or self._is_restoring(unequal):
                await self._server.no_longer_equal()
        for name, failure in failures:
            if self._is_restoring([name]):
                self._server.fault(name, failure.reason)
                raise failure
            await self._server.split_off(name, failure)

    async def _write(self, unit: LogicalUnit, ticket: WriteTicket, data: Buffer) -> None:
        if not unit.write_now(ticket.offset, data):
            self._group.put_under_way(ticket)
            await unit.write(ticket.offset, data)

    def _is_restoring(self, names: list[str]) -> bool:
        """Whether the clone that the Source is being made equal to is among `names`."""
        restoring = self._group.restoring
        return restoring is not None and restoring.name in names

    async def flush(self) -> None:
        await self._gate.enter()
        try:
            await self._server.flush_source()
            for clone in self._group.mirrored:
                try:
                    await self._server.flush_clone(clone.name)
                except ClonefsError:  # D8; any other one is split off, and the Source has it all
                    if self._is_restoring([clone.name]):
                        raise
        finally:
            self._gate.leave()


class CloneLu:
    """A clone: it can always be read, and written while it is fractured."""

    def __init__(self, server: GroupServer, name: str) -> None:
        self._server = server
        self._group = server.group
        self._gate = server.gate
        self._unit = server.units[name]
        self._name = name
        self.size = server.group.geometry.size
        self.counters = server.counters.lu(name)

    def writable(self) -> bool:
        clone = self._group.clones.get(self._name)
        return clone is not None and clone.state is CloneState.FRACTURED

    def refuse_write(self) -> ClonefsError:
        clone = self._group.clones.get(self._name)
        state = "removed" if clone is None else clone.state
        return busy(
            f"{self._server.name}/{self._name} is {state}: a clone can be written to only while it "
            f"is fractured"
        )

    def allocated(self) -> int:
        return self._unit.allocated()

    def modified(self) -> float | None:
        """Since it was split off only hosts have written to it."""
        clone = self._group.clones.get(self._name)
        if clone is not None and not clone.record.written and clone.record.fractured_at:
            return clone.record.fractured_at
        return self._unit.modified()

    def read_now(self, offset: int, length: int) -> Buffer | None:
        return self._unit.read_now(offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        return await self._unit.read(offset, length)

    def write_now(self, offset: int, data: Buffer) -> bool:
        clone = self._group.clones.get(self._name)
        if (
            self._gate.held
            or clone is None
            or clone.state is not CloneState.FRACTURED
            or not clone.record.written
            or self._server.recorder.volume.broken is not None
            or not self._server.durability.covers(offset, len(data))
        ):
            return False
        self._group.mark_clone_write(clone, offset, len(data))
        return self._unit.write_now(offset, data)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._gate.enter()
        try:
            if not self.writable():
                raise self.refuse_write()
            clone = self._group.clones[self._name]
            volume = self._server.recorder.volume
            if volume.broken is not None and (
                volume.uncertain or self._group.clone_write_changes_maps(clone, offset, len(data))
            ):
                raise volume.broken
            if not clone.record.written:
                await self._server.change(lambda group: transitions.written(group, self._name))
            await self._server.durability.cover(offset, len(data))
            self._group.mark_clone_write(self._group.clones[self._name], offset, len(data))
            await _write(self._unit, offset, data)
        finally:
            self._gate.leave()

    async def flush(self) -> None:
        await self._gate.enter()
        try:
            if self._name in self._server.units:  # it was flushed when it was removed
                await self._server.flush_clone(self._name)
        finally:
            self._gate.leave()


async def _write(unit: LogicalUnit, offset: int, data: Buffer) -> None:
    if not unit.write_now(offset, data):
        await unit.write(offset, data)


def past_the_end(size: int) -> ClonefsError:
    """ENOSPC: a write past the end of an LU of `size` bytes."""
    return ClonefsError(errno.ENOSPC, f"a write past the end of an LU of {size} bytes")
