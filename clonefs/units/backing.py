"""A logical unit over a regular file or a block device.

I/O goes through the kernel's page cache of the backing: what was acknowledged outlives the daemon,
and a flush makes it outlive the machine. What the page cache can do at once is done in the event
loop; what would block goes to a thread, at most THREADS of them for one unit, so that one slow
device does not keep the others waiting.
"""

import contextlib
import ctypes
import errno
import fcntl
import math
import os
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import trio

from clonefs.errors import ClonefsError, DeviceError, busy, invalid, missing
from clonefs.extents import SECTOR, format_size
from clonefs.units.flushing import FlushFailure
from clonefs.units.missing import MissingUnit
from clonefs.units.protocol import Buffer, LogicalUnit
from clonefs.units.ring import ring

THREADS = 8
CHUNK = 1 << 20
RING_LARGEST = 1 << 18  # bytes
STAMP = "user.clonefs.volume"  # an extended attribute

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_LARGE = 32 << 10  # bytes
_NO_NOWAIT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

_uninitialised = ctypes.pythonapi.PyByteArray_FromStringAndSize
_uninitialised.restype = ctypes.py_object
_uninitialised.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]


class BackingUnit:
    """`size` bytes of the open descriptor `fd`, which the unit owns from now on."""

    def __init__(
        self,
        fd: int,
        name: str,
        size: int,
        *,
        is_device: bool,
        created: bool = False,
        beneath: int | None = None,
    ) -> None:
        self.fd = fd
        self._beneath = beneath  # the file under a loop device, open so that it stays locked
        self._created = created
        self.name = name
        self.size = size
        self._is_device = is_device
        self._threads = trio.CapacityLimiter(THREADS)
        self._nowait_reads = True
        self._is_local = is_device or _is_page_cached(fd)
        self._inline = InlineWrites(possible=self._is_local)
        self._flushing = threading.Lock()
        self._flush_failure = FlushFailure(name)
        self.sparse = not is_device

    def read_now(self, offset: int, length: int) -> Buffer | None:
        if not self._nowait_reads:
            return None
        data = _room(length)
        try:
            if os.preadv(self.fd, (data,), offset, os.RWF_NOWAIT) == length:
                return data
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in _NO_NOWAIT:
                raise self._error("read", offset, length, error) from error
            self._nowait_reads = False
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        # A large one takes longer to copy than to hand over, and the loop has others to serve.
        if length <= RING_LARGEST and (here := ring(local=self._is_local)) is not None:
            data = _room(length)
            try:
                if self._is_local:
                    done = await here.read(self.fd, offset, data)
                else:  # who may never answer gets no more places in the ring than threads
                    async with self._threads:
                        done = await here.read(self.fd, offset, data)
            except OSError as error:
                raise self._error("read", offset, length, error) from error
            if done:
                return data
        return await trio.to_thread.run_sync(self._read, offset, length, limiter=self._threads)

    def _read(self, offset: int, length: int) -> bytearray:
        data = _room(length)
        view = memoryview(data)
        done = 0
        try:
            while done < length:
                count = os.preadv(self.fd, (view[done:],), offset + done)
                if count == 0:
                    raise self._too_short(offset + done)
                done += count
        except OSError as error:
            raise self._error("read", offset, length, error) from error
        return data

    def write_now(self, offset: int, data: Buffer) -> bool:
        if not self._inline.allowed(len(data)):
            return False
        started = time.monotonic()
        try:
            count = os.pwrite(self.fd, data, offset)
        except OSError as error:
            raise self._error("write", offset, len(data), error) from error
        self._inline.took(time.monotonic() - started)
        if count != len(data):
            self._write(offset + count, memoryview(data)[count:])
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        await trio.to_thread.run_sync(self._write, offset, data, limiter=self._threads)

    def _write(self, offset: int, data: Buffer) -> None:
        started = time.monotonic()
        self._put(offset, data)
        self._inline.took(time.monotonic() - started)

    def _put(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], offset + done)
        except OSError as error:
            raise self._error("write", offset, len(view), error) from error

    async def copy_from(
        self, origin: LogicalUnit, ranges: Sequence[tuple[int, int]], *, share: bool
    ) -> int:
        if isinstance(origin, MissingUnit):
            await origin.read(*ranges[0])  # says why
        assert isinstance(origin, BackingUnit)
        return await trio.to_thread.run_sync(
            self._copy_from, origin, ranges, share, limiter=self._threads
        )

    def _copy_from(
        self, origin: "BackingUnit", ranges: Sequence[tuple[int, int]], share: bool
    ) -> int:
        for number, (offset, length) in enumerate(ranges):
            try:
                self._copy_range(origin, offset, length, share)
            except ClonefsError:
                if number == 0:
                    raise
                return number
        return len(ranges)

    def _copy_range(self, origin: "BackingUnit", offset: int, length: int, share: bool) -> None:
        end = offset + length
        origin._check_length(end)
        while offset < end:
            data = min(origin._seek_data(offset), end)
            if data > offset:
                self._zero(offset, data - offset)
            if data < end:
                hole = min(origin._seek_hole(data), end)
                self._copy_data(origin, data, hole - data, share)
                data = hole
            offset = data

    def _check_length(self, end: int) -> None:
        """A backing that somebody has cut short has no hole at its end: its bytes are gone."""
        if not self._is_device and (held := os.fstat(self.fd).st_size) < end:
            raise self._too_short(held)

    def _too_short(self, held: int) -> DeviceError:
        reason = (
            f"{self.name} ends at byte {held}, but must hold {self.size}: somebody has cut it short"
        )
        return DeviceError(errno.EIO, reason, self.name)

    def _copy_data(self, origin: "BackingUnit", offset: int, length: int, share: bool) -> None:
        end = offset + length
        while offset < end:
            count = self._copy_in_kernel(origin, offset, end - offset) if share else 0
            if count == 0:
                count = min(CHUNK, end - offset)
                self._put(offset, origin._read(offset, count))
            offset += count

    def _copy_in_kernel(self, origin: "BackingUnit", offset: int, length: int) -> int:
        """How many bytes the kernel has copied, or let both share. XFS and Btrfs always share."""
        try:
            return os.copy_file_range(origin.fd, self.fd, length, offset, offset)
        except OSError:
            # Not between these two, or an I/O error: reading and writing tells which and whose.
            return 0

    def _zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, as a hole where the backing can have one."""
        if not self._is_device:
            if self._seek_data(offset) >= offset + length:
                return
            try:
                _punch(self.fd, offset, length)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise self._error("clear", offset, length, error) from error
            else:
                return
        zeros = bytes(min(CHUNK, length))
        for at in range(offset, offset + length, CHUNK):
            self._put(at, zeros[: offset + length - at])

    def _seek_data(self, offset: int) -> int:
        return self._seek(offset, os.SEEK_DATA, past_end=self.size, unknown=offset)

    def _seek_hole(self, offset: int) -> int:
        return self._seek(offset, os.SEEK_HOLE, past_end=self.size, unknown=self.size)

    def _seek(self, offset: int, whence: int, *, past_end: int, unknown: int) -> int:
        # A block device has no holes that lseek would know of, and its lseek is not a query.
        if self._is_device:
            return unknown
        try:
            return min(os.lseek(self.fd, offset, whence), self.size)
        except OSError as error:
            return past_end if error.errno == errno.ENXIO else unknown

    async def flush(self) -> None:
        await trio.to_thread.run_sync(self._flush, limiter=self._threads)

    def _flush(self) -> None:
        # The kernel tells an error to one of those who flush at the same time: one at a time.
        with self._flushing:
            self._flush_failure.check()
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                raise self._flush_failure.remember(str(error.strerror)) from error

    async def forget_cached(self) -> None:
        await trio.to_thread.run_sync(self._forget_cached, limiter=self._threads)

    def _forget_cached(self) -> None:
        # Pages that could not be written count as clean, and clean ones can be dropped.
        self._flush()
        try:
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._error("read", 0, self.size, error) from error

    async def data_from(self, offset: int) -> int:
        return await trio.to_thread.run_sync(self._seek_data, offset, limiter=self._threads)

    def allocated(self) -> int:
        try:
            return self.size if self._is_device else os.fstat(self.fd).st_blocks * 512
        except OSError:  # a network file system that is gone; reads and writes say so
            return 0

    def stamp(self) -> str | None:
        return None if self._is_device else read_stamp(self.fd)

    def set_stamp(self, stamp: str, *, durable: bool) -> None:
        if self._is_device:
            return
        with contextlib.suppress(OSError):  # a file system without attributes, or no room
            os.setxattr(self.fd, STAMP, stamp.encode())
            if durable:
                os.fsync(self.fd)

    def modified(self) -> float | None:
        try:
            return None if self._is_device else os.fstat(self.fd).st_mtime
        except OSError:
            return None

    def close(self) -> None:
        fd, self.fd = self.fd, -1  # a number that the next open file gets must not be used again
        beneath, self._beneath = self._beneath, None
        # What has to be on disk has been flushed; there is nothing else that closing could tell.
        for each in (beneath, fd):
            with contextlib.suppress(OSError):
                if each is not None:
                    os.close(each)

    def discard(self) -> None:
        self.close()
        if self._created:
            Path(self.name).unlink(missing_ok=True)

    def _error(self, verb: str, offset: int, length: int, error: OSError) -> DeviceError:
        if error.errno == errno.ENOSPC:
            reason = f"no space left under {self.name}: make room on its file system"
            return DeviceError(errno.ENOSPC, reason, self.name)
        reason = f"cannot {verb} {length} bytes at {offset} of {self.name}: {error.strerror}"
        return DeviceError(errno.EIO, reason, self.name)


def _room(length: int) -> bytearray:
    """Bytes to be read to, all of them. Large ones are not made zeros first, as `bytearray` would: of a
    read of 1 MiB from the page cache that is a fifth of the time."""
    if length < _LARGE:
        return bytearray(length)
    room: bytearray = _uninitialised(None, length)
    return room


def read_stamp(file: int | str) -> str | None:
    """The stamp of a regular file, by its descriptor or path; None if there is none. Of a device it
    would be that of its node, which is not with its bytes; the kernel allows none there."""
    try:
        return os.getxattr(file, STAMP).decode("ascii", "replace")
    except OSError:
        return None


class InlineWrites:
    """Whether a write may be done in the event loop.

    A write into the page cache costs a tenth of handing it to a thread, but the kernel may make the
    writer wait when too much is dirty. So writes are done at once until one of them was slow; then
    all go to threads, until none of these has been slow for a while. Where writes do not go to the page
    cache in the first place, it is not `possible`.
    """

    LARGEST = 1 << 20  # bytes
    SLOW = 0.005  # seconds
    PENALTY = 1.0  # seconds

    def __init__(self, *, possible: bool = True) -> None:
        self._not_before = 0.0 if possible else math.inf

    def allowed(self, length: int) -> bool:
        """Whether a write of `length` bytes may."""
        return length <= self.LARGEST and (
            self._not_before == 0.0 or time.monotonic() >= self._not_before
        )

    def took(self, seconds: float) -> None:
        """How long a write has taken, be it in a thread or not."""
        if seconds > self.SLOW:
            self._not_before = max(self._not_before, time.monotonic() + self.PENALTY)


# ext2 to ext4, XFS, Btrfs, F2FS, tmpfs. Others may ask a server, or a program like this one, each time.
_PAGE_CACHED = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994})


def _is_page_cached(fd: int) -> bool:
    """Whether it lies on a local file system that is known to use the page cache, and asks nobody."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = (ctypes.c_long * 64)()  # struct statfs begins with the type
    return libc.fstatfs(fd, found) == 0 and found[0] & 0xFFFFFFFF in _PAGE_CACHED


