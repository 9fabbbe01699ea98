"""The mounted tree as a program uses it: find it, write a command to it, read a value from it.

The one place that knows how the contract lays out MOUNTPOINT/control. A command is one write(2) of
one line, as echo would do it, and the sentence for a refusal is the daemon's own, from the `error`
file of the same directory. This module must never do anything to a mount that goes past its files,
and never guess what the daemon would say.

A mount is known by its `control/status.json`, not by the kernel's table: what matters is that the
files are there.
"""

import errno
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clonefs.errors import ClonefsError, failed, invalid, missing

CONTROL = "control"
STATUS = "status"
STATUS_JSON = "status.json"
ERROR = "error"
SOURCE = "source"

_LOST = frozenset({errno.ENOTCONN, errno.ECONNABORTED})
"""What a system call gives when the daemon behind a mount is no more."""


@dataclass(frozen=True)
class Place:
    """A point of a mounted tree: the whole (no group), a group (no LU), or an LU."""

    mountpoint: Path
    group: str | None = None
    lu: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that lead to it from the mount point."""
        return tuple(name for name in (self.group, self.lu) if name is not None)

    @property
    def control(self) -> Path:
        """Its control directory."""
        return self.mountpoint.joinpath(CONTROL, *self.names)

    def __str__(self) -> str:
        return str(self.mountpoint.joinpath(*self.names))


# Finding a place -------------------------------------------------------------------------------


def locate(path: Path) -> Place:
    """The place of a clonefs mount that `path` names. Raises ClonefsError where it names none."""
    real = Path(os.path.realpath(path))
    unseen: dict[int | None, Path] = {}
    for candidate in (real, *real.parents):
        try:
            candidate.joinpath(CONTROL, STATUS_JSON).stat()
        except OSError as error:
            unseen[error.errno] = candidate  # the outermost one stays
        else:
            return _place(candidate, real.relative_to(candidate).parts)
    raise _not_found(path, unseen)


def mount_at(path: Path) -> Place:
    """The mount whose mount point is `path`."""
    place = locate(path)
    if place.group is not None:
        raise invalid(f"{path} is inside the mount at {place.mountpoint}: name the mount point")
    return place


def group_at(path: Path) -> Place:
    """The group whose directory is `path`."""
    place = locate(path)
    if place.group is None:
        raise invalid(f"{path} is a mount point: name a group in it, as {place}/GROUP")
    if place.lu is not None:
        raise invalid(
            f"{path} is not a group: name its directory, {place.mountpoint}/{place.group}"
        )
    return place


def clone_at(path: Path) -> Place:
    """The clone whose file is `path`."""
    place = locate(path)
    if place.lu is None:
        raise invalid(f"{path} is not a clone: name one by its own path, MOUNTPOINT/GROUP/CLONE")
    if place.lu == SOURCE:
        raise invalid(f"{path} is a Source: name one of its clones")
    return place


def require(place: Place) -> None:
    """Raise ClonefsError (ENOENT) unless the group and the LU that `place` names exist."""
    here = Place(place.mountpoint, place.group) if place.lu == SOURCE else place
    if not here.control.is_dir():
        raise _absent(here)


def _place(mountpoint: Path, names: tuple[str, ...]) -> Place:
    if names[:1] == (CONTROL,):
        path = mountpoint.joinpath(*names)
        raise invalid(f"{path} is a control file: name a group or an LU by its own path")
    if len(names) > 2:
        raise missing(f"there is nothing below the LU {mountpoint.joinpath(*names[:2])}")
    return Place(mountpoint, *names)


def _not_found(path: Path, unseen: dict[int | None, Path]) -> ClonefsError:
    for code in _LOST & unseen.keys():
        return _lost(unseen[code])
    if errno.EACCES in unseen:
        where = unseen[errno.EACCES]
        return ClonefsError(errno.EACCES, f"{path}: no permission to look into {where}")
    return invalid(f"{path} is not inside a clonefs mount: see clonefs status")


def _lost(mountpoint: Path) -> ClonefsError:
    return ClonefsError(
        errno.ENOTCONN,
        f"the daemon of the mount at {mountpoint} has died: mount it again, and it recovers",
    )


def no_group(place: Place) -> ClonefsError:
    """ENOENT: there is no such group."""
    return missing(
        f"there is no group {place.group} in the mount at {place.mountpoint}: see clonefs status"
    )


def no_clone(place: Place) -> ClonefsError:
    """ENOENT: there is no such clone."""
    return missing(f"there is no clone {place.lu} in the group {place.group}: see clonefs status")


def _absent(place: Place) -> ClonefsError:
    """Say which of mount, group and clone is not there (any more)."""
    if not place.mountpoint.joinpath(CONTROL, STATUS_JSON).exists():
        return missing(f"clonefs is not mounted at {place.mountpoint} any more")
    if place.group is not None and not place.mountpoint.joinpath(CONTROL, place.group).is_dir():
        return no_group(place)
    if place.lu is not None:
        return no_clone(place)
    return missing(f"the control directory {place.control} is incomplete")


# Commands --------------------------------------------------------------------------------------


def command(place: Place, file: str, *words: str) -> None:
    """Write one command to a control file of `place`; when this returns, it has taken effect."""
    line = _line(words)
    try:
        descriptor = os.open(place.control / file, os.O_WRONLY)
    except OSError as error:
        raise _unopened(place, file, error) from error
    try:
        _write(place, file, descriptor, line)
    finally:
        os.close(descriptor)


def _line(words: tuple[str, ...]) -> bytes:
    for word in words:
        if "\n" in word:
            raise invalid(f"{word!r} has a newline in it: names and paths cannot have one")
    return os.fsencode(" ".join(map(shlex.quote, words)) + "\n")


def _write(place: Place, file: str, descriptor: int, line: bytes) -> None:
    try:
        written = os.write(descriptor, line)
    except OSError as error:
        raise _refused(place, file, error) from error
    if written != len(line):
        raise failed(f"{place.control / file} took only a part of the command")


def _refused(place: Place, file: str, error: OSError) -> ClonefsError:
    """The daemon's own sentence for a write that failed, or else the system's."""
    if error.errno in _LOST:
        return _lost(place.mountpoint)
    sentence = reason(place) or f"{place.control / file}: {error.strerror}"
    return ClonefsError(error.errno or errno.EIO, sentence)


def _unopened(place: Place, file: str, error: OSError) -> ClonefsError:
    if error.errno in _LOST:
        return _lost(place.mountpoint)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return _absent(place)
    if error.errno == errno.EROFS:
        return _refused(place, file, error)
    return ClonefsError(
        error.errno or errno.EIO, f"{place.control / file}: {error.strerror or error}"
    )


# Values ----------------------------------------------------------------------------------------


def read(place: Place, file: str) -> bytes:
    """The whole of a control file of `place`, as it stands at this moment."""
    try:
        return place.control.joinpath(file).read_bytes()
    except OSError as error:
        raise _unopened(place, file, error) from error


def open_and_read(place: Place, file: str) -> tuple[int, str]:
    """A descriptor of a control file of `place`, which the caller closes, and what it has read."""
    try:
        descriptor = os.open(place.control / file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unopened(place, file, error) from error
    try:
        with os.fdopen(descriptor, "rb", closefd=False) as reader:
            return descriptor, os.fsdecode(reader.read())
    except OSError as error:
        os.close(descriptor)
        raise _unopened(place, file, error) from error


def value(place: Place, file: str) -> str:
    """The one word or line that a control file of `place` holds."""
    return os.fsdecode(read(place, file)).strip()


def reason(place: Place) -> str:
    """The sentence in the `error` file of `place`, or an empty string where there is none."""
    try:
        return value(place, ERROR)
    except ClonefsError:
        return ""


def trouble(clone: Place) -> str:
    """What is wrong with a clone itself, or an empty string where nothing is.

    Not from its `error` file: that may hold the sentence of a command that was refused since.
    """
    group = report(clone)["groups"].get(clone.group, {"clones": {}})
    return group["clones"].get(clone.lu, {}).get("error") or ""


def report(place: Place) -> Any:
    """All that status.json says of the mount that `place` is in."""
    return json.loads(read(Place(place.mountpoint), STATUS_JSON))
