"""What a metadata volume is stored on: pages that are mapped, and writes that are durable.

`Medium` is what the volume needs; `FileMedium` is a file or a block device. The mapping and the
writes meet in the page cache, so each sees the other at once.
"""

import contextlib
import ctypes
import errno
import mmap
import os
from typing import Protocol

from clonefs.errors import failed

PIECE = 256 << 10
"""Bytes of a live map that rest together, or not: 2M extents. To wake one takes 0.1 ms."""

_CHUNK = 1 << 20

_MAP_FIXED = 0x10
_MAP_NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
]


class Medium(Protocol):
    """`size` bytes. Failures raise ClonefsError (EIO). `piece`: how many bytes rest together."""

    size: int
    piece: int
    name: str
    view: memoryview

    def read(self, offset: int, length: int) -> bytes:
        """These bytes, or as many as there are."""

    def keep(self, offset: int, length: int) -> None:
        """Have these bytes of `view` in memory, and keep them there."""

    def rest(self, offset: int, length: int) -> None:
        """These bytes are zeros, on stable storage too: they take no memory from now on. They can be
        read and flushed, but must not be stored to."""

    def wake(self, offset: int, length: int) -> None:
        """These bytes rest, and are kept from now on."""

    def forget(self, offset: int, length: int) -> None:
        """Nothing of these bytes rests any more, nor is it kept."""

    def write_durably(self, offset: int, data: bytes) -> None:
        """Write, and return when it is on stable storage. Stores to `view` may go with it."""

    def flush_part(self, offset: int, length: int) -> None:
        """Every store to these bytes of `view` before this call is on stable storage."""

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
        self.piece = PIECE
        self.size = os.lseek(fd, 0, os.SEEK_END) if size is None else size
        self._fd = fd
        self._private = private
        self._map = mmap.mmap(fd, self.size, mmap.MAP_PRIVATE if private else mmap.MAP_SHARED)
        self.view = memoryview(self._map)

    def read(self, offset: int, length: int) -> bytes:
        pieces = []
        while length and (piece := self._pread(length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    def _pread(self, length: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise failed(f"reading {self.name} failed: {error.strerror}") from error

    def keep(self, offset: int, length: int) -> None:
        # Whoever touches a page that is not there reads it, and a device that fails then ends the
        # process. And the kernel may drop a page that it could not write back: a live map would be
        # what it was long ago. Locked pages stay; who is not root may lock few, and goes without.
        end = offset + length
        for at in range(offset, end, _CHUNK):
            if not self._pread(min(_CHUNK, end - at), at):
                raise failed(f"reading {self.name} failed: {os.strerror(errno.EIO)}")
        if not self._private:
            self._lock(offset, length)

    def _lock(self, offset: int, length: int) -> None:
        _libc.mlock(self._address(offset), length)

    def _address(self, offset: int) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map, offset))

    def rest(self, offset: int, length: int) -> None:
        # Pages of nobody's that can only be read take the place of the file's: reading them shows the
        # kernel's one page of zeros, and a store that should not be ends the process.
        self._put_in_place(offset, length, mmap.PROT_READ, _MAP_NOTHING, -1)

    def wake(self, offset: int, length: int) -> None:
        # Zeros were there. They are written again, so that nothing has to be read.
        self._write(offset, bytes(length), 0)
        self.forget(offset, length)
        self._lock(offset, length)

    def forget(self, offset: int, length: int) -> None:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self._put_in_place(offset, length, access, mmap.MAP_SHARED, self._fd)

    def _put_in_place(self, offset: int, length: int, access: int, what: int, fd: int) -> None:
        at = offset if fd >= 0 else 0
        if _libc.mmap(self._address(offset), length, access, what | _MAP_FIXED, fd, at) == _FAILED:
            why = os.strerror(ctypes.get_errno())
            raise failed(f"getting memory for a map on {self.name} failed: {why}")

    def write_durably(self, offset: int, data: bytes) -> None:
        # RWF_DSYNC and not fdatasync: the latter would also write out every page of the live maps
        # that is dirty, and a commit must not take longer the more has been written to.
        self._write(offset, data, os.RWF_DSYNC)

    def _write(self, offset: int, data: bytes, flags: int) -> None:
        try:
            count = os.pwritev(self._fd, (data,), offset, flags)
        except OSError as error:
            raise failed(f"writing to {self.name} failed: {error.strerror}") from error
        if count != len(data):
            raise failed(f"writing to {self.name} stopped half-way: {os.strerror(errno.EIO)}")

    def flush_part(self, offset: int, length: int) -> None:
        try:
            self._map.flush(offset, length)
        except OSError as error:
            raise failed(f"flushing {self.name} failed: {error.strerror}") from error

    def flush(self) -> None:
        try:
            self._map.flush()
            os.fsync(self._fd)
        except OSError as error:
            raise failed(f"flushing {self.name} failed: {error.strerror}") from error

    def close(self) -> None:
        self.view.release()
        self._map.close()
        with contextlib.suppress(OSError):  # a device that is gone; a flush has said so
            os.close(self._fd)
