"""What is counted as it happens: requests of hosts, copies, flushes, writes of metadata.

All of it begins at 0 with the mount and only grows. Counting is on the way of every request, so it is
a few additions and no more: whoever calls has looked at the clock, nothing is locked, nothing waits.
It must never decide anything: the engines do the same with or without it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from clonefs.errors import ClonefsError

SOURCE = "source"  # the name of the Source among the LUs of a group
_BITS = 64  # of nanoseconds: five centuries


@dataclass(frozen=True, slots=True)
class TallyStatistics:
    """A tally at one instant. `buckets[n]` took less than 2**n nanoseconds, and not less than half
    of that; `seconds` is the sum of all."""

    count: int
    bytes: int
    errors: int
    seconds: float
    buckets: tuple[int, ...]


_NOTHING = TallyStatistics(0, 0, 0, 0.0, (0,) * (_BITS + 1))


class Tally:
    """How often something was done, how many bytes that were, how long it took, and how often it has
    failed; what has failed is in `errors` and in nothing else."""

    __slots__ = ("_buckets", "_nanoseconds", "bytes", "errors")

    def __init__(self) -> None:
        self.bytes = 0
        self.errors = 0
        self._nanoseconds = 0
        self._buckets = [0] * (_BITS + 1)

    def done(self, length: int, nanoseconds: int) -> None:
        """Once more, `length` bytes, in that time."""
        self.bytes += length
        self._nanoseconds += nanoseconds
        self._buckets[nanoseconds.bit_length()] += 1

    @contextmanager
    def timed(self, length: int = 0) -> Iterator[None]:
        """The body does it once, or raises ClonefsError."""
        started = time.perf_counter_ns()
        try:
            yield
        except ClonefsError:
            self.errors += 1
            raise
        self.done(length, time.perf_counter_ns() - started)

    @property
    def count(self) -> int:
        """How often it was done."""
        return sum(self._buckets)

    def statistics(self) -> TallyStatistics:
        """What can be seen of it. Most are of clones that nobody uses: these cost nothing here."""
        count = self.count
        if not count and not self.errors:
            return _NOTHING
        seconds = self._nanoseconds / 1e9
        return TallyStatistics(count, self.bytes, self.errors, seconds, tuple(self._buckets))


@dataclass(slots=True)
class LuCounters:
    """An LU: what hosts ask of it, and the flushes of its backing, whoever wanted them."""

    read: Tally = field(default_factory=Tally)
    write: Tally = field(default_factory=Tally)
    flush: Tally = field(default_factory=Tally)
    backing_flush: Tally = field(default_factory=Tally)


@dataclass(slots=True)
class CopyCounters:
    """What one engine has copied from or to a clone."""

    extents: int = 0
    bytes: int = 0
    errors: int = 0

    def copied(self, extents: int, length: int) -> None:
        """A copy is complete."""
        self.extents += extents
        self.bytes += length


@dataclass(slots=True)
class CloneCounters:
    """A clone: the copies of both engines, and how often an error has split it off."""

    sync: CopyCounters = field(default_factory=CopyCounters)
    cod: CopyCounters = field(default_factory=CopyCounters)
    splits: int = 0


class GroupCounters:
    """A group. `cod_copy` are copies on demand; `cod_wait` is how long requests have stood in the COD
    Queue; `checkpoint_at` is when the last checkpoint ended (time.monotonic)."""

    def __init__(self) -> None:
        self.cod_copy = Tally()
        self.cod_wait = Tally()
        self.checkpoint = Tally()
        self.checkpoint_at = time.monotonic()  # or the mount, before the first one
        self._lus: dict[str, LuCounters] = {}
        self._clones: dict[str, CloneCounters] = {}

    def lu(self, name: str) -> LuCounters:
        """Those of an LU: SOURCE, or the name of a clone."""
        return self._lus.setdefault(name, LuCounters())

    def clone(self, name: str) -> CloneCounters:
        """Those of a clone."""
        return self._clones.setdefault(name, CloneCounters())

    def forget(self, name: str) -> None:
        """The clone is no longer one of this group."""
        self._lus.pop(name, None)
        self._clones.pop(name, None)
