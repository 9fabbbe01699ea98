"""The states of a clone, and what each command makes of them.

Two rules stand above this module. A transition is a function from a record to a record: it changes
nothing, so that a refused command has changed nothing, and a commit takes effect whole or not at
all. And what is not in TABLE is refused.

What the maps have to look like before such a record may be committed is said with each function,
and done by CloneGroup and by who commits.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum

from msgspec.structs import replace

from clonefs.errors import busy, missing
from clonefs.volume import CloneRecord, CloneState, GroupRecord, MapSlot, SplitBy


class Command(StrEnum):
    """What a person can ask of a clone, in the words of the control files."""

    SYNC = "sync"
    FRACTURE = "fracture"
    FORCE_FRACTURE = "fracture force"
    PROTECTED_RESTORE = "protected_restore"
    REVERSE_SYNC = "reverse_sync"
    REMOVE = "remove_clone"


_S = CloneState

# The state that follows; the same state means that there is nothing to do, except that a Protected
# Restore of a restoring clone starts again. REMOVE leads nowhere: what it maps to is not used.
TABLE: dict[Command, dict[CloneState, CloneState]] = {
    Command.SYNC: {
        _S.FRACTURED: _S.SYNCHRONIZING,
        _S.OUT_OF_SYNC: _S.SYNCHRONIZING,
        _S.SYNCHRONIZING: _S.SYNCHRONIZING,
        _S.SYNCHRONIZED: _S.SYNCHRONIZED,
    },
    Command.FRACTURE: {
        _S.SYNCHRONIZED: _S.FRACTURED,
        _S.SYNCHRONIZING: _S.OUT_OF_SYNC,
        _S.FRACTURED: _S.FRACTURED,
    },
    Command.FORCE_FRACTURE: {
        _S.SYNCHRONIZED: _S.FRACTURED,
        _S.SYNCHRONIZING: _S.OUT_OF_SYNC,
        _S.FRACTURED: _S.FRACTURED,
        _S.RESTORING: _S.REVERSE_OUT_OF_SYNC,
        _S.REVERSE_SYNCHRONIZING: _S.REVERSE_OUT_OF_SYNC,
        _S.REVERSE_OUT_OF_SYNC: _S.REVERSE_OUT_OF_SYNC,
    },
    Command.PROTECTED_RESTORE: {
        _S.FRACTURED: _S.RESTORING,
        _S.REVERSE_OUT_OF_SYNC: _S.RESTORING,
        _S.RESTORING: _S.RESTORING,
    },
    Command.REVERSE_SYNC: {
        _S.FRACTURED: _S.REVERSE_SYNCHRONIZING,
        _S.REVERSE_OUT_OF_SYNC: _S.REVERSE_SYNCHRONIZING,
        _S.REVERSE_SYNCHRONIZING: _S.REVERSE_SYNCHRONIZING,
    },
    Command.REMOVE: {
        _S.SYNCHRONIZED: _S.SYNCHRONIZED,
        _S.FRACTURED: _S.FRACTURED,
        _S.OUT_OF_SYNC: _S.OUT_OF_SYNC,
        _S.REVERSE_OUT_OF_SYNC: _S.REVERSE_OUT_OF_SYNC,
    },
}

MIRRORED = frozenset({_S.SYNCHRONIZING, _S.SYNCHRONIZED})
# States in which the Source is being made what the clone is.
RESTORES = frozenset({_S.RESTORING, _S.REVERSE_SYNCHRONIZING})

_NEXT_STEP: dict[CloneState, str] = {
    _S.SYNCHRONIZING: "wait until it is synchronized, or fracture it",
    _S.SYNCHRONIZED: "fracture it first",
    _S.FRACTURED: "it is a complete point-in-time copy",
    _S.OUT_OF_SYNC: "it is no complete copy: sync it first",
    _S.RESTORING: "wait until the restore is done, or break it off with force",
    _S.REVERSE_SYNCHRONIZING: "wait until it is synchronized, or break it off with force",
    _S.REVERSE_OUT_OF_SYNC: "the Source is part old, part clone: restore from it again",
}


def next_state(command: Command, group: GroupRecord, clone: CloneRecord) -> CloneState:
    """The state that `command` leads to. Raises ClonefsError (EBUSY) where TABLE has none."""
    following = TABLE[command].get(clone.state)
    if following is None:
        raise busy(
            f"{group.name}/{clone.name} is {clone.state}, so {command} is refused: "
            f"{_NEXT_STEP[clone.state]}"
        )
    return following


def clone_named(group: GroupRecord, name: str) -> CloneRecord:
    """Raises ClonefsError (ENOENT)."""
    try:
        return group.clone(name)
    except KeyError:
        raise missing(f"group {group.name!r} has no clone {name!r}") from None


def restoring_clone(group: GroupRecord) -> CloneRecord | None:
    """The clone that a Protected Restore or a Reverse Sync is running from."""
    return next((clone for clone in group.clones if clone.state in RESTORES), None)


def begin_sync(group: GroupRecord, name: str, *, to_copy: int, then_fracture: bool) -> GroupRecord:
    """The clone is mirrored again. Needs the group held and drained: a host write that was planned
    while the clone was split is not known to be in flight, and the copy could pass it."""
    clone = clone_named(group, name)
    state = next_state(Command.SYNC, group, clone)
    if state is clone.state:
        return group.with_clone(replace(clone, then_fracture=clone.then_fracture or then_fracture))
    return group.with_clone(
        replace(
            clone,
            state=state,
            split_by=None,
            reason=None,
            fractured_at=None,
            written=False,
            then_fracture=then_fracture,
            copy_total=to_copy,
        )
    )


def complete_sync(group: GroupRecord, name: str) -> GroupRecord:
    """The clone is equal to its Source: needs its Delta Map empty with nothing in flight."""
    return group.with_clone(replace(clone_named(group, name), state=_S.SYNCHRONIZED))


def no_longer_equal(group: GroupRecord, name: str, to_copy: int) -> GroupRecord:
    """A mirrored clone that was equal has to be copied to again."""
    clone = clone_named(group, name)
    return group.with_clone(replace(clone, state=_S.SYNCHRONIZING, copy_total=to_copy))


def fracture(
    group: GroupRecord, names: Iterable[str], *, equal: frozenset[str], now: float
) -> GroupRecord:
    """Split the clones off at one instant (D3). Needs the group held and drained and the clones
    flushed. `equal`: the clones whose Delta Map is empty; a mirrored clone that is not among them
    is no complete copy, whatever it was called."""
    for name in names:
        clone = clone_named(group, name)
        state = next_state(Command.FRACTURE, group, clone)
        if clone.state is not state:
            complete = name in equal
            state = _S.FRACTURED if complete else _S.OUT_OF_SYNC
            group = group.with_clone(_split(clone, state, SplitBy.ADMINISTRATOR, now=now))
    return group


def split_off_failed(group: GroupRecord, name: str, *, reason: str, now: float) -> GroupRecord:
    """An I/O error has split a mirrored clone off."""
    clone = clone_named(group, name)
    split = _split(clone, _S.OUT_OF_SYNC, SplitBy.SYSTEM, now=now)
    return group.with_clone(replace(split, reason=reason))


def _split(clone: CloneRecord, state: CloneState, by: SplitBy, *, now: float) -> CloneRecord:
    return replace(
        clone, state=state, split_by=by, reason=None, fractured_at=now, then_fracture=False
    )


def begin_restore(
    group: GroupRecord,
    name: str,
    *,
    command: Command = Command.PROTECTED_RESTORE,
    to_copy: int,
    equal: frozenset[str],
    protected: MapSlot,
    now: float,
    void: bool = False,
) -> GroupRecord:
    """A Protected Restore begins, or begins again (D4), or a Reverse Sync begins (D8), as `command`
    says. Needs the group held and drained, every mirrored clone flushed, L6 done, and if it begins
    again, D[c] |= P. `protected`: an empty Protected Restore Map; the one of the group, if it is.
    `void`: it is not empty, and counts as such until it is emptied."""
    clone = clone_named(group, name)
    running = restoring_clone(group)
    if running is not None and running.name != name:
        raise busy(
            f"{group.name}/{running.name} is {running.state}, and a Source can be restored from one "
            f"clone at a time: wait until it is done, or break it off with force"
        )
    state = next_state(command, group, clone)
    mirrored = [each.name for each in group.clones if each.state in MIRRORED]
    group = fracture(group, mirrored, equal=equal, now=now)
    group = replace(group, protected=protected, epoch=group.epoch + 1, void=void)
    clone = replace(clone, state=state, copy_total=to_copy, reason=None)
    if state is _S.REVERSE_SYNCHRONIZING:  # what hosts write goes to the clone too: as in a sync
        clone = replace(clone, split_by=None, fractured_at=None, written=False)
    return group.with_clone(clone)


def protected_emptied(group: GroupRecord) -> GroupRecord:
    """The Protected Restore Map has been emptied in its place."""
    return replace(group, void=False)


def break_off_restore(group: GroupRecord, name: str, *, void: bool, now: float) -> GroupRecord:
    """The restore ends by force: the Source is part old, part clone. Needs the group held and
    drained and D[c] |= P. `void`: the Protected Restore Map is not empty, and means nothing from now
    on."""
    clone = clone_named(group, name)
    state = next_state(Command.FORCE_FRACTURE, group, clone)
    if clone.state is _S.REVERSE_SYNCHRONIZING:
        clone = replace(clone, split_by=clone.split_by or SplitBy.ADMINISTRATOR, fractured_at=now)
    return replace(group, void=void).with_clone(replace(clone, state=state))


def complete_restore(group: GroupRecord, name: str) -> GroupRecord:
    """The Protected Restore Map becomes the Delta Map (D7). Needs the group held and drained,
    nothing pending, the Source flushed, and D[c] empty: it becomes the Protected Restore Map."""
    clone = clone_named(group, name)
    return replace(group, protected=clone.delta).with_clone(
        replace(clone, state=_S.FRACTURED, delta=group.protected)
    )


def complete_reverse_sync(group: GroupRecord, name: str, *, now: float) -> GroupRecord:
    """The Source is what the clone is, and the clone is mirrored from now on. Needs the group held
    and drained, D[c] empty, and both flushed. A clone that failed meanwhile has to be copied to in
    full: then P must have every extent, and becomes its Delta Map."""
    clone = clone_named(group, name)
    if clone.split_by is SplitBy.SYSTEM:
        split = replace(clone, state=_S.OUT_OF_SYNC, fractured_at=now, delta=group.protected)
        return replace(group, protected=clone.delta).with_clone(split)
    return group.with_clone(replace(clone, state=_S.SYNCHRONIZED))


def failed_in_reverse_sync(group: GroupRecord, name: str, *, reason: str) -> GroupRecord:
    """A flush of a clone that is being reverse synchronized has failed (D10): what it has of the
    hosts' writes is not to be believed, so that it cannot become synchronized."""
    clone = clone_named(group, name)
    return group.with_clone(replace(clone, split_by=SplitBy.SYSTEM, reason=reason))


