"""The control directory: which files it has, what reading one shows, what writing one does.

Three tables, one for each kind of directory; the tree is made of them, and so is the reference in
docs/control-files.md checked by a test.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from time import time

from bitarray import bitarray

from clonefs.engines import CloneStatistics, GroupStatistics, StorageSystem, statistics
from clonefs.errors import invalid
from clonefs.extents import run_text
from clonefs.fuse import commands, metrics, render
from clonefs.fuse.contents import EventLog


@dataclass(slots=True)
class Control:
    """What control files work on: the system, the sentences of the last refusals by directory, and
    the log of events. `in_use` tells whether an LU file is open; `changed` is when the state of the
    thing of a directory last changed, or one came or went there, in seconds since the epoch, and
    `started` when the mount began; `commands` how many were done, and refused."""

    system: StorageSystem
    in_use: Callable[[str, str], bool]
    mountpoint: str
    errors: dict[tuple[str, ...], str] = field(default_factory=dict)
    events: EventLog = field(default_factory=EventLog)
    changed: dict[tuple[str, ...], float] = field(default_factory=dict)
    commands: Counter[str] = field(default_factory=lambda: Counter(done=0, refused=0))
    started: float = field(default_factory=time)

    def group(self, name: str) -> GroupStatistics:
        return statistics(self.system.server(name), self.system.transfers)

    def groups(self) -> list[GroupStatistics]:
        return [self.group(name) for name in sorted(self.system.servers)]

    def volume_error(self) -> str | None:
        broken = self.system.volume.broken
        return None if broken is None else broken.reason

    def clone(self, group: str, name: str) -> CloneStatistics:
        return next(clone for clone in self.group(group).clones if clone.name == name)


Where = tuple[str, ...]  # (), (group,) or (group, clone)
Show = Callable[[Control, Where], str]
MapOf = Callable[[Control, Where], tuple[bitarray, int]]
PiecesOf = Callable[[Control], Awaitable[Callable[[], Iterator[bytes]]]]
Write = Callable[[Control, Where, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ControlFile:
    """A file of the control directory: what it shows and what it does, where it has either.

    It shows a text (`show`), the bits of a map with the number of its extents (`map_of`), a long
    text in pieces (`pieces_of`), or the log (`is_log`). poll(2) tells of a change in what `telling`
    makes of a text, in all of it if that is not given. A value that is also an extended attribute of
    the LU has `attribute`; without a name of its own, that of the file. `of_clones`: one of the group
    that its clones have too.
    """

    show: Show | None = None
    write: Write | None = None
    map_of: MapOf | None = None
    pieces_of: PiecesOf | None = None
    telling: Callable[[str], str] | None = None
    is_log: bool = False
    attribute: Show | None = None
    attribute_name: str | None = None
    of_clones: bool = False

    @property
    def readable(self) -> bool:
        """Whether it can be opened for reading."""
        shown = (self.show, self.map_of, self.pieces_of)
        return self.is_log or any(each is not None for each in shown)


def _value(show: Show, write: Write | None = None, *, of_clones: bool = False) -> ControlFile:
    """One word or line: a file, and an extended attribute."""
    return ControlFile(
        lambda control, where: f"{show(control, where)}\n",
        write,
        attribute=show,
        of_clones=of_clones,
    )


def _of_group(show: Callable[[GroupStatistics], object], *, of_clones: bool = False) -> ControlFile:
    return _value(lambda control, where: str(show(control.group(where[0]))), of_clones=of_clones)


def _of_clone(show: Callable[[CloneStatistics], object]) -> ControlFile:
    return _value(lambda control, where: str(show(control.clone(where[0], where[1]))))


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _error(control: Control, where: Where) -> str:
    """Why the last command in this directory was refused; else what is wrong with the thing. In a
    read-only mount both: there the kernel refuses commands without asking."""
    refused = control.errors.get(where)
    broken = control.system.volume.broken
    if control.system.volume.read_only and broken is not None:
        sentences = [broken.reason, _trouble(control, where)]
    else:
        sentences = [_trouble(control, where) if refused is None else refused]
    return _one_line("; ".join(filter(None, sentences)))


def _trouble(control: Control, where: Where) -> str | None:
    match where:
        case (group,):
            return control.group(group).error
        case (group, clone):
            return control.clone(group, clone).error
        case _:
            return None if control.system.volume.read_only else control.volume_error()


def _protected_restore_map(control: Control, where: Where) -> tuple[bitarray, int]:
    protected = control.system.server(where[0]).group.protected
    return protected.bits, protected.extents


def _persistent_delta_map(control: Control, where: Where) -> tuple[bitarray, int]:
    durable = control.system.server(where[0]).durability.delta
    return durable.bits, durable.extents


def _delta_map(control: Control, where: Where) -> tuple[bitarray, int]:
    delta = control.system.server(where[0]).group.clones[where[1]].delta
    return delta.bits, delta.extents


def _cod_scoreboard(control: Control, where: Where) -> str:
    claims = control.system.server(where[0]).group.scoreboard
    lines = [f"{run_text(each.first, each.stop)} {each.engine} {each.clone}\n" for each in claims]
    return "".join(lines) or "\n"


def _cod_queue(control: Control, where: Where) -> str:
    requests = control.system.server(where[0]).group.cod_queue
    lines = [
        f"{each.verb} {each.offset}+{each.length} {run_text(each.first, each.stop)}\n"
        for each in requests
    ]
    return "".join(lines) or "\n"


def _status_json(control: Control, where: Where) -> str:
    return render.status_json(control.system.volume, control.groups(), control.system.recovery)


async def _metrics(control: Control) -> Callable[[], Iterator[bytes]]:
    mount = metrics.MountMetrics(
        control.system, control.mountpoint, control.started, dict(control.commands)
    )
    return await metrics.snapshot(mount)


def _refuse_reserved(text: str, files: dict[str, ControlFile]) -> None:
    """A group or clone has a directory beside the control files: it cannot have the name of one."""
    name = commands.words(text)[0]
    if name in files:
        raise invalid(f"{name!r} is the name of a control file: choose another")


async def _add_group(control: Control, where: Where, text: str) -> None:
    _refuse_reserved(text, TOP)
    await commands.add_group(control.system, text)


async def _remove_group(control: Control, where: Where, text: str) -> None:
    name = commands.one_name(text)
    await control.system.remove_group(name, in_use=lambda: control.in_use(name, "source"))
    for place in [place for place in control.errors if place[:1] == (name,)]:
        del control.errors[place]


async def _fracture_several(control: Control, where: Where, text: str) -> None:
    await commands.fracture_several(control.system, text)


async def _copy(control: Control, where: Where, text: str) -> None:
    await commands.copy(control.system, where[0], text)


async def _add_clone(control: Control, where: Where, text: str) -> None:
    _refuse_reserved(text, GROUP)
    await commands.add_clone(control.system, where[0], text)


async def _remove_clone(control: Control, where: Where, text: str) -> None:
    group, name = where[0], commands.one_name(text)
    await control.system.remove_clone(group, name, in_use=lambda: control.in_use(group, name))
    control.errors.pop((group, name), None)


def _on_clone(command: Callable[[StorageSystem, str, str, str], Awaitable[None]]) -> Write:
    async def write(control: Control, where: Where, text: str) -> None:
        await command(control.system, where[0], where[1], text)

    return write


TOP: dict[str, ControlFile] = {
    "status": ControlFile(
        lambda control, where: render.table(
            control.groups(), control.volume_error(), control.system.recovery
        )
    ),
    "status.json": ControlFile(_status_json, telling=render.without_host_io),
    "metrics": ControlFile(pieces_of=_metrics),
    "events": ControlFile(is_log=True),
    "error": _value(_error),
    "add_group": ControlFile(write=_add_group),
    "remove_group": ControlFile(write=_remove_group),
    "fracture": ControlFile(write=_fracture_several),
}

GROUP: dict[str, ControlFile] = {
    "status": ControlFile(lambda control, where: render.table([control.group(where[0])])),
    "size": _of_group(lambda group: group.size, of_clones=True),
    "extent_size": _of_group(lambda group: group.extent_size, of_clones=True),
    "backing": _of_group(lambda group: group.backing),
    "copy": _value(
        lambda control, where: render.copy_text(control.group(where[0]).full_copies), _copy
    ),
    "state": _of_group(lambda group: group.state),
    "error": _value(_error),
    "add_clone": ControlFile(write=_add_clone),
    "remove_clone": ControlFile(write=_remove_clone),
    "protected_restore_map": ControlFile(
        map_of=_protected_restore_map,
        attribute=lambda control, where: str(control.system.server(where[0]).group.protected.count),
        attribute_name="protected_extents",
    ),
    "persistent_delta_map": ControlFile(map_of=_persistent_delta_map),
    "cod_scoreboard": ControlFile(_cod_scoreboard),
    "cod_queue": ControlFile(_cod_queue),
}

CLONE: dict[str, ControlFile] = {
    "state": _of_clone(lambda clone: clone.state),
    "condition": _of_clone(lambda clone: clone.condition),
    "error": _value(_error),
    "backing": _of_clone(lambda clone: clone.backing),
    "progress": _of_clone(lambda clone: f"{clone.done}/{clone.total}"),
    "delta_map": ControlFile(
        map_of=_delta_map,
        attribute=lambda control, where: str(control.clone(*where).delta_extents),
        attribute_name="delta_extents",
    ),
    "rate": _value(
        lambda control, where: render.rate_text(control.clone(*where).rate),
        _on_clone(commands.rate),
    ),
    "sync": ControlFile(write=_on_clone(commands.sync)),
    "fracture": ControlFile(write=_on_clone(commands.fracture)),
    "protected_restore": ControlFile(write=_on_clone(commands.protected_restore)),
    "reverse_sync": ControlFile(write=_on_clone(commands.reverse_sync)),
    "verify": ControlFile(
        lambda control, where: render.verify_text(control.clone(*where).verify),
        _on_clone(commands.verify),
    ),
    "differences": ControlFile(
        lambda control, where: render.differences_text(control.clone(*where).verify)
    ),
}

TABLES: tuple[dict[str, ControlFile], ...] = (TOP, GROUP, CLONE)


def attributes(where: Where) -> dict[str, Show]:
    """The extended attributes of the Source (group,) or the clone (group, clone), by name."""
    group = {name: file for name, file in GROUP.items() if len(where) == 1 or file.of_clones}
    files = group if len(where) == 1 else group | CLONE
    return {
        file.attribute_name or name: file.attribute
        for name, file in files.items()
        if file.attribute is not None
    }
