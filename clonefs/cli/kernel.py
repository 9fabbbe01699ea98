"""What the kernel knows of mounts and loop devices, and how to take a mount away.

It asks /proc and /sys and calls umount or fusermount3. It must never look at a path through a mount
to find out whether it is mounted: a dead mount answers nothing.
"""

import errno
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from clonefs.errors import ClonefsError, busy, failed, missing

FSTYPE = "fuse.clonefs"

_MOUNTINFO = Path("/proc/self/mountinfo")
_BLOCK_DEVICES = Path("/sys/block")
_UMOUNT_HELPER = Path("/sbin/umount.clonefs")
_GONE = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


@dataclass(frozen=True)
class MountEntry:
    """One line of the mount table. `source` is what was mounted, a device or only a name."""

    device: str
    root: str
    mountpoint: Path
    fstype: str
    source: str = ""
    number: int = 0


def mounts() -> list[MountEntry]:
    """The mount table: what is mounted later stands later."""
    lines = os.fsdecode(_MOUNTINFO.read_bytes()).splitlines()
    return [_entry(line) for line in lines]


def _entry(line: str) -> MountEntry:
    place, _, kind = line.partition(" - ")
    number, _, device, root, mountpoint, *_ = place.split(" ")
    fstype, source, *_ = kind.split(" ")
    where = Path(_unescape(mountpoint))
    return MountEntry(
        device, _unescape(root), where, _unescape(fstype), _unescape(source), int(number)
    )


def mount_of(path: Path) -> MountEntry | None:
    """The mount that a path is in; None if it is in none of this table.

    Not by st_dev: of a subvolume of Btrfs that is a number of its own, which is in no table.
    """
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    finally:
        os.close(descriptor)
    (number,) = (int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
    return next((entry for entry in mounts() if entry.number == number), None)


def _unescape(field: str) -> str:
    """The kernel writes a blank, a tab, a newline and a backslash as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def clonefs_mountpoints() -> list[Path]:
    """Where clonefs is mounted; of several bind mounts of one, the first."""
    first: dict[str, Path] = {}
    for entry in mounts():
        if entry.fstype == FSTYPE and entry.root == "/":
            first.setdefault(entry.device, entry.mountpoint)
    return list(first.values())


def topmost(mountpoint: Path) -> MountEntry | None:
    """What is mounted at this very path, which is absolute and without symbolic links."""
    return next((entry for entry in reversed(mounts()) if entry.mountpoint == mountpoint), None)


def is_dead(mountpoint: Path) -> bool:
    """Whether a FUSE mount is here whose daemon is no more.

    statvfs always asks the daemon; stat may be answered from the kernel's cache for minutes after.
    """
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in _GONE
    return False


def unmount(mountpoint: Path) -> None:
    """Unmount. Raises ClonefsError, EBUSY with what to do if the mount is in use."""
    result = _run(
        # -i: a helper for this file system type would call the command that calls this.
        ["umount", "-i", str(mountpoint)] if _is_root() else ["fusermount3", "-u", str(mountpoint)]
    )
    if result.returncode != 0:
        raise _in_use(mountpoint) if "busy" in result.stderr else _unmountable(mountpoint, result)


def detach(mountpoint: Path) -> None:
    """Take away a mount whose daemon is dead, even if something still holds files of it open."""
    path = str(mountpoint)
    result = _run(["umount", "-i", "-l", path] if _is_root() else ["fusermount3", "-u", "-z", path])
    if result.returncode != 0:
        raise _unmountable(mountpoint, result)


def note_for_umount(volume: Path, mountpoint: Path) -> bool:
    """Make umount(8) call umount.clonefs for this mount, if that is installed; whether it will.

    Without an entry in its own table umount(8) asks only for the type, gets `fuse`, and calls no
    helper: it would return when the kernel has let go, and not when everything is on disk.
    """
    if not _is_root() or not os.access(_UMOUNT_HELPER, os.X_OK):
        return True  # a user's umount(8) reads the type in the kernel's table
    note = ("mount", "--internal-only", "--fake", "-t", FSTYPE, "-o", "helper=clonefs", "--")
    return _run([*note, str(volume), str(mountpoint)]).returncode == 0


def _is_root() -> bool:
    return os.geteuid() == 0


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise missing(f"the command {command[0]} is not installed") from None


def _unmountable(mountpoint: Path, result: subprocess.CompletedProcess[str]) -> ClonefsError:
    why = result.stderr.strip() or f"exit status {result.returncode}"
    return failed(f"{mountpoint} cannot be unmounted: {why}")


def _in_use(mountpoint: Path) -> ClonefsError:
    advice = f"close the files below it (fuser -vm {mountpoint} shows who has them open)"
    devices = " ".join(loop_devices_below(mountpoint))
    if devices:
        advice += f", and detach the loop devices on them (losetup -d {devices})"
    return busy(f"{mountpoint} is in use: {advice}")


def loop_devices_below(mountpoint: Path) -> list[str]:
    """The loop devices whose backing file is in this mount."""
    found = []
    for attribute in sorted(_BLOCK_DEVICES.glob("loop*/loop/backing_file")):
        try:
            backing = Path(os.fsdecode(attribute.read_bytes()).rstrip("\n"))
        except OSError:
            continue  # detached since
        if backing.is_relative_to(mountpoint):
            found.append(f"/dev/{attribute.parent.parent.name}")
    return found
