"""status --watch: the copies that run, live on a terminal, or a line for each look into a pipe.

A look opens status.json, draws, waits the least interval, and then waits in poll(2) until it has
changed. While something is copied it looks at least once a second, so that a copy that stands still
is seen to. The terminal is put back as it was, however the watch ends.
"""

import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import click

from clonefs.cli import tree
from clonefs.cli.changes import looked_at
from clonefs.cli.speed import WINDOW_S, Copy, Speeds
from clonefs.cli.terminal import Screen, bytes_text, printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_BUSY_S = 1.0
_QUIET_S = 10.0
_BAR = 20
_PERCENT = len(" 100%") + 2


class _Show(Protocol):
    def __call__(self, groups: dict[str, Any], copies: list[Copy]) -> None:
        """Show one look."""


def watch(place: tree.Place, where: Screen, interval_s: float, as_json: bool) -> None:
    """Show the copies of `place`, a mount or a group or an LU in it, until the user ends it."""
    tree.require(place)
    if where.is_terminal and not as_json:
        with _keyboard() as keys, _live(place, where) as show:
            _look_on(place, show, interval_s, keys)
    else:
        _look_on(place, _print_json if as_json else _Lines(), interval_s, None)


def _look_on(place: tree.Place, show: _Show, interval_s: float, keys: int | None) -> None:
    speeds = Speeds()
    try:
        while True:
            with looked_at(tree.Place(place.mountpoint), tree.STATUS_JSON) as look:
                groups = _groups(place, json.loads(look.value(tree.STATUS_JSON)))
                copies = speeds.see(groups, time.monotonic())
                show(groups, copies)
                if _quit(keys, interval_s):
                    return
                if look.wait(_BUSY_S if copies else _QUIET_S, also=keys) and _quit(keys, 0):
                    return
    except KeyboardInterrupt:
        return  # the ordinary way to end it


def _groups(place: tree.Place, report: dict[str, Any]) -> dict[str, Any]:
    groups: dict[str, Any] = report["groups"]
    if place.group is None:
        return groups
    if place.group not in groups:
        raise tree.no_group(place)
    group = groups[place.group]
    if place.lu is None or place.lu == tree.SOURCE:
        return {place.group: group}
    if place.lu not in group["clones"]:
        raise tree.no_clone(place)
    return {place.group: group | {"clones": {place.lu: group["clones"][place.lu]}}}


def _quit(keys: int | None, timeout_s: float) -> bool:
    """Wait this long; True at once if q is pressed, or the terminal has gone."""
    if keys is None:
        time.sleep(timeout_s)
        return False
    end_s = time.monotonic() + timeout_s
    while select.select([keys], [], [], max(end_s - time.monotonic(), 0))[0]:
        pressed = os.read(keys, 64)
        if not pressed or b"q" in pressed.lower():
            return True
    return False


# Words


def _rate(copy: Copy) -> str:
    if copy.extents_s is None:
        return "-"
    return f"{copy.extents_s:.1f} extents/s"


def _bytes_rate(copy: Copy) -> str:
    return "-" if copy.extents_s is None else f"{bytes_text(copy.extents_s * copy.extent_size)}/s"


def _left(copy: Copy) -> str:
    if copy.left_s is None:
        return "stands still" if copy.extents_s == 0 else "-"
    seconds = round(copy.left_s)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if seconds < 360000 else "over 99 h"


def _percent(copy: Copy) -> str:
    """Rounded down: 100% is said of nothing that is not done."""
    return f"{100 * copy.done // copy.total if copy.total else 100}%"


def _cod(copy: Copy) -> str:
    if copy.cod_queue is None:
        return "-"
    speed = "-" if copy.cod_s is None else f"{copy.cod_s:.1f}/s"
    return f"{speed}, {copy.cod_queue} waiting"


# Into a pipe


def _print_json(groups: dict[str, Any], copies: list[Copy]) -> None:
    """The report of this look on one line."""
    click.echo(json.dumps({"at": _now(), "groups": groups}))


