"""What an open control file shows: text, a long one in pieces, or the log of events.

All of it is the state at the moment of open; only the log grows. A descriptor that poll(2) has told
of a change shows the new text when it is read again from its beginning.

Nothing here may hold up the event loop for long: an extent list of millions of runs, or the metrics of
thousands of clones, are written piece by piece as they are read, from a snapshot, and other requests go
on between the pieces.
"""

import errno
import mmap
import os
import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import trio
from bitarray import bitarray

from clonefs.errors import ClonefsError
from clonefs.extents import run_text

READABLE = select.POLLIN | select.POLLRDNORM
WRITABLE = select.POLLOUT | select.POLLWRNORM
CHANGED = select.POLLPRI | select.POLLERR  # as sysfs says it

EVENTS_KEPT = 1 << 20  # bytes of the log that are kept at least
RUNS_AT_ONCE = 512  # of an extent list: about half a millisecond
EXTENTS_AT_ONCE = 1 << 24  # that are looked through at once: about a tenth of one
COPIED_AT_ONCE = 1 << 17  # bytes of a map; above, its copy gets its pages in a thread first

Changed = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Readiness:
    """The events of poll(2), and what tells whether there is something new since."""

    events: int
    changed: Changed | None = None


class Content(Protocol):
    """What one descriptor reads."""

    async def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; none at the end. Raises ClonefsError (ENOENT) for what
        has been removed since."""

    def poll(self) -> Readiness:
        """What poll(2) is told now."""


def _all(text: str) -> str:
    return text


class Text:
    """A text that `show` gives, None once its group or clone is gone. It has changed when what
    `telling` makes of it has."""

    def __init__(
        self, show: Callable[[], str | None], telling: Callable[[str], str] = _all
    ) -> None:
        self._show = show
        self._telling = telling
        self._text = show()
        self._stale = False

    async def read(self, offset: int, size: int) -> bytes:
        if self._stale and offset == 0:
            self._text = self._show()
            self._stale = False
        if self._text is None:
            raise ClonefsError(errno.ENOENT, "it has been removed")
        return encoded(self._text)[offset : offset + size]

    def poll(self) -> Readiness:
        now = self._told()
        if now != self._tell(self._text):
            self._stale = True
        return Readiness(READABLE | (CHANGED if self._stale else 0), lambda: self._told() != now)

    def _told(self) -> str | None:
        return self._tell(self._show())

    def _tell(self, text: str | None) -> str | None:
        return None if text is None else self._telling(text)


def encoded(text: str) -> bytes:
    """A path may have bytes that are no text."""
    return text.encode(errors="surrogateescape")


# Extent lists, and whatever else is long


async def snapshot(bits: bitarray) -> bitarray:
    """`bits` as they are when this returns. The loop stands still for one copy in memory."""
    if bits.nbytes <= COPIED_AT_ONCE:
        return bits.copy()
    pages = mmap.mmap(-1, bits.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    await trio.to_thread.run_sync(_populate, pages)
    copy = bitarray(buffer=pages, endian="little")
    copy[: len(bits)] = bits
    return copy


def _populate(pages: mmap.mmap) -> None:
    """Most of the time that a copy takes goes into new pages; the kernel makes them here."""
    fd = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.preadv(fd, (pages,), 0)
    finally:
        os.close(fd)


def cpulist(bits: bitarray, extents: int) -> Iterator[bytes]:
    """The first `extents` of a map in the kernel's cpulist form, some runs at a time."""
    at, comma = 0, ""
    while at < extents:
        text, at = _some_runs(bits, at, extents, comma)
        comma = "," if text else comma
        yield text.encode()
    yield b"\n"


def _some_runs(bits: bitarray, at: int, extents: int, comma: str) -> tuple[str, int]:
    """The next runs from extent `at` on, and the first extent that has not been looked at."""
    text = ""
    stop_looking = min(at + EXTENTS_AT_ONCE, extents)
    for _ in range(RUNS_AT_ONCE):
        first = bits.find(1, at, stop_looking)
        if first < 0:
            return text, stop_looking
        stop = bits.find(0, first, extents)
        at = extents if stop < 0 else stop
        text += f"{comma}{run_text(first, at)}"
        comma = ","
        if at >= stop_looking:
            break
    return text, at


class Pieces:
    """A text of any length that is written piece by piece as it is read. `begin` gives the pieces
    from the first one on, the same each time.

    `_text` are the bytes from `_start` on that have been written and may be asked for.
    """

    def __init__(self, begin: Callable[[], Iterator[bytes]]) -> None:
        self._begin = begin
        self._reading = trio.Lock()
        self._begin_again()

    def _begin_again(self) -> None:
        self._start = 0
        self._text = bytearray()
        self._pieces: Iterator[bytes] | None = self._begin()

    async def read(self, offset: int, size: int) -> bytes:
        async with self._reading:
            if offset < self._start:
                self._begin_again()
            while self._pieces and self._start + len(self._text) < offset + size:
                self._write_more()
                self._drop_before(offset)
                await trio.lowlevel.checkpoint()
            self._drop_before(offset)
            return bytes(self._text[offset - self._start : offset - self._start + size])

    def _write_more(self) -> None:
        assert self._pieces is not None
        piece = next(self._pieces, None)
        if piece is None:
            self._pieces = None
        else:
            self._text += piece

    def _drop_before(self, offset: int) -> None:
        drop = min(offset - self._start, len(self._text))
        del self._text[:drop]
        self._start += drop

    def poll(self) -> Readiness:
        return Readiness(READABLE)


# The log of events


class EventLog:
    """Lines, of which the last `kept` bytes are there at least. Offsets count from the first line
    that ever was, so that the size only grows: tail -f would take a smaller one for a new file."""

    def __init__(self, kept: int = EVENTS_KEPT) -> None:
        self._kept = kept
        self._text = bytearray()
        self.start = 0

    @property
    def end(self) -> int:
        """The offset at which the next line will be."""
        return self.start + len(self._text)

    def append(self, line: str) -> None:
        """Add a line, and drop the oldest ones now and then."""
        self._text += encoded(f"{line}\n")
        if len(self._text) > 2 * self._kept:
            drop = self._text.rindex(b"\n", 0, len(self._text) - self._kept) + 1
            del self._text[:drop]
            self.start += drop

    def piece(self, offset: int, size: int) -> bytes:
        """Bytes from `offset`, which is not before `start`."""
        return bytes(self._text[offset - self.start : offset - self.start + size])


class EventReader:
    """The log as one descriptor reads it.

    Who reads from the beginning gets what is still there, as if the rest had never been: `_skipped`
    is how much that is. Who comes from the end and goes back too far, as tail -n does, finds empty
    lines.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._skipped = 0
        self._next = 0  # where a reader that goes on would read

    async def read(self, offset: int, size: int) -> bytes:
        log = self._log
        missing = log.start - (offset + self._skipped)
        if missing > 0 and offset not in (0, self._next):
            return b"\n" * min(size, missing)
        self._skipped += max(0, missing)
        piece = log.piece(offset + self._skipped, size)
        self._next = offset + len(piece)
        return piece

    def poll(self) -> Readiness:
        end = self._log.end
        unread = self._next + self._skipped < end
        return Readiness(READABLE | CHANGED if unread else 0, lambda: self._log.end != end)
