"""format: make a metadata volume, the only thing that is needed before the first mount."""

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
