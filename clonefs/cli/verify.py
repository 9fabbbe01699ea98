"""verify: read a clone and its Source, and say what differs though no map has it."""

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from clonefs.cli import arguments, tree
from clonefs.cli.progress import progress_bar
from clonefs.errors import failed

_PAUSE_S = 0.1
_LINE = re.compile(r"(\w+) (\d+)/(\d+) (\d+) differ (\d+) unreadable")


@dataclass(frozen=True)
class _Outcome:
    """How it has ended, and how many extents were looked at, differ, and could not be read."""

    state: str
    done: int
    total: int
    different: int
    unreadable: int


@click.command()
@click.argument("clone", metavar="MOUNTPOINT/GROUP/CLONE", type=arguments.clone())
@click.option("--rate", metavar="RATE", help="Read at most so many bytes a second: 64M.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found for programs instead.")
def verify(clone: Path, rate: str | None, as_json: bool) -> None:
    """Read a clone and its Source, and compare them.

    Every difference must be in the Delta Map. Each run of extents that differs though no map has it
    is printed, and then the exit status is 1. Hosts go on reading and writing meanwhile. Interrupted,
    it stops. It changes nothing.

    \b
    Example, gently:
      clonefs verify --rate 64M /mnt/payroll/nightly
    """
    place = tree.clone_at(clone)
    try:
        tree.command(place, "verify", rate or "1")
        outcome = _wait(place)
    except KeyboardInterrupt:
        tree.command(place, "verify", "stop")
        raise
    if as_json:
        _print_json(place, outcome)
    else:
        _print_differences(place)
    _judge(place, outcome)


def _judge(place: tree.Place, outcome: _Outcome) -> None:
    """Raises ClonefsError unless everything was read, and nothing was found."""
    if outcome.different:
        raise failed(
            f"{place}: {outcome.different} extents differ from the Source, and no map has them: "
            "find out which of the two is right before you use it"
        )
    if outcome.unreadable:
        why = tree.trouble(place)
        raise failed(f"{place}: {outcome.unreadable} extents could not be read: {why}")
    if outcome.state != "done":
        raise failed(
            f"{place}: the verification has {outcome.state} after {outcome.done} extents: start it again"
        )


def _wait(place: tree.Place) -> _Outcome:
    with progress_bar(str(place)) as bar:
        while True:
            found = _LINE.fullmatch(tree.value(place, "verify"))
            if found is None:
                raise failed(f"{place}: the verification is gone: the daemon was started again")
            outcome = _Outcome(found[1], *map(int, found.groups()[1:]))
            bar.show("verifying", outcome.done, outcome.total)
            if outcome.state != "running":
                return outcome
            time.sleep(_PAUSE_S)


def _print_json(place: tree.Place, outcome: _Outcome) -> None:
    """The fields of `verify` in status.json, and the extent size."""
    group = tree.Place(place.mountpoint, place.group)
    told = {
        "clone": "/".join(place.names),
        **asdict(outcome),
        "differences": tree.value(place, "differences"),
        "extent_size": int(tree.value(group, "extent_size")),
    }
    click.echo(json.dumps(told, indent=2))


def _print_differences(place: tree.Place) -> None:
    size = int(tree.value(tree.Place(place.mountpoint, place.group), "extent_size"))
    for part in filter(None, tree.value(place, "differences").split(",")):
        first, _, last = part.partition("-")
        start, stop = int(first) * size, (int(last or first) + 1) * size
        click.echo(f"extents {part}: bytes {start} to {stop - 1} differ")
