"""Extent maps: one bit for each extent of an LU.

An ExtentMap does not own its bits: they may be pages of the metadata volume that are mapped shared,
so that a bit that was set outlives the daemon. It must therefore change bits one way only, by plain
stores in program order, and keep nothing beside them but what can be counted again.

Invariants: no bit at or after `extents` is ever set; `count` is the number of bits that are set.
"""

from collections.abc import Iterator
from typing import NamedTuple

from bitarray import bitarray, frozenbitarray
from bitarray.util import count_and


class Run(NamedTuple):
    """The extents [first, stop)."""

    first: int
    stop: int


class ExtentMap:
    """A map of `extents` extents over the little-endian bits of `bits` (at least as many)."""

    __slots__ = ("bits", "count", "extents")

    def __init__(self, bits: bitarray, extents: int) -> None:
        if len(bits) < extents:
            raise ValueError(f"{len(bits)} bits are too few for {extents} extents")
        self.bits = bits
        self.extents = extents
        self.count = bits.count(1, 0, extents)

    @classmethod
    def empty(cls, extents: int) -> "ExtentMap":
        """A map in memory of its own, all clear."""
        return cls(bitarray(extents, endian="little"), extents)

    def __getitem__(self, extent: int) -> int:
        return self.bits[extent]

    def mark(self, first: int, stop: int) -> None:
        """Set the bits of [first, stop)."""
        bits = self.bits
        if stop - first == 1:
            if not bits[first]:
                bits[first] = 1
                self.count += 1
        else:
            self.count += stop - first - bits.count(1, first, stop)
            bits[first:stop] = 1

    def clear(self, first: int, stop: int) -> None:
        """Clear the bits of [first, stop)."""
        bits = self.bits
        if stop - first == 1:
            if bits[first]:
                bits[first] = 0
                self.count -= 1
        else:
            self.count -= bits.count(1, first, stop)
            bits[first:stop] = 0

    def mark_all(self) -> None:
        """Set every bit."""
        self.mark(0, self.extents)

    def clear_all(self) -> None:
        """Clear every bit."""
        if self.count:
            self.clear(0, self.extents)

    def mark_from(self, other: "ExtentMap") -> None:
        """Set each bit that is set in `other`, a map of as many extents."""
        if other.count:
            self.bits |= other.bits
            self.count = self.bits.count(1, 0, self.extents)

    def fill_from(self, bits: bitarray) -> None:
        """Become equal to `bits`, which are as many as there are extents."""
        self.bits[: self.extents] = bits
        self.count = self.bits.count(1, 0, self.extents)

    def count_common(self, other: "ExtentMap") -> int:
        """How many bits are set here and in `other`, a map of as many extents."""
        if not self.count or not other.count:
            return 0
        return count_and(self.bits, other.bits)

    def next_set(self, start: int, stop: int) -> int:
        """The first extent of [start, stop) whose bit is set, or -1."""
        return self.bits.find(1, start, stop)

    def next_clear(self, start: int, stop: int) -> int:
        """The first extent of [start, stop) whose bit is clear, or `stop`."""
        found = self.bits.find(0, start, stop)
        return stop if found < 0 else found

    def runs(self) -> Iterator[Run]:
        """The runs of set bits, in order."""
        first = self.next_set(0, self.extents)
        while first >= 0:
            stop = self.next_clear(first, self.extents)
            yield Run(first, stop)
            first = self.next_set(stop, self.extents)

    def snapshot(self) -> "ExtentMap":
        """A copy in memory that changes no more."""
        copy = ExtentMap.__new__(ExtentMap)
        copy.bits, copy.extents, copy.count = frozenbitarray(self.bits), self.extents, self.count
        return copy

    def release(self) -> None:
        """Let go of the bits, so that the pages under them can be unmapped."""
        self.bits = bitarray()
        self.extents = self.count = 0


def run_text(first: int, stop: int) -> str:
    """The extents [first, stop) as an extent list has them: `4-7`, or `9`."""
    return str(first) if stop - first == 1 else f"{first}-{stop - 1}"


def extent_list(extents: ExtentMap) -> str:
    """The map in the kernel's cpulist form, `0,4-7,9`; empty for an empty map."""
    return ",".join(run_text(*run) for run in extents.runs())
