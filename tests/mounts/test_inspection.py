"""Looking at a mount: the log that grows, poll(2), extended attributes, times, and large maps."""

import contextlib
import errno
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clonefs.volume import open_volume
from tests.mounts.mount import (
    Clone,
    Group,
    KiB,
    MiB,
    Mount,
    attach,
    mount_disk,
    mounted,
    noise,
    opened,
    parse_extent_list,
    read,
    run,
    wait_for,
    write,
)

# The log -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def tail(mount: Mount, *options: str) -> Iterator[tuple[Path, Path]]:
    """tail on the events: files with what it prints, and with what it complains of."""
    printed, complaints = mount.work / "printed", mount.work / "complaints"
    events = mount.mountpoint / "control" / "events"
    with printed.open("wb") as output, complaints.open("wb") as errors:
        process = subprocess.Popen(
            ["tail", "-s", "0.02", *options, events], stdout=output, stderr=errors
        )
    try:
        yield printed, complaints
    finally:
        process.kill()
        process.wait()


CHANGES = ("fractured -> synchronizing", "synchronizing -> fractured")


@pytest.mark.parametrize("options", [("-f",), ("-F",), ("-n", "+1", "-f"), ("-n", "+1", "-F")])
def test_tail_follows_the_events_also_when_old_ones_are_dropped(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """With 2 KiB kept, the log loses its beginning several times while tail looks on."""
    few = "import clonefs.fuse.contents as c; c.EventLog.__init__.__defaults__ = (2048,)"
    with mounted(tmp_path / "work") as mount:
        mount.umount()
        mount.program = ("-c", f"{few}; from clonefs.cli import main; main()")
        mount.start()
        group = mount.add_group(64 * KiB)
        clone = group.add_fractured("c" * 63)
        with tail(mount, *options) as (printed, complaints):
            wait_for(lambda: "fractured" in printed.read_text(), "for what was there")
            for number in range(30):
                clone.sync("then-fracture")
                clone.wait("fractured")
                # One that is too slow loses lines, so wait for it.
                wait_for(
                    lambda: printed.read_text().count("\n") == 6 + 2 * number,  # noqa: B023
                    "for tail",
                )
            assert complaints.read_text() == ""
            lines = printed.read_text().splitlines()
        size = mount.control("events").path.stat().st_size
        kept = mount.control("events").read()
        assert size > 3 * 2048
        assert len(kept) < 2 * 2048 + 200
        assert kept.splitlines() == lines[-len(kept.splitlines()) :]
        events = [line.partition(" ")[2] for line in lines]
        there = [f"{group.name}/{clone.name} {change}" for change in CHANGES]
        assert events[4:] == there * 30


# poll ---------------------------------------------------------------------------------------------

CHANGED = select.POLLPRI | select.POLLERR


class Poller:
    """A thread that waits in one system call for a change."""

    def __init__(self, wait: Callable[[], object]) -> None:
        self.found: object = None
        self._wait = wait
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_for(self._is_waiting, "for the thread to wait")
        assert self.found is None, "it did not wait"

    def _run(self) -> None:
        self.found = self._wait()

    def _is_waiting(self) -> bool:
        wchan = Path(f"/proc/self/task/{self._thread.native_id}/wchan").read_text()
        return "poll" in wchan or "select" in wchan or not self._thread.is_alive()

    def result(self) -> object:
        """What the call returned, once it has."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "nothing woke it"
        return self.found


def poll_for(fd: int, events: int = CHANGED, timeout_s: float = 60.0) -> Callable[[], object]:
    poller = select.poll()
    poller.register(fd, events)
    return lambda: poller.poll(timeout_s * 1000)


def reread(fd: int) -> str:
    return os.pread(fd, 1 << 20, 0).decode()


@pytest.mark.parametrize(
    "name", ["state", "condition", "../status", "../../status", "../../status.json"]
)
def test_poll_wakes_when_what_a_file_shows_has_changed(shared: Mount, name: str) -> None:
    clone = shared.add_group(1 * MiB).add_clone()
    with opened(clone.control(name).path, os.O_RDONLY) as fd:
        before = reread(fd)
        assert poll_for(fd, timeout_s=0)() == []
        for command, word in (("fracture", "1"), ("sync", "then-fracture")):
            poller = Poller(poll_for(fd))
            clone.control(command).write(word)
            assert poller.result() == [(fd, CHANGED)]
            before, now = reread(fd), before
            assert before != now
            clone.rate("max")
            clone.wait("fractured")
            write(clone.group.source, 0, noise("new", 256 << 10))
            clone.rate(1)  # what comes next is not over before it was looked at
            poll_for(fd, timeout_s=0)()
            before = reread(fd)
        assert "fractured" in before


def test_poll_wakes_when_a_copy_goes_on(shared: Mount) -> None:
    clone = shared.add_group(data=noise("data", 1 * MiB)).add_clone(sync=False)
    clone.rate(1)
    with opened(clone.control("progress").path, os.O_RDONLY) as fd:
        assert reread(fd) == "0/16\n"
        poller = Poller(poll_for(fd))
        clone.sync()
        assert poller.result() == [(fd, CHANGED)]
        assert reread(fd) == "1/16\n"
        poller = Poller(poll_for(fd))
        clone.rate("max")
        assert poller.result() == [(fd, CHANGED)]


def test_poll_of_the_log_waits_for_the_next_line(shared: Mount) -> None:
    clone = shared.add_group(1 * MiB).add_clone()
    with opened(shared.control("events").path, os.O_RDONLY) as fd:
        assert select.select([fd], [], [], 0)[0] == [fd]
        while os.read(fd, 1 << 16):
            pass
        assert select.select([fd], [], [], 0)[0] == []
        for change, line in (
            (clone.fracture, "synchronized -> fractured"),
            (clone.sync, "fractured -> synchronizing"),
        ):
            poller = Poller(lambda: select.select([fd], [], [], 60)[0])
            change()
            assert poller.result() == [fd]
            assert line in os.read(fd, 1 << 16).decode()
        clone.wait("synchronized")


@pytest.mark.parametrize("mode", [0, select.EPOLLET])
def test_epoll_wakes_again_and_again(shared: Mount, mode: int) -> None:
    clone = shared.add_group(1 * MiB).add_clone()
    with opened(clone.control("state").path, os.O_RDONLY) as fd, select.epoll() as epoll:
        epoll.register(fd, select.EPOLLPRI | mode)
        reread(fd)
        assert epoll.poll(0) == []
        for _ in range(3):
            for change, state in ((clone.fracture, "fractured"), (clone.sync, "synchronized")):
                poller = Poller(lambda: epoll.poll(60))
                change()
                assert poller.result() == [(fd, CHANGED)]
                while reread(fd) != f"{state}\n":  # by way of synchronizing
                    assert epoll.poll(60) == [(fd, CHANGED)]
                while epoll.poll(0):
                    reread(fd)


def test_several_wait_for_the_same_file(shared: Mount) -> None:
    clone = shared.add_group(1 * MiB).add_clone()
    path = clone.control("state").path
    with opened(path, os.O_RDONLY) as one, opened(path, os.O_RDONLY) as other:
        pollers = [Poller(poll_for(fd)) for fd in (one, one, other)]
        clone.fracture()
        assert [poller.result() for poller in pollers] == [
            [(fd, CHANGED)] for fd in (one, one, other)
        ]


def test_poll_tells_a_refusal_and_a_removal(shared: Mount) -> None:
    group = shared.add_group(1 * MiB)
    clone = group.add_fractured()
    with (
        opened(clone.control("error").path, os.O_RDONLY) as error,
        opened(clone.control("state").path, os.O_RDONLY) as state,
    ):
        poller = Poller(poll_for(error))
        with pytest.raises(OSError):
            clone.control("rate").write("fast")
        assert poller.result() == [(error, CHANGED)]
        assert "'fast' is not a rate" in reread(error)
        poller = Poller(poll_for(state))
        group.control("remove_clone").write(clone.name)
        assert poller.result() == [(state, CHANGED)]
        with pytest.raises(FileNotFoundError):
            reread(state)


def test_whoever_does_not_poll_goes_on_reading_the_state_at_the_open(shared: Mount) -> None:
    clone = shared.add_group(1 * MiB).add_clone()
    path = clone.control("state").path
    with opened(path, os.O_RDONLY) as polled, opened(path, os.O_RDONLY) as other:
        assert poll_for(polled, timeout_s=0)() == []
        clone.fracture()
        assert (reread(polled), reread(other)) == ("synchronized\n", "synchronized\n")
        assert poll_for(polled)() == [(polled, CHANGED)]
        assert (reread(polled), reread(other)) == ("fractured\n", "synchronized\n")


def test_what_is_always_ready(shared: Mount) -> None:
    """An LU, a map, and a file that is only written never wait, and never say that they changed."""
    group = shared.add_group(1 * MiB)
    clone = group.add_fractured()
    everything = select.POLLIN | select.POLLOUT | CHANGED
    for path, flags, ready in (
        (group.source, os.O_RDWR, select.POLLIN | select.POLLOUT),
        (clone.control("delta_map").path, os.O_RDONLY, select.POLLIN),
        (clone.control("sync").path, os.O_WRONLY, select.POLLOUT),
        (clone.control("rate").path, os.O_RDWR, select.POLLIN | select.POLLOUT),
    ):
        with opened(path, flags) as fd:
            assert poll_for(fd, everything)() == [(fd, ready)]


def test_a_mount_is_unmounted_while_it_remembers_who_polled(mount: Mount) -> None:
    clone = mount.add_group(1 * MiB).add_clone()
    with opened(clone.control("state").path, os.O_RDONLY) as fd:
        assert poll_for(fd, timeout_s=0.01)() == []
    fd = os.open(clone.control("state").path, os.O_RDONLY)
    try:
        poller = Poller(poll_for(fd))
        mount.kill()
        assert poller.result() == [(fd, select.POLLERR)]
    finally:
        with contextlib.suppress(OSError):  # there is nobody to be told of the close
            os.close(fd)
    mount.start()


# Extended attributes ------------------------------------------------------------------------------


def attributes(path: Path) -> dict[str, str]:
    found = {}
    for name in os.listxattr(path):
        assert name.startswith("user.clonefs.")
        found[name.removeprefix("user.clonefs.")] = os.getxattr(path, name).decode()
    return found


def test_the_attributes_of_lus_are_the_words_of_the_control_files(shared: Mount) -> None:
    group = shared.add_group(1 * MiB, extent=16 * KiB)
    clone = group.add_fractured()
    clone.rate("64M")
    write(group.source, 0, noise("some", 20 * KiB))
    values = {
        name: clone.control(name).read()
        for name in ("backing", "condition", "error", "progress", "rate", "state")
    }
    values |= {name: group.control(name).read() for name in ("size", "extent_size")}
    assert attributes(clone.path) == values | {"delta_extents": "2"}
    values = {
        name: group.control(name).read()
        for name in ("backing", "copy", "error", "extent_size", "size", "state")
    }
    assert attributes(group.source) == values | {"protected_extents": "0"}
    assert values["extent_size"] == "16384"
    with pytest.raises(OSError):
        clone.sync("never")
    assert "never" in attributes(clone.path)["error"]
    clone.rate("1")  # it must not end between the two looks
    clone.restore()
    write(group.source, 0, b"host's")
    assert attributes(group.source)["protected_extents"] == str(len(group.protected()))
    clone.rate("64M")
    clone.wait("fractured")
    assert attributes(clone.path)["state"] == "fractured"
    shown = run("getfattr", "-d", "--absolute-names", clone.path)
    assert 'user.clonefs.state="fractured"\n' in shown
    assert run("getfattr", "-n", "user.clonefs.rate", "--only-values", clone.path) == "64M"


def test_attributes_are_probed_for_their_size(shared: Mount) -> None:
    """As the system calls do it: 0 asks for the size, and what is too small is ERANGE."""
    clone = shared.add_group(1 * MiB).add_fractured()
    call = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
path = os.fsencode(sys.argv[1])
def get(name, size):
    return libc.getxattr(path, name, ctypes.create_string_buffer(max(size, 1)), size)
def names(size):
    return libc.listxattr(path, ctypes.create_string_buffer(max(size, 1)), size)
n = names(0)
print(get(b"user.clonefs.state", 0), get(b"user.clonefs.state", 9), n == names(n) > 100)
print(get(b"user.clonefs.state", 8), ctypes.get_errno(), names(n - 1), ctypes.get_errno())
print(get(b"user.clonefs.nothing", 0), ctypes.get_errno())
"""
    printed = run(sys.executable, "-c", call, clone.path).split("\n")
    assert printed[0] == "9 9 True"
    assert printed[1] == f"-1 {errno.ERANGE} -1 {errno.ERANGE}"
    assert printed[2] == f"-1 {errno.ENODATA}"


def test_attributes_cannot_be_set(shared: Mount) -> None:
    group = shared.add_group(1 * MiB)
    clone = group.add_fractured()
    before = attributes(clone.path)
    name = "user.clonefs.state"
    cases: list[tuple[Callable[[Path], None], int]] = [
        (lambda path: os.setxattr(path, name, b"x"), errno.EPERM),
        (lambda path: os.setxattr(path, name, b"x", os.XATTR_REPLACE), errno.EPERM),
        (lambda path: os.setxattr(path, name, b"x", os.XATTR_CREATE), errno.EEXIST),
        (lambda path: os.removexattr(path, name), errno.EPERM),
        (lambda path: os.setxattr(path, "user.mine", b"x"), errno.EOPNOTSUPP),
        (lambda path: os.removexattr(path, "user.mine"), errno.EOPNOTSUPP),
        (lambda path: os.setxattr(path, "trusted.mine", b"x"), errno.EOPNOTSUPP),
    ]
    for path in (clone.path, group.source):
        for change, number in cases:
            with pytest.raises(OSError) as failure:
                change(path)
            assert failure.value.errno == number
    assert attributes(clone.path) == before


def test_only_lus_have_attributes(shared: Mount) -> None:
    group = shared.add_group(1 * MiB)
    for path in (
        shared.mountpoint,
        group.source.parent,
        shared.mountpoint / "control",
        group.control("state").path,
    ):
        assert os.listxattr(path) == []
        with pytest.raises(OSError) as failure:
            os.getxattr(path, "user.clonefs.state")
        assert failure.value.errno == errno.ENODATA


def test_a_cached_mount_has_no_attributes(tmp_path: Path) -> None:
    with mounted(tmp_path / "work", options="cached") as mount:
        group = mount.add_group(1 * MiB)
        for look in (
            lambda: os.getxattr(group.source, "user.clonefs.state"),
            lambda: os.listxattr(group.source),
        ):
            with pytest.raises(OSError) as failure:
                look()
            assert failure.value.errno == errno.EOPNOTSUPP


# Times and space ----------------------------------------------------------------------------------


def modified(path: Path) -> float:
    return path.stat().st_mtime


def changed(path: Path) -> float:
    return path.stat().st_ctime


def test_the_time_of_a_source_is_that_of_the_last_host_write_or_restore(shared: Mount) -> None:
    data = noise("data", 1 * MiB)
    group = shared.add_group(data=data)
    assert modified(group.source) == pytest.approx(modified(group.backing), abs=1e-3)
    clone = group.add_fractured()
    began = time.time()
    write(group.source, 0, b"host's")
    at_write = modified(group.source)
    assert began <= at_write <= time.time()
    assert changed(group.source) >= at_write
    read(group.source, 0, 1)
    clone.rate(1)
    assert modified(group.source) == at_write
    began = time.time()
    clone.restore()
    at_restore = modified(group.source)
    assert began <= at_restore <= time.time()
    clone.rate("max")
    clone.wait("fractured")
    assert modified(group.source) == at_restore  # copying changes nothing that shows
    write(group.source, 100, b"host's")
    again = modified(group.source)
    assert again > at_restore
    clone.rate(1)
    write(group.source, 0, data)
    began = time.time()
    clone.restore()
    first = modified(group.source)
    clone.restore()
    assert clone.state == "restoring"
    assert modified(group.source) > first >= began
    clone.rate("max")
    clone.wait("fractured")


def test_the_time_of_a_clone_is_that_of_its_instant_or_of_the_last_write_to_it(
    mount: Mount,
) -> None:
    group = mount.add_group(data=noise("data", 1 * MiB))
    clone = group.add_clone()
    assert modified(clone.path) == pytest.approx(modified(clone.backing), abs=1e-3)
    write(group.source, 0, b"mirrored")
    assert modified(clone.path) == pytest.approx(modified(clone.backing), abs=1e-3)
    began = time.time()
    clone.fracture()
    instant = modified(clone.path)
    assert began <= instant <= time.time()
    assert changed(clone.path) >= instant
    write(group.source, 0, b"later")
    mount.remount()
    assert modified(clone.path) == instant
    clone.restore()
    clone.wait("fractured")
    assert modified(clone.path) == instant
    assert changed(clone.path) > instant
    write(clone.path, 0, b"host's")
    assert modified(clone.path) == pytest.approx(modified(clone.backing), abs=1e-3)
    assert modified(clone.path) > instant
    mount.remount()
    assert modified(clone.path) == pytest.approx(modified(clone.backing), abs=1e-3)


def test_the_time_of_a_control_file_is_that_of_the_last_change_of_state(shared: Mount) -> None:
    group, other = shared.add_group(1 * MiB), shared.add_group(1 * MiB)
    clone, unchanged = group.add_clone(), other.add_clone()
    state, events = clone.control("state").path, shared.control("events").path
    quiet = unchanged.control("state").path
    before, quiet_before = modified(state), modified(quiet)
    clone.rate("64M")
    assert modified(state) == before
    began = time.time()
    clone.fracture()
    for path in (state, events, state.parent, group.control("status").path, group.source.parent):
        assert began <= modified(path) <= time.time(), path
        assert changed(path) == modified(path)
    assert modified(quiet) == quiet_before


def test_setting_times_does_nothing(shared: Mount) -> None:
    group = shared.add_group(1 * MiB)
    before = modified(group.source)
    os.utime(group.source, (1.0, 1.0))
    assert modified(group.source) == before


def test_df_shows_the_metadata_volume(mount: Mount) -> None:
    def free() -> int:
        space = os.statvfs(mount.mountpoint)
        status = mount.status()["volume"]
        assert space.f_blocks * space.f_frsize == status["size"]
        assert space.f_bfree == space.f_bavail
        assert space.f_bfree * space.f_frsize == status["size"] - status["used"]
        return space.f_bfree * space.f_frsize

    before = free()
    group = mount.add_group(1 * MiB)
    with_group = free()
    group.add_clone()
    assert before > with_group > free()
    write(group.source, 0, noise("data", 1 * MiB))
    assert run("df", "--output=source,fstype", mount.mountpoint).split()[2:] == [
        str(mount.meta),
        "fuse.clonefs",
    ]


# Large maps ---------------------------------------------------------------------------------------

LARGE = 1 << 36
SCATTERED = 300_000


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """A fractured clone of 16 million extents, of which 300,000 are marked, one by one."""
    work = tmp_path_factory.mktemp("large") / "work"
    with mounted(work, volume_size=32 * MiB) as mount:
        group = mount.add_group(LARGE, extent=4 * KiB)
        clone = group.add_fractured()
        mount.umount()
        volume = open_volume(mount.meta)
        record = volume.record.groups[0]
        delta = volume.map(record.clones[0].delta, LARGE // (4 * KiB))
        for extent in range(0, 50 * SCATTERED, 50):
            delta.mark(extent, extent + 1)
        del delta
        volume.close(clean=True)
        mount.start()
        yield clone


def test_a_large_map_is_read_whole_and_others_are_served_meanwhile(scattered: Clone) -> None:
    answered = 0
    done = threading.Event()

    def ask() -> None:
        nonlocal answered
        with opened(scattered.control("state").path, os.O_RDONLY) as fd:
            while not done.is_set():
                assert os.pread(fd, 100, 0) == b"fractured\n"
                answered += 1

    with opened(scattered.control("delta_map").path, os.O_RDONLY) as fd:
        thread = threading.Thread(target=ask)
        thread.start()
        try:
            wait_for(lambda: answered)
            before = answered
            first = os.pread(fd, 1 << 20, 0)  # one request
            meanwhile = answered - before
        finally:
            done.set()
            thread.join()
        assert len(first) == 1 << 20
        assert meanwhile > 20
    text = scattered.control("delta_map").read()
    assert text.encode().startswith(first)
    assert parse_extent_list(text) == set(range(0, 50 * SCATTERED, 50))


def test_a_large_map_is_that_of_the_moment_of_open(scattered: Clone) -> None:
    path = scattered.control("delta_map").path
    with opened(path, os.O_RDONLY) as fd:
        write(scattered.group.source, LARGE - 1, b"x")
        write(scattered.group.source, 4 * KiB, b"x")
        assert os.pread(fd, 9, 0) == b"0,50,100,"
        text = path.read_text()
        assert text.startswith("0-1,50,100,")
        assert text.endswith(f",{LARGE // (4 * KiB) - 1}\n")
        assert os.pread(fd, 9, 0) == b"0,50,100,"


# Who may ------------------------------------------------------------------------------------------

NOBODY = 65534


def as_user(user: int, group: int, code: str, *arguments: str | Path) -> str:
    """What a program of another user prints; an error is printed as its number."""
    program = f"import os, sys\ntry:\n    {code}\nexcept OSError as e: print(e.errno)"
    result = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", program, *map(str, arguments)],
        check=True,
        user=user,
        group=group,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    return result.stdout.strip()


WRITE = "os.write(os.open(sys.argv[1], os.O_WRONLY), b'1'); print('ok')"
READ = "print(os.read(os.open(sys.argv[1], os.O_RDONLY), 100).decode())"
STAT = "print(os.stat(sys.argv[1]).st_size)"
XATTR = "print(os.getxattr(sys.argv[1], 'user.clonefs.state').decode())"


def test_who_may_not_write_cannot_command_and_reads_as_the_modes_say(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:-1]):
        if not directory.stat().st_mode & 1:
            directory.chmod(directory.stat().st_mode | 0o011)
    denied = str(errno.EACCES)
    owner, reader, stranger = (1000, 1000), (1001, NOBODY), (1002, 1002)
    options = f"allow_other,uid={owner[0]},gid={NOBODY},umask=027"
    with mounted(tmp_path / "work", options=options) as mount:
        clone = mount.add_group(1 * MiB).add_clone()
        fracture, state = clone.control("fracture").path, clone.control("state").path
        assert as_user(*reader, READ, state) == "synchronized"
        assert as_user(*reader, XATTR, clone.path) == "synchronized"
        assert as_user(*reader, STAT, clone.path) == str(1 * MiB)
        for who in (reader, stranger):
            assert as_user(*who, WRITE, fracture) == denied
            assert as_user(*who, WRITE, clone.group.source) == denied
            assert as_user(*who, "os.truncate(sys.argv[1], 1)", clone.group.source) == denied
        for path in (state, clone.path, mount.control("events").path):
            assert as_user(*stranger, READ, path) == denied
        assert as_user(*stranger, XATTR, clone.path) == denied
        assert clone.state == "synchronized"
        assert as_user(*owner, WRITE, fracture) == "ok"
        assert clone.state == "fractured"
        assert as_user(*reader, WRITE, clone.path) == denied
        assert as_user(*owner, WRITE, clone.path) == "ok"
        assert read(clone.path, 0, 1) == b"1"
        assert as_user(*owner, "os.mkdir(sys.argv[1])", mount.mountpoint / "new") == denied


def test_without_allow_other_nobody_else_sees_the_tree(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:-1]):
        if not directory.stat().st_mode & 1:
            directory.chmod(directory.stat().st_mode | 0o011)
    with mounted(tmp_path / "work", options="umask=0") as mount:
        clone = mount.add_group(1 * MiB).add_clone()
        for path, code in (
            (clone.path, STAT),
            (clone.control("state").path, READ),
            (clone.control("fracture").path, WRITE),
            (mount.mountpoint, "print(os.listdir(sys.argv[1]))"),
        ):
            assert as_user(NOBODY, NOBODY, code, path) == str(errno.EACCES)
        assert clone.state == "synchronized"


