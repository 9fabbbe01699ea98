"""The Data Storage System: all groups of one metadata volume, and every command on them.

A command on a clone goes through the same steps: check it early, so that a refusal holds nobody up;
flush what can be flushed before; hold and drain the groups; decide on the record as it is then;
flush, set bits, commit; adopt; let the hosts go on. Rules D3, D4 and D7 are these steps.

It must never await anything but flushes and the commit while a group is held; the few extents that
hosts never stop writing to are the exception, they are copied then (`_copy_hot_extents`).
"""

import contextlib
import functools
import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import trio
from msgspec.structs import replace

from clonefs.engines.cod import CodEngine
from clonefs.engines.durability import CHECKPOINT, RUN_AHEAD, Durability
from clonefs.engines.host import CloneLu, SourceLu
from clonefs.engines.recorder import Recorder
from clonefs.engines.recovery import (
    OVERWRITTEN,
    Loaded,
    Recovery,
    found,
    load,
    lost_is_forgotten,
)
from clonefs.engines.server import GroupServer
from clonefs.engines.stamps import (
    SOURCE,
    Doubt,
    Stamp,
    disbelieve,
    distrust_durably,
    look,
    remember,
)
from clonefs.engines.sync import SyncEngine
from clonefs.engines.transfers import RUN, Transfers
from clonefs.engines.verify import Verification
from clonefs.errors import ClonefsError, DeviceError, busy, invalid, missing, taken
from clonefs.extents import Geometry
from clonefs.group import MIRRORED, RESTORES, CloneGroup, Command, transitions
from clonefs.units import LogicalUnit, MissingUnit
from clonefs.volume import CloneRecord, CloneState, GroupRecord, MapSlot, Record, SplitBy

log = logging.getLogger(__name__)

RETRY = 5.0  # seconds between attempts to complete a copy
HOT_EXTENTS = 16
DEFAULT_EXTENT_SIZE = 64 << 10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


class OpenUnit(Protocol):
    """Opens and locks a backing, in a thread if need be (clonefs.units.open_backing)."""

    async def __call__(
        self, path: Path, *, create_size: int | None = None, size: int | None = None
    ) -> LogicalUnit: ...


