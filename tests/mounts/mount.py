"""A real mount that a test can use, kill and put away again.

`Mount` is one metadata volume with the daemon that serves it, `Group` and `Clone` are what it shows.
They go through the mounted files only, as a person would; where a test looks behind them, it reads
the backing files. Nothing here waits for a time to pass: `wait_for` waits for a state.

What a test sets up on top of a mount goes into an ExitStack, and is put away in the opposite order
whatever becomes of the test: file systems, loop devices, and then the mount and its daemon.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from clonefs.volume import CloneState, MapSlot, format_volume, open_volume, was_closed_cleanly

T = TypeVar("T")

DEADLINE_S = 60.0
KiB = 1 << 10
MiB = 1 << 20
EXTENT = 64 * KiB

WITHOUT_CHECKPOINTS = (
    "-c",
    """
from clonefs.cli import main
from clonefs.engines import StorageSystem
StorageSystem.__init__.__kwdefaults__["checkpoint"] = 1e9
main()
""",
)

# How often a daemon was killed in this run, by what it was doing.
KILLS: Counter[str] = Counter()

_LIVE: "set[Mount]" = set()
_DEAD_MOUNT = (errno.ENOTCONN, errno.ECONNABORTED)


def wait_for(look: Callable[[], T], what: str = "", *, deadline_s: float = DEADLINE_S) -> T:
    """What `look` returns, once that is true. Fails when it has not become so in time."""
    deadline = time.monotonic() + deadline_s
    while not (found := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {deadline_s:.0f} s in vain {what}")
        time.sleep(0.005)
    return found


def run(*command: str | Path, deadline_s: float = DEADLINE_S) -> str:
    """Run a program that must succeed; what it prints."""
    result = subprocess.run(
        [str(word) for word in command],
        check=False,
        capture_output=True,
        text=True,
        timeout=deadline_s,
    )
    assert result.returncode == 0, f"{command}: {result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout


def noise(seed: object, length: int) -> bytes:
    """`length` bytes that look like nothing else, the same for the same seed."""
    return random.Random(str(seed)).randbytes(length)


def digest(path: Path) -> str:
    """The SHA-256 of all that a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor of `path`."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read(path: Path, offset: int, length: int) -> bytes:
    """Bytes of an LU, through a descriptor of its own."""
    with opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, length, offset)


def write(path: Path, offset: int, data: bytes) -> None:
    """Write bytes to an LU with one write(2), through a descriptor of its own."""
    with opened(path, os.O_WRONLY) as fd:
        assert os.pwrite(fd, data, offset) == len(data)


def assert_same(actual: bytes | bytearray, expected: bytes | bytearray, what: str = "") -> None:
    """Equal bytes; if not, say where they begin to differ instead of printing them."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} bytes, not {len(expected)}"
    if actual != expected:
        at = differing(actual, expected, 512)
        pytest.fail(f"{what}: {len(at)} sectors differ, the first ones are {sorted(at)[:8]}")


def differing(one: bytes | bytearray, other: bytes | bytearray, extent: int) -> set[int]:
    """The extents in which the two differ."""
    if one == other:
        return set()
    return {
        number
        for number, at in enumerate(range(0, len(one), extent))
        if one[at : at + extent] != other[at : at + extent]
    }


def touched(offset: int, length: int, extent: int = EXTENT) -> set[int]:
    """The extents that the bytes touch."""
    return set(range(offset // extent, (offset + length - 1) // extent + 1))


def parse_extent_list(text: str) -> set[int]:
    """The extents of a list like `0,4-7,9`; only that very form, in order and without overlaps."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        run_of = range(int(first), int(last if dash else first) + 1)
        assert not dash or len(run_of) > 1, f"{part!r} is a run of one"
        assert not found or run_of[0] > found[-1] + 1, f"{part!r} is not apart from the last run"
        found += run_of
    return set(found)


@dataclass(frozen=True)
class Control:
    """One control file."""

    path: Path

    def read(self) -> str:
        """The text, without the newline that it must end in."""
        text = self.path.read_text()
        assert text.endswith("\n"), f"{self.path} does not end in a newline: {text!r}"
        return text[:-1]

    def write(self, command: str) -> None:
        """Write one command, as echo does."""
        self.write_bytes(f"{command}\n".encode())

    def write_bytes(self, command: bytes) -> None:
        """Write just these bytes with one write(2)."""
        with opened(self.path, os.O_WRONLY) as fd:
            assert os.write(fd, command) == len(command)


