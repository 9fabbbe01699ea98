"""Every command in every state, on a real mount: what it leads to; or that it is refused, with a
sentence, and has changed nothing."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clonefs.group import TABLE, Command
from clonefs.volume import CloneState
from clonefs.volume.layout import PAGE, DamagedError, Superblock, unpack_record
from tests.mounts.mount import (
    EXTENT,
    Clone,
    Group,
    Mount,
    assert_same,
    differing,
    digest,
    noise,
    parse_extent_list,
    read,
    wait_for,
    write,
)

S = CloneState
SIZE = 6 * EXTENT
GOOD, RUIN = noise("good", SIZE), noise("ruin", SIZE)
LATER = noise("later", EXTENT)
COPYING = (S.SYNCHRONIZING, S.RESTORING, S.REVERSE_SYNCHRONIZING)


@dataclass(frozen=True)
class Words:
    """How a command is given: the control file, by the place that it is in, and what is written; and
    where a refusal is told. `{g}` is the group, `{c}` the clone, `{o}` another clone."""

    command: Command
    file: str
    words: str = "1"

    def give(self, clone: Clone) -> None:
        file, words = (
            each.format(g=clone.group.name, c=clone.name) for each in (self.file, self.words)
        )
        clone.group.mount.control(file).write(words)

    def place(self, clone: Clone) -> str:
        return str(Path(self.file.format(g=clone.group.name, c=clone.name)).parent).strip(".")


COMMANDS = {
    "sync": Words(Command.SYNC, "{g}/{c}/sync"),
    "sync then-fracture": Words(Command.SYNC, "{g}/{c}/sync", "then-fracture"),
    "fracture": Words(Command.FRACTURE, "{g}/{c}/fracture"),
    "fracture of several": Words(Command.FRACTURE, "fracture", "{g}/{c} {g}/mirror"),
    "fracture force": Words(Command.FORCE_FRACTURE, "{g}/{c}/fracture", "force"),
    "protected_restore": Words(Command.PROTECTED_RESTORE, "{g}/{c}/protected_restore"),
    "reverse_sync": Words(Command.REVERSE_SYNC, "{g}/{c}/reverse_sync"),
    "remove_clone": Words(Command.REMOVE, "{g}/remove_clone", "{c}"),
}


# How to come to each state from fractured, with a rate that lets one extent be copied and no more.


def _slowly(clone: Clone, file: str) -> None:
    write(clone.group.source, 0, RUIN)
    clone.rate(1)
    clone.control(file).write("1")
    clone.wait_for_the_one_extent()


def _synchronized(clone: Clone) -> None:
    clone.sync()
    clone.wait("synchronized")
    clone.rate(1)


def _fractured(clone: Clone) -> None:
    write(clone.group.source, 0, RUIN)
    clone.rate(1)


def _out_of_sync(clone: Clone) -> None:
    _slowly(clone, "sync")
    clone.fracture()


def _reverse_out_of_sync(clone: Clone) -> None:
    _slowly(clone, "protected_restore")
    write(clone.group.source, 5 * EXTENT - 9, b"of a host, in two extents")
    clone.fracture("force")


REACH: dict[CloneState, Callable[[Clone], None]] = {
    S.SYNCHRONIZING: lambda clone: _slowly(clone, "sync"),
    S.SYNCHRONIZED: _synchronized,
    S.FRACTURED: _fractured,
    S.OUT_OF_SYNC: _out_of_sync,
    S.RESTORING: lambda clone: _slowly(clone, "protected_restore"),
    S.REVERSE_SYNCHRONIZING: lambda clone: _slowly(clone, "reverse_sync"),
    S.REVERSE_OUT_OF_SYNC: _reverse_out_of_sync,
}


def generation(mount: Mount) -> int:
    """The number of the newest record on the volume."""
    with mount.meta.open("rb") as file:
        superblock = Superblock.unpack(file.read(PAGE))
        found = []
        for slot in (0, 1):
            file.seek(superblock.record_slot(slot))
            with contextlib.suppress(DamagedError):
                found.append(unpack_record(superblock, file.read(superblock.record_size))[0])
    return max(found)


def everything(group: Group) -> dict[str, Any]:
    """States, maps, and bytes: what a refused command must leave as it is."""
    clones = [group.clone(name) for name in group.status()["clones"]]
    return {
        "status": group.status(),
        "maps": {clone.name: clone.delta() for clone in clones},
        "protected": group.protected(),
        "Source": digest(group.backing),
        "bytes": {clone.name: digest(clone.backing) for clone in clones},
        "shown": digest(group.source) if group.status()["restore"] is None else None,
    }


@contextlib.contextmanager
def changes_nothing(group: Group) -> Iterator[None]:
    """The body changes nothing of the group, and no record is written."""
    before, number = everything(group), generation(group.mount)
    yield
    assert generation(group.mount) == number
    assert everything(group) == before


@pytest.fixture(params=list(CloneState))
def clone(request: pytest.FixtureRequest, shared: Mount) -> Clone:
    """A clone in each state, with another one that is fractured."""
    group = shared.add_group(data=GOOD)
    clone = group.add_fractured()
    other = group.add_fractured("other")
    other.rate(1)
    REACH[request.param](clone)
    assert clone.state == request.param
    return clone


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_in_every_state(clone: Clone, name: str) -> None:
    group, words, was = clone.group, COMMANDS[name], CloneState(clone.state)
    if name == "fracture of several" and was not in (S.RESTORING, S.REVERSE_SYNCHRONIZING):
        group.add_clone("mirror")
    elif name == "fracture of several":
        group.add_clone("mirror", sync=False)
    following = TABLE[words.command].get(was)
    if following is None:
        with (
            changes_nothing(group),
            group.mount.refuses(errno.EBUSY, words.place(clone), f"{group.name}/{clone.name}", was),
        ):
            words.give(clone)
        return
    before = everything(group)
    words.give(clone)
    if words.command is Command.REMOVE:
        _is_gone(clone, before)
    elif name == "sync then-fracture" and was is S.SYNCHRONIZED:
        assert clone.state == S.FRACTURED
    else:
        assert clone.state == following
        if following is was and name in ("sync", "fracture", "fracture force", "reverse_sync"):
            assert everything(group)["maps"] == before["maps"]
            assert everything(group)["bytes"] == before["bytes"]
    if words.command is not Command.REMOVE:
        _has_taken_effect(clone, words, was, before)
        _comes_to_its_end(clone)


def _is_gone(clone: Clone, before: dict[str, Any]) -> None:
    """Its backing stays as it is, and the Source too."""
    assert not clone.path.exists()
    assert clone.name not in clone.group.status()["clones"]
    assert digest(clone.backing) == before["bytes"][clone.name]
    assert digest(clone.group.backing) == before["Source"]


def _has_taken_effect(clone: Clone, words: Words, was: CloneState, before: dict[str, Any]) -> None:
    group = clone.group
    status = clone.status()
    match words.command:
        case Command.PROTECTED_RESTORE:
            # The Source is the clone at once, and the clone does not change. Reading all of it ends
            # the restore.
            assert group.restore_status()["protected"] is True
            assert group.protected() == set()
            assert_same(group.source.read_bytes(), clone.path.read_bytes(), "the Source")
            assert digest(clone.backing) == before["bytes"][clone.name]
        case Command.REVERSE_SYNC:
            assert group.restore_status()["protected"] is False
            assert_same(group.source.read_bytes(), clone.path.read_bytes(), "the Source")
        case Command.FRACTURE | Command.FORCE_FRACTURE:
            assert group.status()["restore"] is None
            assert digest(clone.backing) == before["bytes"][clone.name]
            assert digest(group.backing) == before["Source"]
            if was is not status["state"]:
                assert status["condition"] in ("administratively-fractured", "waiting")
                assert status["fractured_at"] is not None
        case Command.SYNC:
            assert digest(group.backing) == before["Source"]
    assert_maps_have_every_difference(group)


def assert_maps_have_every_difference(group: Group) -> None:
    """Between each backing and that of the Source. Maps are read after bytes where a copy goes on:
    then they may only have less, so that bytes are read again."""

    def look() -> bool:
        source = group.backing.read_bytes()
        for name in group.status()["clones"]:
            clone = group.clone(name)
            found = differing(clone.backing.read_bytes(), source, EXTENT)
            if not found <= clone.delta() | group.protected():
                return False
        return True

    wait_for(look, "for the maps to have every difference")


def _comes_to_its_end(clone: Clone) -> None:
    """With no bound, what goes on ends: nothing that was commanded stays half done."""
    group = clone.group
    at_the_end = {S.SYNCHRONIZING: S.SYNCHRONIZED, S.RESTORING: S.FRACTURED}
    at_the_end[S.REVERSE_SYNCHRONIZING] = S.SYNCHRONIZED
    now = CloneState(clone.state)
    clone.rate("max")
    if now in COPYING:
        wait_for(lambda: clone.state not in COPYING, "for the end of the copy")
        asked = clone.state
        assert asked in (at_the_end[now], S.FRACTURED)
        if now is not S.RESTORING or not group.protected():
            assert_same(clone.backing.read_bytes(), group.backing.read_bytes(), "both sides")
            assert clone.delta() == set()
    assert parse_extent_list(clone.control("delta_map").read()) <= set(range(SIZE // EXTENT))


# What is refused because of another clone, or of the group ---------------------------------------


@pytest.mark.parametrize("command", ["protected_restore", "reverse_sync"])
def test_a_restore_from_another_clone(clone: Clone, command: str) -> None:
    """Refused while one runs; else it splits off whatever is mirrored, at that instant."""
    group, other, was = clone.group, clone.group.clone("other"), CloneState(clone.state)
    give = Words(Command(command), f"{{g}}/other/{command}")
    if was in (S.RESTORING, S.REVERSE_SYNCHRONIZING):
        with (
            changes_nothing(group),
            group.mount.refuses(
                errno.EBUSY, f"{group.name}/other", f"{group.name}/{clone.name}", was
            ),
        ):
            give.give(clone)
        return
    give.give(clone)
    expected = {S.SYNCHRONIZED: S.FRACTURED, S.SYNCHRONIZING: S.OUT_OF_SYNC}.get(was, was)
    assert clone.state == expected
    assert_same(group.source.read_bytes(), other.path.read_bytes(), "the Source")
    assert_maps_have_every_difference(group)


def test_what_is_no_command_on_a_clone(clone: Clone) -> None:
    """A group with clones stays, names that are taken are refused, words that are none too; and only
    a fractured clone can be written to."""
    group, name = clone.group, f"{clone.group.name}/{clone.name}"
    mount = group.mount
    with changes_nothing(group), mount.refuses(errno.EBUSY, "", group.name):
        mount.control("remove_group").write(group.name)
    with changes_nothing(group), mount.refuses(errno.EEXIST, group.name, clone.name):
        group.control("add_clone").write(f"{clone.name} '{mount.work}/another.img'")
    for file in ("sync", "fracture", "protected_restore", "reverse_sync", "rate", "verify"):
        with changes_nothing(group), mount.refuses(errno.EINVAL, name):
            clone.control(file).write("nonsense")
    if clone.state != S.FRACTURED:
        before = everything(group)
        with pytest.raises(OSError, match="busy") as failure:
            os.close(os.open(clone.path, os.O_WRONLY))
        assert failure.value.errno == errno.EBUSY
        assert clone.state in clone.control("error").read()
        assert everything(group) == before


def test_what_is_allowed_in_every_state(clone: Clone) -> None:
    """A rate, a verification, and host I/O of the Source change no state."""
    was = clone.state
    clone.rate(2)
    assert clone.control("rate").read() == "2"
    clone.rate(1)
    clone.control("verify").write("1")
    wait_for(
        lambda: not clone.control("verify").read().startswith("running"), "for the verification"
    )
    assert clone.control("verify").read() == "done 6/6 0 differ 0 unreadable"
    write(clone.group.source, EXTENT, LATER)
    assert read(clone.group.source, EXTENT, EXTENT) == LATER  # all of it would end a restore
    assert clone.state in (was, S.SYNCHRONIZING if was == S.SYNCHRONIZED else was)
    assert_maps_have_every_difference(clone.group)
