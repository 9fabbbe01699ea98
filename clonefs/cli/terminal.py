"""What commands know of where their output goes: a terminal of some size, with or without colours.

Whoever draws asks here, so that NO_COLOR, --color and a pipe mean the same to every command. What
is drawn must be told apart without its colours too: they only help.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., Any])

PIPE_COLUMNS = 80
PIPE_LINES = 24


@dataclass(frozen=True)
class Screen:
    """Where standard output goes. `columns` and `lines` are those of a small terminal for a pipe."""

    is_terminal: bool
    colour: bool
    columns: int
    lines: int
    unicode: bool

    def style(self, text: str, **style: Any) -> str:
        """`text` in colours, if there are any."""
        return click.style(text, **style) if self.colour and text else text

    def print(self, text: str) -> None:
        """Print one line or several, with the colours that are in them."""
        click.echo(text, color=self.colour)


def screen(colour: str) -> Screen:
    """The screen, with colours `always`, `never`, or `auto`: on a terminal without NO_COLOR."""
    is_terminal = sys.stdout.isatty()
    size = shutil.get_terminal_size((PIPE_COLUMNS, PIPE_LINES))
    wanted = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Screen(
        is_terminal=is_terminal,
        colour=wanted if colour == "auto" else colour == "always",
        columns=size.columns if is_terminal else PIPE_COLUMNS,
        lines=size.lines if is_terminal else PIPE_LINES,
        unicode=(sys.stdout.encoding or "").lower().replace("-", "") == "utf8",
    )


def colour_option(function: _Function) -> _Function:
    """The option --color, as `colour`."""
    option = click.option(
        "--color",
        "colour",
        type=click.Choice(("auto", "always", "never")),
        default="auto",
        help="Colours: on a terminal unless NO_COLOR is set (auto), or always, or never.",
    )
    return option(function)


def printable(text: str) -> str:
    """The text without anything that would move a terminal's cursor or change its colours."""
    return "".join(char if char.isprintable() else "?" for char in text)


def shortened(text: str, length: int) -> str:
    """The text, cut at its end to this length; the last character says so."""
    return text if len(text) <= length else text[: max(length - 1, 0)] + "…"


def bytes_text(count: float) -> str:
    """A number of bytes for people: three digits and a unit, 99.4M."""
    for unit in ("", "K", "M", "G"):
        if count < 1024:
            return f"{count:.0f}{unit}" if unit == "" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}T"
