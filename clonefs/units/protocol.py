"""The interface between the engines and storage."""

from collections.abc import Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class LogicalUnit(Protocol):
    """`size` bytes that can be read, written, flushed and copied.

    A unit does no synchronisation: who may touch which bytes when is decided by its callers. All
    offsets and lengths are bytes, and lie within the unit. Failures raise ClonefsError with the
    errno of the device and a sentence that names the backing.

    The `..._now` calls never wait: they do the work at once in the caller's step, or say that it
    would have to wait, and then nothing has happened.
    """

    size: int
    name: str
    sparse: bool  # whether it can have holes; if not, a hole is copied as zeros

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """`length` bytes from `offset`, or None if that would have to wait."""

    async def read(self, offset: int, length: int) -> Buffer:
        """`length` bytes from `offset`."""

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Write `data` at `offset`; False, and nothing written, if that would have to wait."""

    async def write(self, offset: int, data: Buffer) -> None:
        """Write `data` at `offset`. After a failure any part of it may have been written."""

    async def copy_from(
        self, origin: "LogicalUnit", ranges: Sequence[tuple[int, int]], *, share: bool
    ) -> int:
        """Make `ranges` (offset, length) equal to those of `origin`; holes stay holes. `share`: on a
        file system that can do it both may have the same blocks until one of them is written to.

        Returns how many of them, from the first on, have been copied: all, or those before one that
        failed. Raises only if the first fails; after a failure any part of a range may have been copied.
        """

    async def flush(self) -> None:
        """All that was written before this call began is on stable storage when it returns.

        Once a flush has failed, every later one fails too (rule D10): the kernel has dropped what it
        could not write, and a success would be a lie.
        """

    async def forget_cached(self) -> None:
        """What is read from now on is what the device has, and not what somebody has written whose flush
        failed. Flushes first; raises like that."""

    async def data_from(self, offset: int) -> int:
        """The first byte at or after `offset` that may differ from zero, or `size`.

        A hint that lets a copier pass over holes: a host may write into a hole right after.
        """

    def allocated(self) -> int:
        """How many bytes the backing really holds."""

    def stamp(self) -> str | None:
        """What `set_stamp` has left with the backing last, in this life or an earlier one; None if
        there is nothing, or no place for it."""

    def set_stamp(self, stamp: str, *, durable: bool) -> None:
        """Leave a short text with the backing, beside its bytes; `durable`: on stable storage. May
        block. Where there is no place for it, or that fails, the one before stays."""

    def modified(self) -> float | None:
        """When the backing was last written to, in seconds since the epoch; None if nobody knows."""

    def close(self) -> None:
        """Let go of the backing. Nothing may be under way."""

    def discard(self) -> None:
        """Close, and remove the backing if opening created it: a command that fails changes
        nothing."""
