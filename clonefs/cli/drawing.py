"""Maps of extents, read from the tree and drawn: what `clonefs map` does.

It reads extent lists, which stand still one by one but not together. Its order, Delta Map before
Protected Restore Map, and the state before and after, make a picture that was true of each extent at
some moment of the command.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import click

from clonefs.cli import tree
from clonefs.cli.picture import (
    ASCII,
    UNICODE,
    Glyphs,
    Picture,
    count,
    divide,
    legend,
    lines,
    parse_extents,
)
from clonefs.cli.terminal import Screen, bytes_text
from clonefs.errors import missing
from clonefs.extents import format_size

AROUND = 5
"""Lines of a picture that are not cells, and the prompt."""

_RESTORING = frozenset({"restoring", "reverse-synchronizing"})
_LOOKS = 5


def clones_at(place: tree.Place) -> list[tree.Place]:
    """The clones that a place stands for. Raises ClonefsError if there are none."""
    tree.require(place)
    if place.lu not in (None, tree.SOURCE):
        return [place]
    groups = tree.report(place)["groups"]
    names = list(groups) if place.group is None else [place.group]
    found = [
        tree.Place(place.mountpoint, name, clone)
        for name in names
        for clone in groups.get(name, {"clones": ()})["clones"]
    ]
    if not found:
        raise missing(f"{place} has no clones: add one with clonefs add-clone")
    return found


def pictures_of(clones: list[tree.Place], width: int, height: int) -> Iterator[Picture]:
    """A picture of each clone, at most so many characters wide and lines high."""
    return (_look(clone, width, height) for clone in clones)


def _look(clone: tree.Place, width: int, height: int) -> Picture:
    """One picture; looked at again if the clone's state has changed meanwhile."""
    group = tree.Place(clone.mountpoint, clone.group)
    extent_size = int(tree.value(group, "extent_size"))
    extents = -(-int(tree.value(group, "size")) // extent_size)
    for look in itertools.count(1):
        state = tree.value(clone, "state")
        marked = parse_extents(tree.value(clone, "delta_map"), extents)
        restoring = state in _RESTORING
        owned = tree.value(group, "protected_restore_map") if restoring else ""
        if tree.value(clone, "state") == state or look == _LOOKS:
            break
    protected = parse_extents(owned, extents)
    marked &= ~protected
    cells = divide(extents, extent_size, width, height)
    return Picture(
        name="/".join(clone.names),
        state=state,
        word=_word(state),
        extents=extents,
        extent_size=extent_size,
        cells=cells,
        marked=count(marked, cells.per_cell),
        protected=count(protected, cells.per_cell),
    )


def _word(state: str) -> str:
    return "pending" if state in _RESTORING or state == "synchronizing" else "different"


# As text


def print_pictures(
    pictures: Iterable[Picture], where: Screen, *, width: int, ascii_only: bool
) -> None:
    """Draw them on standard output."""
    glyphs = UNICODE if where.unicode and not ascii_only else ASCII
    for number, picture in enumerate(pictures):
        if number:
            click.echo()
        for line in _drawn(picture, glyphs, where, width):
            where.print(line)


def _drawn(picture: Picture, glyphs: Glyphs, where: Screen, width: int) -> Iterator[str]:
    yield _title(picture, where)
    yield _sums(picture)
    for label, row in lines(picture, glyphs):
        yield f"{where.style(label, dim=True)} {_coloured(row, glyphs, where)}"
    yield from _flowed(legend(picture, glyphs), width)


def _title(picture: Picture, where: Screen) -> str:
    per_cell = picture.cells.per_cell
    size = format_size(per_cell * picture.extent_size)
    scale = "one extent" if per_cell == 1 else f"{per_cell} extents"
    name = where.style(picture.name, bold=True)
    return f"{name} {picture.state}: a cell is {scale} ({size})"


def _sums(picture: Picture) -> str:
    sums = [_sum(picture, picture.word, picture.marked)]
    if any(picture.protected):
        sums.append(_sum(picture, "protected", picture.protected))
    return f"{', '.join(sums)}, of {picture.extents} extents"


def _sum(picture: Picture, word: str, counts: tuple[int, ...]) -> str:
    total = sum(counts)
    return f"{total} {word} ({_percent(total, picture.extents)}, {_bytes(picture, total)})"


def _bytes(picture: Picture, extents: int) -> str:
    return bytes_text(extents * picture.extent_size)


def _percent(part: int, whole: int) -> str:
    """A share that is neither nothing nor all of it never says so."""
    share = 100 * part / whole
    if part and share < 0.1:
        return "less than 0.1%"
    return f"{min(share, 99.9) if part < whole else 100:.1f}%"


def _coloured(row: str, glyphs: Glyphs, where: Screen) -> str:
    def kind(char: str) -> str:
        if char in glyphs.shades:
            return "yellow"
        if char == glyphs.both:
            return "magenta"
        return "" if char == glyphs.equal else "cyan"

    runs = itertools.groupby(row, kind)
    return "".join(
        where.style("".join(run), fg=colour) if colour else where.style("".join(run), dim=True)
        for colour, run in runs
    )


def _flowed(items: list[str], width: int) -> Iterator[str]:
    """The items on as few lines as hold them whole."""
    line = ""
    for item in items:
        if line and len(line) + 3 + len(item) > width:
            yield line
            line = ""
        line = f"{line}   {item}" if line else item
    yield line


# For programs


def print_json(pictures: Iterable[Picture]) -> None:
    """Print the cells of each picture, by the clone's name."""
    click.echo(json.dumps({each.name: _as_json(each) for each in pictures}, indent=2))


def _as_json(picture: Picture) -> dict[str, Any]:
    return {
        "state": picture.state,
        "extents": picture.extents,
        "extent_size": picture.extent_size,
        "marked_means": picture.word,
        "marked_extents": sum(picture.marked),
        "protected_extents": sum(picture.protected),
        "extents_per_cell": picture.cells.per_cell,
        "marked": picture.marked,
        "protected": picture.protected,
    }
