"""verify: read a clone and its Source, and say what differs though no map has it."""

import re
import time
from pathlib import Path

import click

from clonefs.cli import arguments, tree
from clonefs.cli.progress import progress_bar
from clonefs.errors import failed

_PAUSE_S = 0.1
_LINE = re.compile(r"(\w+) (\d+)/(\d+) (\d+) differ (\d+) unreadable")


@click.command()
@click.argument("clone", metavar="MOUNTPOINT/GROUP/CLONE", type=arguments.clone())
@click.option("--rate", metavar="RATE", help="Read at most so many bytes a second: 64M.")
def verify(clone: Path, rate: str | None) -> None:
    """Read a clone and its Source, and compare them.

    Every difference must be in the Delta Map. Each run of extents that differs though no map has it
    is printed, and then the exit status is 1. Hosts go on reading and writing meanwhile. Interrupted,
    it stops. It changes nothing.

    \b
    Example, gently:
      clonefs verify --rate 64M /mnt/payroll/nightly
    """
    place = tree.clone_at(clone)
    tree.command(place, "verify", rate or "1")
    try:
        stage, done, different, unreadable = _wait(place)
    except KeyboardInterrupt:
        tree.command(place, "verify", "stop")
        raise
    _print_differences(place)
    if different:
        raise failed(f"{place}: {different} extents differ from the Source, and no map has them")
    if unreadable:
        raise failed(f"{place}: {unreadable} extents could not be read: {tree.trouble(place)}")
    if stage != "done":
        raise failed(f"{place}: the verification has {stage} after {done} extents")


def _wait(place: tree.Place) -> tuple[str, int, int, int]:
    """How it ended: the word for it, and how many extents were looked at, differ, and could not be
    read."""
    with progress_bar(str(place)) as bar:
        while True:
            found = _LINE.fullmatch(tree.value(place, "verify"))
            if found is None:
                raise failed(f"{place}: the verification is gone: the daemon was started again")
            done, total, different, unreadable = map(int, found.groups()[1:])
            bar.show("verifying", done, total)
            if found[1] != "running":
                return found[1], done, different, unreadable
            time.sleep(_PAUSE_S)


def _print_differences(place: tree.Place) -> None:
    size = int(tree.value(tree.Place(place.mountpoint, place.group), "extent_size"))
    for part in filter(None, tree.value(place, "differences").split(",")):
        first, _, last = part.partition("-")
        start, stop = int(first) * size, (int(last or first) + 1) * size
        click.echo(f"extents {part}: bytes {start} to {stop - 1} differ")
