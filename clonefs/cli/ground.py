"""What a file stands on: the file systems, devices and files below it, all the way down.

A write to a file can have to wait for each of them: for the file system that it is in, for the devices
under that, and where one is a loop device, for its file and what that stands on. It asks /proc and
/sys. It must never open a file for reading or writing, and it passes over what it cannot find: a
backing that is missing, a path of another mount namespace, what a FUSE file system stands on.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from clonefs.cli import kernel

_DEVICES = Path("/sys/dev/block")
_BTRFS = Path("/sys/fs/btrfs")
_NO_DEVICE = "0:"  # the number of a file system that is on no single device begins so


@dataclass
class Ground:
    """What was found. A file system is known by its number in the mount table, as a device is."""

    file_systems: set[str] = field(default_factory=set)
    devices: set[str] = field(default_factory=set)
    files: set[Path] = field(default_factory=set)

    def _add(self, path: Path) -> None:
        """A file or a device by its path."""
        with suppress(OSError):
            found = path.stat()
            if stat.S_ISBLK(found.st_mode):
                self._add_device(_number(found.st_rdev))
            elif path not in self.files:
                self.files.add(path)
                self._add_mount(kernel.mount_of(path))

    def _add_mount(self, entry: kernel.MountEntry | None) -> None:
        if entry is None or entry.device in self.file_systems:
            return
        self.file_systems.add(entry.device)
        for device in _devices_of(entry):
            self._add_device(device)

    def _add_device(self, device: str) -> None:
        if device in self.devices:
            return
        self.devices.add(device)
        node = _DEVICES / device
        for below in _devices_below(node):
            self._add_device(below)
        with suppress(OSError):
            self._add(Path(os.fsdecode((node / "loop/backing_file").read_bytes()).rstrip("\n")))


def below(path: Path) -> Ground:
    """All that `path` stands on; a directory stands for the file system that it is in."""
    ground = Ground()
    ground._add(path)
    return ground


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _devices_of(entry: kernel.MountEntry) -> set[str]:
    if not entry.device.startswith(_NO_DEVICE):
        return {entry.device}
    try:
        found = Path(entry.source).stat()
    except OSError:
        return set()
    if not (entry.source.startswith("/") and stat.S_ISBLK(found.st_mode)):
        return set()
    return {_number(found.st_rdev)} | _others_of_btrfs(_number(found.st_rdev))


def _others_of_btrfs(device: str) -> set[str]:
    """All devices of the file system that has this one."""
    for file_system in _BTRFS.glob("*/devices"):
        devices = set(_read(file_system.glob("*/dev")))
        if device in devices:
            return devices
    return set()


def _devices_below(node: Path) -> Iterator[str]:
    """The disk that a partition is on; the devices that a mapped device or an array is made of."""
    if (node / "partition").exists():
        yield from _read([node.resolve().parent / "dev"])
    yield from _read(node.glob("slaves/*/dev"))


def _read(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        with suppress(OSError):
            yield file.read_text().strip()