# What the contract promises beside that -------------------------------------------------------------


def test_an_lu_of_16_tebibytes(cleanup: contextlib.ExitStack, tmp_path: Path) -> None:
    """On tmpfs, since ext4 has no file of that size."""
    disk = tmp_path / "disk"
    mount_disk(cleanup, Path("tmpfs"), disk, "tmpfs")
    mount = cleanup.enter_context(mounted(tmp_path / "work"))
    size = 16 << 40
    mount.control("add_group").write(f"g {disk}/g-source.img size=16T extent=4M")
    group = Group(mount, "g", disk / "g-source.img")
    clone = group.add_clone()
    assert (group.source.stat().st_size, clone.path.stat().st_size) == (size, size)
    write(group.source, size - 512, b"a" * 512)
    clone.fracture()
    write(group.source, size - 512, b"b" * 512)
    assert clone.delta() == {(size >> 22) - 1}
    with opened(group.source, os.O_RDWR) as fd:
        assert os.pread(fd, 4096, size - 512) == b"b" * 512
        assert os.pwrite(fd, b"c" * 1024, size - 256) == 256
        with pytest.raises(OSError) as failure:
            os.pwrite(fd, b"c", size)
        assert failure.value.errno == errno.ENOSPC
    clone.restore()
    assert read(group.source, size - 512, 512) == b"a" * 512
    clone.wait("fractured")
    with mount.refuses(errno.EINVAL, ""):
        mount.control("add_group").write(f"h {disk}/h.img size={size + 512} extent=4M")