def written(group: GroupRecord, name: str) -> GroupRecord:
    """A host is about to write to a fractured clone for the first time."""
    return group.with_clone(replace(clone_named(group, name), written=True))


def unflushed(group: GroupRecord) -> list[str | None]:
    """The LUs of which a flush has failed: clones, or the Source (None)."""
    clones = [clone.name for clone in group.clones if clone.unflushed]
    return [None, *clones] if group.unflushed else [*clones]


def flush_failed(group: GroupRecord, name: str | None, *, failed: bool = True) -> GroupRecord:
    """A flush of the clone `name`, or of the Source (None), has failed (D10); or, if not `failed`, the
    page cache shows no more of it than what is on its disk."""
    if name is None:
        return replace(group, unflushed=failed)
    clone = next((clone for clone in group.clones if clone.name == name), None)
    return group if clone is None else group.with_clone(replace(clone, unflushed=failed))


def recovered(group: GroupRecord, delta_counts: dict[str, int]) -> GroupRecord:
    """The group after a death of the daemon (D9): a mirrored clone whose Delta Map is not empty is
    synchronizing, whatever it was."""
    for clone in group.clones:
        if clone.state is _S.SYNCHRONIZED and delta_counts[clone.name]:
            group = no_longer_equal(group, clone.name, delta_counts[clone.name])
    return group


