"""status: show what the daemon says of itself, word for word; --watch: go on showing it.

A pipe gets the bytes of the control file. A terminal gets the same words in colours, and as many
columns as it has room for.
"""

import json
import os
from pathlib import Path

import click

from clonefs.cli import arguments, kernel, tree
from clonefs.cli.terminal import Screen, colour_option, screen
from clonefs.errors import ClonefsError, failed, invalid, missing


@click.command()
@click.argument("path", required=False, type=arguments.place)
@click.option("--json", "as_json", is_flag=True, help="Print it for programs instead.")
@click.option("--watch", is_flag=True, help="Go on showing the copies that run; q ends it.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=0.5,
    metavar="SECONDS",
    help="With --watch: look no more often than this; 0.5 if not given.",
)
@colour_option
def status(path: Path | None, as_json: bool, watch: bool, interval: float, colour: str) -> None:
    """Show the groups and the clones of a mount, and their states.

    PATH is a mount point, a group, or an LU, for which the whole group is shown. Without PATH every
    mount is shown. A terminal that is too narrow gets fewer columns.

    With --watch there is a bar for each copy that runs, how much it copies a second, the time that
    is left by the mean of the last 10 seconds, and the COD Queue. Into a pipe it prints a line for
    each look at a copy instead, and with --json the report on one line. The mount is in use as long
    as it is watched.

    \b
    Example:
      clonefs status /mnt
      clonefs status --json /mnt/payroll | jq .clones.nightly.state
      clonefs status --watch
    """
    where = screen(colour)
    if watch:
        from clonefs.cli.watch import watch as watch_it

        watch_it(_only_mount() if path is None else tree.locate(path), where, interval, as_json)
    elif path is None:
        _show_all(as_json, where)
    else:
        _show(tree.locate(path), as_json, where)


def _mountpoints() -> list[Path]:
    mountpoints = kernel.clonefs_mountpoints()
    if not mountpoints:
        raise missing("nothing is mounted: see clonefs mount --help")
    return mountpoints


def _only_mount() -> tree.Place:
    first, *others = _mountpoints()
    if others:
        listed = ", ".join(map(str, (first, *others)))
        raise invalid(f"there are several mounts: name the one to watch: {listed}")
    return tree.mount_at(first)


def _show_all(as_json: bool, where: Screen) -> None:
    mountpoints = _mountpoints()
    headed = len(mountpoints) > 1 and not as_json
    unseen = []
    for mountpoint in mountpoints:
        try:
            place = tree.mount_at(mountpoint)
            _show(place, as_json, where, heading=f"{mountpoint}:" if headed else None)
        except ClonefsError as error:
            unseen.append(error.reason)  # one dead mount must not hide the others
    if unseen:
        raise failed("; ".join(unseen))


def _show(place: tree.Place, as_json: bool, where: Screen, heading: str | None = None) -> None:
    tree.require(place)
    text = _json(place) if as_json else tree.read(_group_of(place), tree.STATUS)
    if heading is not None:
        click.echo(heading)
    if as_json or not (where.is_terminal or where.colour):
        click.echo(text, nl=False)
        return
    from clonefs.cli.table import fitted

    for line in fitted(os.fsdecode(text), where):
        where.print(line)


def _group_of(place: tree.Place) -> tree.Place:
    return tree.Place(place.mountpoint, place.group)


def _json(place: tree.Place) -> bytes:
    if place.group is None:
        return tree.read(place, tree.STATUS_JSON)
    groups = tree.report(place)["groups"]
    if place.group not in groups:
        raise tree.no_group(place)
    return json.dumps(groups[place.group], indent=2).encode() + b"\n"
