"""Types of arguments that several commands share: paths, and what a shell may complete them to.

click.Path is not used: it looks at the file itself, and a look at a dead mount, or at one of
another user, is an error that the commands have better words for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    _ParamType = click.ParamType[Path]
else:
    _ParamType = click.ParamType  # takes no type in older versions


class PathType(_ParamType):
    """A path as it was typed; an empty one is wrong usage, for Path would make it the directory.

    `shell` is what the shell completes by itself: `file` or `dir`.
    """

    name = "path"

    def __init__(self, shell: str = "file") -> None:
        self.shell = shell

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        if not str(value):
            self.fail("the path is empty", param, ctx)
        return Path(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Leave it to the shell."""
        return [CompletionItem(incomplete, type=self.shell)]


@dataclass(frozen=True)
class Wish:
    """What path of a mounted tree is meant: one that is `depth` names below a mount point.

    0 is a mount point, 1 a group, 2 an LU. Clones in one of `states` are offered rather than others,
    and none that is `named` already. A Source only with `sources`. With `on_the_way` what leads there is
    meant too.
    """

    depth: int
    states: tuple[str, ...] = ()
    sources: bool = False
    on_the_way: bool = False
    named: frozenset[str] = frozenset()


class TreePath(PathType):
    """A path of a mounted tree."""

    def __init__(self, wish: Wish) -> None:
        super().__init__()
        self.wish = wish

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """What the mounts of this machine have."""
        from clonefs.cli.tree_paths import complete

        given = ctx.params.get(param.name or "")
        named = frozenset(map(str, given)) if isinstance(given, tuple) else frozenset()
        return complete(replace(self.wish, named=named), incomplete)


file = PathType()
directory = PathType("dir")
mountpoint = TreePath(Wish(0))
group = TreePath(Wish(1))
place = TreePath(Wish(2, sources=True, on_the_way=True))


def clone(*states: str) -> TreePath:
    """A clone, best in one of these states."""
    return TreePath(Wish(2, states=states))


def mount_options(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """What the last of several options between commas may be; none that is there already."""
    from clonefs.fuse.options import EXPLAINED

    before, comma, typed = incomplete.rpartition(",")
    named = {each.partition("=")[0] for each in before.split(",")}
    return [
        CompletionItem(before + comma + name, help=text)
        for name, text in EXPLAINED.items()
        if name.startswith(typed) and name.rstrip("=") not in named
    ]