FLUSHING: dict[str, tuple[int, Callable[[int], object]]] = {
    "fsync": (0, os.fsync),
    "fdatasync": (0, os.fdatasync),
    "O_SYNC": (os.O_SYNC, lambda fd: os.pwrite(fd, b"more", 0)),
    "O_DSYNC": (os.O_DSYNC, lambda fd: os.pwrite(fd, b"more", 0)),
}


@pytest.mark.parametrize("how", FLUSHING)
def test_a_flush_of_a_host_reaches_the_devices(
    cleanup: contextlib.ExitStack, tmp_path: Path, how: str
) -> None:
    """The kernel counts the flushes of a block device: of the Source, and of a mirrored clone."""
    devices = []
    for name in ("source", "clone"):
        path = tmp_path / f"{name}.img"
        path.write_bytes(noise(name, 1 * MiB))
        devices.append(attach(cleanup, path).path)
    mount = cleanup.enter_context(mounted(tmp_path / "work"))

    def flushes() -> list[int]:
        stats = [Path("/sys/block", device.name, "stat").read_text() for device in devices]
        return [int(each.split()[15]) for each in stats]

    group = Group(mount, "g", devices[0])
    clone = Clone(group, "c", devices[1])
    mount.control("add_group").write(f"g {devices[0]}")
    group.control("add_clone").write(f"c {devices[1]}")
    clone.wait("synchronized")
    flags, flush = FLUSHING[how]
    with opened(group.source, os.O_WRONLY | flags) as fd:
        os.pwrite(fd, b"some", 0)
        before = flushes()
        flush(fd)
        assert all(new > old for old, new in zip(before, flushes(), strict=True))
    clone.fracture()
    with opened(clone.path, os.O_WRONLY | flags) as fd:
        os.pwrite(fd, b"some", 0)
        before = flushes()
        flush(fd)
        assert flushes()[1] > before[1]
