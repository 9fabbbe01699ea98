"""clonefs as a part of the machine: mount(8), umount(8), fstab, loop devices, systemd.

The real mount(8) calls the helpers that the installer has put into /sbin, inside a mount namespace
(tests/machine.py), so that nothing of the machine that runs the tests changes.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clonefs.cli import service_manager
from clonefs.volume import was_closed_cleanly
from tests.machine import PROGRAM, TOP, Machine
from tests.mounts.mount import DEADLINE_S, Loop, MiB, noise, run, wait_for

HELPERS = TOP / "mount-helpers"
SCRIPTS = (
    *("clonefs-loop", "demo", "install", "mount.clonefs", "setup", "umount.clonefs"),
    "work-directory",
)


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Machine]:
    """A machine with nothing installed."""
    machine = Machine(tmp_path)
    try:
        yield machine
    finally:
        machine.close()


@pytest.fixture
def machine(bare: Machine) -> Machine:
    """A machine with clonefs installed."""
    bare.install()
    return bare


@pytest.fixture
def mounted(machine: Machine) -> Machine:
    """A machine on which mount(8) has mounted a volume."""
    machine.run("mount", "-t", "clonefs", machine.meta, machine.mountpoint)
    return machine


def test_every_script_is_clean() -> None:
    assert {path.name for path in HELPERS.iterdir() if path.is_file()} == set(SCRIPTS)
    scripts = (HELPERS / name for name in SCRIPTS)
    options = ("--external-sources", f"--source-path={TOP}")
    run("shellcheck", *options, *scripts, deadline_s=10 * DEADLINE_S)


# The demo's work directory, and that of tests/run ------------------------------------------------

_AT_WORK = """
set -euo pipefail
source "$1/work-directory"
make_work_directory demo
cd "$work"
"""
_PRODUCTION = """
mkdir mnt disk
clonefs format --size 4M meta > /dev/null
clonefs mount -f meta mnt & daemon=$!
until mountpoint -q mnt; do kill -0 $daemon; sleep 0.05; done
echo "g $work/image size=16M" > mnt/control/add_group
device=$(losetup --find --show mnt/g/source)
mkfs.ext4 -q "$device"
mount "$device" disk
echo $daemon "$device" "$work"
read -r _
"""


def test_what_a_killed_run_left_is_cleared_away_by_the_next(bare: Machine) -> None:
    """Inside, since what is left stands in the way of other tests."""
    runs = bare.work / "runs"
    runs.mkdir()
    at_work = ("bash", "-c", _AT_WORK + "echo; read -r _", "-", str(HELPERS))
    killed = ("bash", "-c", _AT_WORK + _PRODUCTION, "-", str(HELPERS))
    environment = {
        **os.environ,
        "TMPDIR": str(runs),
        "PATH": f"{PROGRAM.parent}:/usr/sbin:/usr/bin:/bin",
    }
    started: list[subprocess.Popen[str]] = []

    def start(command: tuple[str, ...]) -> tuple["subprocess.Popen[str]", str]:
        process = bare.start(
            *command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline()

    try:
        start(at_work)
        (others,) = runs.iterdir()
        dying, line = start(killed)
        daemon, device, work = line.split()
        loop = Loop(Path(device))
        os.kill(int(daemon), signal.SIGKILL)
        dying.kill()
        dying.wait(DEADLINE_S)
        assert work in bare.run("cat", "/proc/self/mounts")

        _, line = start(at_work)
        assert line == f"{work}: left by a run that was killed, and cleared away\n"
        assert others.exists()
        assert not Path(work).exists()
        assert work not in bare.run("cat", "/proc/self/mounts")
        wait_for(lambda: not loop.is_attached(), "for the loop device to be free")
    finally:
        for process in started:
            process.kill()
            process.communicate()
        for left in runs.iterdir():
            take_down = 'source "$1/work-directory"; take_down "$2"'
            bare.result("bash", "-c", take_down, "-", HELPERS, left)


# mount(8) --------------------------------------------------------------------------------------


def test_mount_mounts(machine: Machine) -> None:
    machine.run(
        "mount", "-t", "clonefs", machine.meta, machine.mountpoint, "-o", "umask=022,noatime"
    )
    shown = machine.run("findmnt", "-rno", "SOURCE,FSTYPE,OPTIONS", machine.mountpoint).split()
    assert shown[:2] == [str(machine.meta), "fuse.clonefs"]
    assert "noatime" in shown[2].split(",")
    assert (machine.tree() / "control/status").stat().st_mode & 0o777 == 0o444
    machine.run("umount", machine.mountpoint)


def test_the_type_of_the_kernels_table_does_too(machine: Machine) -> None:
    machine.run("mount", "-t", "fuse.clonefs", machine.meta, machine.mountpoint)
    assert machine.is_mounted()


def test_a_line_of_fstab_does(machine: Machine) -> None:
    fstab = machine.work / "fstab"
    options = (
        "noauto,nofail,_netdev,users,comment=mine,x-systemd.automount,x-systemd.requires=a.service"
        ",X-mount.mkdir,relatime,defaults,ro"
    )
    fstab.write_text(f"{machine.meta} {machine.mountpoint} clonefs {options} 0 0\n")
    machine.run("mount", "-T", fstab, machine.mountpoint)
    assert machine.report()["daemon"]["read_only"]
    machine.run("umount", machine.mountpoint)
    assert not machine.daemons()


def test_mount_all_mounts_once(machine: Machine) -> None:
    fstab = machine.work / "fstab"
    fstab.write_text(f"{machine.meta} {machine.mountpoint} clonefs defaults,nofail 0 0\n")
    machine.run("mount", "-a", "-T", fstab)
    daemons = machine.daemons()
    assert len(daemons) == 1
    machine.run("mount", "-a", "-T", fstab)
    assert machine.daemons() == daemons


def test_a_user_mounts_and_unmounts_what_fstab_allows(machine: Machine) -> None:
    machine.run(
        "sh", "-c", f"mkdir -m 700 /mnt/home /mnt/home/tree; cp {machine.meta} /mnt/home/meta"
    )
    machine.run("chown", "-R", "nobody", "/mnt/home")
    line = "/mnt/home/meta /mnt/home/tree clonefs noauto,user 0 0\n"
    machine.path("/etc/fstab").write_text(line)
    as_nobody = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
    machine.let_everybody_use(PROGRAM, Path(sys.executable).resolve())
    machine.run(*as_nobody, "mount", "/mnt/home/tree")
    machine.run(*as_nobody, "test", "-w", "/mnt/home/tree/control/add_group")
    machine.run(*as_nobody, "umount", "/mnt/home/tree")
    assert was_closed_cleanly(machine.path("/mnt/home/meta"))


def test_the_flags_of_mount(machine: Machine) -> None:
    here = ("-t", "clonefs", machine.meta, machine.mountpoint)
    machine.run("mount", "-f", *here)
    assert not machine.is_mounted()
    machine.run("mount", "-s", *here, "-o", "what=ever,ro")
    assert machine.report()["daemon"]["read_only"]
    machine.run("umount", machine.mountpoint)
    said = machine.run("mount", "-v", "-n", *here)
    assert f"mount.clonefs: {machine.meta} is mounted on {machine.mountpoint}\n" in said


def test_refusals_are_one_line(machine: Machine) -> None:
    here = (machine.meta, machine.mountpoint)
    said = machine.refusal("mount", "-t", "clonefs", *here, "-o", "what=ever")
    assert "mount option 'what=ever' is not known" in said
    said = machine.refusal("mount", "-t", "clonefs", machine.work / "gone", machine.mountpoint)
    assert f"{machine.work}/gone" in said
    said = machine.refusal("mount", "-t", "clonefs", machine.meta, machine.work / "gone")
    assert f"{machine.work}/gone" in said
    machine.run("mount", "-t", "clonefs", *here)
    said = machine.refusal("mount", "-t", "clonefs", *here)
    assert f"clonefs is mounted at {machine.mountpoint} already" in said
    said = machine.refusal("mount", "-o", "remount,ro", machine.mountpoint)
    assert "cannot change its options" in said
    assert "usage:" in machine.refusal("/sbin/mount.clonefs", machine.meta, status=1)
    assert "-q" in machine.refusal("/sbin/mount.clonefs", *here, "-q", status=1)


def options_handed_on(tmp_path: Path, *arguments: str) -> list[str]:
    """What the helper gives to `clonefs mount`, from these arguments."""
    program = tmp_path / "clonefs"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [HELPERS / "mount.clonefs", "META", "DIR", "-n", *arguments],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[:3] == ["mount", "META", "DIR"]
    return done.stdout.splitlines()[3:]


def test_options_of_mount_are_not_handed_on(tmp_path: Path) -> None:
    assert options_handed_on(tmp_path) == []
    assert options_handed_on(tmp_path, "-o", "noauto,x-a.b=c,user=joe,_netdev,comment=*") == []
    assert options_handed_on(tmp_path, "-o", "rw,nofail,uid=7", "-v")[:2] == ["-o", "rw,uid=7"]


def test_sloppy_keeps_every_option_that_is_documented(tmp_path: Path) -> None:
    page = (TOP / "docs/control-files.md").read_text()
    table = page.partition("## Mount options")[2].partition("###")[0]
    named = [
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`([a-z_=]+)`", row)
    ]
    assert {"uid=", "umask=", "ro", "allow_other"} <= set(named)
    options = ",".join(name + "7" if name.endswith("=") else name for name in named)
    assert options_handed_on(tmp_path, "-s", "-o", f"{options},what=ever") == ["-o", options]


# umount(8) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["-c"], ["-v"]])  # -c is what systemd gives
def test_umount_returns_once_everything_is_on_disk(mounted: Machine, flags: list[str]) -> None:
    source = mounted.add_group("64M")
    data = noise("umount", 64 * MiB)
    mounted.path(source).write_bytes(data)
    mounted.run("umount", *flags, mounted.mountpoint)
    assert was_closed_cleanly(mounted.meta)
    wait_for(lambda: not mounted.daemons(), "for the daemon to end")
    assert (mounted.work / "production.img").read_bytes() == data


def test_after_clonefs_mount_it_does_too(machine: Machine) -> None:
    machine.run("/usr/local/bin/clonefs", "mount", machine.meta, machine.mountpoint)
    source = machine.add_group("64M")
    machine.path(source).write_bytes(noise("umount", 64 * MiB))
    machine.run("umount", machine.mountpoint)
    assert was_closed_cleanly(machine.meta)
    wait_for(lambda: not machine.daemons(), "for the daemon to end")
    assert str(machine.mountpoint) not in machine.path("/run/mount/utab").read_text()


def test_a_mount_that_cannot_be_noted_says_so(machine: Machine) -> None:
    machine.run("umount", "/run/mount")
    machine.run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/run/mount")
    done = machine.result("/usr/local/bin/clonefs", "mount", machine.meta, machine.mountpoint)
    said = f"clonefs: umount {machine.mountpoint} will not wait; clonefs umount does\n"
    assert (done.returncode, done.stderr) == (0, said)
    machine.run("/usr/local/bin/clonefs", "umount", machine.mountpoint)


def test_umount_by_the_volume_does_too(mounted: Machine) -> None:
    mounted.run("umount", mounted.meta)
    assert was_closed_cleanly(mounted.meta)


def test_umount_of_a_busy_mount_is_one_line_and_changes_nothing(mounted: Machine) -> None:
    with mounted.path(mounted.add_group()).open("rb"):
        assert "is in use" in mounted.refusal("umount", mounted.mountpoint)
    assert mounted.is_mounted()
    mounted.run("umount", mounted.mountpoint)


def test_umount_takes_a_dead_mount_away(mounted: Machine) -> None:
    [daemon] = mounted.daemons()
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: not mounted.daemons(), "for the daemon to end")
    said = mounted.result("umount", mounted.mountpoint)
    assert (said.returncode, said.stderr) == (
        0,
        f"clonefs: the daemon of {mounted.mountpoint} had died; the next mount recovers\n",
    )
    assert not mounted.is_mounted()


@pytest.mark.parametrize("flag", ["-l", "-f"])
def test_umount_that_is_told_not_to_wait(mounted: Machine, flag: str) -> None:
    mounted.run("umount", flag, mounted.mountpoint)
    assert not mounted.is_mounted()
    wait_for(lambda: not mounted.daemons(), "for the daemon to end")
    assert was_closed_cleanly(mounted.meta)


def test_a_bind_mount_is_unmounted_by_itself(mounted: Machine) -> None:
    mounted.add_group()
    beside, lu = mounted.work / "beside", mounted.work / "lu"
    beside.mkdir()
    lu.touch()
    mounted.run("mount", "--bind", mounted.mountpoint / "payroll", beside)
    mounted.run("mount", "--bind", mounted.mountpoint / "payroll/source", lu)
    for place in (beside, lu):
        done = mounted.result("umount", "-c", place)
        assert done.returncode == 0, done
        assert mounted.report()["groups"]
    mounted.run("umount", mounted.mountpoint)
    assert was_closed_cleanly(mounted.meta)


def test_umount_says_when_the_daemon_goes_on(mounted: Machine) -> None:
    beside = mounted.work / "beside"
    beside.mkdir()
    mounted.run("mount", "--bind", mounted.mountpoint, beside)
    done = mounted.result("umount", mounted.mountpoint)
    assert (done.returncode, "its daemon goes on" in done.stderr) == (0, True)
    assert len(mounted.daemons()) == 1
    mounted.run("umount", "-c", beside)
    assert was_closed_cleanly(mounted.meta)


def test_only_a_dead_mount_is_taken_away_if_so_asked(mounted: Machine) -> None:
    program = "/usr/local/bin/clonefs"
    mounted.run(program, "umount", "--dead", mounted.mountpoint)
    assert mounted.is_mounted()
    [daemon] = mounted.daemons()
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: not mounted.daemons(), "for the daemon to end")
    said = mounted.result(program, "umount", "--dead", mounted.mountpoint)
    assert (said.returncode, "had died" in said.stderr) == (0, True)
    assert not mounted.is_mounted()
    mounted.run(program, "umount", "--dead", mounted.mountpoint)


# Telling systemd -------------------------------------------------------------------------------


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(DEADLINE_S)
        listening.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def test_the_service_manager_is_told(listener: socket.socket) -> None:
    service_manager.ready("a\nb is mounted")
    assert listener.recv(1000) == b"READY=1\nSTATUS=a b is mounted\n"


def test_an_abstract_socket_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(b"\0clonefs-%d" % os.getpid())
        monkeypatch.setenv("NOTIFY_SOCKET", f"@clonefs-{os.getpid()}")
        service_manager.ready("up")
        assert listening.recv(1000) == b"READY=1\nSTATUS=up\n"


def test_nobody_is_told_if_nobody_asks(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET")
    service_manager.ready("up")
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.recv(1000)


@pytest.mark.parametrize("address", ["/nowhere/at/all", "x" * 200])
def test_a_deaf_service_manager_is_logged_and_no_error(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    service_manager.ready("up")
    assert "the service manager at NOTIFY_SOCKET could not be told" in caplog.text


def test_systemd_is_told_when_the_tree_is_there(machine: Machine, listener: socket.socket) -> None:
    daemon = machine.start(PROGRAM, "mount", "-f", machine.meta, machine.mountpoint)
    try:
        message = listener.recv(1000).decode()
        assert message.startswith("READY=1\n")
        assert f"STATUS={machine.meta} is mounted on {machine.mountpoint}\n" in message
        assert machine.report()["daemon"]["pid"] == daemon.pid
        daemon.terminate()
        assert daemon.wait(DEADLINE_S) == 0
    finally:
        daemon.kill()
        daemon.wait()


# An automounter --------------------------------------------------------------------------------

# It is what systemd does for x-systemd.automount: the kernel asks through a pipe, who mounts is of the
# same process group, everybody else who comes to the mount point waits until it is said to be done.
AUTOMOUNTER = """
import fcntl, os, struct, subprocess, sys
meta, directory = sys.argv[1:]
os.setpgid(0, 0)
pipe, kernel = os.pipe()
subprocess.run(["mount", "-i", "-t", "autofs", "-o",
    f"fd={kernel},pgrp={os.getpid()},minproto=5,maxproto=5,direct", "auto", directory],
    pass_fds=[kernel], check=True)
