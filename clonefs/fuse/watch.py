"""Who waits in poll(2) for a control file to change, and who wakes them.

The kernel asks what is ready, and leaves a handle by which it can be told to ask again. A change of
state is looked for as soon as it is said; everything else that files show (progress, counts, reasons)
every INTERVAL, and only while somebody waits. What the looking costs is bounded to a tenth of the time.
"""

import contextlib
from dataclasses import dataclass

import trio
from pyfuse3 import PollHandle

from clonefs.fuse.contents import Changed

INTERVAL = 0.1  # seconds
SHARE = 10  # of so many parts of the time one at most goes into looking


@dataclass(frozen=True, slots=True)
class _Waiting:
    handle: PollHandle
    changed: Changed


class Watch:
    """The descriptors for which the kernel has left a handle, by the numbers of their files."""

    def __init__(self) -> None:
        self._waiting: dict[int, _Waiting] = {}
        self._stirred = trio.Event()

    def wait_for(self, file: int, handle: PollHandle, changed: Changed) -> None:
        """Tell the kernel by `handle` as soon as `changed`. A handle is used once; a later one of
        the same file takes the place of the one before."""
        if not self._waiting:
            self._stirred.set()
        self._waiting[file] = _Waiting(handle, changed)

    def forget(self, file: int) -> None:
        """The file has been closed."""
        self._waiting.pop(file, None)

    def stir(self) -> None:
        """The state of something has changed."""
        self._stirred.set()

    async def run(self) -> None:
        """Look, tell, and wait, until cancelled; no handle is used after that."""
        try:
            while True:
                await self._pause()
                started = trio.current_time()
                self._look()
                await trio.sleep((trio.current_time() - started) * (SHARE - 1))
        finally:
            self._waiting.clear()

    async def _pause(self) -> None:
        with trio.move_on_after(INTERVAL) if self._waiting else contextlib.nullcontext():
            await self._stirred.wait()
        self._stirred = trio.Event()

    def _look(self) -> None:
        for file, waiting in list(self._waiting.items()):
            if waiting.changed():
                del self._waiting[file]
                with contextlib.suppress(OSError):  # the file has been closed meanwhile
                    waiting.handle.notify()
