"""map: the Delta Map, the Protected Restore Map and what is pending, drawn."""

from pathlib import Path

import click

from clonefs.cli import arguments, tree
from clonefs.cli.terminal import colour_option, screen

_FEWEST_LINES = 4


@click.command("map")
@click.argument("path", type=arguments.place)
@click.option("--json", "as_json", is_flag=True, help="Print the cells for programs instead.")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw into FILE.")
@click.option("--width", metavar="COLUMNS", type=click.IntRange(min=8), help="Characters a line.")
@click.option(
    "--lines", "height", metavar="LINES", type=click.IntRange(min=1), help="Lines a clone."
)
@click.option("--ascii", "ascii_only", is_flag=True, help="Draw with ASCII characters only.")
@colour_option
def map_(
    path: Path,
    as_json: bool,
    svg: Path | None,
    width: int | None,
    height: int | None,
    ascii_only: bool,
    colour: str,
) -> None:
    """Draw which extents of a clone differ from its Source.

    PATH is a clone; or a group, its Source or a mount point, for all their clones. Each cell stands
    for one extent or for many, by the size of the terminal, and is the darker the more of them
    differ; one that has any is never drawn as one that has none. While a restore runs from a clone,
    its picture shows what is pending, and what is protected: it belongs to the host, and is not
    copied over.

    \b
    Example:
      clonefs map /mnt/payroll/nightly
      clonefs map --svg report.svg /mnt/payroll
    """
    from clonefs.cli import drawing

    clones = drawing.clones_at(tree.locate(path))
    if svg is not None:
        from clonefs.cli.svg import COLUMNS, LINES, draw

        svg.write_text(draw(drawing.pictures_of(clones, COLUMNS, LINES)), encoding="utf-8")
        return
    where = screen(colour)
    columns = width or where.columns
    room = max(where.lines // len(clones) - drawing.AROUND, _FEWEST_LINES)
    pictures = drawing.pictures_of(clones, columns, height or room)
    if as_json:
        drawing.print_json(pictures)
    else:
        drawing.print_pictures(pictures, where, width=columns, ascii_only=ascii_only)
