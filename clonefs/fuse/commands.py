"""The grammar of the control files: one line of words is one command.

A path with blanks is quoted as in a shell. What is not in the grammar is EINVAL with a sentence
that shows the right form; nothing is guessed.
"""

import shlex
from pathlib import Path

from clonefs.engines import StorageSystem
from clonefs.errors import ClonefsError, invalid
from clonefs.extents import parse_size

AUTO, FULL = "auto", "full"


def words(text: str) -> list[str]:
    """The words of a command. Raises ClonefsError (EINVAL) for an empty or a broken line."""
    line = text[:-1] if text.endswith("\n") else text
    if "\n" in line or "\0" in line:
        raise invalid("a command is one line: write one at a time")
    try:
        found = shlex.split(line)
    except ValueError as error:
        raise invalid(f"{line!r} is no command: {str(error).lower()}") from None
    if not found:
        raise invalid("an empty line is no command")
    return found


def one_of(text: str, *allowed: str) -> str:
    """The one word that `text` is, if it is allowed. Raises ClonefsError (EINVAL)."""
    found = words(text)
    if len(found) != 1 or found[0] not in allowed:
        raise invalid(f"{text.strip()!r} is not a command here: write {' or '.join(allowed)}")
    return found[0]


def settings(found: list[str], form: str, *known: str) -> dict[str, str]:
    """`key=value` words as a mapping. Raises ClonefsError (EINVAL)."""
    values: dict[str, str] = {}
    for word in found:
        key, equals, value = word.partition("=")
        if not equals or key not in known or key in values:
            raise invalid(f"{word!r} is not understood: write {form}")
        values[key] = value
    return values


def backing_path(word: str) -> Path:
    """The path of a backing: absolute, since the daemon works in another directory."""
    path = Path(word)
    if not path.is_absolute():
        raise invalid(f"{word!r} is a relative path: write an absolute one")
    return path


def clone_path(word: str) -> tuple[str, str]:
    """GROUP/CLONE. Raises ClonefsError (EINVAL)."""
    group, slash, clone = word.partition("/")
    if not slash or not group or not clone or "/" in clone:
        raise invalid(f"{word!r} is not a clone: write GROUP/CLONE")
    return group, clone


async def add_group(system: StorageSystem, text: str) -> None:
    """NAME BACKING [size=10G] [extent=64K] [copy=full]"""
    form = "NAME BACKING [size=10G] [extent=64K] [copy=full]"
    found = words(text)
    if len(found) < 2:
        raise invalid(f"{text.strip()!r} is too little: write {form}")
    values = settings(found[2:], form, "size", "extent", "copy")
    full_copies = one_of(values.pop("copy", AUTO), AUTO, FULL) == FULL
    sizes = {key: parse_size(value) for key, value in values.items()}
    await system.add_group(
        found[0],
        backing_path(found[1]),
        size=sizes.get("size"),
        extent_size=sizes.get("extent"),
        full_copies=full_copies,
    )


async def copy(system: StorageSystem, group: str, text: str) -> None:
    """auto or full"""
    await system.set_full_copies(group, one_of(text, AUTO, FULL) == FULL)


async def add_clone(system: StorageSystem, group: str, text: str) -> None:
    """NAME BACKING [sync=no]"""
    form = "NAME BACKING [sync=no]"
    found = words(text)
    if len(found) < 2:
        raise invalid(f"{text.strip()!r} is too little: write {form}")
    sync = settings(found[2:], form, "sync").get("sync", "yes")
    if sync not in ("yes", "no"):
        raise invalid(f"sync={sync} is not understood: write {form}")
    await system.add_clone(group, found[0], backing_path(found[1]), sync=sync == "yes")


def one_name(text: str) -> str:
    """The one word that is a name. Raises ClonefsError (EINVAL)."""
    found = words(text)
    if len(found) != 1:
        raise invalid(f"{text.strip()!r} is not understood: write one NAME")
    return found[0]


async def fracture_several(system: StorageSystem, text: str) -> None:
    """GROUP/CLONE [GROUP/CLONE ...]"""
    await system.fracture([clone_path(word) for word in words(text)])


async def sync(system: StorageSystem, group: str, clone: str, text: str) -> None:
    """1, or then-fracture"""
    word = one_of(text, "1", "then-fracture")
    await system.sync(group, clone, then_fracture=word == "then-fracture")


async def fracture(system: StorageSystem, group: str, clone: str, text: str) -> None:
    """1, or force"""
    if one_of(text, "1", "force") == "force":
        await system.force_fracture(group, clone)
    else:
        await system.fracture([(group, clone)])


async def protected_restore(system: StorageSystem, group: str, clone: str, text: str) -> None:
    """1"""
    one_of(text, "1")
    await system.protected_restore(group, clone)


async def reverse_sync(system: StorageSystem, group: str, clone: str, text: str) -> None:
    """1"""
    one_of(text, "1")
    await system.reverse_sync(group, clone)


async def rate(system: StorageSystem, group: str, clone: str, text: str) -> None:
    """Bytes a second, or max"""
    found = words(text)
    value = parse_rate(found)
    await system.set_rate(group, clone, value)


async def verify(system: StorageSystem, group: str, clone: str, text: str) -> None:
    """1, stop, or a rate"""
    found = words(text)
    if found == ["stop"]:
        await system.stop_verifying(group, clone)
    else:
        await system.verify(group, clone, None if found == ["1"] else parse_rate(found))


def parse_rate(found: list[str]) -> int | None:
    """Bytes a second, None for max. Raises ClonefsError (EINVAL)."""
    if found == ["max"]:
        return None
    try:
        value = parse_size(found[0]) if len(found) == 1 else 0
    except ClonefsError:
        value = 0
    if not value:
        raise invalid(f"{' '.join(found)!r} is not a rate: write bytes a second, like 64M, or max")
    return value