class StorageSystem:
    """The groups of the volume that `recorder` commits to.

    `forget_pages` makes the kernel forget what it has cached of a group's Source; `wall_clock` gives
    seconds since the epoch; `on_event` gets one line for each change of state, `on_change` the names
    of the group and the clone before that; `on_error` gets the names of a group and an LU, and a
    sentence, each time that I/O has failed;
    `run` is how many bytes a Sync Engine copies at a time, `checkpoint` the seconds between
    checkpoints of the durable maps, `run_ahead` the extents that are marked in them at once.
    """

    def __init__(
        self,
        recorder: Recorder,
        open_unit: OpenUnit,
        *,
        forget_pages: Callable[[str], Awaitable[None]],
        wall_clock: Callable[[], float],
        on_event: Callable[[str], None],
        on_change: Callable[..., None] = lambda *place: None,
        on_error: Callable[[str, str, str], None] = lambda group, lu, sentence: None,
        run: int = RUN,
        checkpoint: float = CHECKPOINT,
        run_ahead: int = RUN_AHEAD,
    ) -> None:
        self.recorder = recorder
        self.volume = recorder.volume
        self.recovery: Recovery | None = None  # None: the volume was closed cleanly
        self.servers: dict[str, GroupServer] = {}
        self.sources: dict[str, SourceLu] = {}
        self.clones: dict[tuple[str, str], CloneLu] = {}
        self.transfers = Transfers(self._complete, run)
        self._open_unit = open_unit
        self._forget_pages = forget_pages
        self._wall_clock = wall_clock
        self._on_event = on_event
        self._on_change = on_change
        self._on_error = on_error
        self._checkpoint = checkpoint
        self._run_ahead = run_ahead
        self._engines: dict[tuple[str, str], trio.CancelScope] = {}
        self._checkpointers: dict[str, trio.CancelScope] = {}
        self._verifying = trio.CapacityLimiter(1)
        self._nursery: trio.Nursery | None = None
        self._recovered = False
        self._configuration = trio.Lock()
        self._allocation = trio.Lock()  # from choosing a slot until a record names it
        recorder.backings_of = self._backings_of

    # Life

    async def start(self, nursery: trio.Nursery) -> None:
        """Recover what the volume has, open the backings, and set the engines to work in `nursery`.

        Raises ClonefsError if the volume cannot be used; a backing that is missing only makes its
        group or clone faulted.
        """
        self._nursery = nursery
        self.recorder.on_broken = self._volume_broken
        await self.recorder.settle()
        opened = {group.name: await self._open_units(group) for group in self.volume.record.groups}
        doubt = look(self.volume, opened)
        forgotten: list[str] = []
        loaded = [
            self._load(await self._forget_lost(group, opened[group.name], forgotten), doubt)
            for group in self.volume.record.groups
        ]
        for each in loaded:
            if self._doubted(each, doubt):
                await distrust_durably(self.recorder, each)
        recovery = self._recovery(doubt, loaded, forgotten)
        was_clean = self.volume.closed_cleanly and not forgotten
        recovered = tuple(each.group.record for each in loaded)
        record = replace(self.volume.opened(), groups=recovered)
        if doubt.newest:
            await self.recorder.overtake(doubt.newest, record)
        else:
            await self.recorder.commit(lambda _: record)
        self._recovered = True
        self._tell(recovery, was_clean=was_clean)
        for each in loaded:
            name = each.group.record.name
            # After the commit. Durable where there is doubt, or the next mount would doubt again.
            words = [SOURCE, *(clone.state for clone in each.group.record.clones)]
            backings = list(zip(opened[name], words, strict=True))
            await self.recorder.stamp(backings, durable=name in doubt.reasons)
            await self._open_group(each, opened[name])

    async def _open_units(self, record: GroupRecord) -> list[LogicalUnit]:
        """The Source, and the clones in the order of the record."""
        backings = [record.backing, *(clone.backing for clone in record.clones)]
        return [await self._open_or_missing(backing, record.size) for backing in backings]

    async def _forget_lost(
        self, record: GroupRecord, units: list[LogicalUnit], told: list[str]
    ) -> GroupRecord:
        """What a failed flush has lost the page cache may still show, and the kernel tells nobody any
        more. It is made to forget it before anything is copied, for a power cut would leave the copy and
        not what it is a copy of (D10)."""
        by_name = dict(zip((None, *(clone.name for clone in record.clones)), units, strict=True))
        for name in transitions.unflushed(record):
            if self.volume.record.boot_id == self.volume.boot_id:
                try:
                    await by_name[name].forget_cached()
                except ClonefsError as error:
                    told.append(f"{record.name}/{name or SOURCE}: {error.reason}")
                    continue
                told.append(lost_is_forgotten(record.name, name))
                self._mark_what_reverts(record, name)
            record = transitions.flush_failed(record, name, failed=False)
        return record

    def _mark_what_reverts(self, record: GroupRecord, name: str | None) -> None:
        """What has been forgotten may differ from what an earlier daemon has copied of it: one that
        could not make the kernel forget it, and was killed. As in CloneGroup.distrust."""
        extents = Geometry(record.size, record.extent_size).extents
        for clone in record.clones:
            if name is None or (clone.name == name and clone.state not in RESTORES):
                self.volume.map(clone.delta, extents).mark_all()

    def _load(self, record: GroupRecord, doubt: Doubt) -> Loaded:
        reason = doubt.reasons.get(record.name)
        if reason is None:
            return load(self.volume, record)
        return disbelieve(self.volume, record, reason, doubt.states, self._wall_clock())

    def _recovery(self, doubt: Doubt, loaded: list[Loaded], forgotten: list[str]) -> Recovery:
        """What was found, and what was done about it."""
        damage = [f"{damage}; the other record is used" for damage in self.volume.damage]
        damage += [
            f"{name}: {OVERWRITTEN}"
            for name in sorted(self.volume.overwritten)
            if name not in doubt.reasons
        ]
        damage += [line for each in loaded for line in each.damage]
        damage += [line for each in loaded if self._doubted(each, doubt) for line in each.told]
        done = [line for each in loaded if not self._doubted(each, doubt) for line in each.told]
        done = forgotten + done
        return Recovery(self._wall_clock(), found(self.volume), tuple(damage), tuple(done))

    @staticmethod
    def _doubted(loaded: Loaded, doubt: Doubt) -> bool:
        return loaded.group.record.name in doubt.reasons

    def _tell(self, recovery: Recovery, *, was_clean: bool) -> None:
        """Say it, unless the volume was closed cleanly and nothing is the matter."""
        if was_clean and not recovery.damage:
            return
        self.recovery = recovery
        for line in recovery.lines():
            log.log(logging.WARNING if line in recovery.damage else logging.INFO, "%s", line)
            self._on_event(f"recovery: {line}")

    async def _open_group(self, loaded: Loaded, opened: list[LogicalUnit]) -> None:
        record = loaded.group.record
        source, *others = opened
        clones = {clone.name: unit for clone, unit in zip(record.clones, others, strict=True)}
        server = self._add_server(loaded, source, clones)
        await server.durability.include_live_maps()
        for clone in record.clones:
            unit = clones[clone.name]
            if isinstance(unit, MissingUnit):
                await server.split_off(clone.name, missing(unit.reason))
            self._start_clone(server, clone.name)

    async def _open_or_missing(self, backing: str, size: int) -> LogicalUnit:
        try:
            return await self._open_unit(Path(backing), size=size)
        except ClonefsError as error:
            self._event(f"{backing} is faulted: {error.reason}")
            return MissingUnit(backing, size, error.reason)

    def _backings_of(self, record: GroupRecord) -> list[tuple[LogicalUnit, str]]:
        """The units of a group with what their stamps say of them."""
        server = self.servers.get(record.name)
        if server is None:
            return []
        clones = [
            (server.units[clone.name], clone.state)
            for clone in record.clones
            if clone.name in server.units
        ]
        return [(server.source, SOURCE), *clones]

    async def _take_over(self, unit: LogicalUnit) -> None:
        """A new backing may still have the stamp of another volume, which would bring the group in
        doubt if the machine went down before the next one is on disk."""
        stamp = Stamp.of(unit)
        foreign = stamp is not None and stamp.uuid != self.volume.uuid
        await self.recorder.stamp([(unit, SOURCE)], durable=foreign)

    def _add_server(
        self, loaded: Loaded, source: LogicalUnit, clones: dict[str, LogicalUnit]
    ) -> GroupServer:
        server = self._make_server(loaded, source, clones)
        self.servers[server.name] = server
        self.sources[server.name] = SourceLu(server, CodEngine(server))
        assert self._nursery is not None
        self._checkpointers[server.name] = trio.CancelScope()
        self._nursery.start_soon(self._tend, server)
        return server

    def _make_server(
        self, loaded: Loaded, source: LogicalUnit, clones: dict[str, LogicalUnit]
    ) -> GroupServer:
        durability = Durability(
            loaded.group, self.recorder, loaded.delta, loaded.protected, self._run_ahead
        )
        name = loaded.group.record.name
        return GroupServer(
            loaded.group,
            source,
            clones,
            self.recorder,
            self._wall_clock,
            self._state_changed,
            durability,
            lambda line, level: self._event(line, name, level=level),
            functools.partial(self._on_error, name),
        )

    async def _tend(self, server: GroupServer) -> None:
        """The durable maps of a group, as long as it is there."""
        with self._checkpointers[server.name]:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._checkpoints, server)
                nursery.start_soon(self._marks_ahead, server)

    async def _checkpoints(self, server: GroupServer) -> None:
        """Trim them every now and then."""
        said = ""
        while True:
            await trio.sleep(self._checkpoint)
            units = [server.source, *server.units.values()]
            if any(isinstance(unit, MissingUnit) for unit in units):
                continue  # what cannot be flushed stays marked
            try:
                await server.checkpoint()
                await server.rest()
                said = ""
            except ClonefsError as error:
                if error.reason != said:  # a flush that failed fails each time
                    said = error.reason
                    group = {"clonefs_group": server.name}
                    log.error("%s: no checkpoint: %s", server.name, said, extra=group)

    async def _marks_ahead(self, server: GroupServer) -> None:
        """Have them ahead of sequential writers, as a request among those of hosts: no transition
        takes place meanwhile, and nobody closes the volume."""
        while True:
            await server.durability.wanted()
            await server.gate.enter()
            try:
                with contextlib.suppress(ClonefsError):
                    await server.durability.mark_ahead()
            finally:
                server.gate.leave()

    def _start_clone(self, server: GroupServer, name: str) -> None:
        assert self._nursery is not None
        scope = trio.CancelScope()
        self.clones[server.name, name] = CloneLu(server, name)
        self._engines[server.name, name] = scope
        engine = SyncEngine(server, name, self.transfers)

        async def run() -> None:
            with scope:
                await engine.run()

        self._nursery.start_soon(run, name=f"sync engine of {server.name}/{name}")

    async def stop(self) -> None:
        """Stop the engines, let requests that are inside end, flush everything, and close the
        volume. Raises ClonefsError if not everything could be made durable."""
        for scope in (*self._engines.values(), *self._checkpointers.values()):
            scope.cancel()
        for server in self.servers.values():
            for verification in server.verifications.values():
                await verification.stop()
        failures: list[str] = []
        async with AsyncExitStack() as stack:
            for server in self.servers.values():
                await stack.enter_async_context(server.commands)
                await stack.enter_async_context(server.held())
                await stack.enter_async_context(server.flushing)
            for server in self.servers.values():
                await self._flush_for_stop(server, failures)
        # What is not flushed may be lost when the machine goes down: then the durable maps know. A
        # backing that is missing was flushed if the daemon before closed the volume.
        unflushed = failures or (self.recovery is not None and self._misses_units())
        clean = self._recovered and not unflushed
        try:
            await self._conclude(failures, clean=clean)
        finally:
            await self.recorder.close(clean=False)
        if failures:
            raise ClonefsError(5, "; ".join(failures))

    def _misses_units(self) -> bool:
        units = (u for s in self.servers.values() for u in (s.source, *s.units.values()))
        return any(isinstance(unit, MissingUnit) for unit in units)

    async def _flush_for_stop(self, server: GroupServer, failures: list[str]) -> None:
        flushes = [(server.source, server.flush_source)] + [
            (unit, functools.partial(server.flush_clone, name))
            for name, unit in server.units.items()
        ]
        for unit, flush in flushes:
            try:
                if not isinstance(unit, MissingUnit):
                    await flush()
            except ClonefsError as error:
                failures.append(error.reason)

    def _volume_broken(self, reason: str) -> None:
        log.error("%s", reason)
        self._on_event(reason)

    def request_failed(self, group: str, lu: str, request: str, error: ClonefsError) -> None:
        """A request of a host has failed for no fault of its own; `request` says which."""
        self._on_error(group, lu, f"{request}: {error.reason}")
        if isinstance(error, DeviceError) and group in self.servers:
            self.servers[group].device_failed(error)

    async def _conclude(self, failures: list[str], *, clean: bool) -> None:
        """The record says that all is on disk, the backings learn of that record, and are let go of.
        The volume is let go of last: whoever mounts it next must find its backings free."""
        servers = self.servers.values()
        backings = [each for server in servers for each in self._backings_of(server.group.record)]
        try:
            if clean:
                await self.recorder.stamp(backings, durable=True)
                await self.recorder.commit(self._remember_stamps)
                await self.recorder.conclude()
            if self._recovered:
                await self.recorder.stamp(backings, durable=True)
        except ClonefsError as error:
            failures.append(error.reason)
        for unit, _ in backings:
            unit.close()

    def _remember_stamps(self, record: Record) -> Record:
        """Which backings must have a stamp from now on: those that have one, on stable storage."""
        for server in self.servers.values():
            group = server.group.record
            units = [server.source, *(server.units[clone.name] for clone in group.clones)]
            record = record.with_group(remember(group, units))
        return record

    def _event(
        self, line: str, *place: str, level: int | None = logging.INFO, reason: str = ""
    ) -> None:
        """The line is for `events`, and with the reason for the log (None: it is there already)."""
        if place:
            self._on_change(*place)
        if level is not None:
            group = {"clonefs_group": place[0]} if place else None
            log.log(level, "%s%s", line, reason, extra=group)
        self._on_event(line)

    def _state_changed(self, before: GroupRecord, after: GroupRecord) -> None:
        old = {clone.name: clone.state for clone in before.clones}
        for clone in after.clones:
            was = old.get(clone.name)
            if was is None:
                self._event(
                    f"{after.name}/{clone.name} added: {clone.state}", after.name, clone.name
                )
            elif was is not clone.state:
                line = f"{after.name}/{clone.name} {was} -> {clone.state}"
                if clone.state is CloneState.OUT_OF_SYNC and clone.reason is not None:
                    reason = f": it is split off: {clone.reason}"
                    self._event(line, after.name, clone.name, level=logging.ERROR, reason=reason)
                else:
                    self._event(line, after.name, clone.name)
        for name in old.keys() - {clone.name for clone in after.clones}:
            self._event(f"{after.name}/{name} removed", after.name, name)

    # Look-up

    def server(self, group: str) -> GroupServer:
        """Raises ClonefsError (ENOENT)."""
        try:
            return self.servers[group]
        except KeyError:
            raise missing(f"there is no group {group!r}") from None

    # Groups and clones

    async def add_group(
        self,
        name: str,
        backing: Path,
        *,
        size: int | None,
        extent_size: int | None,
        full_copies: bool = False,
    ) -> None:
        """A new group on the Source at `backing`; sizes in bytes. Raises ClonefsError."""
        check_name(name, reserved="control")
        async with self._configuration:
            if name in self.servers:
                raise taken(f"there is a group {name!r} already")
            if size is not None:
                Geometry(size, extent_size or DEFAULT_EXTENT_SIZE)  # refuses what cannot be
            source = await self._open_unit(backing, create_size=size)
            try:
                async with self._allocation:
                    await self._take_over(source)
                    record = self._new_group(name, source, size, extent_size)
                    record = replace(record, full_copies=full_copies)
                    await self.recorder.clear_durably(record.durable)
                    await self.recorder.commit(lambda whole: whole.with_group(record))
            except BaseException:
                source.discard()
                raise
            self._add_server(load(self.volume, record), source, {})
            self._event(f"{name} added", name)

    def _new_group(
        self, name: str, source: LogicalUnit, size: int | None, extent_size: int | None
    ) -> GroupRecord:
        if size is not None and source.size != size:
            raise invalid(
                f"{source.name} exists and has {source.size} bytes, not {size}: leave size= out"
            )
        geometry = Geometry(source.size, extent_size or DEFAULT_EXTENT_SIZE)
        protected = self.volume.new_map_slot(geometry.extents)
        durable = self.volume.new_durable_slot(geometry.extents, beside=(protected,))
        return GroupRecord(
            name=name,
            backing=source.name,
            size=geometry.size,
            extent_size=geometry.extent_size,
            protected=protected,
            durable=durable,
        )

    async def remove_group(self, name: str, *, in_use: Callable[[], bool]) -> None:
        """Forget a group without clones. Raises ClonefsError (ENOENT, EBUSY)."""
        async with self._configuration:
            server = self.server(name)
            if server.group.clones:
                raise busy(f"group {name!r} has clones: remove them first")
            # A checkpoint whose flush failed would put its group into the record again.
            async with server.commands, server.flushing, server.held():
                if not isinstance(server.source, MissingUnit):
                    await server.flush_source()
                # From the last look on nobody can open it any more.
                if in_use():
                    raise busy(f"the Source of {name!r} is open: close it first")
                source = self.sources.pop(name)
                try:
                    await self.recorder.commit(lambda record: record.without_group(name))
                except BaseException:
                    self.sources[name] = source
                    raise
                del self.servers[name]
            self._checkpointers.pop(name).cancel()
            async with server.flushing:
                server.source.close()
            self._event(f"{name} removed", name)

    async def add_clone(self, group: str, name: str, backing: Path, *, sync: bool) -> None:
        """A new clone, all of which may differ from its Source; `sync` begins to copy."""
        check_name(name, reserved="source")
        server = self.server(group)
        async with self._configuration, server.commands:
            if name in server.group.clones:
                raise taken(f"group {group!r} has a clone {name!r} already")
            size = server.group.geometry.size
            unit = await self._open_unit(backing, create_size=size, size=size)
            try:
                await self._take_over(unit)
                # A checkpoint does not know of the new map, so none may run until the record has it.
                async with server.flushing, server.held(), self._allocation:
                    record = self._new_clone(server.group, name, unit, sync=sync)
                    await server.durability.mark_all()  # D9 would take it for equal
                    server.units[name] = unit
                    await server.change(lambda whole: whole.with_clone(record))
            except BaseException:
                server.units.pop(name, None)
                unit.discard()
                raise
            self._start_clone(server, name)

    def _new_clone(
        self, group: CloneGroup, name: str, unit: LogicalUnit, *, sync: bool
    ) -> CloneRecord:
        extents = group.geometry.extents
        delta = self.volume.new_map_slot(extents)
        self.volume.map(delta, extents).mark_all()
        return CloneRecord(
            name=name,
            backing=unit.name,
            state=CloneState.SYNCHRONIZING if sync else CloneState.OUT_OF_SYNC,
            delta=delta,
            split_by=None if sync else SplitBy.ADMINISTRATOR,
            copy_total=extents,
        )

    async def remove_clone(self, group: str, name: str, *, in_use: Callable[[], bool]) -> None:
        """Forget a clone; its backing stays as it is. Raises ClonefsError (ENOENT, EBUSY)."""
        server = self.server(group)
        async with self._configuration, server.commands:
            self._check(server, Command.REMOVE, name)
            unit = server.units[name]
            is_a_copy = server.group.clones[name].state is not CloneState.OUT_OF_SYNC
            await self._flush_to_remove(server, name, must=is_a_copy)
            async with server.flushing, server.held():
                self._check(server, Command.REMOVE, name)
                await self._flush_to_remove(server, name, must=is_a_copy)
                if in_use():
                    raise busy(f"{group}/{name} is open: close it first")
                lu = self.clones.pop((group, name))
                try:
                    await server.change(lambda record: record.without_clone(name))
                except BaseException:
                    self.clones[group, name] = lu
                    raise
                self._engines.pop((group, name)).cancel()
                del server.units[name]
            server.forget(unit)
            server.counters.forget(name)
            if name in server.verifications:
                await server.verifications.pop(name).stop()
            async with server.flushing:
                unit.close()

    async def _flush_to_remove(self, server: GroupServer, name: str, *, must: bool) -> None:
        """Flush a clone, which `must` succeed unless it is no copy anyway: that may be forgotten though
        its device fails."""
        if isinstance(server.units[name], MissingUnit):
            return
        try:
            await server.flush_clone(name)
        except ClonefsError:
            if must:
                raise

    def _check(self, server: GroupServer, command: Command, name: str) -> CloneState:
        record = server.group.record
        return transitions.next_state(command, record, transitions.clone_named(record, name))

    async def set_full_copies(self, group: str, full_copies: bool) -> None:
        """Whether what is copied from now on has blocks of its own in any case."""
        await self.server(group).change(lambda record: replace(record, full_copies=full_copies))

    # Commands on clones

    async def set_rate(self, group: str, name: str, rate: int | None) -> None:
        """Bound the copies of a clone to `rate` bytes a second; None for no bound."""
        server = self.server(group)
        transitions.clone_named(server.group.record, name)

        def change(record: GroupRecord) -> GroupRecord:
            return record.with_clone(replace(transitions.clone_named(record, name), rate=rate))

        await server.change(change)

    async def verify(self, group: str, name: str, rate: int | None) -> None:
        """Begin to compare the clone with its Source, at most `rate` bytes a second of each (None
        for no bound); of one that is running, change the rate."""
        server = self.server(group)
        async with server.commands:
            transitions.clone_named(server.group.record, name)
            verification = server.verifications.get(name)
            if verification is not None and verification.running:
                verification.set_rate(rate)
                return
            self._present(server, name)
            assert self._nursery is not None
            verification = Verification(server, name, rate, self._verifying)
            server.verifications[name] = verification
            self._nursery.start_soon(verification.run, name=f"verification of {group}/{name}")

    async def stop_verifying(self, group: str, name: str) -> None:
        """Stop comparing, if that goes on."""
        server = self.server(group)
        async with server.commands:
            transitions.clone_named(server.group.record, name)
            if name in server.verifications:
                await server.verifications[name].stop()

    async def sync(self, group: str, name: str, *, then_fracture: bool = False) -> None:
        """Mirror the clone again and copy what differs; returns once that has begun."""
        server = self.server(group)
        async with server.commands:
            self._check(server, Command.SYNC, name)
            if then_fracture and server.group.clones[name].state is CloneState.SYNCHRONIZED:
                await self._fracture([(server, [name])])
                return
            self._present(server, name)
            async with server.held():
                to_copy = server.group.clones[name].delta.count
                await server.change(
                    lambda record: transitions.begin_sync(
                        record, name, to_copy=to_copy, then_fracture=then_fracture
                    )
                )

    def _present(self, server: GroupServer, name: str) -> None:
        for unit in (server.source, server.units[name]):
            if isinstance(unit, MissingUnit):
                raise ClonefsError(5, unit.reason)

    async def fracture(self, clones: Iterable[tuple[str, str]]) -> None:
        """Split all the clones off at one instant (D3); one record has them all."""
        by_group: dict[str, list[str]] = {}
        for group, name in clones:
            names = by_group.setdefault(group, [])
            if name not in names:
                names.append(name)
        servers = [(self.server(group), names) for group, names in sorted(by_group.items())]
        async with AsyncExitStack() as stack:
            for server, names in servers:
                for name in names:
                    transitions.clone_named(server.group.record, name)
            for server, _ in servers:
                await stack.enter_async_context(server.commands)
            await self._fracture(servers)

    async def _fracture(self, servers: list[tuple[GroupServer, list[str]]]) -> None:
        for server, names in servers:
            for name in names:
                self._check(server, Command.FRACTURE, name)
                await self._flush_mirrored(server, [name])
        async with AsyncExitStack() as stack:
            for server, _ in servers:
                await stack.enter_async_context(server.held())
            for server, names in servers:
                await self._flush_mirrored(server, names)
            now = self._wall_clock()

            def change(
                record: GroupRecord, *, names: list[str], equal: frozenset[str]
            ) -> GroupRecord:
                return transitions.fracture(record, names, equal=equal, now=now)

            await GroupServer.change_together(
                *(
                    (server, functools.partial(change, names=names, equal=server.group.equal()))
                    for server, names in servers
                )
            )

    async def _flush_mirrored(self, server: GroupServer, names: Iterable[str]) -> None:
        for name in names:
            clone = server.group.clones.get(name)
            if clone is not None and clone.state in MIRRORED:
                await server.flush_clone(name)

    async def force_fracture(self, group: str, name: str) -> None:
        """Break a restore off: the Source stays part old, part clone. Else like `fracture`."""
        server = self.server(group)
        async with server.commands:
            state = transitions.clone_named(server.group.record, name).state
            if self._check(server, Command.FORCE_FRACTURE, name) is state:
                return
            if state not in RESTORES:
                await self._fracture([(server, [name])])
                return
            async with server.held():
                # What has been restored stays restored, as far as the Source can still be written;
                # and a clone that was being written to stays as it is now.
                for flush in (server.flush_source, functools.partial(server.flush_clone, name)):
                    with contextlib.suppress(ClonefsError):
                        await flush()
                server.group.fold_protected(name)
                void = server.group.protected.count > 0
                now = self._wall_clock()
                await server.change(
                    lambda record: transitions.break_off_restore(record, name, void=void, now=now)
                )
                await self._empty_void(server)
            await self._forget_pages(group)  # what was shown of the clone, and not copied

    def _empty_protected(self, server: GroupServer) -> MapSlot:
        """A Protected Restore Map that is empty: the group's own, or a new one in its place, so
        that dropping what it says takes effect with the record and not before. On a full volume it
        is the group's own as it stands."""
        group = server.group
        if group.protected.count:
            with contextlib.suppress(ClonefsError):
                return self.volume.new_map_slot(group.geometry.extents)
        return group.record.protected

    async def _empty_void(self, server: GroupServer) -> None:
        """Empty the Protected Restore Map that a record has just called void."""
        if server.group.record.void:
            server.group.protected.clear_all()
            # If this cannot be recorded, no host can set anything in it either.
            with contextlib.suppress(ClonefsError):
                await server.change(transitions.protected_emptied)

    async def protected_restore(self, group: str, name: str) -> None:
        """Begin a Protected Restore, or begin the running one again (D4).

        When it returns, every read of the Source shows the clone's data.
        """
        await self._restore(group, name, Command.PROTECTED_RESTORE)

    async def reverse_sync(self, group: str, name: str) -> None:
        """Begin a Reverse Sync (D8): the same, but what hosts write goes to the clone too."""
        await self._restore(group, name, Command.REVERSE_SYNC)

    async def _restore(self, group: str, name: str, command: Command) -> None:
        server = self.server(group)
        async with server.commands:
            self._check_restore(server, name, command)
            if self._check(server, command, name) is CloneState.REVERSE_SYNCHRONIZING and (
                server.group.clones[name].state is CloneState.REVERSE_SYNCHRONIZING
            ):
                return
            self._present(server, name)
            await self._forget_pages(group)  # what hosts have dirtied there comes before
            # The clone is what the Source shows from now on, so it must be as durable as that.
            await server.flush_clone(name)
            await self._flush_those_to_split(server)
            try:
                async with server.held():
                    await server.flush_clone(name)
                    await self._flush_those_to_split(server)
                    # Only a new map in the place of one that is not empty has to be allocated; other
                    # groups that begin at the same time share a commit.
                    allocates = server.group.protected.count > 0
                    async with self._allocation if allocates else contextlib.nullcontext():
                        await self._begin_restore(server, name, command)
            except ClonefsError:
                await server.no_longer_equal()  # L6 may have marked clones that stay mirrored
                raise
        await self._forget_pages(group)

    async def _flush_those_to_split(self, server: GroupServer) -> None:
        """Flush the mirrored clones before a restore. One that fails is split off as out of sync,
        which is no reason not to restore from another."""
        for clone in server.group.mirrored:
            with contextlib.suppress(ClonefsError):
                await server.flush_clone(clone.name)

    def _check_restore(self, server: GroupServer, name: str, command: Command) -> None:
        """Refuse early what `begin_restore` would refuse."""
        record = server.group.record
        transitions.begin_restore(
            record,
            name,
            command=command,
            to_copy=0,
            equal=frozenset(),
            protected=record.protected,
            now=0.0,
        )

    async def _begin_restore(self, server: GroupServer, name: str, command: Command) -> None:
        group = server.group
        equal = group.equal()
        protected = self._empty_protected(server)
        group.fold_protected(name)
        group.spread_delta(name)
        to_copy = group.clones[name].delta.count
        now = self._wall_clock()
        void = protected == group.record.protected and group.protected.count > 0
        group.beginning = name
        try:
            await server.change(
                lambda record: transitions.begin_restore(
                    record,
                    name,
                    command=command,
                    to_copy=to_copy,
                    equal=equal,
                    protected=protected,
                    now=now,
                    void=void,
                )
            )
        finally:
            group.beginning = None
        await self._empty_void(server)
        server.counts.sync = server.counts.cod = 0
        with contextlib.suppress(
            ClonefsError
        ):  # only sectors that were damaged; a flush tries again
            await server.durability.settle(server.durability.protected)

    # What comes at the end of a copy

    async def _complete(self, server: GroupServer, name: str) -> bool:
        """A clone has nothing left to copy. Returns whether all went well."""
        try:
            async with server.commands:
                clone = server.group.clones.get(name)
                if clone is None:
                    return True
                if clone.state is CloneState.RESTORING:
                    await self._complete_restore(server, name)
                elif clone.state is CloneState.REVERSE_SYNCHRONIZING:
                    await self._complete_reverse_sync(server, name)
                elif clone.state is CloneState.SYNCHRONIZING:
                    await self._complete_sync(server, name)
        except ClonefsError as error:
            server.fault(name, error.reason)
            await trio.sleep(RETRY)  # nothing wakes us when a device is mended
            return False
        return True

    async def _complete_restore(self, server: GroupServer, name: str) -> None:
        """D7. Most of the flush is done before the group is held. Meanwhile the flush of a checkpoint
        may fail, which marks all of the Delta Map (D10): before the commit, it is pending again; while
        that is written, it is in what becomes the Protected Restore Map, and belongs to every clone."""
        group = server.group
        await server.flush_source()
        async with server.held():
            if group.next_pending(0, group.geometry.extents) >= 0:
                return
            await server.flush_source()
            if group.next_pending(0, group.geometry.extents) >= 0:
                return
            group.drop_protected_delta()
            await server.change(lambda record: transitions.complete_restore(record, name))
            group.drop_protected()

    async def _complete_reverse_sync(self, server: GroupServer, name: str) -> None:
        """The Source is flushed before the record says that it is what the others are copied from;
        and the clone, for it keeps what hosts have flushed when the Source gets it. A clone that
        cannot be flushed ends as out of sync, and all of it may differ. A flush that fails while
        that is written marks what becomes the Protected Restore Map (D10), and every clone."""
        await server.flush_source()
        async with server.held():
            await self._copy_hot_extents(server, name)
            clone = server.group.clones[name]
            if clone.state is not CloneState.REVERSE_SYNCHRONIZING or clone.delta.count:
                return
            await server.flush_source()
            with contextlib.suppress(ClonefsError):
                await server.flush_clone(name)
            now = self._wall_clock()
            try:
                if server.group.clones[name].record.split_by is not None:
                    await server.durability.mark_all()
                    server.group.protected.mark_all()  # the Delta Map, once the record says so
                await server.change(
                    lambda record: transitions.complete_reverse_sync(record, name, now=now)
                )
            finally:
                server.group.drop_protected()

    async def _complete_sync(self, server: GroupServer, name: str) -> None:
        if server.group.clones[name].record.then_fracture:
            await self._flush_mirrored(server, [name])
        async with server.held():
            await self._copy_hot_extents(server, name)
            clone = server.group.clones[name]
            if clone.state is not CloneState.SYNCHRONIZING or clone.delta.count:
                return
            now = self._wall_clock()

            def change(record: GroupRecord) -> GroupRecord:
                record = transitions.complete_sync(record, name)
                if clone.record.then_fracture:
                    equal = frozenset({name})
                    record = transitions.fracture(record, [name], equal=equal, now=now)
                return record

            if clone.record.then_fracture:
                await self._flush_mirrored(server, [name])
            await server.change(change)

    async def _copy_hot_extents(self, server: GroupServer, name: str) -> None:
        """Extents that hosts write to all the time are never free to be copied but now, while the
        group is held. They are few, or the engine would have found some of them free."""
        group = server.group
        clone = group.clones[name]
        if (
            clone not in group.mirrored  # it may have failed while the group was drained
            or group.restoring not in (None, clone)
            or clone.delta.count > HOT_EXTENTS
        ):
            return
        origin, target = server.source, server.unit(clone)
        claim_one = functools.partial(group.claim_sync, clone, 0, lambda at: 1)
        if group.restoring is clone:
            origin, target = target, origin
            claim_one = functools.partial(group.claim_restore, 0, lambda at: 1)
        for _ in range(clone.delta.count):
            if server.source.name in server.unflushed:  # D10; also since the last one
                return
            claim = claim_one()
            if claim is None:
                return
            copied = False
            try:
                extent = group.geometry.bytes_of(claim.first, claim.stop)
                await target.copy_from(origin, [extent], share=False)
                copied = True
            finally:
                group.end_copy(claim, copied=copied)


def check_name(name: str, *, reserved: str) -> None:
    """Raises ClonefsError (EINVAL) for what is no name of a group or a clone."""
    if _NAME.fullmatch(name) is None:
        raise invalid(
            f"{name!r} is not a name: letters, digits, '.', '_' and '-', at most 63, a letter or "
            f"digit first"
        )
    if name == reserved:
        raise invalid(f"{name!r} is the name of something else: choose another")