def without_trust(group: GroupRecord, counts: dict[str, int], *, lost: bool) -> GroupRecord:
    """The group after a power cut (D9), its live maps filled from the durable ones. `counts` are
    those of the Delta Maps; `lost`: sectors of the PPRM are damaged in both copies, or of a restore
    that the record does not know, so that nobody knows what hosts have written: a restore that ran
    waits for a person."""
    group = recovered(group, counts)
    running = restoring_clone(group)
    if running is None or running.state is not _S.RESTORING or not lost:
        return group
    reason = (
        "the Protected Restore cannot go on: the map of what hosts have written since it began is "
        "damaged; write 1 to protected_restore to start it again, which drops what they have written"
    )
    return group.with_clone(replace(running, state=_S.REVERSE_OUT_OF_SYNC, reason=reason))


_IN_DOUBT: dict[CloneState, str] = {
    _S.FRACTURED: "look at what it holds before you restore from it",
    _S.OUT_OF_SYNC: "nothing is copied by itself: sync it, once you know that its Source is good",
    _S.REVERSE_OUT_OF_SYNC: "a restore from it does not go on by itself: if it is to, write 1 to "
    "protected_restore, which drops what hosts have written since it began",
}


def in_doubt(
    group: GroupRecord, reason: str, *, last: Mapping[str, CloneState], now: float
) -> GroupRecord:
    """The group of a volume that is not the one that its backings were in use with, for that
    `reason`. Needs every Delta Map full and the Protected Restore Map empty. `last`: the last state
    of each clone that anybody knows of.

    No byte may be copied because of what such a record says: a clone that is called mirrored may be
    the only good copy by now, and a restore that it knows of may be over. A clone that was fractured
    stays so, but may have been written to."""
    for clone in group.clones:
        match last[clone.name]:
            case _S.FRACTURED:
                state, by = _S.FRACTURED, clone.split_by or SplitBy.ADMINISTRATOR
            case _S.RESTORING | _S.REVERSE_OUT_OF_SYNC:
                state, by = _S.REVERSE_OUT_OF_SYNC, clone.split_by or SplitBy.ADMINISTRATOR
            case _:
                state, by = _S.OUT_OF_SYNC, SplitBy.SYSTEM
        doubtful = replace(
            clone,
            state=state,
            split_by=by,
            reason=f"{reason}; {_IN_DOUBT[state]}",
            fractured_at=clone.fractured_at or now,
            written=True,
            then_fracture=False,
        )
        group = group.with_clone(doubtful)
    return group
