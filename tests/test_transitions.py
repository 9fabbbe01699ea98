"""The table of states and commands: every command in every state."""

import itertools

import pytest
from bitarray import bitarray

from clonefs.errors import ClonefsError
from clonefs.extents import ExtentMap
from clonefs.group import TABLE, CloneGroup, Command, WriteTicket, transitions
from clonefs.volume import CloneRecord, CloneState, GroupRecord, MapSlot, SplitBy

S = CloneState

# The contract, written out again: command, from, to. Every other pair is EBUSY.
CONTRACT = {
    (Command.SYNC, S.FRACTURED): S.SYNCHRONIZING,
    (Command.SYNC, S.OUT_OF_SYNC): S.SYNCHRONIZING,
    (Command.SYNC, S.SYNCHRONIZING): S.SYNCHRONIZING,
    (Command.SYNC, S.SYNCHRONIZED): S.SYNCHRONIZED,
    (Command.FRACTURE, S.SYNCHRONIZED): S.FRACTURED,
    (Command.FRACTURE, S.SYNCHRONIZING): S.OUT_OF_SYNC,
    (Command.FRACTURE, S.FRACTURED): S.FRACTURED,
    (Command.FORCE_FRACTURE, S.SYNCHRONIZED): S.FRACTURED,
    (Command.FORCE_FRACTURE, S.SYNCHRONIZING): S.OUT_OF_SYNC,
    (Command.FORCE_FRACTURE, S.FRACTURED): S.FRACTURED,
    (Command.FORCE_FRACTURE, S.RESTORING): S.REVERSE_OUT_OF_SYNC,
    (Command.FORCE_FRACTURE, S.REVERSE_SYNCHRONIZING): S.REVERSE_OUT_OF_SYNC,
    (Command.FORCE_FRACTURE, S.REVERSE_OUT_OF_SYNC): S.REVERSE_OUT_OF_SYNC,
    (Command.PROTECTED_RESTORE, S.FRACTURED): S.RESTORING,
    (Command.PROTECTED_RESTORE, S.REVERSE_OUT_OF_SYNC): S.RESTORING,
    (Command.PROTECTED_RESTORE, S.RESTORING): S.RESTORING,
    (Command.REVERSE_SYNC, S.FRACTURED): S.REVERSE_SYNCHRONIZING,
    (Command.REVERSE_SYNC, S.REVERSE_OUT_OF_SYNC): S.REVERSE_SYNCHRONIZING,
    (Command.REVERSE_SYNC, S.REVERSE_SYNCHRONIZING): S.REVERSE_SYNCHRONIZING,
    (Command.REMOVE, S.SYNCHRONIZED): S.SYNCHRONIZED,
    (Command.REMOVE, S.FRACTURED): S.FRACTURED,
    (Command.REMOVE, S.OUT_OF_SYNC): S.OUT_OF_SYNC,
    (Command.REMOVE, S.REVERSE_OUT_OF_SYNC): S.REVERSE_OUT_OF_SYNC,
}


def group(**states: CloneState) -> GroupRecord:
    clones = tuple(
        CloneRecord(name, f"/{name}", state, MapSlot(4096 * number, 4096))
        for number, (name, state) in enumerate(states.items(), 10)
    )
    return GroupRecord("g", "/s", 1 << 20, 65536, MapSlot(4096, 4096), MapSlot(8192, 4096), clones)


@pytest.mark.parametrize(("command", "state"), list(itertools.product(Command, CloneState)))
def test_every_command_in_every_state(command: Command, state: CloneState) -> None:
    record = group(a=state)
    expected = CONTRACT.get((command, state))
    assert TABLE[command].get(state) is expected
    if expected is None:
        with pytest.raises(ClonefsError, match=f"g/a is {state}") as caught:
            transitions.next_state(command, record, record.clone("a"))
        assert caught.value.errno == 16
    else:
        assert transitions.next_state(command, record, record.clone("a")) is expected


def test_a_restore_splits_off_what_is_mirrored() -> None:
    record = group(a=S.FRACTURED, b=S.SYNCHRONIZED, c=S.SYNCHRONIZING, d=S.OUT_OF_SYNC)
    after = transitions.begin_restore(
        record,
        "a",
        to_copy=3,
        equal=frozenset({"b"}),
        protected=record.protected,
        now=5.0,
    )
    assert [clone.state for clone in after.clones] == [
        S.RESTORING,
        S.FRACTURED,
        S.OUT_OF_SYNC,
        S.OUT_OF_SYNC,
    ]
    assert after.clone("b").fractured_at == 5.0
    assert record.clone("b").state is S.SYNCHRONIZED


