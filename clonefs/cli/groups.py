"""add-group, add-clone, remove-clone, remove-group: what a mount consists of.

Whether a name or a backing is good is the daemon's decision, and so are its words. Only one thing
must be done here: a backing is made absolute, because the daemon has another working directory.
"""

from pathlib import Path

import click

from clonefs.cli import arguments, tree


@click.command("add-group")
@click.argument("mountpoint", type=arguments.mountpoint)
@click.argument("name")
@click.argument("backing", type=arguments.file)
@click.option("--size", metavar="SIZE", help="Create BACKING with this size if it does not exist.")
@click.option("--extent", metavar="SIZE", help="The extent size, 4K to 4M; 64K if not given.")
@click.option(
    "--copy",
    type=click.Choice(["auto", "full"]),
    help="auto, if not given: let clones share blocks where the file system can; full: never.",
)
def add_group(
    mountpoint: Path,
    name: str,
    backing: Path,
    size: str | None,
    extent: str | None,
    copy: str | None,
) -> None:
    """Make a clone group with BACKING as its Source.

    BACKING is a regular file or a block device. It appears as MOUNTPOINT/NAME/source, and must be
    used only through that file from now on. With --size a file that does not exist is created
    sparse. Sizes are in bytes, or with K, M, G or T in powers of 1024.

    \b
    Example:
      clonefs add-group /mnt payroll /srv/payroll.img
    """
    options = [f"size={size}"] if size is not None else []
    options += [f"extent={extent}"] if extent is not None else []
    options += [f"copy={copy}"] if copy is not None else []
    place = tree.mount_at(mountpoint)
    tree.command(place, "add_group", name, _absolute(backing), *options)


@click.command("add-clone")
@click.argument("group", metavar="MOUNTPOINT/GROUP", type=arguments.group)
@click.argument("name")
@click.argument("backing", type=arguments.file)
@click.option("--no-sync", is_flag=True, help="Do not start copying the Source to it.")
def add_clone(group: Path, name: str, backing: Path, no_sync: bool) -> None:
    """Add a clone to a group, and start copying the Source to it.

    BACKING is a regular file or a block device, at least as large as the Source; a file that does
    not exist is created sparse. The clone appears as MOUNTPOINT/GROUP/NAME. Wait until it is
    synchronized, then fracture it: that makes it a point-in-time copy.

    \b
    Example:
      clonefs add-clone /mnt/payroll nightly /backup/nightly.img
    """
    options = ["sync=no"] if no_sync else []
    tree.command(tree.group_at(group), "add_clone", name, _absolute(backing), *options)


@click.command("remove-clone")
@click.argument(
    "clone",
    metavar="MOUNTPOINT/GROUP/CLONE",
    type=arguments.clone("synchronized", "fractured", "out-of-sync", "reverse-out-of-sync"),
)
def remove_clone(clone: Path) -> None:
    """Remove a clone from its group.

    Its backing stays as it is. A clone that is being copied to or from cannot be removed.
    """
    place = tree.clone_at(clone)
    tree.require(place)
    tree.command(tree.Place(place.mountpoint, place.group), "remove_clone", *place.names[1:])


@click.command("remove-group")
@click.argument("group", metavar="MOUNTPOINT/GROUP", type=arguments.group)
def remove_group(group: Path) -> None:
    """Remove a group that has no clones left.

    The backing of its Source stays as it is, and can be used directly again.
    """
    place = tree.group_at(group)
    tree.require(place)
    tree.command(tree.Place(place.mountpoint), "remove_group", *place.names)


def _absolute(backing: Path) -> str:
    """The same file, named for a daemon with another working directory.

    `..` is left for the kernel: what it leads to depends on symbolic links.
    """
    return str(backing.absolute())
