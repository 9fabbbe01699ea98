"""Isolation: a backing that hangs or is slow must not slow the requests of another group, and many
restores at once must all be in effect at once.

The backing lies on `tests/mounts/faulty.py`, a FUSE file system in a process of its own. The hosts of
the slow group have one request each under way (psync): the kernel sends a FUSE file system only so
many asynchronous requests at a time, 12 as a rule, and beyond that it is the kernel that makes them
wait for each other.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.bench.load import Job, hosts, measure
from tests.bench.results import Part, median, spread
from tests.bench.scale import Scale, rounds, shuffled
from tests.bench.stage import EXTENT, MiB, Mount, fill, must_be_equal, opened, wait_for
from tests.bench.tables import table
from tests.mounts.faulty import FaultyDevice, faulty_device

SIZE = 64 * MiB
SLOW_HOSTS = 8
DELAY = 0.05  # seconds that the slow backing takes for a request
ALONE, HANGS, SLOW = "alone", "beside a backing that hangs", "beside a backing that is slow"
JOBS = {
    f"4 KiB {what}s, depth {depth}": Job(f"rand{what}", "4k", depth)
    for what in ("read", "write")
    for depth in (1, 16)
}
P99, IOPS = ": p99, µs", ": requests/s"

RESTORES = 64
RESTORE_SIZE = 8 * MiB
ALL_IN_EFFECT, ONE_IN_EFFECT = "all are in effect, ms", "the slowest write, ms"
ALL_OVER, ONE_OVER = "all have copied, s", "one alone has copied, s"
RESTORED = "restores"


def measure_part(work: Path, part: Part, scale: Scale) -> None:
    """All rounds."""
    with faulty_device(work / "faulty") as device, contextlib.ExitStack() as stack:
        mount = Mount(work)
        stack.enter_context(mount.served())
        there = Neighbours(mount, device)
        names = _prepare_restores(mount)
        # Nobody can unmount what hangs.
        stack.callback(device.mend)
        for _ in rounds(part, scale):
            for what in shuffled(list(JOBS)):
                for beside in shuffled([ALONE, HANGS, SLOW]):
                    _beside(there, part, what, beside, scale)
            _restores(mount, part, names)


# Neighbours


@dataclass
class Neighbours:
    """Two groups: one whose backing may be bad, and one whose hosts shall not notice."""

    mount: Mount
    device: FaultyDevice

    def __post_init__(self) -> None:
        self.mount.command("add_group", f"bad '{self.bad}' size={SIZE}")
        self.mount.add_group("good", SIZE)
        for group in ("bad", "good"):
            fill(self.mount.lu(group), SIZE)

    @property
    def bad(self) -> Path:
        """The backing that may be bad."""
        return self.device.path / "bad.img"


def _beside(there: Neighbours, part: Part, what: str, beside: str, scale: Scale) -> None:
    with BESIDE[beside](there):
        got = measure(there.mount.lu("good"), JOBS[what], SIZE, 2 * scale.seconds)
    there.mount.flush("good")
    part.add(what + P99, beside, 1e6 * got.p99)
    part.add(what + IOPS, beside, got.iops)


@contextlib.contextmanager
def _hanging(there: Neighbours) -> Iterator[None]:
    fault = there.device.hang(there.bad, "read")
    with _bad_hosts(there):
        try:
            wait_for(lambda: fault.hanging > 0, "requests to hang")
            yield
            assert fault.hanging > 0, "nothing hung"
        finally:
            there.device.mend()


@contextlib.contextmanager
def _slow(there: Neighbours) -> Iterator[None]:
    fault = there.device.slow_down(there.bad, "read", DELAY)
    with _bad_hosts(there):
        try:
            wait_for(lambda: fault.hits > SLOW_HOSTS, "slow requests")
            before = fault.hits
            yield
            assert fault.hits > before, "nothing was slow"
        finally:
            there.device.mend()


@contextlib.contextmanager
def _bad_hosts(there: Neighbours) -> Iterator[None]:
    """Hosts that read from the bad group, one request each."""
    job = Job("randread", "4k", SLOW_HOSTS, direct=False)
    with hosts(there.mount.work, there.mount.lu("bad"), job, SIZE):
        yield


@contextlib.contextmanager
def _idle(there: Neighbours) -> Iterator[None]:
    yield


BESIDE = {ALONE: _idle, HANGS: _hanging, SLOW: _slow}


# Many restores at once


def _prepare_restores(mount: Mount) -> list[str]:
    names = [f"many{number}" for number in range(RESTORES)]
    for name in names:
        mount.split_group(name, RESTORE_SIZE, RESTORE_SIZE, ["clone"])
    return names


def _restores(mount: Mount, part: Part, names: list[str]) -> None:
    alone = _restore(mount, names[:1])
    together = _restore(mount, names)
    part.add(RESTORED, ALL_IN_EFFECT, 1e3 * together.in_effect)
    part.add(RESTORED, ONE_IN_EFFECT, 1e3 * together.slowest)
    part.add(RESTORED, ALL_OVER, together.over)
    part.add(RESTORED, ONE_OVER, alone.over)


@dataclass(frozen=True)
class Restored:
    """Seconds: until all writes had returned, of the slowest write, until all had copied."""

    in_effect: float
    slowest: float
    over: float


def _restore(mount: Mount, names: list[str]) -> Restored:
    """Ruin all of them and restore them, all at once. When the writes have returned all of them must
    read right, while most have not begun to copy."""
    for name in names:
        fill(mount.lu(name), RESTORE_SIZE)
    started = time.perf_counter()
    with ThreadPoolExecutor(len(names)) as writers:
        commands = [f"{name}/clone/protected_restore" for name in names]
        slowest = max(writers.map(mount.command, commands))
        in_effect = time.perf_counter() - started
    for name in names:
        _must_read_right(mount, name)
    for name in names:
        mount.wait(name, "fractured")
    over = time.perf_counter() - started
    for name in names:
        must_be_equal(mount.backing(name), mount.backing(name, "clone"))
    return Restored(in_effect, slowest, over)


def _must_read_right(mount: Mount, name: str) -> None:
    """The last extent is the last that is copied."""
    at = RESTORE_SIZE - EXTENT
    with opened(mount.lu(name)) as source, opened(mount.backing(name, "clone")) as clone:
        if os.pread(source, 4096, at) != os.pread(clone, 4096, at):
            raise AssertionError(f"{name} does not read as its clone does")


# The report


def report(part: Part) -> str:
    """Markdown."""
    cases = [what + unit for what in JOBS for unit in (P99, IOPS)]
    return "\n\n".join(
        [
            "Hosts of one group, beside another:",
            table(
                ("", ALONE, *(f"{beside}: times that" for beside in (HANGS, SLOW))),
                *(
                    (
                        case,
                        median(part.values(case, ALONE)),
                        *(spread(part.ratios(case, beside, ALONE)) for beside in (HANGS, SLOW)),
                    )
                    for case in cases
                ),
            ),
            f"{RESTORES} restores of {RESTORE_SIZE // MiB} MiB, asked for at once:",
            table(
                ("", "median (spread)"),
                *(
                    (what, spread(part.values(RESTORED, what)))
                    for what in (ALL_IN_EFFECT, ONE_IN_EFFECT, ALL_OVER, ONE_OVER)
                ),
            ),
        ]
    )
