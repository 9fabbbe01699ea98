"""A mounted file system that can be frozen: what fsfreeze(8) does, and sentences for what it refuses.

While it is frozen, whoever writes to it waits, and what is on its device is clean: nothing has to be
replayed. The kernel keeps no account of who has frozen it, and thaws it for anybody who asks. So
`thaw` must be called only by somebody who knows that `freeze` has succeeded here.
"""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from clonefs.cli import kernel
from clonefs.errors import ClonefsError, busy, failed, invalid, missing

_FIFREEZE = 0xC0045877  # linux/fs.h: _IOWR('X', 119, int)
_FITHAW = 0xC0045878  # _IOWR('X', 120, int)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class FileSystem:
    """A file system, open where it is mounted. `device` is its number in the mount table."""

    mountpoint: Path
    kind: str
    device: str
    descriptor: int

    def sync(self) -> None:
        """Write out what is dirty. Raises ClonefsError (EIO)."""
        if _libc.syncfs(self.descriptor) != 0:
            why = os.strerror(ctypes.get_errno())
            raise failed(f"{self.mountpoint} could not be written out before the freeze: {why}")

    def freeze(self) -> None:
        """Freeze it. Raises ClonefsError; then it is as it was."""
        try:
            fcntl.ioctl(self.descriptor, _FIFREEZE, 0)
        except OSError as error:
            raise self._unfrozen(error) from error

    def thaw(self) -> bool:
        """Thaw it; False if it was not frozen any more. Raises ClonefsError if it stays frozen."""
        try:
            fcntl.ioctl(self.descriptor, _FITHAW, 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise failed(
                f"{self.mountpoint} is still frozen ({error.strerror}): "
                f"fsfreeze --unfreeze {self.mountpoint} tries again"
            ) from error
        return True

    def _unfrozen(self, error: OSError) -> ClonefsError:
        where = self.mountpoint
        if error.errno == errno.EBUSY:
            return busy(
                f"{where} has been frozen already, by somebody else: wait until they are done "
                f"(or, if nobody needs it, fsfreeze --unfreeze {where})"
            )
        if error.errno in (errno.EPERM, errno.EACCES):
            return ClonefsError(errno.EPERM, f"{where} can be frozen by root only: use sudo")
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            return invalid(
                f"{where} cannot be frozen: a file system of type {self.kind} does not know how "
                "(ext4, XFS and Btrfs do)"
            )
        return ClonefsError(
            error.errno or errno.EIO, f"{where} could not be frozen: {error.strerror}"
        )


@contextmanager
def opened(mountpoints: Sequence[Path]) -> Iterator[list[FileSystem]]:
    """The file systems that are mounted there, each once, in this order. Raises ClonefsError."""
    with ExitStack() as stack:
        found: dict[str, FileSystem] = {}
        for mountpoint in mountpoints:
            file_system = _open(mountpoint, stack)
            found.setdefault(file_system.device, file_system)
        yield list(found.values())


def _open(path: Path, stack: ExitStack) -> FileSystem:
    real = Path(os.path.realpath(path))
    entry = kernel.topmost(real)
    if entry is None:
        raise _not_a_mount_point(path, real)
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ClonefsError(error.errno or errno.EIO, f"{path}: {error.strerror}") from error
    stack.callback(os.close, descriptor)
    return FileSystem(real, entry.fstype, entry.device, descriptor)


def _not_a_mount_point(path: Path, real: Path) -> ClonefsError:
    if not real.exists():
        return missing(f"there is no {path}: name where the file system is mounted")
    entry = kernel.mount_of(real)
    where = "" if entry is None else f", which is {entry.mountpoint}"
    return invalid(f"{path} is not a mount point: name that of the file system it is in{where}")
