"""What the measurements stand on: a directory, mounts and programs, all gone at the end.

Every program is ended by its own process, every loop device detached by its own name, and every
mount below the directory is taken down before anything is removed, whatever has happened in between.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from clonefs.volume import format_volume, open_volume

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
EXTENT = 64 * KiB
LARGEST = 16 * TiB - EXTENT
"""The largest Source that ext4 can have the file of, but for the last 4 KiB."""

TOP = Path(__file__).parents[2]
DEADLINE = 120.0  # seconds
LAST_LINES = 20  # of a log, when something has failed
STUCK = "16K"  # a rate at which the Sync Engine copies one extent in four seconds


@contextlib.contextmanager
def stage() -> Iterator[Path]:
    """A directory on a real file system, under which the benchmark mounts and writes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    work = Path(tempfile.mkdtemp(prefix="clonefs-bench.", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        yield work
    except Exception:
        for log in sorted(work.rglob("log")):
            print("".join(log.read_text().splitlines(keepends=True)[-LAST_LINES:]), file=sys.stderr)
        raise
    finally:
        _clear(work)


def _clear(work: Path) -> None:
    """Take everything down that a failure may have left, and remove the directory."""
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if device.read_text().startswith(f"{work}/"):
                subprocess.run(["losetup", "--detach", f"/dev/{device.parts[3]}"], check=False)
    for mountpoint in mounts_below(work):
        subprocess.run(["umount", "--lazy", mountpoint], check=False)
    if left := list(mounts_below(work)):
        raise RuntimeError(f"{left[0]} could not be unmounted: {work} is left as it is")
    shutil.rmtree(work)


def mounts_below(work: Path) -> Iterator[str]:
    """Mount points, the innermost first."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if (mountpoint := line.split()[4]).startswith(f"{work}/"):
            yield mountpoint


def wait_for(
    look: Callable[[], bool], what: str, pause: float = 0.01, deadline: float = DEADLINE
) -> None:
    """Return once `look` is true."""
    latest = time.monotonic() + deadline
    while not look():
        if time.monotonic() > latest:
            raise TimeoutError(f"waited {deadline:.0f} s for {what}")
        time.sleep(pause)


@contextlib.contextmanager
def running(work: Path, *command: str | Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A program that works until SIGTERM, for the time of the body."""
    with (work / "log").open("ab") as log:
        # In a session of its own: Ctrl-C is for us, who then end it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=work,
            env=os.environ | {"PYTHONPATH": str(TOP)},
        )
    try:
        yield process
    finally:
        process.terminate()
        ended(process, DEADLINE)


def ended(process: "subprocess.Popen[bytes]", deadline: float) -> None:
    """Return once it has ended, if need be by force."""
    try:
        process.wait(deadline)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    """A loop device over a file, with direct I/O to it."""
    device = run("losetup", "--find", "--show", "--direct-io=on", file).strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)
        backing = Path(f"/sys/block/{Path(device).name}/loop/backing_file")
        # It goes when the last one who has it open, udev perhaps, lets go.
        wait_for(lambda: not _is_over(backing, file), f"{device} to let go of {file}")


def _is_over(backing: Path, file: Path) -> bool:
    try:
        return backing.read_text().strip() == str(file)
    except OSError:
        return False


MAKE = {
    "XFS": ("mkfs.xfs", "-q", "-m", "reflink=1"),
    "Btrfs": ("mkfs.btrfs", "-q"),
}
"""File systems that can share blocks between files, and how they are made."""


@contextlib.contextmanager
def file_system(work: Path, kind: str, size: int) -> Iterator[Path]:
    """A directory that is a file system of its own, in a sparse file."""
    image, place = work / f"{kind}.fs", work / kind
    place.mkdir()
    image.touch()
    os.truncate(image, size)
    run(*MAKE[kind], image)
    with loop_device(image) as device:
        run("mount", device, place)
        try:
            yield place
        finally:
            run("umount", place)
    image.unlink()


