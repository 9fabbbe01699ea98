"""What the measurements stand on: a directory, mounts and programs, all gone at the end.

Every program is ended by its own process, and every mount below the directory is taken down before
anything is removed, whatever has happened in between.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clonefs.volume import format_volume, open_volume

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
EXTENT = 64 * KiB
DEADLINE = 120.0  # seconds


@contextlib.contextmanager
def stage() -> Iterator[Path]:
    """A directory on a real file system, under which the benchmark mounts and writes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    work = Path(tempfile.mkdtemp(prefix="clonefs-bench.", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        yield work
    except Exception:
        print((work / "log").read_text(), file=sys.stderr)
        raise
    finally:
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if (mountpoint := line.split()[4]).startswith(f"{work}/"):
                subprocess.run(["umount", "--lazy", mountpoint], check=False)
        shutil.rmtree(work)


def wait_for(look: Callable[[], bool], what: str, pause: float = 0.01) -> None:
    """Return once `look` is true."""
    deadline = time.monotonic() + DEADLINE
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {DEADLINE:.0f} s for {what}")
        time.sleep(pause)


@contextlib.contextmanager
def running(work: Path, *command: str | Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A program that works until SIGTERM, for the time of the body."""
    with (work / "log").open("ab") as log:
        # In a session of its own: Ctrl-C is for us, who then end it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Mount:
    """A metadata volume in `work` and, within `with mount.served()`, the daemon that serves it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.meta = work / "meta"
        self.mountpoint = work / "mnt"
        self.mountpoint.mkdir(exist_ok=True)
        self.meta.unlink(missing_ok=True)
        format_volume(self.meta, size=None, force=False)

    @contextlib.contextmanager
    def served(
        self, program: tuple[str, ...] = ("-m", "clonefs")
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Mount, and unmount cleanly."""
        command = (sys.executable, *program, "mount", "-f")
        with running(self.work, *command, self.meta, self.mountpoint) as daemon:
            wait_for((self.mountpoint / "control/status").exists, "the mount")
            yield daemon

    def backing(self, group: str, name: str = "source") -> Path:
        """The file under an LU."""
        return self.work / f"{group}-{name}.img"

    def lu(self, group: str, name: str = "source") -> Path:
        """The file of an LU."""
        return self.mountpoint / group / name

    def command(self, where: str, text: str = "1") -> None:
        """Write one command to a control file."""
        fd = os.open(self.mountpoint / "control" / where, os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def group(self, name: str) -> dict[str, Any]:
        """What status.json says of a group."""
        status = json.loads((self.mountpoint / "control/status.json").read_text())
        found: dict[str, Any] = status["groups"][name]
        return found

    def wait(self, group: str, state: str, clone: str = "clone") -> None:
        """Return once the clone is in that state."""
        file = self.mountpoint / "control" / group / clone / "state"
        wait_for(lambda: file.read_text().strip() == state, f"{group}/{clone} to be {state}")

    def add_group(self, group: str, size: int) -> None:
        """A new group with a sparse Source."""
        self.command("add_group", f"{group} '{self.backing(group)}' size={size}")

    def add_clone(self, group: str, clone: str = "clone") -> None:
        """A clone that is synchronized when this returns."""
        self.command(f"{group}/add_clone", f"{clone} '{self.backing(group, clone)}'")
        self.wait(group, "synchronized", clone)

    def remove(self, group: str, clone: str | None = None) -> None:
        """Forget a clone or a group, and remove its backing."""
        where, name = ("remove_group", group) if clone is None else (f"{group}/remove_clone", clone)
        self.command(where, name)
        self.backing(group, clone or "source").unlink()

    def fill_delta_maps(self) -> None:
        """Say that every extent of every clone may differ. Nobody may have it mounted."""
        volume = open_volume(self.meta)
        for group in volume.record.groups:
            extents = -(-group.size // group.extent_size)
            for clone in group.clones:
                volume.map(clone.delta, extents).mark_all()
        volume.close(clean=True)


def fill(path: Path, length: int, offset: int = 0) -> None:
    """Write bytes that were never there before, and flush them."""
    noise = bytearray(os.urandom(MiB))
    fd = os.open(path, os.O_WRONLY)
    try:
        for at in range(offset, offset + length, MiB):
            noise[:16] = os.urandom(16)
            os.pwrite(fd, noise[: offset + length - at], at)
        os.fsync(fd)
    finally:
        os.close(fd)


def flush(path: Path) -> None:
    """fsync."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def run(*command: str | Path) -> str:
    """Run a program that must succeed; what it prints."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
