"""What can be seen of a group from outside, frozen at one instant.

Status files, the table and status.json are made of this and of nothing else.
"""

from dataclasses import dataclass

from clonefs.engines.server import GroupServer
from clonefs.engines.transfers import Transfers
from clonefs.engines.verify import VerifyStatistics
from clonefs.group import Clone
from clonefs.units import LogicalUnit, MissingUnit
from clonefs.volume import CloneState, SplitBy


@dataclass(frozen=True, slots=True)
class CloneStatistics:
    """A clone. Counts are extents, `rate` bytes a second (None: no limit), times seconds since the
    epoch."""

    name: str
    state: str
    condition: str
    error: str | None
    backing: str
    delta_extents: int
    done: int
    total: int
    rate: int | None
    fractured_at: float | None
    written: bool
    verify: VerifyStatistics | None


@dataclass(frozen=True, slots=True)
class RestoreStatistics:
    """A restore that is running. Counts are extents; `cod_queue` is requests."""

    clone: str
    protected: bool
    pending: int
    protected_extents: int
    sync_copies: int
    cod_copies: int
    cod_queue: int


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """A group. `size` and `extent_size` are bytes."""

    name: str
    state: str
    error: str | None
    backing: str
    size: int
    extent_size: int
    extents: int
    full_copies: bool
    restore: RestoreStatistics | None
    clones: tuple[CloneStatistics, ...]


def statistics(server: GroupServer, transfers: Transfers) -> GroupStatistics:
    """The group of `server` as it is now."""
    group = server.group
    fault = _fault(server, server.source)
    return GroupStatistics(
        name=server.name,
        state="normal" if fault is None else "faulted",
        error=fault or server.failures.get(server.source.name),
        backing=group.record.backing,
        size=group.geometry.size,
        extent_size=group.geometry.extent_size,
        extents=group.geometry.extents,
        full_copies=group.record.full_copies,
        restore=_restore(server),
        clones=tuple(_clone(server, clone, transfers) for clone in group.clones.values()),
    )


def _fault(server: GroupServer, unit: LogicalUnit) -> str | None:
    """Why a unit is no good before the next mount: it is missing, or could not be flushed."""
    if isinstance(unit, MissingUnit):
        return unit.reason
    return server.unflushed.get(unit.name)


def _restore(server: GroupServer) -> RestoreStatistics | None:
    group = server.group
    if group.restoring is None:
        return None
    return RestoreStatistics(
        clone=group.restoring.name,
        protected=group.protecting,
        pending=group.pending_count(),
        protected_extents=group.protected.count,
        sync_copies=server.counts.sync,
        cod_copies=server.counts.cod,
        cod_queue=len(group.cod_queue),
    )


def _clone(server: GroupServer, clone: Clone, transfers: Transfers) -> CloneStatistics:
    record = clone.record
    condition, error = _condition(server, clone, transfers)
    return CloneStatistics(
        name=record.name,
        state=record.state,
        condition=condition,
        error=error or _found(server, clone),
        backing=record.backing,
        delta_extents=clone.delta.count,
        done=_done(server, clone),
        total=record.copy_total,
        rate=record.rate,
        fractured_at=record.fractured_at,
        written=record.written,
        verify=_verify(server, clone),
    )


def _verify(server: GroupServer, clone: Clone) -> VerifyStatistics | None:
    verification = server.verifications.get(clone.name)
    return None if verification is None else verification.statistics()


def _found(server: GroupServer, clone: Clone) -> str | None:
    verification = server.verifications.get(clone.name)
    return None if verification is None else verification.trouble()


def _condition(server: GroupServer, clone: Clone, transfers: Transfers) -> tuple[str, str | None]:
    """The condition, and the reason for it where there is one."""
    record = clone.record
    unit = server.unit(clone)
    split_off = record.split_by is SplitBy.SYSTEM
    fault = _fault(server, unit)
    if fault is not None and (isinstance(unit, MissingUnit) or not split_off):
        return "faulted", fault
    if clone.name in server.faults:
        return "faulted", server.faults[clone.name]
    if (server.name, clone.name) in transfers.waiting or (
        record.state is CloneState.REVERSE_OUT_OF_SYNC
    ):
        return "waiting", record.reason
    if record.state in (CloneState.FRACTURED, CloneState.OUT_OF_SYNC) and record.split_by:
        return record.split_by, record.reason or server.failures.get(unit.name)
    return "normal", record.reason or server.failures.get(unit.name)


def _done(server: GroupServer, clone: Clone) -> int:
    """How many extents of the running copy, or of the last one, have been copied."""
    total = clone.record.copy_total
    match clone.state:
        case CloneState.RESTORING | CloneState.REVERSE_SYNCHRONIZING:
            left = server.group.pending_count()
        case CloneState.SYNCHRONIZING | CloneState.OUT_OF_SYNC | CloneState.REVERSE_OUT_OF_SYNC:
            left = clone.delta.count
        case _:
            left = 0
    return max(0, total - left)