class _Lines:
    """A line for each copy at each look, and one when a clone that is not copied has changed."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def __call__(self, groups: dict[str, Any], copies: list[Copy]) -> None:
        at = _now()
        running = {copy.name: copy for copy in copies}
        states = {
            f"{name}/{clone}": f"{shown['state']} {shown['condition']}"
            for name, group in groups.items()
            for clone, shown in group["clones"].items()
        }
        for name, state in states.items():
            if name in running:
                click.echo(f"{at} {_line(running[name])}")
            elif self._shown.get(name) != state:
                click.echo(f"{at} {name} {state}")
        self._shown = states


def _line(copy: Copy) -> str:
    cod = "" if copy.cod_queue is None else f", COD {_cod(copy)}"
    return (
        f"{copy.name} {copy.state} {copy.condition} {copy.done}/{copy.total} {_percent(copy)}, "
        f"{_rate(copy)}, {_bytes_rate(copy)}, {_left(copy)} left{cod}"
    ).replace("stands still left", "stands still")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# On a terminal


@contextmanager
def _keyboard() -> Iterator[int | None]:
    """Keys come one by one and are not shown; None if standard input is no terminal."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        if not sys.stdin.isatty():
            yield None
            return
        keys = sys.stdin.fileno()
        settings = termios.tcgetattr(keys)
        try:
            tty.setcbreak(keys)
            yield keys
        finally:
            termios.tcsetattr(keys, termios.TCSADRAIN, settings)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


@contextmanager
def _live(place: tree.Place, where: Screen) -> Iterator[_Show]:
    from rich.console import Console
    from rich.live import Live

    console = Console(no_color=not where.colour, highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield _drawer(place, live, console)


def _drawer(place: tree.Place, live: "Live", console: Any) -> Callable[..., None]:
    def show(groups: dict[str, Any], copies: list[Copy]) -> None:
        # A window may have another size by now: the console asks anew each time.
        live.update(frame(place, groups, copies, console.width, console.height), refresh=True)

    return show


def frame(
    place: tree.Place, groups: dict[str, Any], copies: list[Copy], width: int, height: int
) -> "RenderableType":
    """What a terminal of this size shows: copies first, what is wrong, then how many clones rest."""
    from rich.console import Group
    from rich.text import Text

    notes = [f"{copy.name}: {copy.error}" for copy in copies if copy.error]
    room = max(height - 4 - len(notes), 1)
    shown = copies[:room] if len(copies) <= room else copies[: room - 1]
    more = len(copies) - len(shown)
    parts: list[RenderableType] = [
        Text(f"{place}", style="bold", no_wrap=True, overflow="ellipsis")
    ]
    parts.append(_table(shown, width) if shown else Text("nothing is being copied"))
    if more:
        parts.append(Text(f"and {more} more copies: a taller window shows them"))
    parts += [Text(printable(note), style="bold red") for note in notes]
    parts.append(Text(_footer(groups, copies), style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def _footer(groups: dict[str, Any], copies: list[Copy]) -> str:
    clones = sum(len(group["clones"]) for group in groups.values())
    return (
        f"{len(copies)} of {clones} clones are being copied; speeds are means of the last "
        f"{WINDOW_S:.0f} s; q ends this"
    )


_COLUMNS: dict[str, Callable[[Copy], str]] = {
    "NAME": lambda copy: copy.name,
    "STATE": lambda copy: copy.state,
    "CONDITION": lambda copy: copy.condition,
    "DONE": lambda copy: f"{copy.done}/{copy.total}",
    "EXTENTS": _rate,
    "BYTES": _bytes_rate,
    "LEFT": _left,
    "COD": _cod,
}
_DROPPED = ("CONDITION", "EXTENTS", "DONE", "COD", "STATE", "BYTES")


def _table(copies: list[Copy], width: int) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    columns, bar = _fitting(copies, width)
    for name in columns:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
        if name == "NAME":
            table.add_column("", no_wrap=True)
    for copy in copies:
        cells = [Text(_COLUMNS[name](copy)) for name in columns]
        table.add_row(cells[0], _bar(copy, bar), *cells[1:])
    return table


def _fitting(copies: list[Copy], width: int) -> tuple[list[str], int]:
    """The columns that fit beside the bar, and the length of the bar: shorter if nothing else helps."""
    columns, hidden = list(_COLUMNS), list(_DROPPED)
    while (room := _room(copies, columns, width)) < _BAR and hidden:
        columns.remove(hidden.pop(0))
    return columns, max(min(room, _BAR), 1)


def _room(copies: list[Copy], columns: list[str], width: int) -> int:
    """What these columns leave for the bar."""
    widths = [
        max(len(column), *(len(_COLUMNS[column](copy)) for copy in copies)) + 2
        for column in columns
    ]
    return width - sum(widths) - _PERCENT


def _bar(copy: Copy, length: int) -> "RenderableType":
    from rich.text import Text

    full = length * copy.done // copy.total if copy.total else length
    bar = Text("━" * full, style="green")
    bar.append("╌" * (length - full), style="dim")
    return bar.append(f" {_percent(copy):>4}")
