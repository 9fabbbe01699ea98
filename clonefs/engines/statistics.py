"""What can be seen of a group from outside, frozen at one instant.

Status files, the table, status.json and the metrics are made of this and of nothing else.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from clonefs.engines.counters import SOURCE, CopyCounters, LuCounters, TallyStatistics
from clonefs.engines.server import GroupServer
from clonefs.engines.transfers import Transfers
from clonefs.engines.verify import VerifyStatistics
from clonefs.group import Clone, Engine
from clonefs.units import LogicalUnit, MissingUnit
from clonefs.volume import CloneState, SplitBy

CONDITIONS = ("normal", *SplitBy, "faulted", "waiting")


@dataclass(frozen=True, slots=True)
class HostIo:
    """What hosts have read from and written to an LU since the mount: requests, and bytes."""

    reads: int
    read_bytes: int
    writes: int
    written_bytes: int


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
    host_io: HostIo


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
    host_io: HostIo
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
        host_io=_host_io(server.counters.lu(SOURCE)),
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
        host_io=_host_io(server.counters.lu(clone.name)),
    )


def _host_io(lu: LuCounters) -> HostIo:
    return HostIo(lu.read.count, lu.read.bytes, lu.write.count, lu.write.bytes)


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


# Metrics


@dataclass(frozen=True, slots=True)
class LuMetrics:
    """An LU: the requests of hosts, and the flushes of its backing."""

    read: TallyStatistics
    write: TallyStatistics
    flush: TallyStatistics
    backing_flush: TallyStatistics


@dataclass(frozen=True, slots=True)
class CopyMetrics:
    """What one engine has copied from or to a clone: extents, bytes, and copies that have failed."""

    extents: int
    bytes: int
    errors: int


@dataclass(frozen=True, slots=True)
class GroupMetrics:
    """A group with everything that is counted. `lus` by their names; `copies` by the names of clones
    and engines; `splits` by the names of clones; `claimed` extents by who has claimed them;
    `map_writes` of the durable maps by their names; `checkpoint_age` in seconds, None where there
    are no checkpoints."""

    statistics: GroupStatistics
    lus: Mapping[str, LuMetrics]
    copies: Mapping[tuple[str, str], CopyMetrics]
    splits: Mapping[str, int]
    claimed: Mapping[str, int]
    cod_queue: int
    cod_copy: TallyStatistics
    cod_wait: TallyStatistics
    checkpoint: TallyStatistics
    checkpoint_age: float | None
    map_writes: Mapping[str, TallyStatistics]


def metrics(server: GroupServer, transfers: Transfers, now: float) -> GroupMetrics:
    """The group of `server` as it is now, with what is counted; `now` is that of time.monotonic."""
    counters, clones = server.counters, server.group.clones
    read_only = server.recorder.volume.read_only
    return GroupMetrics(
        statistics=statistics(server, transfers),
        lus={name: _lu_metrics(counters.lu(name)) for name in (SOURCE, *clones)},
        copies={
            (name, engine): _copies(copies)
            for name in clones
            for engine, copies in (
                ("sync", counters.clone(name).sync),
                ("cod", counters.clone(name).cod),
            )
        },
        splits={name: counters.clone(name).splits for name in clones},
        claimed=_claimed(server),
        cod_queue=len(server.group.cod_queue),
        cod_copy=counters.cod_copy.statistics(),
        cod_wait=counters.cod_wait.statistics(),
        checkpoint=counters.checkpoint.statistics(),
        checkpoint_age=None if read_only else now - counters.checkpoint_at,
        map_writes={
            "delta": server.durability.delta_writes.statistics(),
            "protected": server.durability.protected_writes.statistics(),
        },
    )


def _lu_metrics(lu: LuCounters) -> LuMetrics:
    return LuMetrics(
        lu.read.statistics(),
        lu.write.statistics(),
        lu.flush.statistics(),
        lu.backing_flush.statistics(),
    )


def _copies(copies: CopyCounters) -> CopyMetrics:
    return CopyMetrics(copies.extents, copies.bytes, copies.errors)


def _claimed(server: GroupServer) -> Mapping[str, int]:
    extents = Counter({str(engine): 0 for engine in Engine})
    for claim in server.group.scoreboard:
        extents[claim.engine] += claim.stop - claim.first
    return extents
