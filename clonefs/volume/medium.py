"""What a metadata volume is stored on: pages that are mapped, and writes that are durable.

`Medium` is what the volume needs; `FileMedium` is a file or a block device. The mapping and the
writes meet in the page cache, so each sees the other at once.
"""

import errno
import mmap
import os
from typing import Protocol

from clonefs.errors import failed


class Medium(Protocol):
    """`size` bytes. Failures raise ClonefsError (EIO)."""

    size: int
    name: str
    view: memoryview

    def write_durably(self, offset: int, data: bytes) -> None:
        """Write, and return when it is on stable storage. Stores to `view` may go with it."""

    def flush(self) -> None:
        """Every write and every store to `view` before this call is on stable storage."""

    def close(self) -> None:
        """Unmap and let go. Nobody may hold a part of `view` any more."""


class FileMedium:
    """`size` bytes of the open descriptor `fd`, mapped; the medium owns it. All calls block.

    `private`: a store to `view` is seen here only and never reaches the file; `fd` may be one for
    reading.
    """

    def __init__(
        self, fd: int, name: str, size: int | None = None, *, private: bool = False
    ) -> None:
        self.name = name
        self.size = os.lseek(fd, 0, os.SEEK_END) if size is None else size
        self._fd = fd
        self._map = mmap.mmap(fd, self.size, mmap.MAP_PRIVATE if private else mmap.MAP_SHARED)
        self.view = memoryview(self._map)

    def write_durably(self, offset: int, data: bytes) -> None:
        # RWF_DSYNC and not fdatasync: the latter would also write out every page of the live maps
        # that is dirty, and a commit must not take longer the more has been written to.
        try:
            count = os.pwritev(self._fd, (data,), offset, os.RWF_DSYNC)
        except OSError as error:
            raise failed(f"writing to {self.name} failed: {error.strerror}") from error
        if count != len(data):
            raise failed(f"writing to {self.name} stopped half-way: {os.strerror(errno.EIO)}")

    def flush(self) -> None:
        try:
            self._map.flush()
            os.fsync(self._fd)
        except OSError as error:
            raise failed(f"flushing {self.name} failed: {error.strerror}") from error

    def close(self) -> None:
        self.view.release()
        self._map.close()
        os.close(self._fd)
