"""Host writes to mirrored extents that are under way (rule L2).

Such a write sets D[c] before the first of its two writes and clears it after both have returned,
unless it was set before. Two writes may share an extent: the last one to end clears the bit, and
only if none of them, nor anybody else, has found a reason to keep it.

Overlapping writes are serialised: both sides must see the same order.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Extent:
    writes: int = 0
    keep: set[str] = field(default_factory=set)


class WritesInFlight:
    """The mirrored writes of one Clone Group that have begun and not ended."""

    __slots__ = ("_extents", "_ranges")

    def __init__(self) -> None:
        self._extents: dict[int, _Extent] = {}
        self._ranges: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._ranges)

    def overlaps(self, offset: int, end: int) -> bool:
        """Whether a write that is under way touches a byte of [offset, end)."""
        return any(start < end and offset < stop for start, stop in self._ranges)

    def first_in(self, first: int, stop: int) -> int:
        """The lowest extent of [first, stop) that is being written to, or `stop`."""
        return min((e for e in self._extents if first <= e < stop), default=stop)

    def begin(self, offset: int, end: int, first: int, stop: int) -> list[int]:
        """Note a write to bytes [offset, end), extents [first, stop).

        Returns those of the extents that no other write that is under way touches.
        """
        self._ranges.append((offset, end))
        fresh = [e for e in range(first, stop) if e not in self._extents]
        for e in range(first, stop):
            self._extents.setdefault(e, _Extent()).writes += 1
        return fresh

    def keep(self, extent: int, clone: str) -> None:
        """D[clone][extent] stays set when the writes to the extent have ended."""
        self._extents[extent].keep.add(clone)

    def keep_all(self, clone: str) -> None:
        """The same for every extent that is being written to."""
        for extent in self._extents.values():
            extent.keep.add(clone)

    def end(self, offset: int, end: int, first: int, stop: int) -> list[tuple[int, set[str]]]:
        """The write has ended. Returns the extents that no write touches now, each with the clones
        whose bits stay set."""
        self._ranges.remove((offset, end))
        ended = []
        for e in range(first, stop):
            extent = self._extents[e]
            extent.writes -= 1
            if extent.writes == 0:
                del self._extents[e]
                ended.append((e, extent.keep))
        return ended
