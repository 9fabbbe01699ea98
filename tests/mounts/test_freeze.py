"""`clonefs fracture --freeze` on real file systems: clean copies, milliseconds, and thawed whatever
happens.

What is killed is killed at a known step: the hooks wait for a word (`Gate`), and a device that hangs
holds up a freeze or a fracture. Whether a file system is frozen is asked of the kernel: a second freeze
is EBUSY.
"""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clonefs.volume import format_volume
from clonefs.volume.layout import PAGE, Superblock
from tests.mounts.faulty import Fault, FaultyDevice
from tests.mounts.mount import (
    DEADLINE_S,
    Clone,
    Loop,
    MiB,
    Mount,
    attach,
    mount_disk,
    opened,
    run,
    wait_for,
)
from tests.terminal import CLONEFS

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878


def ask(where: Path, request: int) -> int:
    """Freeze or thaw; 0 or the errno."""
    descriptor = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(descriptor, request, 0)
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(descriptor)
    return 0


def is_frozen(where: Path) -> bool:
    """Whether it is frozen; it is left as it was."""
    found = ask(where, FIFREEZE)
    if found == 0:
        assert ask(where, FITHAW) == 0
    assert found in (0, errno.EBUSY)
    return found == errno.EBUSY


# A test that has failed leaves some of these: then its file systems would be in use.
GATES: "set[Gate]" = set()
RUNNING: "set[Running]" = set()


NOTE = "clonefs: note: "


def has_ended(pid: int) -> bool:
    """Whether a child of somebody else has."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")


# What it is done to --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """A kind of file system: how it is made, what says that it is whole, and how it is mounted as it
    lies there, without replaying anything."""

    kind: str
    size: int
    make: tuple[str, ...]
    check: tuple[str, ...]
    as_it_is: str


EXT4 = Disk("ext4", 64 * MiB, ("mkfs.ext4", "-q"), ("e2fsck", "-fn"), "ro,noload")
XFS = Disk("xfs", 320 * MiB, ("mkfs.xfs", "-q"), ("xfs_repair", "-n"), "ro,norecovery,nouuid")
BTRFS = Disk("btrfs", 320 * MiB, ("mkfs.btrfs", "-q"), ("btrfs", "check"), "ro,rescue=nologreplay")


@dataclass
class Production:
    """A file system on the Source of a group, and a clone that is synchronized."""

    mount: Mount
    cleanup: contextlib.ExitStack
    disk: Disk = EXT4
    clone: Clone = field(init=False)
    loop: Loop = field(init=False)
    where: Path = field(init=False)

    def __post_init__(self) -> None:
        group = self.mount.add_group(self.disk.size)
        self.where = self.mount.work / f"{group.name}-disk"
        self.loop = attach(self.cleanup, group.source, direct=True)
        run(*self.disk.make, self.loop.path)
        mount_disk(self.cleanup, self.loop.path, self.where, self.disk.kind)
        self.clone = group.add_clone()
        self.cleanup.callback(self._unmount)
        self.cleanup.callback(self._thaw_at_last)

    def _unmount(self) -> None:
        """The guard of a command that was killed may need a moment to let go."""
        command = ["umount", str(self.where)]
        wait_for(lambda: subprocess.run(command, check=False).returncode == 0, "for umount")

    def _thaw_at_last(self) -> None:
        """A test that has failed must not leave something that nobody can unmount."""
        while GATES:
            GATES.pop().give_up()
        while RUNNING:
            running = RUNNING.pop()
            running.kill()
            running.process.communicate()
        assert ask(self.where, FITHAW) == errno.EINVAL, f"{self.where} was left frozen"


@pytest.fixture
def mount(shared: Mount) -> Mount:
    """Nothing is done to the daemon of these."""
    return shared


@pytest.fixture
def production(mount: Mount, cleanup: contextlib.ExitStack) -> Production:
    """An ext4 on a Source."""
    return Production(mount, cleanup)


# The command -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """A command that has ended: its status, and what it has printed."""

    status: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The sentence of a command that has failed."""
        assert (self.status, self.out) == (1, ""), self
        (line,) = [each for each in self.err.splitlines() if not each.startswith(NOTE)]
        return line.removeprefix("clonefs: ")


