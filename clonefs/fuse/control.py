"""The control directory: which files it has, what reading one shows, what writing one does.

Three tables, one for each kind of directory; the tree is made of them, and so is the reference in
docs/control-files.md checked by a test.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from clonefs.engines import CloneStatistics, GroupStatistics, StorageSystem, statistics
from clonefs.errors import invalid
from clonefs.extents import ExtentMap, extent_list, run_text
from clonefs.fuse import commands, render

# What an open file shows: its text, or what gives the text in a thread (a large map).
Content = str | Callable[[], str]


@dataclass(slots=True)
class Control:
    """What control files work on: the system, the sentences of the last refusals by directory, and
    the log of events. `in_use` tells whether an LU file is open."""

    system: StorageSystem
    in_use: Callable[[str, str], bool]
    errors: dict[tuple[str, ...], str] = field(default_factory=dict)
    events: bytearray = field(default_factory=bytearray)

    def group(self, name: str) -> GroupStatistics:
        return statistics(self.system.server(name), self.system.transfers)

    def groups(self) -> list[GroupStatistics]:
        return [self.group(name) for name in sorted(self.system.servers)]

    def clone(self, group: str, name: str) -> CloneStatistics:
        return next(clone for clone in self.group(group).clones if clone.name == name)


Where = tuple[str, ...]  # (), (group,) or (group, clone)
Read = Callable[[Control, Where], Content]
Write = Callable[[Control, Where, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ControlFile:
    """A file of the control directory: what it shows and what it does, where it has either."""

    read: Read | None = None
    write: Write | None = None


def _of_group(show: Callable[[GroupStatistics], object]) -> ControlFile:
    return ControlFile(lambda control, where: f"{show(control.group(where[0]))}\n")


def _of_clone(show: Callable[[CloneStatistics], object]) -> ControlFile:
    return ControlFile(lambda control, where: f"{show(control.clone(where[0], where[1]))}\n")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _error(control: Control, where: Where) -> Content:
    """Why the last command in this directory was refused; else what is wrong with the thing. In a
    read-only mount both: there the kernel refuses commands without asking."""
    refused = control.errors.get(where)
    broken = control.system.volume.broken
    if control.system.volume.read_only and broken is not None:
        sentences = [broken.reason, _trouble(control, where)]
    else:
        sentences = [_trouble(control, where) if refused is None else refused]
    return f"{_one_line('; '.join(filter(None, sentences)))}\n"


def _trouble(control: Control, where: Where) -> str | None:
    match where:
        case (group,):
            return control.group(group).error
        case (group, clone):
            return control.clone(group, clone).error
        case _:
            return None


def _map(extents: ExtentMap) -> Content:
    if extents.extents <= 1 << 14:
        return f"{extent_list(extents)}\n"
    frozen = extents.snapshot()
    return lambda: f"{extent_list(frozen)}\n"


def _protected_restore_map(control: Control, where: Where) -> Content:
    return _map(control.system.server(where[0]).group.protected)


def _persistent_delta_map(control: Control, where: Where) -> Content:
    server = control.system.server(where[0])
    return _map(ExtentMap(server.durability.delta.bits, server.group.geometry.extents))


def _delta_map(control: Control, where: Where) -> Content:
    return _map(control.system.server(where[0]).group.clones[where[1]].delta)


def _cod_scoreboard(control: Control, where: Where) -> Content:
    claims = control.system.server(where[0]).group.scoreboard
    lines = [f"{run_text(each.first, each.stop)} {each.engine} {each.clone}\n" for each in claims]
    return "".join(lines) or "\n"


def _cod_queue(control: Control, where: Where) -> Content:
    requests = control.system.server(where[0]).group.cod_queue
    lines = [
        f"{each.verb} {each.offset}+{each.length} {run_text(each.first, each.stop)}\n"
        for each in requests
    ]
    return "".join(lines) or "\n"


def _status_json(control: Control, where: Where) -> Content:
    return render.status_json(control.system.volume, control.groups())


def _refuse_reserved(text: str, files: dict[str, ControlFile], later: frozenset[str]) -> None:
    """A group or clone has a directory beside the control files: it cannot have the name of one,
    nor of one that the contract names for later."""
    name = commands.words(text)[0]
    if name in files or name in later:
        raise invalid(f"{name!r} is the name of a control file: choose another")


async def _add_group(control: Control, where: Where, text: str) -> None:
    _refuse_reserved(text, TOP, frozenset({"metrics"}))
    await commands.add_group(control.system, text)


async def _remove_group(control: Control, where: Where, text: str) -> None:
    name = commands.one_name(text)
    await control.system.remove_group(name, in_use=lambda: control.in_use(name, "source"))
    for place in [place for place in control.errors if place[:1] == (name,)]:
        del control.errors[place]


async def _fracture_several(control: Control, where: Where, text: str) -> None:
    await commands.fracture_several(control.system, text)


async def _add_clone(control: Control, where: Where, text: str) -> None:
    _refuse_reserved(text, GROUP, frozenset())
    await commands.add_clone(control.system, where[0], text)


async def _remove_clone(control: Control, where: Where, text: str) -> None:
    group, name = where[0], commands.one_name(text)
    await control.system.remove_clone(group, name, in_use=lambda: control.in_use(group, name))
    control.errors.pop((group, name), None)


def _on_clone(
    command: Callable[[StorageSystem, str, str, str], Awaitable[None]],
    read: Read | None = None,
) -> ControlFile:
    async def write(control: Control, where: Where, text: str) -> None:
        await command(control.system, where[0], where[1], text)

    return ControlFile(read, write)


TOP: dict[str, ControlFile] = {
    "status": ControlFile(lambda control, where: render.table(control.groups())),
    "status.json": ControlFile(_status_json),
    "events": ControlFile(lambda control, where: ""),  # read as it grows, see operations
    "error": ControlFile(_error),
    "add_group": ControlFile(write=_add_group),
    "remove_group": ControlFile(write=_remove_group),
    "fracture": ControlFile(write=_fracture_several),
}

GROUP: dict[str, ControlFile] = {
    "status": ControlFile(lambda control, where: render.table([control.group(where[0])])),
    "size": _of_group(lambda group: group.size),
    "extent_size": _of_group(lambda group: group.extent_size),
    "backing": _of_group(lambda group: group.backing),
    "state": _of_group(lambda group: group.state),
    "error": ControlFile(_error),
    "add_clone": ControlFile(write=_add_clone),
    "remove_clone": ControlFile(write=_remove_clone),
    "protected_restore_map": ControlFile(_protected_restore_map),
    "persistent_delta_map": ControlFile(_persistent_delta_map),
    "cod_scoreboard": ControlFile(_cod_scoreboard),
    "cod_queue": ControlFile(_cod_queue),
}

CLONE: dict[str, ControlFile] = {
    "state": _of_clone(lambda clone: clone.state),
    "condition": _of_clone(lambda clone: clone.condition),
    "error": ControlFile(_error),
    "backing": _of_clone(lambda clone: clone.backing),
    "progress": _of_clone(lambda clone: f"{clone.done}/{clone.total}"),
    "delta_map": ControlFile(_delta_map),
    "rate": _on_clone(
        commands.rate,
        read=lambda control, where: f"{render.rate_text(control.clone(*where).rate)}\n",
    ),
    "sync": _on_clone(commands.sync),
    "fracture": _on_clone(commands.fracture),
    "protected_restore": _on_clone(commands.protected_restore),
}

TABLES: tuple[dict[str, ControlFile], ...] = (TOP, GROUP, CLONE)
