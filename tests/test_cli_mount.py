"""format, mount and umount, as far as that goes without a mount: the promises about returning."""

import errno
import fcntl
import os
import select
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import clonefs.volume
from clonefs import logs
from clonefs.cli import background, kernel
from clonefs.errors import busy, failed
from tests.test_cli_support import make_mount, put, refusal, run

# format ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size", "force"),
    [([], None, False), (["--size", "128M"], 128 << 20, False), (["--force"], None, True)],
)
def test_format_hands_on_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, options: list[str], size: int | None, force: bool
) -> None:
    made = []
    monkeypatch.setattr(
        clonefs.volume, "format_volume", lambda path, **asked: made.append((path, asked))
    )
    result = run("format", "some/meta", *options)
    assert (result.exit_code, result.output) == (0, "")
    assert made == [(Path("some/meta"), {"size": size, "force": force})]


def test_format_refuses_what_is_no_size(tmp_path: Path) -> None:
    assert "'much' is not a size" in refusal(run("format", tmp_path / "meta", "--size", "much"))
    assert not (tmp_path / "meta").exists()


# The background --------------------------------------------------------------------------------


def in_background(job: str) -> subprocess.CompletedProcess[str]:
    """Start a daemon whose job is this code, from a process of its own; print what comes of it."""
    script = (
        "import os, signal, sys, logging\n"
        "from clonefs.cli import background\n"
        "from clonefs.errors import busy\n"
        "def job(on_ready):\n" + textwrap.indent(textwrap.dedent(job), "    ") + "\n"
        "try:\n"
        "    daemon = background.start(job, logging.NullHandler)\n"
        "except Exception as error:\n"
        "    print(repr(error))\n"
        "else:\n"
        "    print('ready;', daemon.how_it_ended())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )


def test_the_parent_returns_when_the_job_is_ready() -> None:
    assert in_background("on_ready()").stdout == "ready; the daemon ended with exit status 0\n"


def test_a_refusal_reaches_the_parent_as_it_is() -> None:
    done = in_background("raise busy('the volume meta is mounted already')")
    assert done.stdout == "ClonefsError(EBUSY, 'the volume meta is mounted already')\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("job", "end"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("os._exit(3)", "ended with exit status 3"),
        ("pass", "ended with exit status 0"),
    ],
)
def test_a_daemon_that_dies_without_a_word_is_reported(job: str, end: str) -> None:
    done = in_background(job)
    assert done.stdout == (
        f"ClonefsError(EIO, 'the daemon {end} before it was ready: "
        "clonefs mount -f may show why')\n"
    )


def test_a_bug_in_the_job_is_one_sentence() -> None:
    done = in_background("raise RuntimeError('a bug')")
    assert done.stdout == "ClonefsError(EIO, 'the daemon failed: RuntimeError: a bug')\n"


def test_what_fails_later_is_logged_and_not_printed(tmp_path: Path) -> None:
    done = in_background(
        f"""
        logging.getLogger().addHandler(logging.FileHandler({str(tmp_path / "log")!r}))
        on_ready()
        raise busy("too late")
        """
    )
    assert (done.stdout, done.stderr) == ("ready; the daemon ended with exit status 1\n", "")
    assert (tmp_path / "log").read_text() == "too late\n"


def test_the_daemon_lets_go_of_the_terminal_and_the_directory() -> None:
    done = in_background(
        """
        on_ready()
        print("on stdout", flush=True)
        print("on stderr", file=sys.stderr, flush=True)
        assert os.getcwd() == "/"
        assert os.getsid(0) == os.getpid()
        """
    )
    assert (done.stdout, done.stderr) == ("ready; the daemon ended with exit status 0\n", "")


def test_the_daemon_keeps_nothing_open_that_it_was_given(tmp_path: Path) -> None:
    script = (
        "import logging, os, sys\n"
        "from clonefs.cli import background\n"
        "inherited = int(sys.argv[1])\n"
        "os.fstat(inherited)\n"
        "def job(on_ready):\n"
        "    try:\n"
        "        os.fstat(inherited)\n"
        "    except OSError:\n"
        "        on_ready()\n"
        "background.start(job, logging.NullHandler)\n"
    )
    with (tmp_path / "lock").open("w") as lock:
        command = [sys.executable, "-c", script, str(lock.fileno())]
        subprocess.run(command, pass_fds=[lock.fileno()], check=True, timeout=60)


EARLY = (
    "fork = os.fork\n"
    "def fork_and_be_interrupted():\n"
    "    pid = fork()\n"
    "    while pid and signal.SIGINT not in signal.sigpending():\n"
    "        pass\n"
    "    return pid\n"
    "os.fork = fork_and_be_interrupted\n"
)