root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
os.close(kernel)
print("ready", flush=True)
packet = os.read(pipe, 4096)
token = struct.unpack_from("iiI", packet)[2]
status = subprocess.run(["mount", "-t", "clonefs", meta, directory]).returncode
fcntl.ioctl(root, 0x9360 if status == 0 else 0x9361, token)
os.close(root)
sys.exit(status)
"""


def test_an_automounter_can_mount_it(machine: Machine) -> None:
    if "\tautofs\n" not in Path("/proc/filesystems").read_text():
        pytest.skip("the kernel has no autofs")
    automounter = machine.start(
        sys.executable, "-c", AUTOMOUNTER, machine.meta, machine.mountpoint, stdout=subprocess.PIPE
    )
    visitor = None
    try:
        assert automounter.stdout is not None
        assert automounter.stdout.readline() == "ready\n"
        visitor = machine.start(
            "setsid", "cat", machine.mountpoint / "control/status", stdout=subprocess.PIPE
        )
        assert automounter.wait(DEADLINE_S) == 0
        table, _ = visitor.communicate(timeout=DEADLINE_S)
        assert visitor.returncode == 0
        assert table.startswith("NAME")
    finally:
        for process in filter(None, (automounter, visitor)):
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


# Loop devices ----------------------------------------------------------------------------------

LOOP = "/usr/local/sbin/clonefs-loop"


def setting(device: str, name: str) -> str:
    """What the kernel says of a loop device."""
    return Path("/sys/block", Path(device).name, name).read_text().strip()


def test_a_loop_device_over_a_source(mounted: Machine) -> None:
    source = mounted.add_group()
    device = mounted.run(LOOP, "attach", source).strip()
    assert setting(device, "loop/dio") == "1"
    assert setting(device, "ro") == "0"
    assert setting(device, "queue/logical_block_size") == "512"
    assert setting(device, "size") == str(8 * MiB // 512)
    assert mounted.run(LOOP, "list") == f"{device} rw {source}\n"
    mounted.run("dd", f"if={PROGRAM}", f"of={device}", "conv=fsync", "status=none")
    program = PROGRAM.read_bytes()
    assert mounted.path(source).read_bytes()[: len(program)] == program
    mounted.run(LOOP, "detach", source)
    assert mounted.run(LOOP, "list") == ""
    mounted.run("umount", mounted.mountpoint)


def test_a_path_with_blanks_is_listed_as_it_is(machine: Machine) -> None:
    machine.mountpoint = machine.work / "two  blanks \\ 2"
    machine.mountpoint.mkdir()
    machine.run("mount", "-t", "clonefs", machine.meta, machine.mountpoint)
    source = machine.add_group()
    device = machine.run(LOOP, "attach", source).strip()
    assert machine.run(LOOP, "list") == f"{device} rw {source}\n"
    machine.run(LOOP, "detach", source)
    machine.run("umount", machine.mountpoint)


def test_attaching_and_detaching_twice_is_as_good_as_once(mounted: Machine) -> None:
    source = mounted.add_group()
    device = mounted.run(LOOP, "attach", source)
    assert mounted.run(LOOP, "attach", source) == device
    assert mounted.run(LOOP, "attach", "--mount", mounted.mountpoint, "payroll/source") == device
    mounted.run(LOOP, "detach", "--mount", mounted.mountpoint, "payroll/source")
    assert mounted.run(LOOP, "list") == ""
    mounted.run(LOOP, "detach", source)
    mounted.run(LOOP, "detach", "/dev/loop1048575")  # not one that another test may have by now


def test_a_device_of_somebody_else_is_not_detached(mounted: Machine) -> None:
    source = mounted.add_group()
    image = mounted.work / "other.img"
    image.write_bytes(bytes(1 * MiB))
    other = Loop(Path(mounted.run("losetup", "--find", "--show", image).strip()))
    said = mounted.refusal(LOOP, "detach", other.path, status=1)
    assert said == (
        f"clonefs-loop: {other.path} is attached to {image}, in no mount of clonefs that is there: "
        f"if it has to go, losetup --detach {other.path}"
    )

    # As if the other one had been the Source's before, and was detached by other means.
    device = Loop(Path(mounted.run(LOOP, "attach", source).strip()))
    notes = Path("/run/clonefs-loop")
    mounted.run("mv", notes / device.path.name, notes / other.path.name)
    mounted.run(LOOP, "detach", source)
    assert (device.is_attached(), other.is_attached()) == (False, True)
    mounted.refusal(LOOP, "detach", other.path, status=1)
    other.detach()


def test_a_loop_device_is_read_only_where_the_lu_is(mounted: Machine) -> None:
    source = mounted.add_group()
    clone = mounted.add_clone()
    device = mounted.run(LOOP, "attach", clone).strip()
    assert setting(device, "ro") == "1"
    assert mounted.run(LOOP, "list") == f"{device} ro {clone}\n"
    (mounted.tree() / "control/payroll/nightly/fracture").write_text("1\n")
    said = mounted.refusal(LOOP, "attach", clone, status=1)
    assert said == (
        f"clonefs-loop: {device} is attached to {clone} already, but not as it is wanted now (rw): "
        "detach it first"
    )
    assert mounted.run(LOOP, "attach", "--read-only", clone) == f"{device}\n"
    mounted.run(LOOP, "detach", clone)
    device = mounted.run(LOOP, "attach", clone).strip()
    assert setting(device, "ro") == "0"
    mounted.run(LOOP, "detach", device)
    device = mounted.run(LOOP, "attach", "--read-only", source).strip()
    assert setting(device, "ro") == "1"
    mounted.run(LOOP, "detach", source)


def test_sectors_are_those_of_the_backing(mounted: Machine) -> None:
    image = mounted.work / "disk.img"
    image.write_bytes(bytes(8 * MiB))
    attach = ("losetup", "--find", "--show", "--sector-size", "4096")
    disk = mounted.run(*attach, image).strip()
    source = mounted.add_group(backing=Path(disk))
    device = mounted.run(LOOP, "attach", source).strip()
    assert setting(device, "queue/logical_block_size") == "4096"
    mounted.run(LOOP, "detach", source)
    device = mounted.run(LOOP, "attach", "--sector-size", "512", source).strip()
    assert setting(device, "queue/logical_block_size") == "512"
    mounted.run(LOOP, "detach", source)
    mounted.run("umount", mounted.mountpoint)
    mounted.run("losetup", "--detach", disk)


def test_a_device_in_use_is_not_detached(mounted: Machine) -> None:
    source = mounted.add_group()
    device = mounted.run(LOOP, "attach", source).strip()
    mounted.run("mkfs.ext4", "-q", device)
    mounted.run("mkdir", "/mnt/disk")
    mounted.run("mount", device, "/mnt/disk")
    said = mounted.refusal(LOOP, "detach", source, status=1)
    assert said == f"clonefs-loop: {device} is mounted on /mnt/disk: unmount it first"
    mounted.run("umount", "/mnt/disk")
    mounted.run(LOOP, "detach", source)


def test_a_device_whose_daemon_has_died_can_be_detached(mounted: Machine) -> None:
    source = mounted.add_group()
    dead = Loop(Path(mounted.run(LOOP, "attach", source).strip()))
    [daemon] = mounted.daemons()
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: not mounted.daemons(), "for the daemon to end")
    mounted.run("umount", "--lazy", "--internal-only", mounted.mountpoint)
    mounted.run("mount", "-t", "clonefs", mounted.meta, mounted.mountpoint)
    device = Loop(Path(mounted.run(LOOP, "attach", source).strip()))
    assert device.path != dead.path
    mounted.run(LOOP, "detach", source)
    assert (device.is_attached(), dead.is_attached()) == (False, False)


@pytest.mark.parametrize("by", ["device", "LU"])
def test_a_device_that_was_attached_by_hand_can_be_detached_when_the_daemon_has_died(
    mounted: Machine, by: str
) -> None:
    source = mounted.add_group()
    dead = Loop(Path(mounted.run("losetup", "--find", "--show", source).strip()))
    [daemon] = mounted.daemons()
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: not mounted.daemons(), "for the daemon to end")
    assert mounted.run(LOOP, "list") == f"{dead.path} rw {source}\n"
    mounted.run(LOOP, "detach", dead.path if by == "device" else source)
    assert not dead.is_attached()


def test_a_device_that_is_held_open_is_not_forgotten(mounted: Machine) -> None:
    source = mounted.add_group()
    device = Loop(Path(mounted.run(LOOP, "attach", source).strip()))
    with device.path.open("rb"):
        said = mounted.refusal(LOOP, "detach", source, status=1)
        assert said.startswith(f"clonefs-loop: {device.path} is still open somewhere")
        assert mounted.path(f"/run/clonefs-loop/{device.path.name}").exists()
    wait_for(lambda: not device.is_attached(), "for the device to go")


def test_a_daemon_that_hangs_holds_up_only_what_is_its_own(mounted: Machine) -> None:
    source = mounted.add_group()
    device = Loop(Path(mounted.run(LOOP, "attach", source).strip()))
    image = mounted.work / "other.img"
    image.write_bytes(bytes(1 * MiB))
    other = Loop(Path(mounted.run("losetup", "--find", "--show", image).strip()))
    [daemon] = mounted.daemons()
    os.kill(daemon, signal.SIGSTOP)
    try:
        assert mounted.run(LOOP, "list") == f"{device.path} rw {source}\n"
        mounted.refusal(LOOP, "detach", other.path, status=1)
        # One that is refused does not keep the others.
        mounted.refusal(LOOP, "detach", other.path, device.path, status=1)
        assert not device.is_attached()
    finally:
        os.kill(daemon, signal.SIGCONT)
    other.detach()


def test_what_is_no_lu_is_refused(mounted: Machine) -> None:
    mounted.add_group()
    gone = mounted.mountpoint / "payroll/gone"
    assert f"there is no {gone}" in mounted.refusal(LOOP, "attach", gone, status=1)
    for path in (
        mounted.meta,
        mounted.mountpoint / "payroll",
        mounted.mountpoint / "control/status",
    ):
        said = mounted.refusal(LOOP, "attach", path, status=1)
        assert said == f"clonefs-loop: {path} is not an LU of a clonefs mount"
    for wrong in ([], ["attach"], ["detach"], ["list", "it"], ["attach", "--what", "a"]):
        assert "usage:" in mounted.refusal(LOOP, *wrong, status=2)
    assert mounted.run(LOOP, "list") == ""


# The installer ---------------------------------------------------------------------------------

UNITS = Path("/usr/local/lib/systemd/system")


def installed_below(root: Path) -> dict[str, str]:
    """Every file below, with what is in it; of a link, what it says."""
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def install(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Install below a directory."""
    return subprocess.run(
        [HELPERS / "install", *arguments],
        env=os.environ | {"DESTDIR": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_installer_can_be_run_twice_and_taken_back(tmp_path: Path) -> None:
    assert install(tmp_path).returncode == 0
    once = installed_below(tmp_path)
    assert {
        "sbin/mount.clonefs",
        "sbin/umount.clonefs",
        "sbin/mount.fuse.clonefs",
        "sbin/umount.fuse.clonefs",
        "usr/local/bin/clonefs",
        "usr/local/sbin/clonefs-loop",
        "usr/local/lib/systemd/system/clonefs@.service",
        "usr/local/lib/systemd/system/clonefs-loop@.service",
        "usr/local/share/man/man1/clonefs.1",
        "usr/local/share/man/man8/mount.clonefs.8",
        "usr/local/share/bash-completion/completions/clonefs",
        "usr/local/share/zsh/site-functions/_clonefs",
        "etc/fish/completions/clonefs.fish",
    } == set(once)
    assert install(tmp_path).returncode == 0
    assert installed_below(tmp_path) == once
    assert install(tmp_path, "--uninstall").returncode == 0
    assert installed_below(tmp_path) == {}
    assert install(tmp_path, "--uninstall").returncode == 0


def test_the_installer_takes_another_prefix_and_program(tmp_path: Path) -> None:
    assert install(tmp_path, "--prefix", "/opt/clonefs", "--program", "/bin/true").returncode == 0
    put = installed_below(tmp_path)
    assert put["opt/clonefs/bin/clonefs"] == "/bin/true"
    assert "\nprogram=/opt/clonefs/bin/clonefs\n" in put["sbin/mount.clonefs"]
    assert "/opt/clonefs/sbin/clonefs-loop" in put["etc/systemd/system/clonefs-loop@.service"]
    assert "@PREFIX@" not in "".join(put.values())
    assert install(tmp_path, "--uninstall", "--prefix", "/opt/clonefs").returncode == 0
    assert installed_below(tmp_path) == {}


@pytest.mark.parametrize(
    "name",
    [
        "sbin/mount.clonefs",
        "sbin/umount.fuse.clonefs",
        "usr/local/share/man/man1/clonefs.1",
        "usr/local/share/zsh/site-functions/_clonefs",
    ],
)
def test_the_installer_leaves_alone_what_is_not_its_own(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs\n")
    done = install(tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"install: {theirs} is there and was not put there by this: take it away first\n"
    )
    assert install(tmp_path, "--uninstall").returncode == 0
    assert installed_below(tmp_path) == {name: "theirs\n"}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--what"], 2), (["--prefix"], 2), (["--prefix", "here"], 1), (["--program", "/gone"], 1)],
)
def test_the_installer_refuses_what_it_cannot_do(
    tmp_path: Path, arguments: list[str], status: int
) -> None:
    done = install(tmp_path, *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1)
    assert installed_below(tmp_path) == {}


# Units -----------------------------------------------------------------------------------------


def test_the_units_are_sound(machine: Machine) -> None:
    machine.path("/etc/clonefs").mkdir()
    machine.path("/etc/clonefs/a.conf").write_text("META=/m\nMOUNTPOINT=/n\n")
    units = [UNITS / "clonefs@a.service", UNITS / "clonefs-loop@a.service"]
    for unit in units:  # verify takes no instance of a template from another directory
        template = unit.with_name(unit.name.replace("@a", "@"))
        machine.run("ln", "-s", template, unit)
    assert machine.run("systemd-analyze", "verify", "--man=no", *units) == ""
