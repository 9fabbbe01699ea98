"""Extent maps: one bit for each extent of an LU.

An ExtentMap does not own its bits: they may be pages of the metadata volume that are mapped shared,
so that a bit that was set outlives the daemon. It must therefore change bits one way only, by plain
stores in program order, and keep nothing beside them but what can be counted again.

Large maps are mostly clear. Pieces of them that are may rest: they take no memory and read as zeros, and
are woken before a bit of them is set.

Invariants: no bit at or after `extents` is ever set; `count` is the number of bits that are set; nothing
is ever stored to a piece that rests.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from bitarray import bitarray, frozenbitarray
from bitarray.util import count_and

_SHORT = 1 << 15  # extents; which of them rest is not asked


class Run(NamedTuple):
    """The extents [first, stop)."""

    first: int
    stop: int


class Pieces(Protocol):
    """What lies under a map, in pieces of `size` extents."""

    size: int

    def rest(self, piece: int) -> None:
        """It is clear, also on stable storage: it takes no memory from now on."""

    def wake(self, piece: int) -> None:
        """It can be stored to again. Raises ClonefsError (EIO): then it cannot."""


class ExtentMap:
    """A map of `extents` extents over the little-endian bits of `bits` (at least as many). `pieces` is
    what lies under them, if they can rest; those of them in `resting` do."""

    __slots__ = ("_pieces", "_size", "_watched", "bits", "count", "extents")

    def __init__(
        self,
        bits: bitarray,
        extents: int,
        pieces: Pieces | None = None,
        resting: Iterable[int] = (),
    ) -> None:
        if len(bits) < extents:
            raise ValueError(f"{len(bits)} bits are too few for {extents} extents")
        self.bits = bits
        self.extents = extents
        self._pieces = pieces
        self._size = pieces.size if pieces is not None else max(1, extents)
        # Pieces that are clear: True for one that rests, False for one that is going to.
        self._watched = dict.fromkeys(resting, True)
        self.count = sum(bits.count(1, *part) for part in self._awake(0, extents))

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
                if self._watched and first // self._size in self._watched:
                    self._touch(first, stop)
                bits[first] = 1
                self.count += 1
        else:
            if self._watched:
                self._touch(first, stop)
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
            if not self._watched:
                bits[first:stop] = 0
            else:
                for low, high in self._awake(first, stop):
                    bits[low:high] = 0

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
            self._take_from(other.bits)

    def fill_from(self, bits: bitarray) -> None:
        """Become equal to `bits`, which are as many as there are extents."""
        self.clear_all()
        self._take_from(bits)

    def _take_from(self, bits: bitarray) -> None:
        for first, stop in self._parts(0, self.extents):
            if bits.find(1, first, stop) >= 0:
                if self._watched:
                    self._touch(first, stop)
                self.count -= self.bits.count(1, first, stop)
                self.bits[first:stop] |= bits[first:stop]
                self.count += self.bits.count(1, first, stop)

    def count_common(self, other: "ExtentMap") -> int:
        """How many bits are set here and in `other`, a map of as many extents."""
        if not self.count or not other.count:
            return 0
        return count_and(self.bits, other.bits)

    def next_set(self, start: int, stop: int) -> int:
        """The first extent of [start, stop) whose bit is set, or -1."""
        if not self._watched or stop - start <= _SHORT:
            return self.bits.find(1, start, stop)
        for part in self._awake(start, stop):
            found = self.bits.find(1, *part)
            if found >= 0:
                return found
        return -1

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
        copy._pieces, copy._watched, copy._size = None, {}, max(1, self.extents)
        return copy

    def release(self) -> None:
        """Let go of the bits, so that the pages under them can be unmapped."""
        self.bits = bitarray()
        self.extents = self.count = 0
        self._pieces, self._watched = None, {}

    # Pieces that rest

    def begin_rest(self) -> bool:
        """Whether there are pieces that are clear and do not rest yet. Those that are still clear, and
        have been all the time, when `end_rest` is called, are going to: until then all that was stored
        to them before has to be brought to stable storage."""
        if self._pieces is None:
            return False
        for piece, part in enumerate(self._parts(0, self.extents)):
            if piece not in self._watched and self.bits.find(1, *part) < 0:
                self._watched[piece] = False
        return not all(self._watched.values())

    def end_rest(self, *, flushed: bool) -> None:
        """All that was stored before `begin_rest` is on stable storage, or nobody knows."""
        for piece in [each for each, rests in self._watched.items() if not rests]:
            del self._watched[piece]
            if flushed and self._pieces is not None:
                self._pieces.rest(piece)
                self._watched[piece] = True

    def _touch(self, first: int, stop: int) -> None:
        """Bits of [first, stop) are about to be set."""
        for piece in range(first // self._size, (stop - 1) // self._size + 1):
            if piece in self._watched:
                if self._watched[piece] and self._pieces is not None:
                    self._pieces.wake(piece)
                del self._watched[piece]

    def _parts(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """[first, stop) in parts that each lie within a piece."""
        while first < stop:
            end = min(stop, (first // self._size + 1) * self._size)
            yield first, end
            first = end

    def _awake(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """[first, stop) without what rests."""
        for low, high in self._parts(first, stop):
            if not self._watched.get(low // self._size):
                yield low, high


def run_text(first: int, stop: int) -> str:
    """The extents [first, stop) as an extent list has them: `4-7`, or `9`."""
    return str(first) if stop - first == 1 else f"{first}-{stop - 1}"


def extent_list(extents: ExtentMap) -> str:
    """The map in the kernel's cpulist form, `0,4-7,9`; empty for an empty map."""
    return ",".join(run_text(*run) for run in extents.runs())
