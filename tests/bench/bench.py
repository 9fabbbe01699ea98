"""Measurements of clonefs, as ratios of interleaved rounds: A B C, B C A, C A B, ...

A machine that is busy with other things is slower for all of them; so what is compared is measured
next to each other, and what counts is the median of the ratios of rounds, not the ratio of medians.
Each measurement is one function that returns a Markdown table.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import trio

from tests.bench import counting
from tests.bench.stage import (
    EXTENT,
    GiB,
    MiB,
    Mount,
    TiB,
    fill,
    flush,
    run,
    running,
    stage,
    wait_for,
)

PAGE = Path(__file__).parents[2] / "docs/performance.md"
SIZES = {"1 GiB": GiB, "1 TiB": TiB}
STUCK = "64K"  # a rate at which the Sync Engine copies one extent a second
ENOUGH_RESTORES = 10
FIRST_READS = 400
IO_SIZE = 512 * MiB
AHEAD = 512 * EXTENT  # what is marked in the Persistent Delta Map at once


@dataclass(frozen=True)
class Options:
    """How long to measure."""

    rounds: int
    seconds: float


@dataclass
class Samples:
    """What was measured in each round, by the name of the thing."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """One more round of `name`."""
        self.of.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """The median of its rounds."""
        return statistics.median(self.of[name])

    def ratio(self, name: str, to: str) -> str:
        """The median of the rounds' ratios, and the least and the greatest."""
        ratios = [one / other for one, other in zip(self.of[name], self.of[to], strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"

    def seconds(self, name: str) -> str:
        """Median, least and greatest."""
        values = self.of[name]
        return f"{self.median(name):.2f} ({min(values):.2f}–{max(values):.2f})"


def table(*rows: Iterable[object]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|---" * (lines[0].count(" | ") + 1) + "|")
    return "\n".join(lines)


def rotated(names: list[str], by: int) -> list[str]:
    """The names, another one first in each round."""
    by %= len(names)
    return names[by:] + names[:by]


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A file descriptor."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


# 1: a restore is in effect when the write returns


FEW, ALL, BUSY = "8 extents", "all extents", "8 extents, while four programs write"


def restore(work: Path, options: Options) -> str:
    """Milliseconds of the write to `protected_restore`."""
    mount = Mount(work)
    samples = Samples()
    groups = {
        f"{size.replace(' ', '')}-{number}": (size, differs)
        for size in SIZES
        for number, differs in enumerate((FEW, ALL))
    }
    prepare_restores(mount, {name: SIZES[size] for name, (size, _) in groups.items()})
    with mount.served():
        for group, (size, differs) in groups.items():
            if differs == FEW:  # after a first restore nothing differs
                mount.command(f"{group}/clone/rate", "max")
                restore_once(mount, group, SIZES[size])
                mount.wait(group, "fractured")
        for number in range(max(ENOUGH_RESTORES, options.rounds)):
            for group in rotated(list(groups), number):
                size, differs = groups[group]
                if differs == ALL and number:
                    mount.command(f"{group}/clone/fracture", "force")
                samples.add(group, restore_once(mount, group, SIZES[size]))
                if differs == FEW:
                    mount.wait(group, "fractured")
                elif mount.group(group)["restore"]["pending"] < 0.99 * SIZES[size] // EXTENT:
                    raise AssertionError("not everything was pending")
        for group, (size, differs) in list(groups.items()):
            if differs == FEW:
                groups[f"{group}-busy"] = (size, BUSY)
                with running(work, *writers(mount.lu(group))):
                    for _ in range(max(ENOUGH_RESTORES, options.rounds)):
                        samples.add(f"{group}-busy", restore_once(mount, group, SIZES[size]))
                        mount.wait(group, "fractured")
    return table(
        ("LU", "differs", "restores", "median, ms", "max, ms"),
        *(
            (
                *groups[group],
                len(times),
                f"{1e3 * statistics.median(times):.1f}",
                f"{1e3 * max(times):.1f}",
            )
            for group, times in samples.of.items()
        ),
    )


def writers(path: Path) -> list[str]:
    """fio that goes on writing into the first 16 MiB."""
    words = "--rw=randwrite --bs=4k --size=16m --numjobs=4 --thread --allow_file_create=0"
    forever = "--time_based --runtime=1h --invalidate=0 --fallocate=none"
    return ["fio", "--name=writers", f"--filename={path}", *words.split(), *forever.split()]


def prepare_restores(mount: Mount, groups: dict[str, int]) -> None:
    """Sparse groups with a fractured clone each, all of which may differ. The first 16 MiB are data
    and the rate is low: the Sync Engine stays there, and the rest stays pending."""
    with mount.served():
        for group, size in groups.items():
            mount.add_group(group, size)
            fill(mount.lu(group), 16 * MiB)
            mount.add_clone(group)
            mount.command(f"{group}/clone/fracture")
            mount.command(f"{group}/clone/rate", STUCK)
    mount.fill_delta_maps()


def restore_once(mount: Mount, group: str, size: int) -> float:
    """Ruin 8 extents, restore; seconds until it was in effect. What is read next must be right."""
    places = [(2 * number + 1) * size // 16 for number in range(8)]
    for place in places:
        fill(mount.lu(group), 4096, place)
    with opened(
        mount.mountpoint / "control" / group / "clone/protected_restore", os.O_WRONLY
    ) as fd:
        started = time.perf_counter()
        os.write(fd, b"1\n")
        took = time.perf_counter() - started
    with opened(mount.lu(group)) as source:
        if any(os.pread(source, 4096, place).strip(b"\0") for place in places):
            raise AssertionError("the Source does not read as the clone does")
    return took


# 2: the first read of a pending extent


def first_read(work: Path, options: Options) -> str:
    """Microseconds of 4 KiB reads through the mount."""
    mount = Mount(work)
    size = 256 * MiB
    medians, all_times = Samples(), Samples()
    with mount.served():
        mount.add_group("reads", size)
        fill(mount.lu("reads"), size)
        mount.add_clone("reads")
        mount.command("reads/clone/fracture")
        mount.command("reads/clone/rate", STUCK)
        for number in range(options.rounds):
            if number:
                mount.command("reads/clone/fracture", "force")
            fill(mount.lu("reads"), size)
            mount.command("reads/clone/protected_restore")
            add_round(time_reads(mount, size // EXTENT), medians, all_times)
    return of_requests("4 KiB read", medians, all_times, "the clone")


def time_reads(mount: Mount, extents: int) -> Samples:
    """Read one extent of the clone and one of the Source, which is pending, in turns. The Sync
    Engine is far from the second half."""
    samples = Samples()
    chosen = random.sample(range(extents // 2, extents), 2 * FIRST_READS)
    with opened(mount.lu("reads", "clone")) as clone, opened(mount.lu("reads")) as source:
        for other, extent in zip(chosen[::2], chosen[1::2], strict=True):
            for name, fd, at in (
                ("the clone", clone, other),
                ("a pending extent, first", source, extent),
                ("the same extent again", source, extent),
            ):
                started = time.perf_counter()
                data = os.pread(fd, 4096, at * EXTENT + 8192)
                samples.add(name, time.perf_counter() - started)
                if len(data) != 4096:
                    raise AssertionError("a short read")
    return samples


# 3: the first write to an extent since it was equal


def first_write(work: Path, options: Options) -> str:
    """Microseconds of 4 KiB writes through the mount to a Source with a fractured clone."""
    mount = Mount(work)
    per_round = 64
    size = options.rounds * per_round * AHEAD
    names = ("first in 32 MiB", "first in its extent", "same extent again")
    medians, all_times = Samples(), Samples()
    with mount.served():
        mount.add_group("writes", size)
        mount.add_clone("writes")
        mount.command("writes/clone/fracture")
        durable = mount.mountpoint / "control/writes/persistent_delta_map"
        wait_for(lambda: not durable.read_text().strip(), "a checkpoint")
        with opened(mount.lu("writes"), os.O_WRONLY) as source:
            for number in range(options.rounds):
                times = Samples()
                for run_of in range(number * per_round, (number + 1) * per_round):
                    at = run_of * AHEAD + EXTENT
                    for name, offset in zip(names, (at, at + EXTENT, at + EXTENT), strict=True):
                        started = time.perf_counter()
                        os.pwrite(source, bytes(4096), offset)
                        times.add(name, time.perf_counter() - started)
                add_round(times, medians, all_times)
    return of_requests("4 KiB write", medians, all_times, names[-1])


def add_round(times: Samples, medians: Samples, all_times: Samples) -> None:
    """Add the single requests of a round."""
    for name, values in times.of.items():
        medians.add(name, statistics.median(values))
        all_times.of.setdefault(name, []).extend(values)


def of_requests(title: str, medians: Samples, all_times: Samples, to: str) -> str:
    """A table of single requests."""
    return table(
        (title, "requests", "median, µs", "99 of 100 within, µs", f"ratio to *{to}*"),
        *(
            (
                name,
                len(values),
                f"{1e6 * statistics.median(values):.0f}",
                f"{1e6 * statistics.quantiles(values, n=100)[98]:.0f}",
                medians.ratio(name, to),
            )
            for name, values in all_times.of.items()
        ),
    )


# What durability costs: intent ahead of first writes, and maps that go with a flush

DURABLE_REGION = 64 * MiB  # of each round: what is written there has not been written to before
FSYNCS = 200


def durability(work: Path, options: Options) -> str:
    """Seconds of first writes, and of writes with an fsync each, against a Source without clones."""
    mount = Mount(work)
    size = options.rounds * 4 * DURABLE_REGION
    samples = {title: Samples() for title in DURABLE_WORK}
    with mount.served():
        for group in ("plain", "split", "restored"):
            mount.add_group(group, size)
            fill(mount.lu(group), size)
        for group in ("split", "restored"):
            mount.add_clone(group)
            mount.wait(group, "synchronized")
            mount.command(f"{group}/clone/fracture")
        fill(mount.lu("restored"), size)  # so that all of it differs
        mount.command("restored/clone/rate", STUCK)
        mount.command("restored/clone/protected_restore")
        wait_for(lambda: not _durable_delta(mount, "split"), "a checkpoint")
        for number in range(options.rounds):
            for index, (title, work_on) in enumerate(DURABLE_WORK.items()):
                start = (4 * number + index) * DURABLE_REGION
                for group in rotated(["plain", "split", "restored"], number):
                    for name in ("plain", "split", "restored"):
                        flush(mount.backing(name))
                    with opened(mount.lu(group), os.O_WRONLY) as lu:
                        samples[title].add(group, work_on(lu, start))
    return table(
        ("", "no clones, s", "fractured clone: times that", "in a restore: times that"),
        *(
            (
                title,
                each.seconds("plain"),
                each.ratio("split", "plain"),
                each.ratio("restored", "plain"),
            )
            for title, each in samples.items()
        ),
    )


def _durable_delta(mount: Mount, group: str) -> str:
    return (mount.mountpoint / f"control/{group}/persistent_delta_map").read_text().strip()


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _sequential(lu: int, start: int) -> float:
    data = b"s" * EXTENT

    def work() -> None:
        for offset in range(start, start + DURABLE_REGION, EXTENT):
            os.pwrite(lu, data, offset)

    return _timed(work)


def _scattered(lu: int, start: int) -> float:
    offsets = list(range(start, start + DURABLE_REGION, EXTENT))
    random.Random(start).shuffle(offsets)

    def work() -> None:
        for offset in offsets:
            os.pwrite(lu, b"r" * 4096, offset + 4096)

    return _timed(work)


def _fsyncs(lu: int, start: int, step: int) -> float:
    def work() -> None:
        for number in range(FSYNCS):
            os.pwrite(lu, b"f" * 4096, start + number * step)
            os.fsync(lu)

    return _timed(work)


DURABLE_WORK: dict[str, Callable[[int, int], float]] = {
    "1024 first writes of 64 KiB in order": _sequential,
    "1024 first writes of 4 KiB at random": _scattered,
    "200 writes of 4 KiB, each to a new extent, each with fsync": lambda lu, start: _fsyncs(
        lu, start, EXTENT
    ),
    "200 writes of 4 KiB in 13 extents, each with fsync": lambda lu, start: _fsyncs(
        lu, start, 4096
    ),
}


# 4: the whole copy of a restore against cp


def copy(work: Path, options: Options) -> str:
    """Seconds until 1 GiB of different data is copied."""
    mount = Mount(work)
    samples = Samples()
    target = work / "target.img"
    origin = mount.backing("copy", "clone")
    with mount.served():
        mount.add_group("copy", GiB)
        fill(mount.lu("copy"), GiB)
        mount.add_clone("copy")
        mount.command("copy/clone/fracture")

        def protected_restore() -> None:
            fill(mount.lu("copy"), GiB)
            started = time.perf_counter()
            mount.command("copy/clone/protected_restore")
            mount.wait("copy", "fractured")
            samples.add("Protected Restore", time.perf_counter() - started)
            run("cmp", mount.backing("copy"), origin)

        def by_hand(name: str, *command: str | Path) -> None:
            run("cp", "--reflink=never", mount.backing("copy"), target)
            flush(target)
            timed_copy(samples, name, target, *command)

        def cp() -> None:
            by_hand("cp over the old file", "cp", "--reflink=never", origin, target)

        def dd() -> None:
            words = ("bs=1M", "conv=notrunc", "status=none", f"if={origin}", f"of={target}")
            by_hand("dd into the old file", "dd", *words)

        ways = {"restore": protected_restore, "cp": cp, "dd": dd}
        for number in range(options.rounds):
            for way in rotated(list(ways), number):
                ways[way]()
    return compare(samples, "Protected Restore")


def timed_copy(samples: Samples, name: str, target: Path, *command: str | Path) -> None:
    """Run a program that copies to `target`; its seconds, and those with an fsync after it."""
    started = time.perf_counter()
    run(*command)
    samples.add(name, time.perf_counter() - started)
    flush(target)
    samples.add(f"{name}, fsync", time.perf_counter() - started)


def compare(samples: Samples, *ours: str) -> str:
    """A table of seconds, and how each of ours compares with all."""
    return table(
        ("", "seconds", *(f"{name} takes, times this" for name in ours)),
        *(
            (name, samples.seconds(name), *(samples.ratio(our, name) for our in ours))
            for name in samples.of
        ),
    )


# 5: host I/O against another FUSE file system and the bare file


class Cell(NamedTuple):
    """One row of the table: what fio does."""

    title: str
    rw: str
    bs: str
    engine: str
    depth: int
    direct: int


CELLS = [
    Cell(f"{title}, {queue}", rw, bs, engine, depth, direct)
    for title, rw, bs in (
        ("sequential 1 MiB read", "read", "1m"),
        ("sequential 1 MiB write", "write", "1m"),
        ("random 4 KiB read", "randread", "4k"),
        ("random 4 KiB write", "randwrite", "4k"),
    )
    for queue, engine, depth, direct in (
        ("direct, depth 1", "libaio", 1, 1),
        ("direct, depth 16", "libaio", 16, 1),
        ("buffered, depth 1", "psync", 1, 0),
    )
]
QEMU, RAW, MIRROR = "qemu", "raw file", "clonefs, mirrored clone"


def host_io(work: Path, options: Options) -> str:
    """Requests a second of fio."""
    mount = Mount(work)
    groups = {"clonefs, no clone": "plain", "clonefs, fractured clone": "split", MIRROR: "mirror"}
    raw, image, export = work / "raw.img", work / "qemu.img", work / "export"
    for path in (raw, image, export):
        path.touch()
    for path in (raw, image):
        fill(path, IO_SIZE)
    qemu = (
        "qemu-storage-daemon",
        *("--blockdev", f"driver=file,node-name=file,filename={image}"),
        *("--export", f"type=fuse,id=fuse,node-name=file,mountpoint={export},writable=on"),
    )
    with mount.served(), running(work, *qemu):
        for group in groups.values():
            mount.add_group(group, IO_SIZE)
            fill(mount.lu(group), IO_SIZE)
        for group in ("split", "mirror"):
            mount.add_clone(group)
        mount.command("split/clone/fracture")
        fill(mount.lu("split"), IO_SIZE)  # the first write to an extent is behind it
        wait_for(lambda: export.stat().st_size > 0, "qemu-storage-daemon")
        paths = {name: mount.lu(group) for name, group in groups.items()}
        paths |= {QEMU: export, RAW: raw}
        rates = {cell: Samples() for cell in CELLS}
        for number in range(options.rounds):
            for cell in CELLS:
                for name in rotated(list(paths), number):
                    if name != MIRROR or "write" in cell.rw:
                        rate = fio(paths[name], cell, options.seconds, raw=name == RAW)
                        rates[cell].add(name, rate)
                        for backing in work.glob("*.img"):
                            flush(backing)
    ours = [*groups, RAW]
    return table(
        ("", "qemu, requests/s", *(f"{name}: times qemu" for name in ours)),
        *(
            (
                cell.title,
                f"{samples.median(QEMU):,.0f}",
                *(samples.ratio(name, QEMU) if name in samples.of else "" for name in ours),
            )
            for cell, samples in rates.items()
        ),
    )


def fio(path: Path, cell: Cell, seconds: float, *, raw: bool) -> float:
    """Requests a second. A raw file is always buffered: the others have its page cache below them,
    and direct requests would be the only ones that go to the disk."""
    direct = 0 if raw else cell.direct
    said = run(
        *("fio", "--name=bench", f"--filename={path}", f"--rw={cell.rw}", f"--bs={cell.bs}"),
        *(f"--ioengine={cell.engine}", f"--iodepth={cell.depth}", f"--direct={direct}"),
        *(f"--size={IO_SIZE}", f"--runtime={int(1e6 * seconds)}us", "--time_based", "--thread"),
        *("--allow_file_create=0", "--fallocate=none", "--invalidate=0", "--randrepeat=0"),
        *("--norandommap", "--output-format=json"),
    )
    job = json.loads(said[said.index("{") :])["jobs"][0]
    return float(job["write" if "write" in cell.rw else "read"]["iops"])


# 6: memory


def memory(work: Path, options: Options) -> str:
    """MiB that the daemon has."""
    rows = []
    for title, size in {"none": 0, **SIZES}.items():
        mount = Mount(work)
        prepare_restores(mount, {"lu": size} if size else {})
        with mount.served() as daemon:
            idle = resident(daemon.pid)
            if size:
                restore_once(mount, "lu", size)
            after = resident(daemon.pid)
            if size:
                mount.command("lu/clone/fracture", "force")
                mount.remove("lu", "clone")
                mount.remove("lu")
        rows.append((title, idle["VmRSS"], after["VmRSS"], after["RssAnon"], after["VmHWM"]))
    head = ("LU", "idle, MiB", "after a restore, MiB", "of which its own, MiB", "most so far, MiB")
    return table(head, *rows)


def resident(pid: int) -> dict[str, str]:
    """MiB of physical memory, by the names of the kernel."""
    found = re.findall(r"(\w+):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return {name: f"{int(value) / 1024:.1f}" for name, value in found}


# 7: a first sync against cp


def sync(work: Path, options: Options) -> str:
    """Seconds until a sparse Source of 1 TiB with 1 GiB of data is copied."""
    mount = Mount(work)
    samples = Samples()
    target = work / "target.img"
    with mount.served():
        mount.add_group("sync", TiB)
        for at in range(16):
            fill(mount.lu("sync"), 64 * MiB, at * TiB // 16)

        def clone() -> None:
            started = time.perf_counter()
            mount.add_clone("sync")
            samples.add("sync", time.perf_counter() - started)
            mount.command("sync/clone/fracture")
            samples.add("sync, fracture", time.perf_counter() - started)
            mount.remove("sync", "clone")

        def cp() -> None:
            command = ("cp", "--sparse=always", mount.backing("sync"), target)
            timed_copy(samples, "cp", target, *command)
            target.unlink()

        ways = {"clone": clone, "cp": cp}
        for number in range(options.rounds):
            for way in rotated(list(ways), number):
                ways[way]()
    return compare(samples, "sync", "sync, fracture")


# The command

# 8: what the metrics cost


COUNTED = [cell for cell in CELLS if "direct" in cell.title and "4 KiB" in cell.title]


def count(work: Path, options: Options) -> str:
    """Requests with the lines that count them, and without."""
    rows: list[tuple[object, ...]] = [("", "without", "with: times that")]
    for request, times in trio.run(counting.in_process, work).items():
        in_process = Samples(times)
        name = f"{request} in one process, µs"
        rows.append((name, f"{in_process.median('without') / 1e3:.2f}", _quartiles(times)))
    rates, costs = _count_mounted(work, options)
    for cell in COUNTED:
        for what, unit, samples in (("requests/s", 1.0, rates), ("processor time, µs", 1e6, costs)):
            of_cell = samples[cell]
            without = f"{unit * of_cell.median('without'):,.{0 if unit == 1.0 else 1}f}"
            rows.append((f"{cell.title}, {what}", without, of_cell.ratio("with", "without")))
    return table(*rows)


def _quartiles(times: dict[str, list[float]]) -> str:
    """The median of the batches' ratios, and the quartiles: a batch is short, and many are disturbed."""
    pairs = zip(times["with"], times["without"], strict=True)
    low, middle, high = statistics.quantiles([one / other for one, other in pairs], n=4)
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def _count_mounted(work: Path, options: Options) -> tuple[dict[Cell, Samples], dict[Cell, Samples]]:
    """Requests a second, and seconds of processor time for a request, by what fio does."""
    rates = {cell: Samples() for cell in COUNTED}
    costs = {cell: Samples() for cell in COUNTED}
    mount = Mount(work)
    with mount.served(counting.PROGRAM) as daemon:
        mount.add_group("group", IO_SIZE)
        lu, metrics = mount.lu("group"), mount.mountpoint / "control/metrics"
        fill(lu, IO_SIZE)
        for number in range(options.rounds):
            for cell in COUNTED:
                for name in rotated(list(counting.SIGNALS), number):
                    counting.tell(daemon.pid, name, metrics, lu)
                    before = counting.processor_time(daemon.pid)
                    rate = fio(lu, cell, options.seconds, raw=False)
                    spent = counting.processor_time(daemon.pid) - before
                    rates[cell].add(name, rate)
                    costs[cell].add(name, spent / (rate * options.seconds))
                    flush(mount.backing("group"))
    return rates, costs


BENCHES: dict[str, Callable[[Path, Options], str]] = {
    "restore": restore,
    "first-read": first_read,
    "first-write": first_write,
    "durability": durability,
    "copy": copy,
    "io": host_io,
    "memory": memory,
    "sync": sync,
    "counting": count,
}


def machine(work: Path) -> str:
    """What it was measured on, in one sentence."""
    kernel = ".".join(platform.release().split(".")[:2])
    file_system = run("stat", "--file-system", "--format=%T", work).strip()
    file_system = "ext4" if file_system == "ext2/ext3" else file_system
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GiB
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {kernel}, {file_system}, "
        f"Python {platform.python_version()}"
    )


def put_into_page(name: str, text: str) -> None:
    """Replace what is between the markers of `name`."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text(before + begin + text + end + rest.split(end)[1])


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(prog="tests/bench/run", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run of fio (1)")
    parser.add_argument(
        "--only",
        choices=BENCHES,
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(BENCHES)}; may be given again",
    )
    parser.add_argument("--write", action="store_true", help="put the tables into the page, too")
    arguments = parser.parse_args()
    options = Options(max(1, arguments.rounds), arguments.seconds)
    for name in arguments.only or BENCHES:
        with stage() as work:
            before = os.getloadavg()[0]
            result = BENCHES[name](work, options)
            load = f"load average {before:.1f} before and {os.getloadavg()[0]:.1f} after"
            text = f"{machine(work)}; {load}.\n\n{result}"
        print(f"\n## {name}\n\n{text}", flush=True)
        if arguments.write:
            put_into_page(name, text)


if __name__ == "__main__":
    main()
