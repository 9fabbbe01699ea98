"""control/metrics: what is counted and what is now, in the text form of Prometheus (0.0.4).

Two tables, MOUNT and GROUPS, have every metric with the function that makes its samples; the
reference in docs/metrics.md is checked against them. The samples of a metric stand together, so the
text goes through all groups once for each; it is written piece by piece as it is read, from what
was seen at the open, and other requests go on between the pieces.
"""

import functools
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from clonefs import __version__
from clonefs.engines import (
    CONDITIONS,
    SOURCE,
    CloneStatistics,
    GroupMetrics,
    StorageSystem,
    TallyStatistics,
    metrics,
)
from clonefs.logs import dropped
from clonefs.volume import CloneState

BUCKETS = range(11, 35)  # of a histogram: powers of two, in nanoseconds

Value = int | float | TallyStatistics
Sample = tuple[tuple[str, ...], Value]  # the values of the labels, and the value
Samples = Iterable[Sample]
Of = TypeVar("Of")


@dataclass(frozen=True, slots=True)
class MountMetrics:
    """What is neither of a group nor of a clone. `mountpoint` becomes a label of every sample, so that
    those of several mounts can stand in one collection; `started` is seconds since the epoch,
    `commands` how many were `done` and `refused`."""

    system: StorageSystem
    mountpoint: str
    started: float
    commands: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Metric(Generic[Of]):
    """A metric; `samples` makes its samples of what it is about."""

    name: str
    kind: str
    labels: tuple[str, ...]
    samples: Callable[[Of], Samples]
    text: str


