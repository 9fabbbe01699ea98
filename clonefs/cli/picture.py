"""A map of extents as a picture: an LU divided into cells, and a glyph for each.

It knows neither files nor terminals: extents in, cells and lines of glyphs out. Two things must hold:
a cell with one marked extent in a million never looks like one with none, and no two kinds of cell
differ by colour alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bitarray import bitarray

from clonefs.extents import format_size


class Cells(NamedTuple):
    """How an LU is divided: `per_cell` extents a cell, `columns` cells a line."""

    per_cell: int
    columns: int


class Glyphs(NamedTuple):
    """`shades` from the lightest share of marked extents to the fullest."""

    equal: str
    shades: str
    some_protected: str
    all_protected: str
    both: str


UNICODE = Glyphs("·", "░▒▓█", "p", "P", "%")
ASCII = Glyphs(".", "-+*#", "p", "P", "%")


@dataclass(frozen=True)
class Picture:
    """An LU and what is marked in each of its cells. Counts of extents; the last cell may be short.

    `word` says what it means to be marked: pending, or different. `protected` is all zeros
    unless a restore is running.
    """

    name: str
    state: str
    word: str
    extents: int
    extent_size: int
    cells: Cells
    marked: tuple[int, ...]
    protected: tuple[int, ...]

    def extents_of(self, cell: int) -> int:
        """How many extents a cell stands for."""
        return min(self.cells.per_cell, self.extents - cell * self.cells.per_cell)


def parse_extents(text: str, extents: int) -> bitarray:
    """The bits of an extent list like `0,4-7`."""
    bits = bitarray(extents)
    for run in text.strip().split(","):
        if run:
            first, _, last = run.partition("-")
            bits[int(first) : int(last or first) + 1] = 1
    return bits


def divide(extents: int, extent_size: int, width: int, lines: int) -> Cells:
    """Cells that fit into `lines` lines of `width` characters, each with its label before it.

    The number of extents in a cell is a power of two, so that labels are round.
    """
    for label in range(2, width):
        cells = _divide(extents, max(width - label - 1, 1), max(lines, 1))
        if label_width(extents, extent_size, cells) <= label:
            return cells
    return _divide(extents, 1, max(lines, 1))


def _divide(extents: int, columns: int, lines: int) -> Cells:
    if columns > 8:
        columns -= columns % 8
    per_cell = 1
    while -(-extents // per_cell) > columns * lines:
        per_cell *= 2
    return Cells(per_cell, min(columns, -(-extents // per_cell)))


def label(line: int, extent_size: int, cells: Cells) -> str:
    """Where a line begins, in bytes."""
    return format_size(line * cells.columns * cells.per_cell * extent_size)


def label_width(extents: int, extent_size: int, cells: Cells) -> int:
    """The length of the longest label."""
    lines = -(-extents // (cells.per_cell * cells.columns))
    return max(len(label(line, extent_size, cells)) for line in range(lines))


def count(bits: bitarray, per_cell: int) -> tuple[int, ...]:
    """How many bits are set in each cell."""
    return tuple(bits.count(1, at, at + per_cell) for at in range(0, len(bits), per_cell))


def glyph(picture: Picture, cell: int, glyphs: Glyphs) -> str:
    """What stands for a cell."""
    size, marked, protected = (
        picture.extents_of(cell),
        picture.marked[cell],
        picture.protected[cell],
    )
    if marked and protected:
        return glyphs.both
    if protected:
        return glyphs.all_protected if protected == size else glyphs.some_protected
    return shade(marked, size, glyphs.shades) if marked else glyphs.equal


def shade(marked: int, size: int, shades: str) -> str:
    """Of n shades the first one up to a share of 1/n, the next one up to 2/n, and so on."""
    return shades[-(-marked * len(shades) // size) - 1]


def lines(picture: Picture, glyphs: Glyphs) -> Iterator[tuple[str, str]]:
    """Each line's label, and its glyphs."""
    cells = picture.cells
    width = label_width(picture.extents, picture.extent_size, cells)
    for number, first in enumerate(range(0, len(picture.marked), cells.columns)):
        stop = min(first + cells.columns, len(picture.marked))
        row = "".join(glyph(picture, cell, glyphs) for cell in range(first, stop))
        yield label(number, picture.extent_size, cells).rjust(width), row


def legend(picture: Picture, glyphs: Glyphs) -> list[str]:
    """What each glyph means that this picture may have."""
    single = picture.cells.per_cell == 1
    shades = glyphs.shades[-1] if single else glyphs.shades
    shares = "" if single else " (to 1/4, 1/2, 3/4, more)"
    items = [f"{glyphs.equal} equal", f"{shades} {picture.word}{shares}"]
    if any(picture.protected):
        items += (
            [f"{glyphs.all_protected} protected"]
            if single
            else [
                f"{glyphs.some_protected}{glyphs.all_protected} protected (part, all)",
                f"{glyphs.both} {picture.word} and protected",
            ]
        )
    return items
