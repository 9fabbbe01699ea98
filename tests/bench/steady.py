"""Steady state: what hosts get when nothing is copied.

Everything that is read lies in the page cache of the backing files, for all contestants but one: the raw
file with O_DIRECT, and through its loop device, is the disk. A kernel may take pages from files that are
not used for a moment (DAMON), and in a round of all contestants each is idle for long; so what is going
to be read is read once before.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.bench.load import BYTES, Job, Measured, measure, write_once
from tests.bench.peers import exported
from tests.bench.results import Part, median, spread
from tests.bench.scale import Scale, rounds, shuffled
from tests.bench.stage import EXTENT, Mount, cpu_seconds, fill, flush, loop_device, read_through
from tests.bench.tables import table

PLAIN, MIRROR, SPLIT, EIGHT = "no clone", "mirrored clone", "fractured clone", "8 fractured clones"
CLONE, QEMU, RAW = "on the fractured clone", "qemu-storage-daemon", "raw file"
QEMU_DEFAULT = "qemu-storage-daemon, aio=threads"
CACHED = "no clone, -o cached"
GROUPS = {PLAIN: "plain", MIRROR: "mirror", SPLIT: "split", EIGHT: "eight"}
EIGHT_CLONES = [f"clone{number}" for number in range(8)]
BUFFERED, DIRECT, LOOP = "buffered", "O_DIRECT", "loop"
WAYS = (BUFFERED, DIRECT, LOOP)
CPU = ", CPU"


class Cell(NamedTuple):
    """One thing that hosts do, in one way."""

    what: str
    job: Job
    way: str

    @property
    def case(self) -> str:
        """Its name."""
        return f"{self.what}, depth {self.job.depth}, {self.way}"

    def whos(self) -> list[str]:
        """Who does it. Clones are in the way of writes only; the clone itself has one way."""
        found = [PLAIN, SPLIT, QEMU, QEMU_DEFAULT, RAW]
        if self.job.writes:
            found += [MIRROR, EIGHT] if self.way == DIRECT else [MIRROR]
        return found + {BUFFERED: [CACHED], DIRECT: [CLONE], LOOP: []}[self.way]


WHATS = {
    "sequential 1 MiB reads": ("read", "1m"),
    "sequential 1 MiB writes": ("write", "1m"),
    "random 4 KiB reads": ("randread", "4k"),
    "random 4 KiB writes": ("randwrite", "4k"),
}
CELLS = [
    Cell(what, Job(rw, bs, depth, way != BUFFERED), way)
    for what, (rw, bs) in WHATS.items()
    for depth in (1, 16)
    for way in WAYS
]


class FirstWrites(NamedTuple):
    """Writes to extents that were equal until then, in a piece of the LU of their own."""

    what: str
    job: Job
    piece: int

    @property
    def case(self) -> str:
        """Its name."""
        return f"first: {self.what}, depth {self.job.depth}, {DIRECT}"


FIRST, LATER = "first writes", "later writes"
FIRSTS = [
    FirstWrites("sequential 1 MiB writes", Job("write", "1m", 1), 0),
    FirstWrites("sequential 1 MiB writes", Job("write", "1m", 16), 1),
    FirstWrites("one 4 KiB write an extent, at random", Job("randwrite", "4k", 1), 2),
    FirstWrites("one 4 KiB write an extent, at random", Job("randwrite", "4k", 16), 3),
]


@dataclass
class Field:
    """Who is there, and where."""

    mount: Mount
    scale: Scale
    paths: dict[str, Path] = field(default_factory=dict)
    loops: dict[str, Path] = field(default_factory=dict)
    backings: dict[str, list[Path]] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)

    def add(self, who: str, path: Path, pid: int | None, *backings: Path) -> None:
        """One more."""
        self.paths[who] = path
        self.backings[who] = list(backings)
        if pid is not None:
            self.pids[who] = pid

    def measure(self, cell: Cell, who: str) -> tuple[Measured, float]:
        """What hosts get, and the seconds of processor time that a request costs the daemon."""
        path = (self.loops if cell.way == LOOP else self.paths)[who]
        if not cell.job.writes:
            for cached in (*self.backings[who], *([path] if cell.way == BUFFERED else [])):
                read_through(cached)
        before = self._cpu(who)
        measured = measure(path, cell.job, self.scale.steady, self.scale.seconds)
        used = self._cpu(who) - before
        if cell.job.writes:
            for backing in self.backings[who]:
                flush(backing)
        return measured, used / measured.requests

    def _cpu(self, who: str) -> float:
        return cpu_seconds(self.pids[who]) if who in self.pids else 0.0


def measure_part(work: Path, part: Part, scale: Scale) -> None:
    """All rounds."""
    with contextlib.ExitStack() as stack:
        there = _contestants(stack, work, scale)
        _first_writers(there)
        for _ in rounds(part, scale):
            for cell in shuffled(CELLS):
                for who in shuffled(cell.whos()):
                    measured, cpu = there.measure(cell, who)
                    part.add(cell.case, who, measured.iops)
                    if who in there.pids:
                        part.add(cell.case + CPU, who, 1e6 * cpu)
            _first_writes(there, part)


def _contestants(stack: contextlib.ExitStack, work: Path, scale: Scale) -> Field:
    """All of them on the same file system, in the page cache, and every first write behind them."""
    raw, image, default = work / "raw.img", work / "qemu.img", work / "default.img"
    for path in (raw, image, default):
        path.touch()
        fill(path, scale.steady)
    mount = Mount(work)
    daemon = stack.enter_context(mount.served())
    there = Field(mount, scale)
    for who, group in GROUPS.items():
        clones = {PLAIN: [], EIGHT: EIGHT_CLONES}.get(who, ["clone"])
        mount.split_group(group, scale.steady, scale.steady, clones)
        used = [mount.backing(group), *([mount.backing(group, "clone")] if who == MIRROR else [])]
        there.add(who, mount.lu(group), daemon.pid, *used)
    fill(mount.lu("split"), scale.steady)
    fill(mount.lu("eight"), scale.steady)
    mount.command("mirror/clone/sync")
    mount.wait("mirror", "synchronized")
    there.add(CLONE, mount.lu("split", "clone"), daemon.pid, mount.backing("split", "clone"))
    _add_cached(stack, there)
    for who, file, aio in ((QEMU, image, "io_uring"), (QEMU_DEFAULT, default, "threads")):
        export, pid = stack.enter_context(exported(work, file, aio))
        there.add(who, export, pid, file)
    there.add(RAW, raw, None, raw)
    for who, path in there.paths.items():
        if who not in (CLONE, CACHED):
            there.loops[who] = stack.enter_context(loop_device(path))
    return there


def _add_cached(stack: contextlib.ExitStack, there: Field) -> None:
    """A mount that lets the kernel keep pages, as it does for qemu: what is read again does not come
    to the daemon."""
    mount = Mount(there.mount.work / "cached")
    daemon = stack.enter_context(mount.served("cached"))
    mount.split_group("plain", there.scale.steady, there.scale.steady, [])
    there.add(CACHED, mount.lu("plain"), daemon.pid, mount.backing("plain"))


# First writes

FIRST_GROUPS = {SPLIT: ("first1", ["clone"]), EIGHT: ("first8", EIGHT_CLONES)}


def _piece(scale: Scale, who: str) -> int:
    """Bytes of a piece: with eight clones, all of which have to be made equal again, half as many."""
    return scale.first_writes // (2 if who == EIGHT else 1)


def _first_writers(there: Field) -> None:
    for who, (group, clones) in FIRST_GROUPS.items():
        size = len(FIRSTS) * _piece(there.scale, who)
        there.mount.split_group(group, size, size, clones)


def _first_writes(there: Field, part: Part) -> None:
    """Each piece twice, so that what is compared differs in nothing else."""
    for group, clones in FIRST_GROUPS.values():
        there.mount.resync(group, clones)
        there.mount.flush(group)
    for group, _ in FIRST_GROUPS.values():
        there.mount.wait_for_checkpoint(group)
    for who, (group, _) in shuffled(list(FIRST_GROUPS.items())):
        for each in shuffled(FIRSTS):
            _write_twice(there, part, who, group, each)


def _write_twice(there: Field, part: Part, who: str, group: str, each: FirstWrites) -> None:
    size = _piece(there.scale, who)
    step = max(EXTENT, BYTES[each.job.bs])
    offsets = list(range(each.piece * size, (each.piece + 1) * size, step))
    if each.job.rw == "randwrite":
        offsets = shuffled(offsets)
    before = there.mount.group(group)["clones"]
    for what in (FIRST, LATER):
        read_through(there.mount.backing(group))
        measured = write_once(there.mount.work, there.mount.lu(group), each.job, offsets)
        part.add(each.case, f"{who}: {what}", measured.iops)
        there.mount.flush(group)
    for name, clone in there.mount.group(group)["clones"].items():
        found = clone["delta_extents"] - before[name]["delta_extents"]
        if found != size // EXTENT:
            raise AssertionError(f"{found} first writes instead of {size // EXTENT}")


# The report


def report(part: Part) -> str:
    """Markdown."""
    return "\n\n".join(
        [
            _ratios(part),
            "Processor time of the daemon for a request, in µs:",
            _cpu(part),
            "First writes against later ones to the same places:",
            _firsts(part),
        ]
    )


def _ratios(part: Part) -> str:
    ours = [PLAIN, CACHED, SPLIT]
    to_default = (f"{QEMU_DEFAULT}: times that, no clone",)
    to_plain = [SPLIT, MIRROR, EIGHT, CLONE]
    head = (
        *("", f"{QEMU}, requests/s", *(f"{who}: times qemu" for who in ours), *to_default),
        *("raw file: times qemu", *(f"{who}: times {PLAIN}" for who in to_plain)),
    )
    return table(
        head,
        *(
            (
                cell.case,
                median(part.values(cell.case, QEMU)),
                *(spread(part.ratios(cell.case, who, QEMU)) for who in ours),
                spread(part.ratios(cell.case, PLAIN, QEMU_DEFAULT)),
                spread(part.ratios(cell.case, RAW, QEMU)),
                *(
                    spread(part.ratios(cell.case, who, PLAIN)) if who in cell.whos() else ""
                    for who in to_plain
                ),
            )
            for cell in CELLS
        ),
    )


def _cpu(part: Part) -> str:
    whos = (QEMU, PLAIN, SPLIT, MIRROR, EIGHT)
    cells = [cell for cell in CELLS if cell.way == DIRECT]
    return table(
        ("", *whos),
        *(
            (cell.case, *(median(part.values(cell.case + CPU, who)) for who in whos))
            for cell in cells
        ),
    )


def _firsts(part: Part) -> str:
    def compared(case: str, who: str) -> str:
        return spread(part.ratios(case, f"{who}: {FIRST}", f"{who}: {LATER}"))

    return table(
        ("", *(f"{who}: first, times later" for who in FIRST_GROUPS)),
        *(
            (each.case.removeprefix("first: "), *(compared(each.case, who) for who in FIRST_GROUPS))
            for each in FIRSTS
        ),
    )