class Mount:
    """A metadata volume in `work` and, within `with mount.served()`, the daemon that serves it."""

    def __init__(self, work: Path, volume: int | None = None) -> None:
        self.work = work
        work.mkdir(exist_ok=True)
        self.meta = work / "meta"
        self.mountpoint = work / "mnt"
        self.mountpoint.mkdir(exist_ok=True)
        self.meta.unlink(missing_ok=True)
        self.mounting = 0.0
        """Seconds that the last mount took."""
        format_volume(self.meta, size=volume, force=False)

    @contextlib.contextmanager
    def served(self, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Mount, and unmount cleanly."""
        command = (
            sys.executable,
            "-m",
            "clonefs",
            "mount",
            "-f",
            *(f"-o{each}" for each in options),
        )
        started = time.perf_counter()
        with running(self.work, *command, self.meta, self.mountpoint) as daemon:
            wait_for((self.mountpoint / "control/status").exists, "the mount", pause=0.002)
            self.mounting = time.perf_counter() - started
            yield daemon
        wait_for(lambda: not self._mounted(), "the mount to go")

    def _mounted(self) -> bool:
        return str(self.mountpoint) in mounts_below(self.work)

    def backing(self, group: str, name: str = "source") -> Path:
        """The file under an LU."""
        return self.work / f"{group}-{name}.img"

    def lu(self, group: str, name: str = "source") -> Path:
        """The file of an LU."""
        return self.mountpoint / group / name

    def control(self, where: str) -> Path:
        """A control file."""
        return self.mountpoint / "control" / where

    def command(self, where: str, text: str = "1") -> float:
        """Write one command to a control file; the seconds of the write."""
        with opened(self.control(where), os.O_WRONLY) as fd:
            started = time.perf_counter()
            os.write(fd, text.encode())
            return time.perf_counter() - started

    def group(self, name: str) -> dict[str, Any]:
        """What status.json says of a group."""
        status = json.loads(self.control("status.json").read_text())
        found: dict[str, Any] = status["groups"][name]
        return found

    def state(self, group: str, clone: str = "clone") -> str:
        """The state of a clone."""
        return self.control(f"{group}/{clone}/state").read_text().strip()

    def wait(self, group: str, state: str, clone: str = "clone") -> None:
        """Return once the clone is in that state."""
        wait_for(
            lambda: self.state(group, clone) == state, f"{group}/{clone} to be {state}", pause=0.002
        )

    def wait_for_checkpoint(self, group: str) -> None:
        """Return once nothing is marked ahead: what is written next is a first write."""
        durable = self.control(f"{group}/persistent_delta_map")
        wait_for(lambda: not durable.read_text().strip(), "a checkpoint")

    def add_group(self, group: str, size: int) -> None:
        """A new group with a sparse Source."""
        self.command("add_group", f"{group} '{self.backing(group)}' size={size}")

    def add_clone(self, group: str, clone: str = "clone") -> None:
        """A clone that is synchronized when this returns."""
        self.command(f"{group}/add_clone", f"{clone} '{self.backing(group, clone)}'")
        self.wait(group, "synchronized", clone)

    def fracture(self, group: str, *clones: str) -> None:
        """Split clones off at one instant."""
        self.command("fracture", " ".join(f"{group}/{clone}" for clone in clones))

    def split_group(self, group: str, size: int, data: int, clones: Iterable[str]) -> list[str]:
        """A group with so much data at its beginning and fractured clones; their names."""
        self.add_group(group, size)
        fill(self.lu(group), data)
        names = list(clones)
        for name in names:
            self.command(f"{group}/add_clone", f"{name} '{self.backing(group, name)}'")
        for name in names:
            self.wait(group, "synchronized", name)
        if names:
            self.fracture(group, *names)
        return names

    def resync(self, group: str, clones: Iterable[str]) -> None:
        """Make fractured clones equal to the Source, and split them off again."""
        names = list(clones)
        for name in names:
            self.command(f"{group}/{name}/sync")
        for name in names:
            self.wait(group, "synchronized", name)
        self.fracture(group, *names)

    def remove(self, group: str, clone: str | None = None) -> None:
        """Forget a clone or a group, and remove its backing."""
        where, name = ("remove_group", group) if clone is None else (f"{group}/remove_clone", clone)
        self.command(where, name)
        self.backing(group, clone or "source").unlink()

    def flush(self, group: str) -> None:
        """Write out what is dirty in the group's backings."""
        for backing in self.work.glob(f"{group}-*.img"):
            flush(backing)

    def fill_delta_maps(self, *groups: str) -> None:
        """Say that every extent of the clones of these groups may differ. Nobody may have it
        mounted."""
        volume = open_volume(self.meta)
        for group in volume.record.groups:
            extents = -(-group.size // group.extent_size)
            for clone in group.clones if group.name in groups else ():
                volume.map(clone.delta, extents).mark_all()
        volume.close(clean=True)


# Files


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A file descriptor."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def fill(path: Path, length: int, offset: int = 0) -> None:
    """Write bytes that were never there before, and flush them."""
    fill_pieces(path, ((at, min(MiB, offset + length - at)) for at in _steps(offset, length)))


def _steps(offset: int, length: int) -> range:
    return range(offset, offset + length, MiB)


def fill_pieces(path: Path, pieces: Iterable[tuple[int, int]]) -> None:
    """The same for pieces of at most 1 MiB, each an offset and a length."""
    noise = bytearray(os.urandom(MiB))
    with opened(path, os.O_WRONLY) as fd:
        for offset, length in pieces:
            noise[:16] = os.urandom(16)
            os.pwrite(fd, noise[:length], offset)
        os.fsync(fd)


def flush(path: Path) -> None:
    """fsync."""
    with opened(path) as fd:
        os.fsync(fd)


def read_through(path: Path) -> None:
    """All of it once."""
    piece = bytearray(MiB)
    with opened(path) as fd:
        at = 0
        while count := os.preadv(fd, [piece], at):
            at += count


def must_be_equal(
    one: Path, other: Path, but: Iterable[range] = (), stop: int | None = None
) -> None:
    """Raise AssertionError if two files differ, but for these extents, and as far as `stop`."""
    left_out = {extent for run_of in but for extent in run_of}
    with opened(one) as first, opened(other) as second:
        for at in range(0, stop or os.fstat(first).st_size, EXTENT):
            if at // EXTENT not in left_out and os.pread(first, EXTENT, at) != os.pread(
                second, EXTENT, at
            ):
                raise AssertionError(f"{one} and {other} differ at byte {at}")


def parse_extents(text: str) -> list[range]:
    """What a map's control file says."""
    runs = [run_of.split("-") for run_of in text.strip().split(",") if run_of]
    return [range(int(run_of[0]), int(run_of[-1]) + 1) for run_of in runs]


# Programs


def run(*command: str | Path) -> str:
    """Run a program that must succeed; what it prints."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def cpu_seconds(pid: int) -> float:
    """Processor time of a process, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> dict[str, float]:
    """MiB of physical memory, by the names of the kernel (VmRSS, RssAnon)."""
    found = re.findall(r"(\w+):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return {name: int(value) / 1024 for name, value in found}
