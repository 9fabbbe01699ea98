"""Pictures of maps as one SVG file, for reports.

Light and dark tell kinds of cell apart before their colours do, and what is protected is hatched, so
that a copy in grey says the same.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from xml.sax.saxutils import escape

from clonefs.cli.picture import UNICODE, Picture, label, legend, lines

COLUMNS, LINES = 136, 64
"""How large a picture is at most, in cells, with room for labels."""

_CELL = 8
_LEFT = 72
_LINE = 20
_WIDTH = _LEFT + COLUMNS * _CELL + _CELL
_FILLS = {
    UNICODE.equal: "#eeeeee",
    UNICODE.shades[0]: "#fdd49e",
    UNICODE.shades[1]: "#fc8d59",
    UNICODE.shades[2]: "#d7301f",
    UNICODE.shades[3]: "#7f0000",
    UNICODE.some_protected: "url(#some)",
    UNICODE.all_protected: "url(#all)",
    UNICODE.both: "url(#both)",
}
_HATCHES = (
    ("some", "#9ecae1", "#ffffff"),
    ("all", "#08519c", "#9ecae1"),
    ("both", "#7f0000", "#9ecae1"),
)


def draw(pictures: Iterable[Picture]) -> str:
    """One SVG document, the pictures one below the other."""
    body: list[str] = []
    top = _LINE
    for picture in pictures:
        body += _picture(picture, top)
        top += _height(picture)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" '
        f'width="{_WIDTH}" height="{top}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, "<defs>", *_hatches(), "</defs>", *body, "</svg>"]) + "\n"


def _hatches() -> Iterator[str]:
    for name, ground, line in _HATCHES:
        yield (
            f'<pattern id="{name}" width="4" height="4" patternUnits="userSpaceOnUse">'
            f'<rect width="4" height="4" fill="{ground}"/>'
            f'<path d="M0 4L4 0" stroke="{line}"/></pattern>'
        )


def _height(picture: Picture) -> int:
    rows = -(-len(picture.marked) // picture.cells.columns)
    return _LINE + rows * _CELL + _LINE * (len(legend(picture, UNICODE)) + 1)


def _picture(picture: Picture, top: int) -> Iterator[str]:
    total, whole = sum(picture.marked), picture.extents
    yield _text(
        _LEFT,
        top,
        f"{picture.name}, {picture.state}: {total} of {whole} extents {picture.word}, "
        f"{sum(picture.protected)} protected",
    )
    y = top + _LINE // 2
    for number, (_, row) in enumerate(lines(picture, UNICODE)):
        if number % 4 == 0:
            yield _text(
                _LEFT - 6, y + _CELL, label(number, picture.extent_size, picture.cells), "end"
            )
        yield from _row(row, y)
        y += _CELL
    for item in legend(picture, UNICODE):
        y += _LINE
        yield from _legend(item, y)


def _row(row: str, y: int) -> Iterator[str]:
    x = _LEFT
    for char, run in groupby(row):
        width = _CELL * len(list(run))
        yield f'<rect x="{x}" y="{y}" width="{width}" height="{_CELL}" fill="{_FILLS[char]}"/>'
        x += width


def _legend(item: str, y: int) -> Iterator[str]:
    glyphs, _, words = item.partition(" ")
    yield from _row(glyphs, y - _CELL)
    yield _text(_LEFT + _CELL * (len(glyphs) + 1), y, words)


def _text(x: int, y: int, text: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