@pytest.mark.parametrize("when", ["", EARLY], ids=["while it waits", "before it waits"])
def test_ctrl_c_while_the_daemon_starts_stops_the_daemon(when: str) -> None:
    script = (
        "import logging, os, signal\n"
        "from clonefs.cli import background\n"
        "parent = os.getpid()\n"
        f"{when}"
        "def job(on_ready):\n"
        "    os.kill(parent, signal.SIGINT)\n"
        "    signal.pause()\n"
        "try:\n"
        "    background.start(job, logging.NullHandler)\n"
        "except KeyboardInterrupt:\n"
        "    print(signal.Signals(os.wait()[1]).name)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "SIGTERM\n"


# mount -----------------------------------------------------------------------------------------


class Daemon:
    """Stands in for clonefs.fuse.daemon: remembers what it was asked to serve."""

    def __init__(self) -> None:
        self.served: list[tuple[Path, Path, str]] = []
        self.error: Exception | None = None

    def serve(
        self, meta: Path, mountpoint: Path, options: str, on_ready: Callable[[], None]
    ) -> None:
        self.served.append((meta, mountpoint, options))
        if self.error is not None:
            raise self.error
        on_ready()


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Daemon:
    fake = Daemon()
    module = ModuleType("clonefs.fuse.daemon")
    module.serve = fake.serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clonefs.fuse.daemon", module)
    monkeypatch.setattr(logs, "begin", lambda handler: None)
    return fake


@pytest.fixture
def detached(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The dead mounts that were taken away; no mount is dead unless a test says so."""
    made: list[Path] = []
    monkeypatch.setattr(kernel, "detach", made.append)
    return made


def table(monkeypatch: pytest.MonkeyPatch, *entries: kernel.MountEntry) -> None:
    monkeypatch.setattr(kernel, "mounts", lambda: list(entries))


def entry(mountpoint: Path, fstype: str = kernel.FSTYPE, device: str = "0:50") -> kernel.MountEntry:
    return kernel.MountEntry(device, "/", mountpoint, fstype)


def test_the_daemon_gets_absolute_paths_and_joined_options(
    tmp_path: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "link").symlink_to("mnt")
    monkeypatch.chdir(tmp_path)
    result = run("mount", "-f", "meta", "link", "-o", "a,b", "-o", "c=d", "-o", "")
    assert (result.exit_code, result.output) == (0, "")
    assert daemon.served == [(tmp_path / "meta", tmp_path / "mnt", "a,b,c=d")]


def test_the_level_of_the_log_is_a_mount_option(tmp_path: Path, daemon: Daemon) -> None:
    level = ("--log-level", "error")
    assert run("mount", "-f", "-o", "allow_other", *level, "meta", tmp_path).exit_code == 0
    assert daemon.served[0][2] == "allow_other,log=error"
    assert run("mount", "-f", "--log-level", "loud", "meta", tmp_path).exit_code == 2


def test_a_daemon_that_refuses_is_the_commands_refusal(tmp_path: Path, daemon: Daemon) -> None:
    daemon.error = busy("the volume meta is mounted already")
    assert refusal(run("mount", "-f", "meta", tmp_path)) == "the volume meta is mounted already"


def test_the_mount_point_must_be_a_directory(tmp_path: Path, daemon: Daemon) -> None:
    put(tmp_path / "file", "")
    gone = tmp_path / "gone"
    assert refusal(run("mount", "-f", "meta", gone)) == (
        f"there is no directory {gone} to mount on: make it first"
    )
    assert refusal(run("mount", "-f", "meta", tmp_path / "file")) == (
        f"{tmp_path}/file is not a directory to mount on: name one"
    )
    assert daemon.served == []


def test_a_live_mount_is_not_mounted_over(
    tmp_path: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(monkeypatch, entry(tmp_path))
    sentence = refusal(run("mount", "-f", "meta", tmp_path))
    assert sentence == f"clonefs is mounted at {tmp_path} already"
    assert daemon.served == []


def test_dead_mounts_are_taken_away_first(
    tmp_path: Path, daemon: Daemon, detached: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = [entry(tmp_path, "ext4"), entry(tmp_path), entry(tmp_path)]
    monkeypatch.setattr(kernel, "mounts", lambda: stack[: len(stack) - len(detached)])
    monkeypatch.setattr(kernel, "is_dead", lambda path: len(detached) < 2)
    assert run("mount", "-f", "meta", tmp_path).exit_code == 0
    assert detached == [tmp_path, tmp_path]
    assert len(daemon.served) == 1


def test_a_dead_mount_of_somebody_else_is_left_alone(
    tmp_path: Path, daemon: Daemon, detached: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    table(monkeypatch, entry(tmp_path, "fuse.sshfs"))
    monkeypatch.setattr(kernel, "is_dead", lambda path: True)
    sentence = refusal(run("mount", "-f", "meta", tmp_path))
    assert sentence.startswith(f"the fuse.sshfs mount at {tmp_path} is dead")
    assert (detached, daemon.served) == ([], [])


def test_mount_believes_the_tree_and_not_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def start(job: background.Job, handler: object) -> background.Daemon:
        started.append(job)
        return background.Daemon(pid=-1)

    monkeypatch.setattr(background, "start", start)
    sentence = refusal(run("mount", "meta", tmp_path))
    assert sentence == f"{tmp_path} is mounted, but shows no tree: No such file or directory"
    make_mount(tmp_path)
    assert run("mount", "meta", tmp_path).exit_code == 0
    assert len(started) == 2


def test_only_a_mount_whose_daemon_is_gone_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def statvfs(path: Path) -> None:
        code = int(path.name)
        raise OSError(code, os.strerror(code))

    assert not kernel.is_dead(tmp_path)
    monkeypatch.setattr(os, "statvfs", statvfs)
    dead = {code for code in errno.errorcode if kernel.is_dead(Path(str(code)))}
    assert dead == {errno.ENOTCONN, errno.ECONNABORTED}


# umount ----------------------------------------------------------------------------------------


class Unmounting:
    """A clonefs mount in a plain directory, and in which order umount does its work on it."""

    def __init__(self, tmp_path: Path) -> None:
        self.mnt = make_mount(tmp_path / "mnt")
        self.volume = tmp_path / "meta"
        self.table = [entry(self.mnt)]
        self.clean = True
        self.done: list[str] = []
        put(self.volume, "")
        put(self.mnt / "control/status.json", f'{{"volume": {{"path": "{self.volume}"}}}}')

    def unmount(self, mountpoint: Path) -> None:
        assert mountpoint == self.mnt
        self.done.append("unmounted")
        self.table.pop(0)
        (self.mnt / "control/status.json").unlink()

    def flock(self, file: object, operation: int) -> None:
        assert getattr(file, "name", None) == str(self.volume)
        assert operation == fcntl.LOCK_SH
        self.done.append("released")

    def was_closed_cleanly(self, path: Path) -> bool:
        assert path == self.volume
        self.done.append("looked")
        return self.clean


@pytest.fixture
def unmounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Unmounting:
    fake = Unmounting(tmp_path)
    monkeypatch.setattr(kernel, "mounts", lambda: list(fake.table))
    monkeypatch.setattr(kernel, "unmount", fake.unmount)
    monkeypatch.setattr(fcntl, "flock", fake.flock)
    monkeypatch.setattr(clonefs.volume, "was_closed_cleanly", fake.was_closed_cleanly)
    return fake


def test_umount_returns_when_the_daemon_has_let_go_of_the_volume(unmounting: Unmounting) -> None:
    result = run("umount", unmounting.mnt)
    assert (result.exit_code, result.output) == (0, "")
    assert unmounting.done == ["unmounted", "released", "looked"]


def test_umount_of_a_read_only_mount_waits_for_the_daemon_itself(
    unmounting: Unmounting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_for_end(descriptors: list[int], *_: object) -> None:
        assert str(Path(f"/proc/self/fd/{descriptors[0]}").readlink()) == "anon_inode:[pidfd]"
        unmounting.done.append("ended")

    monkeypatch.setattr(select, "select", wait_for_end)
    daemon = f'{{"pid": {os.getpid()}, "read_only": true}}'
    put(
        unmounting.mnt / "control/status.json",
        f'{{"volume": {{"path": "{unmounting.volume}"}}, "daemon": {daemon}}}',
    )
    result = run("umount", unmounting.mnt)
    assert (result.exit_code, result.output) == (0, "")
    assert unmounting.done == ["unmounted", "ended"]


def test_umount_says_when_the_volume_was_not_closed_cleanly(unmounting: Unmounting) -> None:
    unmounting.clean = False
    assert refusal(run("umount", unmounting.mnt)) == (
        f"the daemon could not write everything out to {unmounting.volume}: the next mount recovers"
    )


def test_umount_does_not_wait_while_the_same_mount_is_elsewhere(unmounting: Unmounting) -> None:
    unmounting.table.append(entry(Path("/bound")))
    assert "the daemon goes on for the mount at /bound" in refusal(run("umount", unmounting.mnt))
    assert unmounting.done == ["unmounted"]


def test_umount_of_a_mount_in_use_fails_and_waits_for_nothing(
    unmounting: Unmounting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(mountpoint: Path) -> None:
        raise busy(f"{mountpoint} is in use")

    monkeypatch.setattr(kernel, "unmount", refuse)
    assert refusal(run("umount", unmounting.mnt)) == f"{unmounting.mnt} is in use"
    assert unmounting.done == []


def test_umount_says_when_it_cannot_tell(
    unmounting: Unmounting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> bool:
        raise failed("the superblock is damaged")

    monkeypatch.setattr(clonefs.volume, "was_closed_cleanly", broken)
    assert refusal(run("umount", unmounting.mnt)).endswith(
        "cannot be seen: the superblock is damaged"
    )
    unmounting.table.append(entry(unmounting.mnt))
    put(unmounting.mnt / "control/status.json", '{"volume": {"path": "/gone/meta"}}')
    assert refusal(run("umount", unmounting.mnt)).endswith(
        "cannot be seen: No such file or directory"
    )


def test_a_dead_mount_is_taken_away_and_said_to_be_dead(
    unmounting: Unmounting, detached: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "is_dead", lambda path: True)
    result = run("umount", unmounting.mnt)
    assert result.exit_code == 0
    assert result.stderr == (
        f"clonefs: the daemon of {unmounting.mnt} had died; the next mount recovers\n"
    )
    assert (detached, unmounting.done) == ([unmounting.mnt], [])


@pytest.mark.parametrize("fstype", ["ext4", "fuse.sshfs", None])
def test_only_clonefs_is_unmounted(unmounting: Unmounting, fstype: str | None) -> None:
    unmounting.table = [] if fstype is None else [entry(unmounting.mnt, fstype)]
    sentence = refusal(run("umount", unmounting.mnt))
    assert (
        sentence
        == f"{unmounting.mnt} is not the mount point of a clonefs mount: see clonefs status"
    )
    assert unmounting.done == []


# What umount(8) and fusermount3 say ------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of commands that stands in for all others."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


def tool(directory: Path, name: str, *, says: str = "", status: int = 0) -> Path:
    """A command that writes its arguments to a file, says this on stderr, and exits so."""
    path = directory / name
    path.write_text(
        f"#!/bin/sh\necho \"$LC_ALL $*\" >'{path}.called'\necho '{says}' >&2\nexit {status}\n"
    )
    path.chmod(0o755)
    return directory / f"{name}.called"


@pytest.mark.parametrize(
    ("user", "name", "unmount", "detach"),
    [(0, "umount", "-i /m p", "-i -l /m p"), (1000, "fusermount3", "-u /m p", "-u -z /m p")],
)
def test_root_and_others_unmount_differently(
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
    user: int,
    name: str,
    unmount: str,
    detach: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    called = tool(tools, name)
    kernel.unmount(Path("/m p"))
    assert called.read_text() == f"C {unmount}\n"
    kernel.detach(Path("/m p"))
    assert called.read_text() == f"C {detach}\n"


def test_a_mount_in_use_names_the_loop_devices_on_it(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device, backing in {
        "loop0": "/m/payroll/source",
        "loop1": "/other/image",
        "loop10": "/m/ledger/nightly",
        "loop2": "/main/image",
    }.items():
        put(tmp_path / "block" / device / "loop" / "backing_file", f"{backing}\n")
    (tmp_path / "block" / "loop3").mkdir()
    monkeypatch.setattr(kernel, "_BLOCK_DEVICES", tmp_path / "block")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    tool(tools, "umount", says="umount: /m: target is busy.", status=32)
    with pytest.raises(clonefs.errors.ClonefsError) as refused:
        kernel.unmount(Path("/m"))
    assert refused.value.errno == errno.EBUSY
    assert refused.value.reason == (
        "/m is in use: close the files below it (fuser -vm /m shows who has them open), and detach "
        "the loop devices on them (losetup -d /dev/loop0 /dev/loop10)"
    )


def test_another_failure_of_umount_is_told_in_its_words(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(clonefs.errors.ClonefsError) as refused:
        kernel.unmount(Path("/m"))
    assert refused.value.reason == "the command umount is not installed"
    tool(tools, "umount", says="umount: /m: must be superuser", status=32)
    with pytest.raises(clonefs.errors.ClonefsError) as refused:
        kernel.unmount(Path("/m"))
    assert refused.value.reason == "/m cannot be unmounted: umount: /m: must be superuser"