def _punch(fd: int, offset: int, length: int) -> None:
    """fallocate(2) with PUNCH_HOLE, which the os module does not have. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    if libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_backing(
    path: Path,
    *,
    create_size: int | None = None,
    size: int | None = None,
    read_only: bool = False,
) -> BackingUnit:
    """Open and lock the backing at `path`, a regular file or a block device. Blocks.

    A regular file that does not exist is created sparse with `create_size` bytes, if given. `size`
    is how many bytes of it the unit has; the whole backing if not given. `read_only`: the unit cannot
    write, and others may have the backing open in the same way.

    Raises ClonefsError: ENOENT (not there), EBUSY (in use), EINVAL (no backing at all, or too
    small), or what the operating system says.
    """
    if create_size is not None and _is_to_be_created(path):
        return _create(path, create_size)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        raise missing(
            f"{path} does not exist: to have a Source created, give its size (size=10G, or --size 10G)"
        ) from None
    except OSError as error:
        raise _refused(path, error) from error
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        raise invalid(f"{path} is neither a regular file nor a block device")
    is_device = stat.S_ISBLK(kind)
    alone = os.O_EXCL if is_device and not read_only else 0
    fd = _open(path, (os.O_RDONLY if read_only else os.O_RDWR) | alone)
    beneath: int | None = None
    try:
        _lock(fd, path, shared=read_only)
        if is_device and (file := file_under(path)) is not None:
            beneath = _open(file, os.O_RDONLY)
            _lock(beneath, file, shared=read_only)
        try:
            held = os.lseek(fd, 0, os.SEEK_END)
        except OSError as error:
            raise _refused(path, error) from error
        if size is not None and held < size:
            raise invalid(
                f"{path} has {format_size(held)}, but at least {format_size(size)} are needed: "
                "make it larger"
            )
        if size is None and (held == 0 or held % SECTOR):
            raise invalid(f"{path} has {held} bytes, which is not a positive multiple of {SECTOR}")
        return BackingUnit(
            fd,
            str(path),
            held if size is None else size,
            is_device=is_device,
            beneath=beneath,
        )
    except BaseException:
        if beneath is not None:
            os.close(beneath)
        os.close(fd)
        raise


def file_under(device: Path) -> Path | None:
    """The file that the loop device `device` is attached to; None if it is no loop device, or that
    file cannot be found by its name. It is the same bytes by another name."""
    try:
        number = device.stat().st_rdev
        place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/loop/backing_file")
        file = Path(os.fsdecode(place.read_bytes().removesuffix(b"\n")))
        return file if file.is_file() or file.is_block_device() else None
    except OSError:
        return None


def _is_to_be_created(path: Path) -> bool:
    """Not there; or an empty file, which is what a death half-way through creating one leaves."""
    try:
        found = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == 0


def _create(path: Path, size: int) -> BackingUnit:
    fd = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        _lock(fd, path)
        os.ftruncate(fd, size)
        os.fsync(fd)  # the command that creates it is durable when it returns
        _sync_directory(path.parent)
        return BackingUnit(fd, str(path), size, is_device=False, created=True)
    except BaseException as error:
        os.close(fd)
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _refused(path, error) from error
        raise


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open(path: Path, flags: int) -> int:
    try:
        return open_alone(path, flags)
    except OSError as error:
        raise _refused(path, error) from error


def open_alone(path: Path, flags: int) -> int:
    """Open a file, or a block device that is not mounted. Raises OSError, EBUSY for one that is.

    Who opens a device with O_EXCL has it alone among those that do. For reading only it is asked
    for, and let go again, since several may read at the same time.
    """
    flags |= os.O_CLOEXEC
    if path.is_block_device():
        if flags & os.O_ACCMODE == os.O_RDONLY:
            os.close(os.open(path, flags | os.O_EXCL))
        else:
            flags |= os.O_EXCL
    return os.open(path, flags, 0o600)


def _lock(fd: int, path: Path, *, shared: bool = False) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy(
            f"{path} is in use: by a group or a clone of this mount or another, or as a metadata "
            f"volume"
        ) from None
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> ClonefsError:
    match error.errno:
        case errno.ENOENT:
            return missing(f"{path} cannot be created: its directory does not exist")
        case errno.EBUSY:
            return busy(f"{path} is in use: it is mounted, or part of another device")
        case _:
            return ClonefsError(
                error.errno or errno.EIO, f"{path} cannot be opened: {error.strerror}"
            )
