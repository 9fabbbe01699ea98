"""status --watch: the copies that run and the I/O of hosts, live on a terminal, or a line for each
look into a pipe.

A look opens status.json, draws, waits the least interval, and then waits in poll(2) until it has
changed. While something is copied, or a host reads or writes, it looks at least once a second, so
that a copy that stands still is seen to; poll(2) tells nothing of host I/O. The terminal is put back
as it was, however the watch ends.
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
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import click

from clonefs.cli import tree
from clonefs.cli.changes import looked_at
from clonefs.cli.speed import WINDOW_S, Copy, HostIo, HostSpeeds, Speeds
from clonefs.cli.terminal import Screen, bytes_text, printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_BUSY_S = 1.0
_QUIET_S = 10.0
_GLANCE_S = 2.0  # on a terminal: within so long the first I/O of a host is seen
_BAR = 20
_PERCENT = len(" 100%") + 2

_Row = TypeVar("_Row")


class _Show(Protocol):
    def __call__(self, groups: dict[str, Any], copies: list[Copy], hosts: list[HostIo]) -> None:
        """Show one look."""


def watch(place: tree.Place, where: Screen, interval_s: float, as_json: bool) -> None:
    """Show the copies and the host I/O of `place`, a mount or a group or an LU in it, until the user
    ends it."""
    tree.require(place)
    if where.is_terminal and not as_json:
        with _keyboard() as keys, _live(place, where) as show:
            _look_on(place, show, interval_s, keys, quiet_s=min(_GLANCE_S, _QUIET_S))
    else:
        show = _print_json if as_json else _Lines()
        _look_on(place, show, interval_s, None, quiet_s=_QUIET_S)


def _look_on(
    place: tree.Place, show: _Show, interval_s: float, keys: int | None, *, quiet_s: float
) -> None:
    speeds, host_speeds = Speeds(), HostSpeeds()
    try:
        while True:
            with looked_at(tree.Place(place.mountpoint), tree.STATUS_JSON) as look:
                groups = _groups(place, json.loads(look.value(tree.STATUS_JSON)))
                now_s = time.monotonic()
                copies, hosts = speeds.see(groups, now_s), host_speeds.see(groups, now_s)
                show(groups, copies, hosts)
                if _quit(keys, interval_s):
                    return
                wait_s = _BUSY_S if copies or hosts else quiet_s
                if look.wait(wait_s, also=keys) and _quit(keys, 0):
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


def _per_second(count: float) -> str:
    return f"{count:.0f}/s" if count >= 100 or count == 0 else f"{count:.1f}/s"


# Into a pipe


def _print_json(groups: dict[str, Any], copies: list[Copy], hosts: list[HostIo]) -> None:
    """The report of this look on one line."""
    click.echo(json.dumps({"at": _now(), "groups": groups}))


class _Lines:
    """A line at each look for each copy, and for each LU that hosts use; and one when a clone that is
    not copied has changed."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def __call__(self, groups: dict[str, Any], copies: list[Copy], hosts: list[HostIo]) -> None:
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
        for host in hosts:
            click.echo(f"{at} {_host_line(host)}")
        self._shown = states


def _line(copy: Copy) -> str:
    cod = "" if copy.cod_queue is None else f", COD {_cod(copy)}"
    return (
        f"{copy.name} {copy.state} {copy.condition} {copy.done}/{copy.total} {_percent(copy)}, "
        f"{_rate(copy)}, {_bytes_rate(copy)}, {_left(copy)} left{cod}"
    ).replace("stands still left", "stands still")


def _host_line(host: HostIo) -> str:
    return (
        f"{host.name} hosts: {_per_second(host.reads_s)} reads, {bytes_text(host.read_bytes_s)}/s, "
        f"{_per_second(host.writes_s)} writes, {bytes_text(host.written_bytes_s)}/s"
    )


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
    def show(groups: dict[str, Any], copies: list[Copy], hosts: list[HostIo]) -> None:
        # A window may have another size by now: the console asks anew each time.
        picture = frame(place, groups, copies, hosts, console.width, console.height)
        live.update(picture, refresh=True)

    return show


def frame(
    place: tree.Place,
    groups: dict[str, Any],
    copies: list[Copy],
    hosts: list[HostIo],
    width: int,
    height: int,
) -> "RenderableType":
    """What a terminal of this size shows: copies first, what is wrong, what hosts do, then how many
    clones rest."""
    from rich.console import Group
    from rich.text import Text

    notes = [f"{copy.name}: {copy.error}" for copy in copies if copy.error]
    room = max(height - 5 - len(notes), 2)
    for_hosts = min(len(hosts), max(room // 3, room - len(copies), 1))
    parts: list[RenderableType] = [
        Text(f"{place}", style="bold", no_wrap=True, overflow="ellipsis")
    ]
    shown, more = _fitting_rows(copies, room - for_hosts)
    parts.append(_table(shown, width) if copies else Text("nothing is being copied"))
    if more:
        parts.append(Text(f"and {more} more copies: a taller window shows them"))
    parts += [Text(printable(note), style="bold red") for note in notes]
    busiest = sorted(hosts, key=lambda host: -(host.reads_s + host.writes_s))
    used, others = _fitting_rows(busiest, for_hosts)
    parts.append(_host_table(used, width) if hosts else Text("no host reads or writes"))
    if others:
        parts.append(Text(f"and {others} more LUs that hosts use"))
    parts.append(Text(_footer(groups, copies), style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def _fitting_rows(rows: list[_Row], room: int) -> tuple[list[_Row], int]:
    """The first rows, and how many do not fit: then a line less, which says so."""
    shown = rows if len(rows) <= room else rows[: max(room - 1, 1)]
    return shown, len(rows) - len(shown)


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


_HOST_COLUMNS: dict[str, Callable[[HostIo], str]] = {
    "READS": lambda host: _per_second(host.reads_s),
    "READ": lambda host: f"{bytes_text(host.read_bytes_s)}/s",
    "WRITES": lambda host: _per_second(host.writes_s),
    "WRITTEN": lambda host: f"{bytes_text(host.written_bytes_s)}/s",
}
_CELL = len("99999/s") + 2


def _host_table(hosts: list[HostIo], width: int) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    longest = max(len(host.name) for host in hosts)
    columns = list(_HOST_COLUMNS)
    if width < longest + len(columns) * _CELL:
        columns = ["READ", "WRITTEN"]
    table.add_column("HOST I/O", no_wrap=True, overflow="ellipsis", min_width=longest)
    for name in columns:
        table.add_column(name, no_wrap=True, justify="right", min_width=_CELL - 2)
    for host in hosts:
        cells = [Text(_HOST_COLUMNS[name](host)) for name in columns]
        table.add_row(Text(host.name), *cells)
    return table
