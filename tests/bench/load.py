"""The load: fio, for a time, or for as long as something else takes.

A depth of 16 is 16 requests under way of one program with O_DIRECT (libaio), and 16 programs with
one request each without (psync), since buffered requests of libaio wait for each other. Latencies are
from the submission of a request to its completion.
"""

import contextlib
import json
import signal
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.bench.stage import DEADLINE, ended, run, running, wait_for

ENOUGH = 100
"""Requests without which a p99 means nothing."""


BYTES = {"4k": 4096, "1m": 1 << 20}


class Job(NamedTuple):
    """What hosts do."""

    rw: str  # read, write, randread, randwrite
    bs: str  # 1m, 4k
    depth: int
    direct: bool = True

    @property
    def writes(self) -> bool:
        """Whether it is about writes."""
        return "write" in self.rw

    def words(self, size: int) -> list[str]:
        """The arguments that all runs have. Caches stay as they are; nothing is created or allocated."""
        words = [
            "--name=bench",
            f"--rw={self.rw}",
            f"--bs={self.bs}",
            "--thread",
            "--output-format=json",
        ]
        words += ["--allow_file_create=0", "--fallocate=none", "--invalidate=0", "--randrepeat=0"]
        words += ["--lat_percentiles=1", "--clat_percentiles=0", "--group_reporting"]
        words.append("--norandommap")
        if self.direct:
            return [
                *words,
                "--direct=1",
                "--ioengine=libaio",
                f"--iodepth={self.depth}",
                f"--size={size}",
            ]
        words += ["--direct=0", "--ioengine=psync", f"--numjobs={self.depth}"]
        if self.rw in ("read", "write"):  # each has a piece of its own
            return [
                *words,
                f"--size={size // self.depth}",
                f"--offset_increment={size // self.depth}",
            ]
        return [*words, f"--size={size}"]


@dataclass(frozen=True)
class Measured:
    """What hosts got: requests a second, and seconds that a request took."""

    iops: float
    p50: float
    p99: float
    requests: int


def measure(path: Path, job: Job, size: int, seconds: float) -> Measured:
    """Requests to the first `size` bytes for so many seconds."""
    return _measured(
        job, _fio(path, job, size, f"--runtime={int(1e6 * seconds)}us", "--time_based")
    )


def write_once(work: Path, path: Path, job: Job, offsets: Iterable[int]) -> Measured:
    """One write to each of these offsets."""
    log = work / "iolog"
    length = BYTES[job.bs]
    lines = [f"{path} write {offset} {length}" for offset in offsets]
    head = ["fio version 2 iolog", f"{path} add", f"{path} open"]
    log.write_text("\n".join([*head, *lines, f"{path} close", ""]))
    said = run(
        *("fio", "--name=bench", f"--rw={job.rw}", f"--read_iolog={log}", "--replay_no_stall=1"),
        *("--thread", "--output-format=json", "--allow_file_create=0", "--invalidate=0"),
        *("--lat_percentiles=1", "--clat_percentiles=0", "--direct=1", "--ioengine=libaio"),
        f"--iodepth={job.depth}",
    )
    measured = _measured(job, said)
    if measured.requests != len(lines):
        raise AssertionError(f"fio made {measured.requests} writes instead of {len(lines)}")
    return measured


def _fio(path: Path, job: Job, size: int, *more: str) -> str:
    return run("fio", *job.words(size), f"--filename={path}", *more)


def _measured(job: Job, said: str) -> Measured:
    whole = json.loads(said[said.index("{") :])["jobs"][0]
    if whole["error"]:
        raise AssertionError(f"fio: errno {whole['error']} in {job}")
    part = whole["write" if job.writes else "read"]
    at = part["lat_ns"]["percentile"]
    return Measured(
        part["iops"], at["50.000000"] / 1e9, at["99.000000"] / 1e9, int(part["total_ios"])
    )


# While something else happens


class Requests:
    """When each request was completed, in time.time(), and how long it took."""

    def __init__(self, log: str) -> None:
        """From a log of latencies of fio."""
        fields = [line.split(", ", 2) for line in log.splitlines()]
        self._requests = [(int(when) / 1e3, int(took) / 1e9) for when, took, _ in fields]

    def within(self, begin: float, end: float) -> Measured | None:
        """What hosts got between two times; None if they got hardly anything."""
        took = [took for when, took in self._requests if begin <= when < end]
        if len(took) < ENOUGH:
            return None
        whole = statistics.quantiles(took, n=100)
        return Measured(len(took) / (end - begin), whole[49], whole[98], len(took))


@dataclass(frozen=True)
class Hosts:
    """fio that goes on until it is told to stop."""

    log: Path
    process: "subprocess.Popen[bytes]"

    def stop(self) -> Requests:
        """All that they have done."""
        self.process.send_signal(signal.SIGINT)
        ended(self.process, DEADLINE)
        return Requests(self.log.read_text())


@contextlib.contextmanager
def hosts(work: Path, where: Path | str, job: Job, size: int) -> Iterator[Hosts]:
    """Hosts that are at it. `where` is a file, or the URI of an NBD export."""
    log, begun = work / "fio_lat.1.log", work / "fio.begun"
    for left in (log, begun):
        left.unlink(missing_ok=True)
    words = job.words(size)
    if isinstance(where, str):
        words += ["--ioengine=nbd", f"--uri={where}"]
    else:
        words.append(f"--filename={where}")
    words += ["--time_based", "--runtime=1h", f"--exec_prerun=touch {begun}"]
    words += [f"--write_lat_log={work}/fio", "--log_unix_epoch=1", "--disable_slat=1"]
    with running(work, "fio", *words, "--disable_clat=1") as process:
        wait_for(begun.exists, "fio")
        time.sleep(0.1)  # it is under way, not starting; what counts is cut out by time
        yield Hosts(log, process)