@dataclass(frozen=True)
class Clone:
    """A clone as a mount shows it."""

    group: "Group"
    name: str
    backing: Path

    @property
    def path(self) -> Path:
        """Its LU file."""
        return self.group.mount.mountpoint / self.group.name / self.name

    def control(self, name: str) -> Control:
        """One of its control files."""
        return self.group.control(f"{self.name}/{name}")

    @property
    def state(self) -> str:
        """What its `state` file says."""
        return self.control("state").read()

    def delta(self) -> set[int]:
        """What its `delta_map` says."""
        return parse_extent_list(self.control("delta_map").read())

    def status(self) -> dict[str, Any]:
        """Its part of status.json."""
        status: dict[str, Any] = self.group.status()["clones"][self.name]
        return status

    def wait(self, state: str) -> None:
        """Return once it is in that state."""
        wait_for(lambda: self.state == state, f"for {self.name} to be {state}")

    def sync(self, word: str = "1") -> None:
        """Begin to copy what differs to it."""
        self.control("sync").write(word)

    def fracture(self, word: str = "1") -> None:
        """Split it off."""
        self.control("fracture").write(word)

    def restore(self) -> None:
        """Begin a Protected Restore from it."""
        self.control("protected_restore").write("1")

    def rate(self, rate: int | str) -> None:
        """Bound its copies. With 1 a byte a second, one extent is copied and then no more."""
        self.control("rate").write(str(rate))

    def wait_for_the_one_extent(self) -> None:
        """With a rate of 1: return when that one extent has been copied."""
        wait_for(lambda: self.status()["progress"]["done"] == 1, "for the one extent")


@dataclass(frozen=True)
class Group:
    """A Clone Group as a mount shows it."""

    mount: "Mount"
    name: str
    backing: Path

    @property
    def source(self) -> Path:
        """The LU file of the Source."""
        return self.mount.mountpoint / self.name / "source"

    def control(self, name: str) -> Control:
        """One of its control files."""
        return self.mount.control(f"{self.name}/{name}")

    def status(self) -> dict[str, Any]:
        """Its part of status.json."""
        status: dict[str, Any] = self.mount.status()["groups"][self.name]
        return status

    def restore_status(self) -> dict[str, Any]:
        """What status.json says of the restore that is running."""
        status = self.status()["restore"]
        assert isinstance(status, dict), "no restore is running"
        return status

    def protected(self) -> set[int]:
        """What the `protected_restore_map` says."""
        return parse_extent_list(self.control("protected_restore_map").read())

    def clone(self, name: str) -> Clone:
        """The clone of that name, with the backing that `add_clone` gives it."""
        return Clone(self, name, self.backing.with_name(f"{self.name}-{name}.img"))

    def add_clone(self, name: str = "nightly", *, sync: bool = True) -> Clone:
        """Add a clone; with `sync` it is synchronized when this returns."""
        clone = self.clone(name)
        tail = "" if sync else " sync=no"
        self.control("add_clone").write(f"{name} '{clone.backing}'{tail}")
        if sync:
            clone.wait("synchronized")
        return clone

    def add_fractured(self, name: str = "nightly") -> Clone:
        """Add a clone, and split it off when it is equal."""
        clone = self.add_clone(name)
        clone.fracture()
        return clone


