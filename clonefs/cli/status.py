"""status: show what the daemon says of itself, word for word."""

import json
from pathlib import Path

import click

from clonefs.cli import kernel, tree
from clonefs.cli.arguments import path as path_type
from clonefs.errors import ClonefsError, failed, missing


@click.command()
@click.argument("path", required=False, type=path_type)
@click.option("--json", "as_json", is_flag=True, help="Print it for programs instead.")
def status(path: Path | None, as_json: bool) -> None:
    """Show the groups and the clones of a mount, and their states.

    PATH is a mount point, a group, or an LU, for which the whole group is shown. Without PATH every
    mount is shown.

    \b
    Example:
      clonefs status /mnt
      clonefs status --json /mnt/payroll | jq .clones.nightly.state
    """
    if path is None:
        _show_all(as_json)
    else:
        _show(tree.locate(path), as_json)


def _show_all(as_json: bool) -> None:
    mountpoints = kernel.clonefs_mountpoints()
    if not mountpoints:
        raise missing("nothing is mounted: see clonefs mount --help")
    headed = len(mountpoints) > 1 and not as_json
    unseen = []
    for mountpoint in mountpoints:
        try:
            _show(tree.mount_at(mountpoint), as_json, heading=f"{mountpoint}:" if headed else None)
        except ClonefsError as error:
            unseen.append(error.reason)  # one dead mount must not hide the others
    if unseen:
        raise failed("; ".join(unseen))


def _show(place: tree.Place, as_json: bool, heading: str | None = None) -> None:
    tree.require(place)
    text = _json(place) if as_json else tree.read(_group_of(place), tree.STATUS)
    if heading is not None:
        click.echo(heading)
    click.echo(text, nl=False)


def _group_of(place: tree.Place) -> tree.Place:
    return tree.Place(place.mountpoint, place.group)


def _json(place: tree.Place) -> bytes:
    if place.group is None:
        return tree.read(place, tree.STATUS_JSON)
    groups = tree.report(place)["groups"]
    if place.group not in groups:
        raise missing(f"there is no group {place.group} in the mount at {place.mountpoint}")
    return json.dumps(groups[place.group], indent=2).encode() + b"\n"
