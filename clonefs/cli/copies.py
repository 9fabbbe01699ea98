"""sync, fracture, restore, reverse-sync, wait: what is done with the clones of a group."""

from pathlib import Path

import click

from clonefs.cli import arguments, tree
from clonefs.cli.waiting import COPYING, STATES, wait_for
from clonefs.errors import invalid

_CLONE = "MOUNTPOINT/GROUP/CLONE"
_RESTORABLE = arguments.clone("fractured", "reverse-out-of-sync")
_wait_option = click.option(
    "--wait", "wait_too", is_flag=True, help="Return only when the copy is complete."
)


@click.command()
@click.argument("clone", metavar=_CLONE, type=arguments.clone("fractured", "out-of-sync"))
@click.option(
    "--then-fracture", is_flag=True, help="Split the clone off again when it equals the Source."
)
@_wait_option
def sync(clone: Path, then_fracture: bool, wait_too: bool) -> None:
    """Copy to a clone what has changed since it was fractured.

    The clone is mirrored from now on, and is no point-in-time copy until it is fractured again.

    \b
    Example, a fresh copy every night:
      clonefs sync --then-fracture --wait /mnt/payroll/nightly
    """
    place = tree.clone_at(clone)
    tree.command(place, "sync", "then-fracture" if then_fracture else "1")
    if wait_too:
        wait_for(place, wanted="fractured" if then_fracture else None)


@click.command()
@click.argument(
    "clones",
    metavar=f"{_CLONE}...",
    nargs=-1,
    required=True,
    type=arguments.clone("synchronized", "synchronizing", "restoring", "reverse-synchronizing"),
)
@click.option(
    "--force",
    is_flag=True,
    help="Break off a restore or reverse sync from this clone: the Source stays mixed.",
)
@click.option(
    "--freeze",
    "mountpoints",
    metavar="MOUNTPOINT",
    multiple=True,
    type=arguments.directory,
    help="Freeze the file system that is mounted there meanwhile. Several: in this order.",
)
@click.option("--before", metavar="COMMAND", help="Run this by sh before; if it fails, stop there.")
@click.option("--after", metavar="COMMAND", help="Run this by sh after, whatever has come of it.")
@click.option(
    "--freeze-limit",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    help="Thaw after this time in any case; 10 if not given.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what has been done for programs.")
def fracture(
    clones: tuple[Path, ...],
    force: bool,
    mountpoints: tuple[Path, ...],
    before: str | None,
    after: str | None,
    freeze_limit: float,
    as_json: bool,
) -> None:
    """Split clones off from their Sources.

    A clone that is synchronized becomes a complete point-in-time copy. Several clones of one mount,
    of the same or of different groups, are split off at one and the same instant.

    With --freeze the file systems on the Sources are frozen for that instant (milliseconds), so that
    the copies are clean, and thawed whatever happens. --before and --after are for programs that
    have to be told.

    \b
    Example, data and log of a database as they were together:
      clonefs fracture /mnt/data/nightly /mnt/log/nightly
    Example, a clean copy of a file system in use:
      clonefs fracture /mnt/payroll/nightly --freeze /srv/payroll
    """
    places = list(dict.fromkeys(map(tree.clone_at, clones)))
    place, file, words = _fracture_write(places, force=force)
    if not (mountpoints or before is not None or after is not None):
        if as_json:
            raise click.UsageError("--json goes with --freeze")
        tree.command(place, file, *words)
    elif force:
        raise click.UsageError("--force goes with neither --freeze nor --before nor --after")
    else:
        from clonefs.cli import consistent

        order = consistent.Order(
            places, (place, file, words), mountpoints, before, after, freeze_limit
        )
        consistent.fracture_and_say(order, as_json=as_json)


def _fracture_write(places: list[tree.Place], *, force: bool) -> tuple[tree.Place, str, list[str]]:
    """What is to be written: where, to which file, which words."""
    first, *others = places
    if not others:
        return first, "fracture", ["force" if force else "1"]
    if force:
        raise click.UsageError("--force takes one clone at a time")
    for other in others:
        if other.mountpoint != first.mountpoint:
            raise invalid(
                f"{first} and {other} are in different mounts: "
                "only clones of one mount can be fractured at one instant"
            )
    return tree.Place(first.mountpoint), "fracture", ["/".join(each.names) for each in places]


@click.command()
@click.argument("clone", metavar=_CLONE, type=_RESTORABLE)
@_wait_option
def restore(clone: Path, wait_too: bool) -> None:
    """Make the Source what the clone is, at once.

    When this returns, the Source shows the clone's data, whatever the size; the copying goes on in
    the background while the Source is read and written. The clone itself never changes, so that it
    can be restored from again. Stop whatever has the Source's old data in memory first: unmount the
    file system on it, or stop the database.

    \b
    Example:
      clonefs restore /mnt/payroll/nightly
    """
    place = tree.clone_at(clone)
    tree.command(place, "protected_restore", "1")
    if wait_too:
        wait_for(place)


@click.command("reverse-sync")
@click.argument("clone", metavar=_CLONE, type=_RESTORABLE)
@_wait_option
def reverse_sync(clone: Path, wait_too: bool) -> None:
    """Make the Source what the clone is, and mirror the clone again.

    Like restore, it takes effect at once. But whatever is written to the Source from now on goes to
    the clone too, so that the point-in-time copy is used up; at the end the clone is synchronized.

    \b
    Example:
      clonefs reverse-sync --wait /mnt/payroll/nightly
    """
    place = tree.clone_at(clone)
    tree.command(place, "reverse_sync", "1")
    if wait_too:
        wait_for(place, wanted="synchronized")


@click.command()
@click.argument("clone", metavar=_CLONE, type=arguments.clone(*COPYING))
@click.option(
    "--state",
    metavar="STATE",
    type=click.Choice(STATES),
    help=f"Wait until the clone is in this state: {', '.join(STATES[:-1])} or {STATES[-1]}.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Give up, with exit status 1, after this time.",
)
def wait(clone: Path, state: str | None, timeout: float | None) -> None:
    """Wait until a copy is done, or the clone is in a given state.

    It returns at once when nothing is being copied. The exit status is 1 when the copy cannot
    complete: the clone is out-of-sync, say, or waits for somebody to act.

    \b
    Example:
      clonefs wait --state synchronized --timeout 3600 /mnt/payroll/nightly
    """
    wait_for(tree.clone_at(clone), wanted=state, timeout_s=timeout)