@dataclass(eq=False)
class Mount:
    """A metadata volume in `work` and its daemon. Everything that tests put there goes with it."""

    work: Path
    options: str = ""
    volume_size: int = 4 * MiB
    program: tuple[str, ...] = ("-m", "clonefs")
    process: "subprocess.Popen[bytes] | None" = None
    cleanly: bool = True  # whether the volume will be a clean one when it has been closed

    def __post_init__(self) -> None:
        self.meta = self.work / "meta"
        self.mountpoint = self.work / "mnt"
        self.log = self.work / "log"
        self._numbers = itertools.count(1)
        self._expected: list[str] = []
        self.mountpoint.mkdir(parents=True)

    # Life

    def format(self) -> None:
        """Make the volume."""
        format_volume(self.meta, size=self.volume_size, force=False)

    def start(self) -> None:
        """Mount, and return once the tree is there."""
        self._launch()
        wait_for(self._is_there, "for the tree")

    def _launch(self) -> None:
        assert self.process is None
        command = [sys.executable, "-W", "error", *self.program, "mount", "-f"]
        if self.options:
            command += ["-o", self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, self.meta, self.mountpoint], stdin=subprocess.DEVNULL, stderr=log
            )
        _LIVE.add(self)

    def _is_there(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon has ended: {self.log.read_text()}"
        try:
            self.control("status").path.stat()
        except FileNotFoundError:
            return False
        return True

    def umount(self, *, clean: bool | None = None) -> None:
        """Unmount, and return once the volume is closed; it must be clean, or must not: `cleanly` if
        it is not said here."""
        # A file that was just closed, or a loop device that was just detached, may be let go a
        # little later.
        wait_for(self._try_umount, f"for {self.mountpoint} to be free", deadline_s=10.0)
        assert self.wait_for_end() == 0
        if "ro" not in self.options.split(","):
            assert was_closed_cleanly(self.meta) is (self.cleanly if clean is None else clean)

    def _try_umount(self) -> bool:
        try:
            run("umount", self.mountpoint)
        except AssertionError as failure:
            if "busy" not in str(failure):
                raise
            return False
        return True

    def wait_for_end(self) -> int:
        """The exit status of the daemon, once it has ended."""
        assert self.process is not None
        status = self.process.wait(DEADLINE_S)
        self.process = None
        _LIVE.discard(self)
        return status

    def signal(self, number: signal.Signals) -> None:
        """Send the daemon a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the daemon, and take the dead mount away."""
        self.signal(signal.SIGKILL)
        assert self.wait_for_end() == -signal.SIGKILL
        run("umount", "--lazy", self.mountpoint)
        KILLS[self._what_it_did()] += 1

    def _what_it_did(self) -> str:
        """What a daemon that is dead was doing, by the record that it has left."""
        volume = open_volume(self.meta)
        try:
            states = {clone.state for group in volume.record.groups for clone in group.clones}
        finally:
            volume.close(clean=False)
        if CloneState.RESTORING in states:
            return "in a restore"
        return "in a sync" if CloneState.SYNCHRONIZING in states else "in steady state"

    def start_over_dead(self) -> None:
        """Mount where a dead mount still is."""
        self._launch()
        wait_for(lambda: not self._is_dead() and self._is_there(), "for the tree")

    def _is_dead(self) -> bool:
        try:
            os.statvfs(self.mountpoint)
        except OSError as error:
            return error.errno in _DEAD_MOUNT
        return False

    def start_and_kill(self, delay_s: float) -> None:
        """Begin to mount, and kill the daemon wherever it is then."""
        self._launch()
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(delay_s)
        self.signal(signal.SIGKILL)
        assert self.wait_for_end() == -signal.SIGKILL
        _unmount_all_below(self.work)
        KILLS["while it starts"] += 1

    def start_if_dead(self) -> None:
        """Mount again after a test in which the daemon has died: that test has failed, and what
        comes after it is not to fail for it."""
        if self.process is None or self.process.poll() is not None:
            _unmount_all_below(self.work)
            self.process = None
            self.start()

    def remount(self, options: str | None = None) -> None:
        """Unmount and mount again, with the same options or with these."""
        self.umount()
        self.options = self.options if options is None else options
        self.start()

    def close(self) -> None:
        """Put everything away, whatever has become of it, and look into the log."""
        # A request that hangs would keep umount waiting: then the daemon is killed under it.
        with patience():
            if self.process is not None:
                self._end()
        assert not _unmount_all_below(self.work), "something was still mounted at the end"
        self._look_into_the_log()

    def _end(self) -> None:
        try:
            self.umount()
        except BaseException:
            if self.process is not None:
                self.process.kill()
                self.process.wait()
                self.process = None
            raise
        finally:
            _LIVE.discard(self)

    # The log

    def expect_in_log(self, pattern: str) -> None:
        """Warnings and errors with this in them are part of the test; any other is a failure."""
        self._expected.append(pattern)

    def _look_into_the_log(self) -> None:
        if not self.log.exists():
            return
        unexpected = [
            line
            for line in self.log.read_text().splitlines()
            if re.search(r" (WARNING|ERROR|CRITICAL) |^Traceback|Warning: ", line)
            and not any(re.search(pattern, line) for pattern in self._expected)
        ]
        assert not unexpected, "\n".join(["unexpected in the log:", *unexpected])

    # The tree

    def control(self, name: str) -> Control:
        """A control file, by its path below `control`."""
        return Control(self.mountpoint / "control" / name.lstrip("/"))

    def status(self) -> dict[str, Any]:
        """What status.json says, but for what hosts have done: tests look at LUs all the time."""
        status: dict[str, Any] = json.loads(self.control("status.json").read())
        for group in status["groups"].values():
            for lu in (group, *group["clones"].values()):
                del lu["host_io"]
        return status

    def _errors_near(self, place: str) -> dict[str, str]:
        """What the `error` files say, by their directories below `control`: that of the top, and
        those of the group that `place` is in."""
        places = [""]
        if name := place.partition("/")[0]:
            clones = self.status()["groups"][name]["clones"]
            places += [name, *(f"{name}/{clone}" for clone in clones)]
        return {place: self.control(f"{place}/error").read() for place in places}

    def new_name(self) -> str:
        """A name that no group has had, so that the tests of a module can share a mount."""
        return f"g{next(self._numbers)}"

    def group(self, name: str) -> Group:
        """The group of that name, with the backing that `add_group` gives it."""
        return Group(self, name, self.work / f"{name}-source.img")

    def add_group(
        self, size: int = 4 * MiB, *, extent: int = EXTENT, data: bytes | None = None
    ) -> Group:
        """A new group whose Source holds `data`; a backing of `size` bytes if there is none."""
        group = self.group(self.new_name())
        if data is not None:
            group.backing.write_bytes(data)
        tail = f"size={size} " if data is None else ""
        self.control("add_group").write(f"{group.name} '{group.backing}' {tail}extent={extent}")
        return group

    @contextlib.contextmanager
    def refuses(self, number: int, place: str, *words: str) -> Iterator[None]:
        """The body is a command that must fail with this errno, leave a sentence with these words
        in the `error` file of the directory `place`, and change nothing else."""
        status, errors = self.status(), self._errors_near(place)
        with pytest.raises(OSError) as failure:
            yield
        assert errno.errorcode[failure.value.errno or 0] == errno.errorcode[number]
        assert self.status() == status
        sentence = self.control(f"{place}/error").read()
        assert self._errors_near(place) == errors | {place: sentence}
        assert sentence
        assert [word for word in words if word not in sentence] == [], sentence

    # Behind the tree, while nobody has the volume mounted

    def look_behind(self, group: str) -> "Remembered":
        """What the volume remembers of a group."""
        assert self.process is None
        volume = open_volume(self.meta)
        try:
            record = next(each for each in volume.record.groups if each.name == group)
            extents = -(-record.size // record.extent_size)

            def bits(slot: MapSlot) -> set[int]:
                runs = volume.map(slot, extents).runs()
                return {extent for first, stop in runs for extent in range(first, stop)}

            return Remembered(
                {clone.name: str(clone.state) for clone in record.clones},
                {clone.name: bits(clone.delta) for clone in record.clones},
                bits(record.protected),
            )
        finally:
            volume.close(clean=False)


@dataclass(frozen=True)
class Remembered:
    """States and Delta Maps by the names of the clones, and the Protected Restore Map."""

    states: dict[str, str]
    delta: dict[str, set[int]]
    protected: set[int]


def kill_all_daemons() -> None:
    """Kill every daemon that is running, so that whoever hangs in a request gets an error."""
    for mount in list(_LIVE):
        if mount.process is not None:
            mount.process.kill()


@contextlib.contextmanager
def patience(seconds: float = 2 * DEADLINE_S) -> Iterator[None]:
    """A body that takes longer hangs: then all daemons are killed, which ends every request."""
    timer = threading.Timer(seconds, kill_all_daemons)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def mounts_below(work: Path) -> list[Path]:
    """Where something is mounted below `work`; what was mounted last comes first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    # A blank, a tab, a newline and a backslash stand there as octal numbers.
    places = [
        Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4]))
        for line in lines
    ]
    return [place for place in reversed(places) if place.is_relative_to(work)]


def _unmount_all_below(work: Path) -> list[Path]:
    """Take away whatever is mounted there; what it was."""
    left = mounts_below(work)
    for place in left:
        run("umount", "--lazy", place)
    return left


@contextlib.contextmanager
def mounted(
    work: Path,
    *,
    options: str = "",
    volume_size: int = 4 * MiB,
    program: tuple[str, ...] = Mount.program,
) -> Iterator[Mount]:
    """A new volume, mounted, and put away at the end with everything in `work`."""
    mount = Mount(work, options, volume_size, program)
    try:
        mount.format()
        mount.start()
        yield mount
    finally:
        mount.close()
        run("rm", "-r", "--one-file-system", work)


# Loop devices and file systems ---------------------------------------------------------------


@dataclass(eq=False)
class Loop:
    """A loop device."""

    path: Path

    def __post_init__(self) -> None:
        self._sequence = self._sequence_now()

    @classmethod
    def all_below(cls, directory: Path) -> "list[Loop]":
        """Those over files below a directory."""
        found = []
        for file in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
            loop = cls(Path("/dev", file.parts[3]))
            with contextlib.suppress(OSError):  # it was detached just now
                if file.read_text().startswith(f"{directory}/"):
                    found.append(loop)
        return found

    def is_attached(self) -> bool:
        """Whether it is what it was. The same device may be somebody else's by now, with another
        number in sequence."""
        attached = Path("/sys/block", self.path.name, "loop/backing_file").exists()
        return attached and self._sequence_now() == self._sequence

    def _sequence_now(self) -> str:
        return Path("/sys/block", self.path.name, "diskseq").read_text()

    def detach(self) -> None:
        """Detach it, if it is attached, and return when it has let go of its backing."""
        if self.is_attached():
            run("losetup", "--detach", self.path)
            wait_for(lambda: not self.is_attached(), f"for {self.path} to be free")

    @classmethod
    def take_away(cls, loops: "list[Loop]") -> None:
        """Let go of all that are still attached: at once, or when what uses them does."""
        for loop in loops:
            if loop.is_attached():
                subprocess.run(["losetup", "--detach", loop.path], check=False)

    def forget_pages(self) -> None:
        """Make the kernel forget what it has cached of the device."""
        run("blockdev", "--flushbufs", self.path)


def attach(
    cleanup: contextlib.ExitStack,
    path: Path,
    *,
    direct: bool = False,
    read_only: bool = False,
    size: int | None = None,
) -> Loop:
    """A loop device on `path`, or on its first `size` bytes. It is detached with `cleanup`, if not
    before."""
    options = ["--direct-io=on"] if direct else []
    options += [f"--sizelimit={size}"] if size else []
    options += ["--read-only"] if read_only else []
    loop = Loop(Path(run("losetup", "--find", "--show", *options, path).strip()))
    cleanup.callback(loop.detach)
    return loop


def is_free(device: Path) -> bool:
    """Whether a device can be had alone: the mount namespace of another test may hold for a moment
    what was just unmounted. One that has gone is free."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        return error.errno != errno.EBUSY
    return True


def copied_by_reading(clone: Clone, *extents: int) -> None:
    """Read these extents of the Source until they are copied: a read is answered before, and is not
    always worth a copy."""
    size = int(clone.group.control("extent_size").read())
    for extent in extents:

        def is_copied(extent: int = extent) -> bool:
            read(clone.group.source, extent * size, 512)
            return extent not in clone.delta()

        wait_for(is_copied, f"for extent {extent} to be copied")


def mount_disk(
    cleanup: contextlib.ExitStack, device: Path, where: Path, kind: str, options: str = "defaults"
) -> Callable[[], None]:
    """Mount the file system on `device`. Returns what unmounts it, which `cleanup` does at last."""
    where.mkdir(exist_ok=True)
    run("mount", "-t", kind, "-o", options, device, where)

    def is_unmounted() -> bool:
        done = subprocess.run(["umount", where], check=False, capture_output=True, text=True)
        assert done.returncode == 0 or "busy" in done.stderr, done
        return done.returncode == 0

    def unmount() -> None:
        if where in mounts_below(where):
            wait_for(is_unmounted, f"for {where} to be free")  # who was there may be about to end
            wait_for(lambda: is_free(device), f"for {device} to be free")

    cleanup.callback(unmount)
    return unmount
