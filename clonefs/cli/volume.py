"""format and grow: make a metadata volume, and make it larger."""

from pathlib import Path

import click

from clonefs.cli import arguments


@click.command("format")
@click.argument("meta", type=arguments.file)
@click.option("--size", metavar="SIZE", help="Its size: 64M for a file, or all of a block device.")
@click.option("--force", is_flag=True, help="Overwrite what is there.")
def format_(meta: Path, size: str | None, force: bool) -> None:
    """Make a metadata volume in META, a file or a block device.

    It keeps the names, the states and the maps of all groups of one mount, no data of theirs.

    \b
    Example:
      clonefs format /var/lib/clonefs.meta
    """
    from clonefs.extents import parse_size
    from clonefs.volume import format_volume

    format_volume(meta, size=None if size is None else parse_size(size), force=force)


@click.command()
@click.argument("meta", type=arguments.file)
@click.option("--size", metavar="SIZE", help="Its new size; else all of its file or block device.")
def grow(meta: Path, size: str | None) -> None:
    """Make the metadata volume META larger, while it is not mounted.

    Groups, clones and maps stay as they are, and there is room for more. A file is made longer; a block
    device has to be larger already.

    \b
    Example:
      clonefs grow /var/lib/clonefs.meta --size 256M
    """
    from clonefs.extents import parse_size
    from clonefs.volume import grow_volume

    grow_volume(meta, size=None if size is None else parse_size(size))
