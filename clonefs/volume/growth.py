"""A metadata volume gets more room for maps, in place, while nobody has it mounted.

Two things change, in this order: the file becomes longer, on stable storage; then the superblock says
so, in one sector. Whatever comes in between, the volume is whole: with its old size or with the new one.
A superblock that asks for more than its file has must never be on disk.

Nothing moves. Slots, maps, records, their generation and the uuid stay, so that what the next mount
makes of them stays too, and the stamps of the backings remain true. The room for the record is that of
the format.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

from clonefs.errors import ClonefsError, full, invalid
from clonefs.extents import format_size
from clonefs.volume.layout import PAGE
from clonefs.volume.volume import open_volume


def grow_volume(path: Path, *, size: int | None) -> None:
    """Make the volume at `path` `size` bytes large, or as large as its file or device if None. Blocks.

    A file is made longer, and allocated in full. A volume that has that size is left as it is. Raises
    ClonefsError: EINVAL (smaller than it is, larger than the device, not a volume), EBUSY (mounted),
    ENOSPC, ENOENT, EIO (damaged).
    """
    volume = open_volume(path)
    try:
        with path.open("rb+", buffering=0) as file:
            wanted = _new_size(path, file.fileno(), volume.superblock.size, size)
            if wanted > volume.superblock.size:
                _lengthen(path, file.fileno(), wanted)
                volume.extend(wanted)
    finally:
        volume.close(clean=False)


def _new_size(path: Path, fd: int, present: int, size: int | None) -> int:
    """The size that the volume is to have, in whole pages."""
    held = os.lseek(fd, 0, os.SEEK_END)
    wanted = (held if size is None else size) // PAGE * PAGE
    if wanted < present:
        raise invalid(
            f"{path} has {format_size(present)}, and a metadata volume cannot be made smaller: "
            f"choose a larger --size"
        )
    if size is None and wanted == present:
        raise invalid(
            f"{path} has no room beyond the {format_size(present)} of its volume: say with --size how "
            f"large it is to be, or make the device larger first"
        )
    if wanted > held and not _is_file(fd):
        raise invalid(
            f"{path} has {format_size(held)}, which is less than {format_size(wanted)}: make the "
            f"device larger first"
        )
    return wanted


def _is_file(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode)


def _lengthen(path: Path, fd: int, wanted: int) -> None:
    """Have `wanted` bytes on stable storage, all of them allocated: a store to a mapped page must never
    meet a full disk."""
    if not _is_file(fd):
        return
    held = os.lseek(fd, 0, os.SEEK_END)
    try:
        os.posix_fallocate(fd, 0, wanted)
        os.fsync(fd)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, held)
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise full(
                f"no room for {path} with {format_size(wanted)}: make space, or choose a smaller --size"
            ) from error
        raise ClonefsError(error.errno or errno.EIO, f"{path}: {error.strerror}") from error
