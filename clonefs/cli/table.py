"""The status table on a terminal: the daemon's own words, in colours, in as many columns as fit.

It takes the text of a `status` file apart by the columns of its head, and shows cells as they are. A
terminal that is too narrow loses whole columns, in the order of `DROPPED`, and is told which; lines
below the table, which say what is wrong, are never cut.
"""

import re
from collections.abc import Iterator
from typing import Any

from clonefs.cli.terminal import Screen, printable, shortened

DROPPED = ("BACKING", "FRACTURED", "RATE", "SIZE", "DELTA", "CONDITION", "PROGRESS")
"""What goes first. NAME and STATE stay; if they do not fit, they are cut short, names first."""

_GAP = 2
_SHORTEST = 8
_ROW = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]* ", re.ASCII)
_GOOD: dict[str, Any] = {"fg": "green"}
_BUSY: dict[str, Any] = {"fg": "yellow"}
_BAD: dict[str, Any] = {"fg": "red", "bold": True}
_HEAD: dict[str, Any] = {"bold": True}
_STYLES = {
    "synchronized": _GOOD,
    "fractured": _GOOD,
    "synchronizing": _BUSY,
    "restoring": _BUSY,
    "reverse-synchronizing": _BUSY,
    "out-of-sync": _BAD,
    "reverse-out-of-sync": _BAD,
    "waiting": _BUSY,
    "system-fractured": _BAD,
    "faulted": _BAD,
}


def fitted(text: str, where: Screen) -> Iterator[str]:
    """The lines of a status file for this screen; all columns where it is no terminal."""
    head, *rest = [printable(line) for line in text.splitlines()]
    starts = [match.start() for match in re.finditer(r"\S+", head)]
    rows = [line for line in rest if _is_row(line, starts)]
    cells = _columns([head, *rows], starts)
    shown, hidden = _choose(cells, where)
    yield from _rows(cells, shown, where)
    if hidden:
        yield where.style(
            f"({where.columns} columns are too few for {', '.join(hidden)})", dim=True
        )
    for line in rest:
        if not _is_row(line, starts):
            yield where.style(line, **_BAD) if not line.startswith("recovery: ") else line


def _is_row(line: str, starts: list[int]) -> bool:
    """Whether a line is one of the table: it has a name, and blanks before each column."""
    padded = line.ljust(starts[-1])
    blanks = all(padded[start - _GAP : start].isspace() for start in starts[1:])
    return blanks and _ROW.match(line) is not None


def _columns(lines: list[str], starts: list[int]) -> dict[str, list[str]]:
    stops = [*starts[1:], None]
    cut = [
        [line[start:stop].strip() for start, stop in zip(starts, stops, strict=True)]
        for line in lines
    ]
    return {column[0]: list(column) for column in zip(*cut, strict=True)}


def _choose(cells: dict[str, list[str]], where: Screen) -> tuple[list[str], list[str]]:
    """The columns that are shown, and those that are not."""
    hidden: list[str] = []
    for name in DROPPED:
        shown = [column for column in cells if column not in hidden]
        if not where.is_terminal or _width(cells, shown) <= where.columns:
            break
        if name in cells:
            hidden.append(name)
    return [column for column in cells if column not in hidden], hidden


def _width(cells: dict[str, list[str]], shown: list[str]) -> int:
    return sum(max(map(len, cells[name])) + _GAP for name in shown) - _GAP


def _rows(cells: dict[str, list[str]], shown: list[str], where: Screen) -> Iterator[str]:
    widths = {name: max(map(len, cells[name])) for name in shown}
    if where.is_terminal:
        for name in shown:
            others = sum(widths[other] + _GAP for other in shown if other != name)
            widths[name] = min(widths[name], max(where.columns - others, _SHORTEST))
    for number in range(len(cells[shown[0]])):
        yield _row({name: cells[name][number] for name in shown}, widths, where, bold=number == 0)


def _row(row: dict[str, str], widths: dict[str, int], where: Screen, *, bold: bool) -> str:
    parts = []
    for name, width in widths.items():
        cell = shortened(row[name], width)
        style = _HEAD if bold else _STYLES.get(row[name].partition(" ")[0], {})
        parts.append(where.style(cell, **style) + " " * (width - len(cell)))
    return (" " * _GAP).join(parts).rstrip()
