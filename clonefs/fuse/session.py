"""Who reads the kernel's requests: pyfuse3's workers, one of them at a time.

pyfuse3 asks trio to wait for the FUSE descriptor before each request, and hands the wait to another
worker after each; under load that is most of what a small request costs. Here one worker has the
descriptor, reads request after request as long as there are any, and keeps it while it waits for
more. It passes the descriptor on only when its handler has to wait for something.

Invariants: at most one worker has the descriptor, and nobody else reads from it, since a read with
nothing to read would stop the whole mount; a worker whose handler waits does not have it; every
SLICE the other tasks get their turn.

pyfuse3 has no interface for this. What is used of its inside is looked at first (`_fits`), and where
it does not fit its own loop is used, which is slower and otherwise the same.
"""

import contextlib
import logging
import select
import time
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pyfuse3
import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from clonefs.engines import AFTERWARDS

log = logging.getLogger(__name__)

# A request that waits (for a copy, or while a group is held) takes one of these; the others go on.
WORKERS = 1000
IDLE_WORKERS = 64
SLICE = 0.00025  # seconds
# To go to sleep and be woken takes longer than many a host needs from one request to the next. So the
# reader looks for the next one for a moment, if the last one came soon.
LINGER = 0.00005  # seconds
SOON = 2 * LINGER

_DEVICE = Path("/dev/fuse")


class _Inside(Protocol):
    """What is used of pyfuse3's inside: a worker, which waits for the descriptor with the second,
    reads one request, and answers it; again and again until that says False."""

    async def _session_loop(
        self, nursery: trio.Nursery, min_tasks: int, max_tasks: int
    ) -> None: ...

    async def _wait_fuse_readable(self) -> bool: ...


_inside: Any = pyfuse3


class Session:
    """The requests of one mount. Make it before pyfuse3.init."""

    def __init__(self) -> None:
        self._before = _descriptors()
        self._workers: Workers | None = None

    async def serve(self) -> None:
        """Answer requests until the file system is unmounted, or `end` is called."""
        opened = _descriptors() - self._before
        if len(opened) == 1 and _fits():
            self._workers = Workers(opened.pop())
            AFTERWARDS.set(self._workers.afterwards)
            with self._workers.in_place():
                await pyfuse3.main(min_tasks=1, max_tasks=1)
        else:
            log.warning("this pyfuse3 is not known: requests are read in its own, slower way")
            await pyfuse3.main(min_tasks=IDLE_WORKERS, max_tasks=WORKERS)

    def end(self) -> None:
        """Let `serve` return once the requests that are being answered are."""
        if self._workers is not None:
            self._workers.end()
        pyfuse3.terminate()


class Workers:
    """pyfuse3's workers over the FUSE descriptor `fd`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        self._poll = poller.poll
        self._loop = _inside._session_loop
        self._nursery: trio.Nursery | None = None
        self._count = 0
        self._idle: list[Task] = []
        self._reader: Task | None = None  # who has the descriptor
        self._running: Task | None = None  # who runs now
        self._waiting = False  # whether the reader waits for the descriptor
        self._slice_end = 0.0
        self._soon = False  # whether the last request came soon
        self._ended = False
        self._due: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """pyfuse3 works with these workers, within the body."""
        plain = _inside._session_loop, _inside._wait_fuse_readable
        _inside._session_loop, _inside._wait_fuse_readable = self.work, self.wait
        try:
            yield
        finally:
            _inside._session_loop, _inside._wait_fuse_readable = plain

    def afterwards(self, work: Callable[[], None]) -> None:
        """Do `work` when the request that is being answered in this step has its answer."""
        self._due.append(work)

    def end(self) -> None:
        """Whoever waits for requests ends."""
        self._ended = True
        while self._idle:
            reschedule(self._idle.pop())

    async def work(self, nursery: trio.Nursery, min_tasks: int, max_tasks: int) -> None:
        """One worker, from its first request to its last."""
        self._nursery = nursery
        self._count += 1
        task = current_task()
        try:
            await self._watched(task, self._loop(nursery, min_tasks, max_tasks))
        finally:
            self._count -= 1
            if self._reader is task:  # unmounted, or an exception: nobody reads any more
                self._reader = None
                self.end()

    @types.coroutine
    def _watched(self, task: Task, loop: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        """Run `loop`, and see when it waits, be it wherever it may in a handler."""
        resume, value = loop.send, None
        while True:
            self._running = task
            try:
                wanted = resume(value)
            except StopIteration:
                return
            if self._reader is task and not self._waiting:
                self._pass_on()
            try:
                resume, value = loop.send, (yield wanted)
            except BaseException as error:
                resume, value = loop.throw, error

    def _pass_on(self) -> None:
        """The reader's handler waits: another worker reads on."""
        assert self._nursery is not None
        self._reader = None
        if self._idle:
            self._reader = self._idle.pop()
            reschedule(self._reader)
        elif self._count < WORKERS and not self._ended:
            self._nursery.start_soon(self.work, self._nursery, 1, 1)

    async def wait(self) -> bool:
        """Wait until the worker that runs can read a request; False: it is to end."""
        assert self._running is not None
        while self._due:
            self._due.pop()()
        if self._reader is not self._running and not await self._take(self._running):
            return False
        while not self._ended:
            # Even after trio has said so: whoever has sent a request may have been killed since.
            readable = self._poll(0) or self._linger()
            now = time.monotonic()
            if readable and now < self._slice_end:
                return True
            self._waiting = True
            try:
                if readable:
                    await trio.lowlevel.checkpoint()
                else:
                    await trio.lowlevel.wait_readable(self._fd)
            except trio.ClosedResourceError:  # by pyfuse3.terminate
                return False
            finally:
                self._waiting = False
            woken = time.monotonic()
            self._soon = woken - now < SOON
            self._slice_end = woken + SLICE
        return False

    def _linger(self) -> bool:
        """Whether a request comes in a moment."""
        until = time.monotonic() + LINGER if self._soon else 0.0
        while time.monotonic() < until:
            if self._poll(0):
                return True
        return False

    async def _take(self, task: Task) -> bool:
        """Wait until the descriptor is passed on to this worker; False: it is not needed."""
        if self._reader is None:
            self._reader = task
        elif len(self._idle) >= IDLE_WORKERS:
            return False
        else:
            self._idle.append(task)
            await wait_task_rescheduled(lambda _: self._leave(task))
        return self._reader is task

    def _leave(self, task: Task) -> Abort:
        self._idle.remove(task)
        return Abort.SUCCEEDED


def _fits() -> bool:
    """Whether pyfuse3 is as it is known here."""
    return pyfuse3.__version__.startswith("3.") and all(
        callable(getattr(_inside, name, None)) for name in ("_session_loop", "_wait_fuse_readable")
    )


def _descriptors() -> set[int]:
    """Open descriptors of the FUSE device."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if entry.readlink() == _DEVICE:
                found.add(int(entry.name))
    return found