def process_cpu_seconds() -> float:
    """The processor time of this process, in and out of the kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# Samples


def _one(value: Callable[[Of], Value]) -> Callable[[Of], Samples]:
    """One sample without labels."""
    return lambda about: [((), value(about))]


def _each(values: Callable[[Of], Mapping[str, Value]]) -> Callable[[Of], Samples]:
    """A sample for each name, which is the only label."""
    return lambda about: [((name,), value) for name, value in values(about).items()]


def _group(value: Callable[[GroupMetrics], Value | None]) -> Callable[[GroupMetrics], Samples]:
    """One sample, or none."""

    def samples(group: GroupMetrics) -> Samples:
        found = value(group)
        return [] if found is None else [((group.statistics.name,), found)]

    return samples


def _group_each(
    values: Callable[[GroupMetrics], Mapping[str, Value]],
) -> Callable[[GroupMetrics], Samples]:
    return lambda group: [
        ((group.statistics.name, name), value) for name, value in values(group).items()
    ]


def _clone(
    value: Callable[[GroupMetrics, CloneStatistics], Value | None],
) -> Callable[[GroupMetrics], Samples]:
    """A sample for each clone, but for those without a value."""

    def samples(group: GroupMetrics) -> Samples:
        for clone in group.statistics.clones:
            found = value(group, clone)
            if found is not None:
                yield (group.statistics.name, clone.name), found

    return samples


def _clone_one_of(
    words: Iterable[str], now: Callable[[CloneStatistics], str]
) -> Callable[[GroupMetrics], Samples]:
    """For each clone a sample for each word: 1 for the one that holds."""
    all_words = tuple(map(str, words))
    return lambda group: (
        ((group.statistics.name, clone.name, word), int(now(clone) == word))
        for clone in group.statistics.clones
        for word in all_words
    )


def _copies(field: str) -> Callable[[GroupMetrics], Samples]:
    return lambda group: (
        ((group.statistics.name, clone, engine), getattr(copies, field))
        for (clone, engine), copies in group.copies.items()
    )


_OPS = ("read", "write", "flush")


def _host(
    value: Callable[[TallyStatistics], Value], ops: Iterable[str] = _OPS
) -> Callable[[GroupMetrics], Samples]:
    return lambda group: (
        ((group.statistics.name, lu, op), value(getattr(tallies, op)))
        for lu, tallies in group.lus.items()
        for op in ops
    )


def _host_latency(group: GroupMetrics) -> Samples:
    """Most clones are never used by a host, and a histogram is long: theirs begin with the first
    request."""
    for labels, tally in _host(lambda tally: tally)(group):
        assert isinstance(tally, TallyStatistics)
        if tally.count or labels[1] == SOURCE:
            yield labels, tally


def _flushes(value: Callable[[TallyStatistics], Value]) -> Callable[[GroupMetrics], Samples]:
    return lambda group: (
        ((group.statistics.name, lu), value(tallies.backing_flush))
        for lu, tallies in group.lus.items()
    )


def _pending(group: GroupMetrics, clone: CloneStatistics) -> int:
    if clone.state == CloneState.SYNCHRONIZING:
        return clone.delta_extents
    restore = group.statistics.restore
    return restore.pending if restore is not None and restore.clone == clone.name else 0


def _protected(group: GroupMetrics) -> int:
    restore = group.statistics.restore
    return 0 if restore is None else restore.protected_extents


def _failed(mount: MountMetrics) -> int:
    volume = mount.system.volume
    return int(volume.broken is not None and not volume.read_only)


_G = ("group",)
_C = ("group", "clone")
_L = ("group", "lu")

MOUNT: tuple[Metric[MountMetrics], ...] = (
    Metric(
        "clonefs_build_info",
        "gauge",
        ("version",),
        lambda mount: [((__version__,), 1)],
        "The version of clonefs, as a label; always 1.",
    ),
    Metric(
        "clonefs_volume_info",
        "gauge",
        ("path", "uuid"),
        lambda mount: [((mount.system.volume.name, mount.system.volume.uuid), 1)],
        "The metadata volume, as labels; always 1.",
    ),
    Metric(
        "clonefs_start_time_seconds",
        "gauge",
        (),
        _one(lambda mount: mount.started),
        "When the mount began, in seconds since the epoch: counters were 0 then.",
    ),
    Metric(
        "clonefs_cpu_seconds_total",
        "counter",
        (),
        _one(lambda mount: process_cpu_seconds()),
        "Processor time of the daemon.",
    ),
    Metric(
        "clonefs_read_only",
        "gauge",
        (),
        _one(lambda mount: int(mount.system.volume.read_only)),
        "1 if it is mounted with ro.",
    ),
    Metric(
        "clonefs_volume_size_bytes",
        "gauge",
        (),
        _one(lambda mount: mount.system.volume.superblock.size),
        "Size of the metadata volume.",
    ),
    Metric(
        "clonefs_volume_used_bytes",
        "gauge",
        (),
        _one(lambda mount: mount.system.volume.used),
        "What is used of it.",
    ),
    Metric(
        "clonefs_volume_failed",
        "gauge",
        (),
        _one(_failed),
        "1 once the metadata volume cannot be written any more.",
    ),
    Metric(
        "clonefs_commit_seconds",
        "histogram",
        (),
        _one(lambda mount: mount.system.recorder.commits.statistics()),
        "How long commits of the record took: one for each change of state.",
    ),
    Metric(
        "clonefs_commit_errors_total",
        "counter",
        (),
        _one(lambda mount: mount.system.recorder.commits.errors),
        "Commits of the record that have failed.",
    ),
    Metric(
        "clonefs_commands_total",
        "counter",
        ("result",),
        _each(lambda mount: mount.commands),
        "Commands that were done, and that were refused or have failed; an open of a clone for writing "
        "that its state forbids is refused too.",
    ),
    Metric(
        "clonefs_copies_waiting",
        "gauge",
        (),
        _one(lambda mount: len(mount.system.transfers.waiting)),
        "Clones whose copy waits for its turn.",
    ),
    Metric(
        "clonefs_log_lines_dropped_total",
        "counter",
        (),
        _one(lambda mount: dropped()),
        "Lines of the log that nobody took in time.",
    ),
)

GROUPS: tuple[Metric[GroupMetrics], ...] = (
    Metric(
        "clonefs_group_state",
        "gauge",
        (*_G, "state"),
        _group_each(
            lambda group: {
                state: int(group.statistics.state == state) for state in ("normal", "faulted")
            }
        ),
        "1 for the state that the group is in, 0 for the other.",
    ),
    Metric(
        "clonefs_group_size_bytes",
        "gauge",
        _G,
        _group(lambda group: group.statistics.size),
        "Size of the Source.",
    ),
    Metric(
        "clonefs_group_extent_size_bytes",
        "gauge",
        _G,
        _group(lambda group: group.statistics.extent_size),
        "Size of an extent.",
    ),
    Metric(
        "clonefs_group_protected_extents",
        "gauge",
        _G,
        _group(_protected),
        "Extents that belong to the host: written since the running restore began.",
    ),
    Metric(
        "clonefs_group_claimed_extents",
        "gauge",
        (*_G, "engine"),
        _group_each(lambda group: group.claimed),
        "Extents on the COD Scoreboard now, by who has claimed them.",
    ),
    Metric(
        "clonefs_cod_queue_requests",
        "gauge",
        _G,
        _group(lambda group: group.cod_queue),
        "Host requests that stand in the COD Queue now.",
    ),
    Metric(
        "clonefs_cod_copy_seconds",
        "histogram",
        _G,
        _group(lambda group: group.cod_copy),
        "How long copies on demand took, from the claim until the Source has the extent.",
    ),
    Metric(
        "clonefs_cod_wait_seconds",
        "histogram",
        _G,
        _group(lambda group: group.cod_wait),
        "How long host requests stood in the COD Queue, each time that one did.",
    ),
    Metric(
        "clonefs_checkpoint_age_seconds",
        "gauge",
        _G,
        _group(lambda group: group.checkpoint_age),
        "Time since the last checkpoint ended, or since the mount. A read-only mount has none.",
    ),
    Metric(
        "clonefs_checkpoints_total",
        "counter",
        _G,
        _group(lambda group: group.checkpoint.count),
        "Checkpoints.",
    ),
    Metric(
        "clonefs_checkpoint_errors_total",
        "counter",
        _G,
        _group(lambda group: group.checkpoint.errors),
        "Checkpoints that have failed.",
    ),
    Metric(
        "clonefs_map_writes_total",
        "counter",
        (*_G, "map"),
        _group_each(lambda group: {name: tally.count for name, tally in group.map_writes.items()}),
        "Durable writes of a durable map: the Persistent Delta Map, or the Persistent Protected "
        "Restore Map.",
    ),
    Metric(
        "clonefs_map_written_bytes_total",
        "counter",
        (*_G, "map"),
        _group_each(lambda group: {name: tally.bytes for name, tally in group.map_writes.items()}),
        "Bytes of these writes: sectors of 512.",
    ),
    Metric(
        "clonefs_map_write_errors_total",
        "counter",
        (*_G, "map"),
        _group_each(lambda group: {name: tally.errors for name, tally in group.map_writes.items()}),
        "Writes of a durable map that have failed.",
    ),
    Metric(
        "clonefs_host_requests_total",
        "counter",
        (*_L, "op"),
        _host(lambda tally: tally.count),
        "Requests of hosts that were answered without an error.",
    ),
    Metric(
        "clonefs_host_bytes_total",
        "counter",
        (*_L, "op"),
        _host(lambda tally: tally.bytes, ("read", "write")),
        "Bytes that hosts have read and written.",
    ),
    Metric(
        "clonefs_host_errors_total",
        "counter",
        (*_L, "op"),
        _host(lambda tally: tally.errors),
        "Requests of hosts that an I/O error has ended.",
    ),
    Metric(
        "clonefs_host_request_seconds",
        "histogram",
        (*_L, "op"),
        _host_latency,
        "How long requests of hosts took in the daemon. For a clone from its first request on.",
    ),
    Metric(
        "clonefs_flushes_total",
        "counter",
        _L,
        _flushes(lambda tally: tally.count),
        "Flushes of the backing, for hosts, commands and checkpoints.",
    ),
    Metric(
        "clonefs_flush_seconds_total",
        "counter",
        _L,
        _flushes(lambda tally: tally.seconds),
        "How long these took together.",
    ),
    Metric(
        "clonefs_flush_errors_total",
        "counter",
        _L,
        _flushes(lambda tally: tally.errors),
        "Flushes of the backing that have failed.",
    ),
    Metric(
        "clonefs_clone_state",
        "gauge",
        (*_C, "state"),
        _clone_one_of(CloneState, lambda clone: clone.state),
        "1 for the state that the clone is in, 0 for each other.",
    ),
    Metric(
        "clonefs_clone_condition",
        "gauge",
        (*_C, "condition"),
        _clone_one_of(CONDITIONS, lambda clone: clone.condition),
        "1 for its condition, 0 for each other.",
    ),
    Metric(
        "clonefs_clone_delta_extents",
        "gauge",
        _C,
        _clone(lambda group, clone: clone.delta_extents),
        "Extents in which the clone may differ from its Source.",
    ),
    Metric(
        "clonefs_clone_pending_extents",
        "gauge",
        _C,
        _clone(_pending),
        "Extents that a running sync or restore still has to copy.",
    ),
    Metric(
        "clonefs_clone_copy_done_extents",
        "gauge",
        _C,
        _clone(lambda group, clone: clone.done),
        "How far the running copy is, or how far the last one came.",
    ),
    Metric(
        "clonefs_clone_copy_extents",
        "gauge",
        _C,
        _clone(lambda group, clone: clone.total),
        "How many extents that copy has in all.",
    ),
    Metric(
        "clonefs_clone_rate_limit_bytes_per_second",
        "gauge",
        _C,
        _clone(lambda group, clone: math.inf if clone.rate is None else clone.rate),
        "The bound on its copies; +Inf for none.",
    ),
    Metric(
        "clonefs_clone_fractured_timestamp_seconds",
        "gauge",
        _C,
        _clone(lambda group, clone: clone.fractured_at),
        "When it was split off, in seconds since the epoch, if it is.",
    ),
    Metric(
        "clonefs_clone_split_off_total",
        "counter",
        _C,
        _clone(lambda group, clone: group.splits[clone.name]),
        "How often an I/O error has split it off.",
    ),
    Metric(
        "clonefs_clone_different_extents",
        "gauge",
        _C,
        _clone(lambda group, clone: None if clone.verify is None else clone.verify.different),
        "Extents that the last verification has found to differ though no map has them; only after one.",
    ),
    Metric(
        "clonefs_clone_unreadable_extents",
        "gauge",
        _C,
        _clone(lambda group, clone: None if clone.verify is None else clone.verify.unreadable),
        "Extents that the last verification could not read; only after one.",
    ),
    Metric(
        "clonefs_copied_extents_total",
        "counter",
        (*_C, "engine"),
        _copies("extents"),
        "Extents that the Sync Engine and the COD Engine have copied from or to the clone.",
    ),
    Metric(
        "clonefs_copied_bytes_total",
        "counter",
        (*_C, "engine"),
        _copies("bytes"),
        "Bytes of these, holes included.",
    ),
    Metric(
        "clonefs_copy_errors_total",
        "counter",
        (*_C, "engine"),
        _copies("errors"),
        "Copies that have failed, each attempt.",
    ),
)


# Text


async def snapshot(mount: MountMetrics) -> Callable[[], Iterator[bytes]]:
    """What gives the text, in pieces, of what is now. Each group is seen at one instant, and other
    requests go on between two of them."""
    system = mount.system
    where = _label("mountpoint", mount.mountpoint)
    head = b"".join(_piece(metric, where, metric.samples(mount), first=True) for metric in MOUNT)
    groups: list[GroupMetrics] = []
    for name in sorted(system.servers):
        await trio.lowlevel.checkpoint()
        if name in system.servers:
            groups.append(metrics(system.servers[name], system.transfers, time.monotonic()))
    return functools.partial(_pieces, head, where, groups)


def _pieces(head: bytes, where: str, groups: Iterable[GroupMetrics]) -> Iterator[bytes]:
    """The text; a piece is at most the samples that a metric has of one group."""
    yield head
    for each in GROUPS:
        first = True
        for group in groups:
            piece = _piece(each, where, each.samples(group), first=first)
            if piece:
                first = False
                yield piece


def _piece(metric: "Metric[Of]", where: str, samples: Samples, *, first: bool) -> bytes:
    """The lines of the samples, which have the label `where`, below those about the metric if they are
    its first."""
    lines: list[str] = []
    for values, value in samples:
        labels = [where, *map(_label, metric.labels, values)]
        if isinstance(value, TallyStatistics):
            lines += _histogram(metric.name, labels, value)
        else:
            lines.append(f"{metric.name}{_braced(labels)} {_number(value)}\n")
    if first and lines:
        lines[:0] = [
            f"# HELP {metric.name} {metric.text}\n",
            f"# TYPE {metric.name} {metric.kind}\n",
        ]
    return "".join(lines).encode()


_BOUNDS = [(bits, f'le="{2**bits / 1e9!r}"') for bits in BUCKETS]


def _histogram(name: str, labels: list[str], tally: TallyStatistics) -> Iterator[str]:
    start = 0
    count = 0
    for bits, bound in _BOUNDS:
        count += sum(tally.buckets[start : bits + 1])
        start = bits + 1
        yield f"{name}_bucket{_braced([*labels, bound])} {count}\n"
    infinite = _braced([*labels, 'le="+Inf"'])
    yield f"{name}_bucket{infinite} {tally.count}\n"
    yield f"{name}_sum{_braced(labels)} {_number(tally.seconds)}\n"
    yield f"{name}_count{_braced(labels)} {tally.count}\n"


def _braced(labels: list[str]) -> str:
    return f"{{{','.join(labels)}}}"


def _label(name: str, value: str) -> str:
    """A label. It must be UTF-8: bytes of a path that are no text are replaced."""
    text = value.encode(errors="surrogateescape").decode(errors="replace")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{escaped}"'


def _number(value: int | float) -> str:
    return "+Inf" if value == math.inf else repr(value)
