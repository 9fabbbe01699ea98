"""Reads that wait for the disk without a thread each: io_uring(7), as much of it as that takes.

A read of what the page cache does not have costs a thread ten times what the same read of cached bytes
costs, most of it for handing it there and back. A ring costs about as much as a cached read.

There are two rings for an event loop, each made for the first read that needs it: one for what is on
local disks, and one for file systems that ask somebody, who may never answer. There each read keeps a
worker of the kernel, and a place in the ring, until it is answered; so there are as many workers as
places, and the others have a ring of their own. Where the kernel has none or does not allow it (sysctl
kernel.io_uring_disabled, a container), or it is full, `read` says so, and threads do the same.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from dataclasses import dataclass

import outcome
import trio
from trio.lowlevel import Abort, RunVar, Task, current_task, reschedule, wait_task_rescheduled

ENTRIES = 256
"""Reads under way at once; a few pages of memory in the kernel."""

_SETUP, _ENTER, _REGISTER = 425, 426, 427  # the same on every architecture
_REGISTER_EVENTFD = 4
_REGISTER_IOWQ_MAX_WORKERS = 19
_ASYNC = 1 << 4  # a flag of an entry: not even a try in the call that submits it
_SQES_OFFSET = 0x10000000
_SINGLE_MMAP = 1  # struct io_uring_params.features
_OP_READ = 22
_PARAMS = struct.Struct("20x I 16x 10I 10I")  # features; sq_off; cq_off
_ENTRIES = struct.Struct("2I")
_SQE = struct.Struct("<B B H i Q Q I I Q 24x")
_CQE = struct.Struct("<Q i I")

_NOT_IN_THIS_WAY = (
    *(errno.EAGAIN, errno.EINTR, errno.ECANCELED),
    *(errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOMEM, errno.EPERM),
)

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 7


@dataclass(eq=False, slots=True)
class _Read:
    """One that is under way. The kernel writes to `buffer` until it has a `result`."""

    buffer: ctypes.c_char
    result: int | None = None
    task: Task | None = None


class Ring:
    """`local`: for what is on local disks. Raises OSError where the kernel does not give one."""

    def __init__(self, *, local: bool) -> None:
        self._flags = 0 if local else _ASYNC
        params = ctypes.create_string_buffer(120)
        self._fd = _call(_SETUP, ENTRIES, ctypes.addressof(params))
        self._done = -1
        try:
            self._map(params.raw)
            self._done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            number = ctypes.c_int(self._done)
            _call(_REGISTER, self._fd, _REGISTER_EVENTFD, ctypes.addressof(number), 1)
            if not local:
                # The rings have them in common, and the other one may need some now and then.
                self.limit_workers((ctypes.c_uint * 2)(2 * ENTRIES, 0))
        except BaseException:
            self._close()
            raise
        self._reads: dict[int, _Read] = {}
        self._next = 0

    def limit_workers(self, most: "ctypes.Array[ctypes.c_uint]") -> None:
        """Let the kernel have at most so many workers for reads of files and of anything else; 0 is what
        it has. Gets what it had before."""
        address = ctypes.addressof(most)
        _call(_REGISTER, self._fd, _REGISTER_IOWQ_MAX_WORKERS, address, len(most))

    def _map(self, params: bytes) -> None:
        sq_entries, cq_entries = _ENTRIES.unpack_from(params)
        features, *offsets = _PARAMS.unpack(params)
        if not features & _SINGLE_MMAP:
            raise OSError("this kernel's io_uring is too old")
        sq, cq = offsets[:10], offsets[10:]
        length = max(sq[6] + 4 * sq_entries, cq[5] + _CQE.size * cq_entries)
        rings = mmap.mmap(self._fd, length)
        words = memoryview(rings).cast("I")
        self._sqes = mmap.mmap(self._fd, _SQE.size * sq_entries, offset=_SQES_OFFSET)
        self._words, self._rings = words, rings
        self._sq_tail, self._cq_head, self._cq_tail = sq[1] // 4, cq[0] // 4, cq[1] // 4
        self._sq_mask, self._cq_mask = words[sq[2] // 4], words[cq[2] // 4]
        self._cqes = cq[5]
        for index in range(sq_entries):  # the entry of a slot is always the one of the same number
            words[sq[6] // 4 + index] = index

    async def read(self, fd: int, offset: int, data: bytearray) -> bool:
        """Fill `data` from the file `fd`, at `offset` (bytes); False if that was not possible in this
        way, or there is less. Raises OSError. Not to be cancelled, since the kernel writes to `data`
        until it is done."""
        if len(self._reads) >= ENTRIES:
            return False
        read = _Read(ctypes.c_char.from_buffer(data))
        if not self._submit(read, fd, offset, len(data)):
            return False
        self._reap()
        if read.result is None:
            read.task = current_task()
            await wait_task_rescheduled(lambda _: Abort.FAILED)
        assert read.result is not None
        if read.result < 0 and -read.result not in _NOT_IN_THIS_WAY:
            raise OSError(-read.result, os.strerror(-read.result))
        return read.result == len(data)

    def _submit(self, read: _Read, fd: int, offset: int, length: int) -> bool:
        number = self._next
        address = ctypes.addressof(read.buffer)
        tail = self._words[self._sq_tail]
        slot = tail & self._sq_mask
        entry = (_OP_READ, self._flags, 0, fd, offset, address, length, 0, number)
        _SQE.pack_into(self._sqes, slot * _SQE.size, *entry)
        self._reads[number] = read
        self._words[self._sq_tail] = (tail + 1) & 0xFFFFFFFF
        if _syscall(_ENTER, self._fd, 1, 0, 0, 0, 0) != 1:
            self._words[self._sq_tail] = tail  # the kernel has not taken it
            del self._reads[number]
            return False
        self._next += 1
        return True

    async def reap(self) -> None:
        """Wake whoever waits for a read that is done; for as long as the event loop runs."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._done)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._done)
                self._reap()
        finally:
            self._close()

    def _reap(self) -> None:
        head = self._words[self._cq_head]
        while head != self._words[self._cq_tail]:
            at = self._cqes + (head & self._cq_mask) * _CQE.size
            number, result, _ = _CQE.unpack_from(self._rings, at)
            head = (head + 1) & 0xFFFFFFFF
            self._words[self._cq_head] = head
            read = self._reads.pop(number)
            read.result = result
            if read.task is not None:
                reschedule(read.task, outcome.Value(None))

    def _close(self) -> None:
        for fd in (self._fd, self._done):
            if fd >= 0:
                os.close(fd)


_LOCAL: RunVar[Ring | None] = RunVar("clonefs.units.ring local")
_REMOTE: RunVar[Ring | None] = RunVar("clonefs.units.ring remote")


def ring(*, local: bool) -> Ring | None:
    """The ring of this event loop for what is on local disks, or the other one; None where the kernel
    gives none."""
    held = _LOCAL if local else _REMOTE
    with contextlib.suppress(LookupError):
        return held.get()
    made: Ring | None = None
    with contextlib.suppress(OSError):
        made = Ring(local=local)
        trio.lowlevel.spawn_system_task(made.reap)
    held.set(made)
    return made


def _call(number: int, *arguments: int) -> int:
    result: int = _syscall(number, *arguments, *[0] * (6 - len(arguments)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