@dataclass(frozen=True, eq=False)
class Running:
    """A command that is running."""

    process: "subprocess.Popen[str]"

    def __post_init__(self) -> None:
        RUNNING.add(self)

    def end(self) -> Done:
        """What has become of it, once it has ended."""
        out, err = self.process.communicate(timeout=DEADLINE_S)
        RUNNING.discard(self)
        return Done(self.process.returncode, out, err)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    @property
    def beside(self) -> list[int]:
        """The processes beside it: the writer, and the guard."""
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(*words: str | Path) -> Running:
    """Start `clonefs fracture`."""
    return Running(
        subprocess.Popen(
            [*CLONEFS, "fracture", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )


def fracture(*words: str | Path) -> Done:
    """Run it to its end."""
    return start(*words).end()


def freeze(production: Production, *words: str | Path) -> Running:
    """Start it with this file system frozen."""
    return start(production.clone.path, "--freeze", production.where, *words)


class Gate:
    """A command for a hook that says that it has come, and waits until it is let through."""

    def __init__(self, work: Path, name: str) -> None:
        self._come, self._go = work / f"{name}-come", work / f"{name}-go"
        GATES.add(self)
        os.mkfifo(self._come)
        os.mkfifo(self._go)
        self.command = f"echo $CLONEFS_RESULT > '{self._come}'; read -r word < '{self._go}'"

    def wait(self) -> str:
        """Return when it has come; what CLONEFS_RESULT is."""
        with opened(self._come, os.O_RDONLY | os.O_NONBLOCK) as fd:
            return wait_for(lambda: self._said(fd), "for the hook").strip()

    def _said(self, fd: int) -> str:
        try:
            return os.read(fd, 100).decode()
        except BlockingIOError:
            return ""

    def open(self) -> None:
        """Let it through."""

        def waits() -> int | None:
            try:
                return os.open(self._go, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                return None

        fd = wait_for(waits, "for the hook to wait")
        assert fd is not None
        os.write(fd, b"go\n")
        os.close(fd)
        GATES.discard(self)

    def give_up(self) -> None:
        """Nobody waits for it any more, nor does it."""
        for path in (self._come, self._go):
            fd = os.open(path, os.O_RDWR)  # wakes who waits for the other end
            os.write(fd, b"go\n")  # and stays open, so that it is read


def note(path: Path) -> str:
    """A command for a hook that notes what it is told, a line for each time."""
    return f"echo $CLONEFS_RESULT >> '{path}'"


# Clean copies ----------------------------------------------------------------------------------------

WRITER = """
import os, sys
for number in range(10**6):
    fd = os.open(f"{sys.argv[1]}/{number % 50}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, f"{number} ".encode() * 2000)
    os.fsync(fd)
    os.close(fd)
    os.rename(f"{sys.argv[1]}/{number % 50}.new", f"{sys.argv[1]}/{number % 50}")
    print(number, flush=True)
"""


class Writer:
    """A program that writes files, and says of each that it is on disk."""

    def __init__(self, where: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, where], stdout=subprocess.PIPE, text=True
        )
        self.last = -1
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.last = int(line)

    def go_on(self, count: int) -> None:
        """Return when it has written so many more."""
        wanted = self.last + count
        wait_for(lambda: self.last >= wanted, "for the writer")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()


@contextlib.contextmanager
def writing(where: Path) -> Iterator[Writer]:
    """A writer, which is stopped at the end."""
    writer = Writer(where)
    try:
        yield writer
    finally:
        writer.stop()


def numbers(where: Path) -> set[int]:
    """What the writer has written there; each file must be whole, except for one that has not got
    its name yet."""
    found = set()
    for path in where.iterdir():
        if path.name.isdigit():
            words = path.read_text().split()
            assert words == 2000 * words[:1]
            found.add(int(words[0]))
    return found


def needs_replay(clone: Clone, disk: Disk) -> bool:
    """Whether a mount would have to replay something that the file systems themselves wrote."""
    if disk is EXT4:
        return "needs_recovery" in run("dumpe2fs", "-h", clone.backing)
    if disk is BTRFS:
        lines = run("btrfs", "inspect-internal", "dump-super", clone.backing).splitlines()
        return not any(line.split() == ["log_root", "0"] for line in lines)
    # XFS keeps counts in its log also when it is frozen, and its checker wants them in their place;
    # that nothing else is there is shown by what a mount without recovery has.
    return False


def check(clone: Clone, disk: Disk, cleanup: contextlib.ExitStack) -> None:
    """The file system's own checker finds nothing."""
    if disk is XFS:
        device = attach(cleanup, clone.path, direct=True)
        mount_disk(cleanup, device.path, clone.group.mount.work / "replayed", "xfs", "nouuid")()
        device.detach()
    run(*disk.check, clone.backing)


@pytest.mark.parametrize("disk", [EXT4, XFS, BTRFS], ids=lambda disk: disk.kind)
def test_what_is_in_the_clone_is_clean(
    mount: Mount, cleanup: contextlib.ExitStack, disk: Disk
) -> None:
    """Mounted as it lies there, without replaying a journal, it has what was written before, whole,
    and nothing that was written after."""
    production = Production(mount, cleanup, disk)
    clone, copy = production.clone, mount.work / "copy"
    with writing(production.where) as writer:
        for _ in range(2):
            clone.wait("synchronized")
            writer.go_on(60)
            before = writer.last
            done = freeze(production).end()
            after = writer.last + 1
            writer.go_on(60)
            assert (done.status, done.err) == (0, "")
            assert done.out.startswith(f"{clone.path} fractured; {production.where} frozen for ")
            assert done.out.endswith(" ms\n")
            assert not needs_replay(clone, disk)
            device = attach(cleanup, clone.backing, read_only=True)
            unmount = mount_disk(cleanup, device.path, copy, disk.kind, disk.as_it_is)
            last = max(numbers(copy))
            assert before <= last <= after
            assert numbers(copy) == set(range(last - 49, last + 1))
            unmount()
            device.detach()
            check(clone, disk, cleanup)
            clone.sync()


def test_several_file_systems_are_frozen_for_one_instant(
    mount: Mount, cleanup: contextlib.ExitStack
) -> None:
    """One file system is named twice."""
    one, other = Production(mount, cleanup), Production(mount, cleanup)
    with writing(one.where) as a, writing(other.where) as b:
        a.go_on(10)
        b.go_on(10)
        paths = (one.clone.path, other.clone.path)
        places = [word for each in (one, other, one) for word in ("--freeze", each.where)]
        done = fracture(*paths, *places, "--json")
        a.go_on(10)
        b.go_on(10)
    assert (done.status, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["fractured"] == [str(path) for path in paths]
    assert report["frozen"] == [str(one.where), str(other.where)]
    assert 0 < report["frozen_ms"] < 10_000
    for each in (one, other):
        assert not needs_replay(each.clone, EXT4)
        run(*EXT4.check, each.clone.backing)


def test_a_clone_of_a_file_system_that_is_not_frozen_needs_its_journal(
    production: Production,
) -> None:
    """The other tests would not notice a freeze that does nothing if this were not so."""
    with writing(production.where) as writer:
        writer.go_on(10)
        assert fracture(production.clone.path) == Done(0, "", "")
    assert needs_replay(production.clone, EXT4)


# Hooks -----------------------------------------------------------------------------------------------


def test_hooks_come_before_and_after_and_are_told(production: Production, tmp_path: Path) -> None:
    """What `--before` has started lives until `--after` ends it: as a session that holds a lock."""
    notes, session = tmp_path / "notes", tmp_path / "session"
    before = (
        f"test -w '{production.where}'/. && sleep 1000 & echo $! > '{session}'; "
        f"echo before $CLONEFS_CLONES; touch '{production.where}/before'"
    )
    after = (
        f"touch '{production.where}/after'; kill $(cat '{session}') && "
        f"echo $CLONEFS_RESULT $CLONEFS_CLONES $CLONEFS_FROZEN_MS > '{notes}'"
    )
    done = freeze(production, "--before", before, "--after", after).end()
    path = str(production.clone.path)
    assert (done.status, done.err) == (0, f"before {path}\n")
    result, clone, frozen_ms = notes.read_text().split()
    assert (result, clone) == ("fractured", path)
    assert f"frozen for {frozen_ms} ms" in done.out
    names = run("debugfs", "-R", "ls -p /", production.clone.backing)
    assert "/before/" in names
    assert "/after/" not in names


def test_hooks_without_a_freeze(production: Production, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    command = f"echo $CLONEFS_RESULT $CLONEFS_FROZEN_MS >> '{notes}'"
    done = fracture(production.clone.path, "--before", command, "--after", command)
    assert done == Done(0, f"{production.clone.path} fractured\n", "")
    assert notes.read_text() == "\nfractured 0.0\n"


def test_when_before_fails_nothing_is_done(production: Production, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    done = freeze(production, "--before", "exit 7", "--after", note(notes)).end()
    assert done.refusal == "--before failed (exit status 7): nothing has been fractured"
    assert notes.read_text() == "before-failed\n"
    assert production.clone.state == "synchronized"


def test_when_after_fails_the_copy_is_there(production: Production) -> None:
    done = freeze(production, "--after", "kill -9 $$").end()
    assert done.status == 1
    assert "frozen for" in done.out
    assert done.err == "clonefs: --after failed (killed by SIGKILL); the copy is good\n"
    assert production.clone.state == "fractured"


# Refusals --------------------------------------------------------------------------------------------


def test_what_cannot_be_frozen_is_a_sentence(production: Production, tmp_path: Path) -> None:
    """What has been frozen before it is thawed, and nothing is fractured."""
    mountpoint = production.mount.mountpoint
    (production.where / "below").mkdir()
    notes = tmp_path / "notes"
    for where, words in (
        (tmp_path / "nowhere", ["there is no", "nowhere"]),
        (production.where / "below", ["not a mount point", f"which is {production.where}"]),
        (Path("/"), ["/ is not frozen"]),
        (Path("/proc"), ["/proc cannot be frozen", "type proc", "Nothing has been fractured"]),
        (mountpoint, [f"{mountpoint} cannot be frozen", "type fuse.clonefs"]),
    ):
        done = freeze(production, "--freeze", where, "--after", note(notes)).end()
        assert [word for word in words if word not in done.refusal] == [], done
        assert not is_frozen(production.where)
        assert production.clone.state == "synchronized"
    assert notes.read_text() == 2 * "not-frozen\n"


def test_who_may_not_freeze_is_told(production: Production) -> None:
    """Root without the capability is what anybody else is."""
    command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    words = [*CLONEFS, "fracture", production.clone.path, "--freeze", production.where]
    done = subprocess.run(
        [*command, *map(str, words)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "can be frozen by root only: use sudo" in done.stderr
    assert production.clone.state == "synchronized"


def test_a_freeze_of_somebody_else_stays(mount: Mount, cleanup: contextlib.ExitStack) -> None:
    """And what was frozen before it is found is thawed."""
    production, other = Production(mount, cleanup), Production(mount, cleanup)
    assert ask(other.where, FIFREEZE) == 0
    done = freeze(production, "--freeze", other.where).end()
    assert is_frozen(other.where)
    assert ask(other.where, FITHAW) == 0
    assert f"{other.where} has been frozen already" in done.refusal
    assert not is_frozen(production.where)
    assert production.clone.state == "synchronized"


@pytest.mark.parametrize("state", ["fractured", "synchronizing"])
def test_a_clone_of_which_no_copy_would_come(production: Production, state: str) -> None:
    """`fracture` by itself says yes to the first, and to the second, which makes it out-of-sync."""
    clone = production.clone
    clone.fracture()
    if state == "synchronizing":
        run("dd", "if=/dev/zero", f"of={production.where}/zero", "bs=1M", "count=4", "conv=fsync")
        clone.rate(1)
        clone.sync()
    assert f"{clone.path} is {state}" in freeze(production).end().refusal
    assert clone.state == state


def test_wrong_usage(production: Production) -> None:
    clone = production.clone.path
    for words in (("--json",), ("--force", "--before", "true"), ("--freeze-limit", "0")):
        assert fracture(clone, *words).status == 2
    assert production.clone.state == "synchronized"


# The ground it stands on


def disk_in(mount: Mount, cleanup: contextlib.ExitStack, image: Path, *, disk: Disk = EXT4) -> Path:
    """A file system in a file, mounted."""
    with image.open("wb") as file:
        file.truncate(disk.size)
    run(*disk.make, image)
    device = attach(cleanup, image)
    mount_disk(cleanup, device.path, mount.work / f"{image.name}-disk", disk.kind)
    return mount.work / f"{image.name}-disk"


@contextlib.contextmanager
def backing_at(mount: Mount, path: Path) -> Iterator[str]:
    """A group whose backing is there, as long as the body runs."""
    name = mount.new_name()
    mount.control("add_group").write(f"{name} {path} size=1M")
    try:
        yield name
    finally:
        mount.control("remove_group").write(name)


def test_the_file_system_of_a_backing_is_not_frozen(
    production: Production, cleanup: contextlib.ExitStack
) -> None:
    """Nor one that holds it by way of a file system in a file: whoever writes would wait."""
    mount = production.mount
    outer = disk_in(mount, cleanup, mount.work / "outer.img")
    inner = disk_in(
        mount, cleanup, outer / "inner.img", disk=Disk("ext4", 8 * MiB, EXT4.make, (), "")
    )
    for where in (outer, inner):
        with backing_at(mount, inner / "backing") as name:
            refusal = start(production.clone.path, "--freeze", where).end().refusal
        assert f"the backing of {name}/source, {inner}/backing, which is on it" in refusal
    # Without that nobody waits, if they are frozen from the top.
    refusal = start(production.clone.path, "--freeze", outer, "--freeze", inner).end().refusal
    assert f"{inner} lies on a file of {outer}" in refusal
    done = start(production.clone.path, "--freeze", inner, "--freeze", outer).end()
    assert done.status == 0, done
    source = production.clone.group.source
    assert [line.split(", as far")[0] for line in done.err.splitlines()] == [
        f"{NOTE}{where} is not on {source}" for where in (inner, outer)
    ]


def test_the_file_system_of_a_subvolume_with_a_backing_is_not_frozen(
    production: Production, cleanup: contextlib.ExitStack
) -> None:
    """By st_dev it would be another one."""
    mount = production.mount
    where = disk_in(mount, cleanup, mount.work / "btrfs.img", disk=BTRFS)
    run("btrfs", "subvolume", "create", where / "sub")
    assert (where / "sub").stat().st_dev != where.stat().st_dev
    with backing_at(mount, where / "sub/backing"):
        assert "which is on it" in start(production.clone.path, "--freeze", where).end().refusal


def test_the_file_system_of_the_volume_is_not_frozen(
    tmp_path: Path, production: Production, cleanup: contextlib.ExitStack
) -> None:
    """Of another mount: the work directories of tests are on /."""
    where = disk_in(production.mount, cleanup, production.mount.work / "disk.img")
    other = Mount(tmp_path / "other")
    other.meta = where / "meta"
    other.format()
    other.start()
    cleanup.callback(run, "rm", "-r", "--one-file-system", other.work)
    cleanup.callback(other.close)
    clone = other.add_group(1 * MiB).add_clone()
    refusal = start(clone.path, "--freeze", where).end().refusal
    assert f"the metadata volume, {where}/meta, which is on it" in refusal


# Killed ----------------------------------------------------------------------------------------------


def test_killed_in_before(production: Production, tmp_path: Path) -> None:
    """What it does is ended, and then comes `--after`."""
    before, after = Gate(tmp_path, "before"), Gate(tmp_path, "after")
    command = freeze(production, "--before", before.command, "--after", after.command)
    assert before.wait() == ""
    command.kill()
    assert after.wait() == "interrupted"
    after.open()
    assert command.end().status == -signal.SIGKILL
    assert production.clone.state == "synchronized"


def test_killed_in_after(production: Production, tmp_path: Path) -> None:
    after, notes = Gate(tmp_path, "after"), tmp_path / "notes"
    command = freeze(production, "--after", f"{after.command}; {note(notes)}")
    assert after.wait() == "fractured"
    assert not is_frozen(production.where)
    command.kill()
    after.open()
    command.end()
    assert notes.read_text() == "fractured\n"
    assert production.clone.state == "fractured"


SUPERBLOCK = range(1024, 2048)  # of ext4: written by a freeze, and by no sync


@pytest.mark.parametrize("ends", ["killed", "limit"])
def test_held_up_in_a_freeze(
    mount_above: Mount, device: FaultyDevice, cleanup: contextlib.ExitStack, ends: str
) -> None:
    """The kernel cannot be talked out of a freeze that hangs on its device. But what was frozen
    before is thawed, and the other as soon as it goes on."""
    first = Production(mount_above, cleanup)
    second = disk_in(mount_above, cleanup, device.path / "disk.img")
    after = Gate(mount_above.work, "after")
    limit = "3" if ends == "limit" else "1000"
    words = ("--freeze", second, "--freeze-limit", limit, "--after", after.command)
    hang = device.hang(device.path / "disk.img", "write", first=SUPERBLOCK[0], stop=SUPERBLOCK[-1])
    cleanup.callback(device.mend)
    command = freeze(first, *words)
    hang.wait_for_a_hang()
    if ends == "killed":
        assert is_frozen(first.where)
        command.kill()
    assert after.wait() == {"killed": "interrupted", "limit": "limit"}[ends]
    assert not is_frozen(first.where)
    after.open()
    done = command.end() if ends == "limit" else None
    hang.mend()
    wait_for(lambda: not is_frozen(second), "for the other thaw")
    if done is not None:
        assert f"{first.where}, {second} could not be frozen within 3 s" in done.refusal
        assert "nothing has been fractured" in done.refusal
    else:
        assert command.end().status == -signal.SIGKILL
    assert first.clone.state == "synchronized"


def _waits_in(process: int) -> str:
    """The function of the kernel in which a process waits: of a request to the daemon, that of FUSE."""
    return Path(f"/proc/{process}/wchan").read_text()


@dataclass
class HeldUp:
    """A fracture that does not come to its end as long as the device of the clone hangs, and a file
    system that is frozen for it. That is on another group, whose Source goes on."""

    production: Production
    clone: Clone
    device: FaultyDevice
    after: Gate
    hang: Fault = field(init=False)

    def start(self, *words: str) -> Running:
        """Start it; returns when it is held up."""
        self.hang = self.device.hang(self.clone.backing, "fsync")
        frozen = ("--freeze", self.production.where, "--after", self.after.command)
        command = start(self.clone.path, *frozen, *words)
        self.hang.wait_for_a_hang()
        # It may be a checkpoint that hangs there, and the fracture behind it.
        wait_for(lambda: is_frozen(self.production.where), "for the freeze")
        writer, _ = command.beside
        wait_for(lambda: "request" in _waits_in(writer), "for the fracture to be asked for")
        return command

    def wait_for_after(self, result: str) -> None:
        """Return when `--after` has been told this, which comes after the thaw, and let it go on."""
        assert self.after.wait() == result
        assert not is_frozen(self.production.where)
        assert self.clone.state == "synchronized"
        self.after.open()

    def go_on(self) -> None:
        """Let the fracture come to its end."""
        self.hang.mend()
        self.clone.wait("fractured")


@pytest.fixture
def held_up(
    mount_above: Mount, tmp_path: Path, device: FaultyDevice, cleanup: contextlib.ExitStack
) -> HeldUp:
    """What is to be held up."""
    group = mount_above.add_group(1 * MiB)
    clone = Clone(group, "nightly", device.path / "clone.img")
    group.control("add_clone").write(f"nightly {clone.backing}")
    clone.wait("synchronized")
    production = Production(mount_above, cleanup)
    cleanup.callback(device.mend)
    return HeldUp(production, clone, device, Gate(tmp_path, "after"))


UNDER_WAY = "the fracture is under way and may take effect later: see "


def test_killed_while_it_is_frozen(held_up: HeldUp) -> None:
    command = held_up.start()
    command.kill()
    held_up.wait_for_after("interrupted")
    assert command.end().status == -signal.SIGKILL
    held_up.go_on()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ended_while_it_is_frozen(held_up: HeldUp, number: signal.Signals) -> None:
    """It says what is known of the fracture, and ends when nothing is frozen any more."""
    command = held_up.start()
    command.kill(number)
    held_up.wait_for_after("interrupted")
    done = command.end()
    assert done.status == 128 + number
    assert f"clonefs: interrupted; {UNDER_WAY}" in done.err
    held_up.go_on()


def test_the_guard_is_killed_while_it_is_frozen(held_up: HeldUp) -> None:
    """Then the command does its work."""
    command = held_up.start()
    _, guard = command.beside
    os.kill(guard, signal.SIGKILL)
    held_up.wait_for_after("interrupted")
    refusal = command.end().refusal
    assert "the process that guards the freeze has been killed" in refusal
    assert f"{held_up.production.where} has been thawed" in refusal
    assert UNDER_WAY in refusal
    held_up.go_on()


def test_the_writer_is_killed_while_it_is_frozen(held_up: HeldUp) -> None:
    """It cannot end before the daemon has answered."""
    command = held_up.start()
    writer, _ = command.beside
    os.kill(writer, signal.SIGKILL)
    held_up.go_on()
    assert held_up.after.wait() == "interrupted"
    held_up.after.open()
    assert "it is not known whether the fracture has taken effect" in command.end().refusal


def test_the_limit_ends_it(held_up: HeldUp) -> None:
    command = held_up.start("--freeze-limit", "3")
    held_up.wait_for_after("limit")
    refusal = command.end().refusal
    where, state = held_up.production.where, held_up.clone.control("state").path
    assert f"{where} was frozen for longer than 3 s, and has been thawed" in refusal
    assert f"{UNDER_WAY}{state}" in refusal
    held_up.go_on()


def test_a_fracture_after_the_limit_is_no_clean_copy(held_up: HeldUp) -> None:
    command = held_up.start("--freeze-limit", "3")
    assert held_up.after.wait() == "limit"
    held_up.go_on()
    held_up.after.open()
    refusal = command.end().refusal
    assert "has been thawed; " in refusal
    assert "has been fractured, but perhaps when it was not frozen any more" in refusal


@pytest.mark.parametrize("in_time", [True, False])
def test_what_counts_is_when_the_fracture_was_done(held_up: HeldUp, in_time: bool) -> None:
    """Not when the command hears of it: it is stopped for a while, and the limit ends meanwhile."""
    command = held_up.start("--freeze-limit", "5" if in_time else "3")
    writer, _ = command.beside
    command.kill(signal.SIGSTOP)
    if in_time:
        held_up.go_on()
        wait_for(lambda: has_ended(writer), "for the writer")
        assert is_frozen(held_up.production.where)
    assert held_up.after.wait() == "limit"
    if not in_time:
        held_up.go_on()
    held_up.after.open()
    command.kill(signal.SIGCONT)
    done = command.end()
    if in_time:
        assert done.status == 0, done
    else:
        assert "has been fractured, but perhaps when it was not frozen any more" in done.refusal


def test_a_thaw_that_hangs_keeps_nobody_waiting(
    tmp_path: Path, device: FaultyDevice, cleanup: contextlib.ExitStack
) -> None:
    """The Source itself is held here by a commit that hangs, and ext4 writes to it in the thaw."""
    mount = Mount(tmp_path / "work")
    mount.meta = device.path / "mapped-volume"
    volume = device.behind / mount.meta.name
    format_volume(volume, size=4 * MiB, force=False)
    mount.start()
    cleanup.callback(mount.close)
    production, notes = Production(mount, cleanup), tmp_path / "notes"
    cleanup.callback(device.mend)
    stop = Superblock.unpack(volume.read_bytes()[:PAGE]).first_map_byte
    hang = device.hang(mount.meta, "write", first=PAGE, stop=stop)
    words = ("--freeze-limit", "3", "--after", note(notes))
    command = freeze(production, *words)
    hang.wait_for_a_hang()
    refusal = command.end().refusal
    assert f"the thaw of {production.where} waits for its device" in refusal
    assert UNDER_WAY in refusal
    assert not notes.exists()
    hang.mend()
    wait_for(notes.exists, "for the thaw")
    assert not is_frozen(production.where)
    production.clone.wait("fractured")


def test_somebody_else_thaws_it(held_up: HeldUp) -> None:
    command = held_up.start()
    where = held_up.production.where
    assert ask(where, FITHAW) == 0
    held_up.go_on()
    assert held_up.after.wait() == "not-frozen"
    held_up.after.open()
    refusal = command.end().refusal
    assert f"{where} was thawed by somebody else meanwhile" in refusal
    assert "what a power cut would leave" in refusal


def test_the_daemon_refuses(production: Production, tmp_path: Path) -> None:
    """What is true before the freeze need not be true in it."""
    clone, notes = production.clone, tmp_path / "notes"
    remove = f"echo {clone.name} > {clone.group.control('remove_clone').path}"
    done = freeze(production, "--before", remove, "--after", note(notes)).end()
    place = f"in the group {clone.group.name}"
    assert done.refusal == f"there is no clone {clone.name} {place}: see clonefs status"
    assert notes.read_text() == "refused\n"


def test_a_fracture_that_makes_no_copy(production: Production) -> None:
    """The clone is synchronizing by the time of the fracture."""
    control = production.clone.control("x").path.parent
    fill = f"dd if=/dev/zero of={production.where}/zero bs=1M count=4 conv=fsync"
    begin = f"cd {control}; echo 1 > fracture; {fill} 2> /dev/null; echo 1 > rate; echo 1 > sync"
    refusal = freeze(production, "--before", begin).end().refusal
    assert refusal == f"{production.clone.path} is out-of-sync after the fracture, and no copy"