def test_a_second_restore_is_refused_while_one_runs() -> None:
    record = group(a=S.RESTORING, b=S.FRACTURED)
    with pytest.raises(
        ClonefsError, match="g/a is restoring, and a Source can be restored from one"
    ):
        transitions.begin_restore(
            record, "b", to_copy=0, equal=frozenset(), protected=record.protected, now=0.0
        )


def test_the_protected_restore_map_becomes_the_delta_map() -> None:
    record = group(a=S.RESTORING)
    after = transitions.complete_restore(record, "a")
    assert after.clone("a").state is S.FRACTURED
    assert (after.clone("a").delta, after.protected) == (record.protected, record.clone("a").delta)


def test_a_mirrored_clone_that_differs_is_no_complete_copy() -> None:
    record = group(a=S.SYNCHRONIZED)
    after = transitions.fracture(record, ["a"], equal=frozenset(), now=1.0)
    assert after.clone("a").state is S.OUT_OF_SYNC


def test_recovery_of_maps_that_are_trusted() -> None:
    record = group(a=S.SYNCHRONIZED, b=S.SYNCHRONIZED, c=S.FRACTURED)
    after = transitions.recovered(record, {"a": 2, "b": 0, "c": 9})
    assert [clone.state for clone in after.clones] == [
        S.SYNCHRONIZING,
        S.SYNCHRONIZED,
        S.FRACTURED,
    ]


def test_recovery_after_a_power_cut() -> None:
    record = group(a=S.SYNCHRONIZED, b=S.RESTORING, c=S.FRACTURED, d=S.SYNCHRONIZING)
    counts = {"a": 1, "b": 1, "c": 1, "d": 1}
    assert transitions.without_trust(record, counts, lost=False).clone("b").state is S.RESTORING
    after = transitions.without_trust(record, counts, lost=True)
    assert [clone.state for clone in after.clones] == [
        S.SYNCHRONIZING,
        S.REVERSE_OUT_OF_SYNC,
        S.FRACTURED,
        S.SYNCHRONIZING,
    ]
    assert "start it again" in (after.clone("b").reason or "")
    assert after.clone("c") == record.clone("c")


def test_a_reverse_sync_splits_off_what_is_mirrored_and_ends_mirrored() -> None:
    record = group(a=S.FRACTURED, b=S.SYNCHRONIZED)
    after = transitions.begin_restore(
        record,
        "a",
        command=Command.REVERSE_SYNC,
        to_copy=3,
        equal=frozenset({"b"}),
        protected=record.protected,
        now=5.0,
    )
    assert [clone.state for clone in after.clones] == [S.REVERSE_SYNCHRONIZING, S.FRACTURED]
    ended = transitions.complete_reverse_sync(after, "a", now=6.0)
    assert ended.clone("a").state is S.SYNCHRONIZED
    assert ended.protected == record.protected


def test_a_reverse_sync_whose_clone_failed_ends_as_out_of_sync() -> None:
    """Its Delta Map is then the one that P had, which must have every extent."""
    record = transitions.failed_in_reverse_sync(
        group(a=S.REVERSE_SYNCHRONIZING), "a", reason="flushing failed"
    )
    after = transitions.complete_reverse_sync(record, "a", now=6.0)
    clone = after.clone("a")
    assert (clone.state, clone.split_by, clone.reason) == (
        S.OUT_OF_SYNC,
        SplitBy.SYSTEM,
        "flushing failed",
    )
    assert (clone.delta, after.protected) == (record.protected, record.clone("a").delta)


def test_a_reverse_sync_broken_off_is_split_off() -> None:
    record = group(a=S.REVERSE_SYNCHRONIZING)
    after = transitions.break_off_restore(record, "a", void=False, now=7.0).clone("a")
    assert (after.state, after.fractured_at) == (S.REVERSE_OUT_OF_SYNC, 7.0)
    assert after.split_by is SplitBy.ADMINISTRATOR


def test_what_is_being_written_stays_marked_when_its_clone_is_split_off() -> None:
    """L2: a later write does not know of the one under way, which ends after it."""
    maps: dict[MapSlot, ExtentMap] = {}

    def map_of(slot: MapSlot, extents: int) -> ExtentMap:
        if slot not in maps:
            maps[slot] = ExtentMap(bitarray(4096 * 8, endian="little"), extents)
        return maps[slot]

    at_work = CloneGroup(group(a=S.SYNCHRONIZED), map_of)
    ticket = at_work.admit_write(0, 512)
    assert isinstance(ticket, WriteTicket)
    at_work.put_under_way(ticket)
    record = transitions.split_off_failed(at_work.record, "a", reason="it failed", now=1.0)
    at_work.split_off(record, "a")
    assert at_work.admit_simple_write(4096, 512)  # the same extent, and the Source alone
    at_work.end_write(ticket, written=True, unequal=[])
    assert at_work.clones["a"].delta[0] == 1
