"""A progress bar on a terminal, and nothing anywhere else.

The bar goes to standard error, so that standard output stays the command's. rich is imported only
when there is a terminal to draw on: scripts must not pay for it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar(Protocol):
    """Where a wait shows how far it is."""

    def show(self, state: str, done: int, total: int) -> None:
        """Draw this as the present state."""

    def say(self, text: str) -> None:
        """Print one line without disturbing what is drawn."""


@contextmanager
def progress_bar(title: str) -> Iterator[Bar]:
    """A bar for as long as the block runs: drawn if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield _NoBar()
        return
    with _progress() as progress:
        yield _TerminalBar(progress, title)


def _progress() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[state]}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("extents"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _NoBar:
    def show(self, state: str, done: int, total: int) -> None:
        pass

    def say(self, text: str) -> None:
        click.echo(text, err=True)


class _TerminalBar:
    def __init__(self, progress: "Progress", title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None, state="")

    def show(self, state: str, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total, state=state)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
