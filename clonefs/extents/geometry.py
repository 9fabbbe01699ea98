"""How an LU is divided into extents.

An extent is "a number of contiguous data blocks on an LU that is represented by ... a bit in a map"
(Table 1). All extents of a Clone Group have one size, a power of two; the last one may be short.
Ranges are half open everywhere: `first` belongs to them, `stop` does not.
"""

from dataclasses import dataclass

from clonefs.errors import invalid
from clonefs.extents.sizes import format_size

SECTOR = 512
MIN_EXTENT_SIZE = 4 << 10
MAX_EXTENT_SIZE = 4 << 20
MAX_SIZE = 16 << 40


@dataclass(frozen=True, slots=True)
class Geometry:
    """The size of an LU and of its extents, both in bytes.

    Raises ClonefsError (EINVAL) for a size that no LU can have.
    """

    size: int
    extent_size: int
    shift: int = 0
    extents: int = 0

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % SECTOR:
            raise invalid(f"a size of {self.size} bytes is not a positive multiple of {SECTOR}")
        if self.size > MAX_SIZE:
            raise invalid(f"{format_size(self.size)} is more than {format_size(MAX_SIZE)}")
        if not MIN_EXTENT_SIZE <= self.extent_size <= MAX_EXTENT_SIZE or (
            self.extent_size & (self.extent_size - 1)
        ):
            raise invalid(
                f"an extent size of {format_size(self.extent_size)} is not a power of two from 4K to 4M"
            )
        object.__setattr__(self, "shift", self.extent_size.bit_length() - 1)
        object.__setattr__(self, "extents", (self.size + self.extent_size - 1) >> self.shift)

    def extents_of(self, offset: int, length: int) -> tuple[int, int]:
        """The extents [first, stop) that `length` > 0 bytes from `offset` touch."""
        return offset >> self.shift, ((offset + length - 1) >> self.shift) + 1

    def whole_extents_of(self, offset: int, length: int) -> tuple[int, int]:
        """The extents [first, stop) that the bytes cover whole; the short last one counts.

        Empty (first >= stop) where no extent is covered whole.
        """
        end = offset + length
        first = (offset + self.extent_size - 1) >> self.shift
        return first, self.extents if end >= self.size else end >> self.shift

    def bytes_of(self, first: int, stop: int) -> tuple[int, int]:
        """(offset, length) in bytes of the extents [first, stop)."""
        offset = first << self.shift
        return offset, min(stop << self.shift, self.size) - offset
