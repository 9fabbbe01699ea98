"""The oracle: which contents each sector of each LU may have.

A sector is a register. A read may return a value that was being written while it ran, or the value
of a write that ended before it began and that no other write has overtaken since. Time is a counter
of events. A Protected Restore writes every sector of the Source at the instant at which it takes
effect; a fracture fixes the sectors of the clone.

A host stamps every sector that it writes with a number of its own, so that a value says which write
it came from.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from clonefs.extents import SECTOR

NEVER = 1 << 62


class Violation(AssertionError):  # noqa: N818 - it is what it is called
    """clonefs broke a promise."""


@dataclass(slots=True)
class Write:
    """A value that was written from `start` to `end`, and overtaken at `overtaken`.

    `acknowledged`: somebody was told that it is done; `flushed`: and that it is on stable storage;
    `buried`: another one that is flushed has overtaken it, so that no power cut brings it back.
    `dropped`: a flush of it has failed, so that no later one can be believed to have flushed it.
    """

    value: int
    start: int
    end: int = NEVER
    overtaken: int = NEVER
    acknowledged: bool = False
    flushed: bool = False
    buried: bool = False
    dropped: bool = False


def stamp(value: int) -> bytes:
    """A sector with that value."""
    return value.to_bytes(8, "little") * (SECTOR // 8)


def stamps(data: bytes | bytearray | memoryview) -> list[int]:
    """The values of the sectors in `data`. Raises Violation for a sector that is of two writes."""
    values = []
    for at in range(0, len(data), SECTOR):
        sector = bytes(data[at : at + SECTOR])
        value = int.from_bytes(sector[:8], "little")
        if sector != stamp(value):
            raise Violation(f"the sector at {at} is of two writes")
        values.append(value)
    return values


class Register:
    """The sectors of one LU."""

    def __init__(self, name: str, values: Iterable[int], now: int) -> None:
        self.name = name
        self._sectors = [
            [Write(value, now, now, acknowledged=True, flushed=True)] for value in values
        ]

    def begin(self, first: int, values: list[int], now: int) -> list[tuple[int, Write]]:
        """A write of `values` begins at sector `first`."""
        begun = []
        for sector, value in enumerate(values, first):
            write = Write(value, now)
            self._sectors[sector].append(write)
            begun.append((sector, write))
        return begun

    def end(self, begun: list[tuple[int, Write]], now: int) -> None:
        """The write was acknowledged: what had ended before it began is overtaken."""
        for sector, write in begun:
            write.end = now
            write.acknowledged = True
            self._overtake(sector, write, now)

    def _overtake(self, sector: int, by: Write, now: int) -> None:
        for other in self._sectors[sector]:
            if other.end < by.start and other.overtaken == NEVER:
                other.overtaken = now
        if len(self._sectors[sector]) > 16:
            # Reads are short: one that began this long ago has ended.
            self._sectors[sector] = [
                write
                for write in self._sectors[sector]
                if not write.buried or write.overtaken > now - 2000
            ]

    def flushed(self, since: int) -> None:
        """A flush that began at `since` has succeeded: what had been acknowledged is durable."""
        for writes in self._sectors:
            latest = -1
            for write in writes:
                if write.acknowledged and (
                    write.flushed or (write.end < since and not write.dropped)
                ):
                    write.flushed = True
                    latest = max(latest, write.start)
            for write in writes:
                write.buried = write.buried or write.end < latest

    def dropped(self, sector: int, value: int, now: int) -> None:
        """A flush has failed, and dropped what was written to `sector`; `value` is on disk instead.
        Whoever was to be told has been told: from now on either may be found."""
        for write in self._sectors[sector]:
            write.dropped = write.dropped or not write.flushed
        self._sectors[sector].append(Write(value, now, now))

    def give_up(self, begun: list[tuple[int, Write]], now: int) -> None:
        """The write failed, or the daemon died: it may have happened or not, but is over."""
        for _, write in begun:
            write.end = min(write.end, now)

    def all_at_once(self, values: list[int], start: int, end: int) -> None:
        """Every sector was written from `start` to `end`, durably: a restore took effect."""
        begun = self.begin(0, values, start)
        self.end(begun, end)
        for _, write in begun:
            write.flushed = True
        self.flushed(start)

    def after_a_power_cut(self, first: int, values: list[int], what: str) -> None:
        """Raises Violation if a power cut may not have left `values`. They are what is there from
        now on."""
        for sector, value in enumerate(values, first):
            writes = self._sectors[sector]
            if not any(write.value == value and not write.buried for write in writes):
                left = [write for write in writes if not write.buried]
                raise Violation(
                    f"{what}: sector {sector} of {self.name} has {value}; a power cut may leave {left}"
                )
            self._sectors[sector] = [Write(value, -1, -1, acknowledged=True, flushed=True)]

    def check(self, first: int, values: list[int], start: int, now: int, what: str) -> None:
        """Raises Violation if a read from `start` to `now` may not have returned `values`."""
        for sector, value in enumerate(values, first):
            if not any(
                write.value == value and write.start <= now and write.overtaken >= start
                for write in self._sectors[sector]
            ):
                known = [w for w in self._sectors[sector] if w.overtaken >= start]
                raise Violation(
                    f"{what}: sector {sector} of {self.name} has {value}; allowed from {start} to "
                    f"{now}: {known}"
                )
