"""Commits that come together: one record has them all, and each hears how it went."""

import random
from collections.abc import Callable
from typing import cast

import pytest
import trio
from msgspec.structs import replace

from clonefs.engines import Recorder
from clonefs.engines.recorder import _Waiting
from clonefs.errors import ClonefsError, busy
from clonefs.group import CloneGroup
from clonefs.testing.world import SimulatedMedium, World
from clonefs.volume import MetadataVolume, Record, format_medium
from tests.test_figures import rig


class Desk:
    """A recorder that writes when it is let."""

    def __init__(self) -> None:
        world = World(
            random.Random(0), volume=bytearray(1 << 20), volume_on_disk=bytearray(1 << 20)
        )
        format_medium(SimulatedMedium(world), bytes(16))
        self.volume = MetadataVolume(SimulatedMedium(world), "boot")
        self.recorder = Recorder(self.volume, self._write)
        self.may_write = trio.Event()
        self.failing = False
        self.told: dict[str, str] = {}

    async def _write(self, work: Callable[[], None]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):  # as a thread is
            await self.may_write.wait()
        if self.failing:
            raise ClonefsError(5, "no disk")
        work()

    @property
    def boot_id(self) -> str:
        return self.volume.record.boot_id

    @staticmethod
    def group_of(name: str) -> CloneGroup:
        """Of another group each."""
        return cast(CloneGroup, name)

    async def commit(self, name: str, change: Callable[[Record], Record] | None = None) -> None:
        """Add `name` to what the record says, and remember what became of it."""

        def add(record: Record) -> Record:
            return replace(record, boot_id=f"{record.boot_id}+{name}")

        try:
            await self.recorder._take_turns(
                _Waiting(change or add, frozenset({self.group_of(name)}), lambda: None)
            )
            self.told[name] = "done"
        except ClonefsError as error:
            self.told[name] = error.reason
        except trio.Cancelled:
            self.told[name] = "cancelled"
            raise


def refused(record: Record) -> Record:
    raise busy("not now")


async def test_those_that_come_while_one_is_written_share_the_next() -> None:
    desk = Desk()
    before, generation = desk.boot_id, desk.volume.generation
    async with trio.open_nursery() as nursery:
        for name in "abcd":
            change = refused if name == "c" else None
            nursery.start_soon(desk.commit, name, change)
            await trio.testing.wait_all_tasks_blocked()
        desk.may_write.set()
    assert desk.told == {"a": "done", "b": "done", "c": "not now", "d": "done"}
    assert desk.boot_id == f"{before}+a+b+d"
    assert desk.volume.generation == generation + 2


async def test_none_of_them_has_happened_if_the_write_fails() -> None:
    desk = Desk()
    before = desk.boot_id
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.commit, "a")
        await trio.testing.wait_all_tasks_blocked()
        for name in "bc":
            nursery.start_soon(desk.commit, name)
        await trio.testing.wait_all_tasks_blocked()
        desk.failing = True
        desk.may_write.set()
    assert desk.told == dict.fromkeys("abc", "no disk")
    assert desk.boot_id == before
    desk.failing = False
    await desk.commit("e")
    assert desk.boot_id == f"{before}+e"


async def test_a_second_change_of_a_group_sees_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were both in one record, the second would be made of what the group was before."""
    async with rig("one", "two") as r:
        server = r.system.servers["group"]
        generation = r.system.volume.generation

        async def later(work: Callable[[], None]) -> None:
            await trio.testing.wait_all_tasks_blocked()
            work()

        monkeypatch.setattr(r.system.recorder, "_blocking", later)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.system.set_full_copies, "group", True)
            nursery.start_soon(r.system.set_rate, "group", "one", 1000)
            nursery.start_soon(r.system.set_rate, "group", "two", 2000)
        assert r.system.volume.generation == generation + 3
        assert r.system.volume.record.groups == (server.group.record,)
        assert server.group.record.full_copies
        assert [clone.rate for clone in server.group.record.clones] == [1000, 2000]


@pytest.mark.parametrize("taken", [False, True])
async def test_who_gives_up_is_told_if_it_is_too_late(taken: bool) -> None:
    """A record that has a change must not have it without whoever asked for it knowing."""
    desk = Desk()
    before = desk.boot_id
    scope = trio.CancelScope()

    async def give_up() -> None:
        with scope:
            await desk.commit("c")

    async with trio.open_nursery() as nursery:
        for commit in (lambda: desk.commit("a"), lambda: desk.commit("b"), give_up):
            nursery.start_soon(commit)
            await trio.testing.wait_all_tasks_blocked()
        if taken:  # by the second one, which writes it now
            first, desk.may_write = desk.may_write, trio.Event()
            first.set()
            await trio.testing.wait_all_tasks_blocked()
            assert desk.told == {"a": "done"}
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert desk.told == ({"a": "done"} if taken else {"c": "cancelled"})
        desk.may_write.set()
    assert desk.told == {"a": "done", "b": "done", "c": "done" if taken else "cancelled"}
    assert desk.boot_id == f"{before}+a+b" + ("+c" if taken else "")


async def test_who_gives_up_while_it_commits_for_others_does_it_all_the_same() -> None:
    desk = Desk()
    before = desk.boot_id
    scope = trio.CancelScope()

    async def first() -> None:
        await desk.commit("a")
        scope.cancel()  # the next one has the turn already

    async def give_up() -> None:
        with scope:
            await desk.commit("b")

    async with trio.open_nursery() as nursery:
        for commit in (first, give_up, lambda: desk.commit("c")):
            nursery.start_soon(commit)
            await trio.testing.wait_all_tasks_blocked()
        desk.may_write.set()
    assert desk.told == dict.fromkeys("abc", "done")
    assert desk.boot_id == f"{before}+a+b+c"
