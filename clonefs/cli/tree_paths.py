"""What a path in a mounted tree may go on with, for shells that complete it.

Whoever presses Tab must never wait, and never see an error: which mounts there are is read from the
kernel's table, what is in one from a single read of its status.json, for which there is a second in
all. A mount that is dead, hangs, or may not be looked into has nothing in it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from click.shell_completion import CompletionItem

from clonefs.cli import kernel, tree
from clonefs.cli.arguments import Wish
from clonefs.errors import ClonefsError

_LONGEST_S = 1.0


@dataclass(frozen=True)
class _Candidate:
    """How it is typed, and what it is."""

    text: str
    place: tree.Place
    state: str = ""

    @property
    def depth(self) -> int:
        return len(self.place.names)


def complete(wanted: Wish, incomplete: str) -> list[CompletionItem[str]]:
    """What `incomplete` may become; the shell's own files where it leads into no mount."""
    found: list[_Candidate] = []
    # A thread that hangs in the kernel does not keep the process from ending.
    look = threading.Thread(
        target=lambda: found.extend(_candidates(wanted, incomplete)), daemon=True
    )
    look.start()
    look.join(_LONGEST_S)
    items = [_item(each, wanted) for each in found]
    return items or [CompletionItem(incomplete, type="file")]


def _item(candidate: _Candidate, wanted: Wish) -> CompletionItem[str]:
    """A path that leads on ends in a slash."""
    more = "" if candidate.depth == wanted.depth else "/"
    return CompletionItem(candidate.text + more, type="path", help=candidate.state)


def _candidates(wanted: Wish, incomplete: str) -> list[_Candidate]:
    """Those that begin so. What there is only one of is gone into at once, unless it is wanted."""
    head, slash, _ = incomplete.rpartition("/")
    found = [each for each in _at(head + slash, wanted) if each.text.startswith(incomplete)]
    while len(found) == 1 and found[0].depth < wanted.depth and not wanted.on_the_way:
        inside = list(_below(f"{found[0].text}/", found[0].place, wanted))
        if not inside:
            break
        found = inside
    return found


def _at(head: str, wanted: Wish) -> Iterator[_Candidate]:
    """What is in the directory `head`, which is empty or ends in a slash."""
    real = Path(os.path.realpath(head or "."))
    mountpoints = _mountpoints()
    inside = [each for each in mountpoints if real.is_relative_to(each)]
    if inside:
        root = max(inside, key=lambda each: len(each.parts))
        names = real.relative_to(root).parts
        if len(names) < wanted.depth:
            yield from _below(head, tree.Place(root, *names), wanted)
            return
    for mountpoint in mountpoints:
        place = tree.Place(mountpoint)
        if mountpoint != real and mountpoint.is_relative_to(real):
            yield _Candidate(f"{head}{mountpoint.relative_to(real)}", place)
        elif not head:
            yield _Candidate(str(mountpoint), place)


def _below(head: str, place: tree.Place, wanted: Wish) -> Iterator[_Candidate]:
    """The groups of a mount, or the LUs of a group."""
    groups = _groups(place.mountpoint)
    if place.group is None:
        for name in sorted(groups):
            yield _Candidate(head + name, tree.Place(place.mountpoint, name))
        return
    clones = groups.get(place.group, {"clones": {}})["clones"]
    states = {
        name: clone.get("state", "")
        for name, clone in clones.items()
        if head + name not in wanted.named
    }
    best = [name for name, state in states.items() if state in wanted.states]
    for name in (*([tree.SOURCE] if wanted.sources else []), *(best or states)):
        here = tree.Place(place.mountpoint, place.group, name)
        yield _Candidate(head + name, here, states.get(name, ""))


@cache
def _mountpoints() -> tuple[Path, ...]:
    with suppress(OSError):
        return tuple(kernel.clonefs_mountpoints())
    return ()


@cache
def _groups(mountpoint: Path) -> dict[str, Any]:
    with suppress(ClonefsError, OSError, ValueError):
        groups: dict[str, Any] = tree.report(tree.Place(mountpoint))["groups"]
        return groups
    return {}
