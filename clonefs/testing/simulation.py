"""A run: hosts, people who command, faults, and deaths of the daemon, from one seed.

The world is small (a few extents of a few sectors), so that everything meets everything. A run is
several lives of the daemon over the same disks and the same volume. Each but the last ends with a
death at a point, a power cut, or an unmount; faults may come in each but the last, in which
everything that copies comes to its end. After each life, and at the end, the ledgers look at disks
and maps as they lie there.
"""

import importlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import trio
import trio.testing
from bitarray import bitarray

from clonefs.engines import Recorder, StorageSystem
from clonefs.engines.recovery import load
from clonefs.errors import ClonefsError
from clonefs.extents import SECTOR, ExtentMap, Geometry, Pieces
from clonefs.group import CloneGroup
from clonefs.group.transitions import unflushed
from clonefs.testing.driver import EXTENT, PER_EXTENT, Counts, Driver
from clonefs.testing.ledger import SOURCE, Clock, Ledger, disk_name
from clonefs.testing.oracle import Register, Violation, stamp, stamps
from clonefs.testing.scenarios import SCENARIOS
from clonefs.testing.world import Disk, Faults, SimulatedMedium, SimulatedUnit, World
from clonefs.units import LogicalUnit
from clonefs.volume import CloneState, MetadataVolume, format_medium
from clonefs.volume.check import Fault, Severity, examine
from clonefs.volume.durable import (
    PERSISTENT_PROTECTED_RESTORE_MAP,
    DurableMap,
    Place,
    starts_of_maps,
    unpack_sector,
)
from clonefs.volume.layout import DURABLE_SECTOR, EXTENTS_PER_DURABLE_SECTOR, DamagedError

GROUPS = ("g", "h")
CLONES = ("a", "b", "c")
VOLUME = 1 << 20
A_LONG_TIME = 24 * 3600.0  # virtual seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made of. Everything that happens follows from this.

    `requests` are of each host in each life, `commands` of each life. `fault_rate`: of the reads
    and writes of disks; `flush_fault_rate`, `volume_fault_rate`: of flushes, and of durable writes to
    the volume. Of the lives that end, `power_cuts` is the share that end with one. `rot`: the chance
    that a sector of a durable map is damaged between two lives; such a sector has
    `extents_per_sector`. `scenario`: a written one instead of
    random hosts; `death`: the point at which the first life ends, `fault`: the I/O of the first life
    that fails, for ever if `lasting`.
    """

    seed: int
    groups: int = 1
    clones: int = 3
    extents: int = 6
    lives: int = 3
    points_a_life: int = 1500
    hosts: int = 4
    requests: int = 40
    commands: int = 25
    fault_rate: float = 0.0
    flush_fault_rate: float = 0.0
    volume_fault_rate: float = 0.0
    lasting_rate: float = 0.0
    power_cuts: float = 0.5
    rot: float = 0.0
    extents_per_sector: int = EXTENTS_PER_DURABLE_SECTOR
    scenario: str | None = None
    death: int | None = None
    fault: int | None = None
    lasting: bool = False


@dataclass(slots=True)
class Report:
    """What a run did."""

    seed: int
    operations: int = 0
    points: int = 0
    deaths: int = 0
    power_cuts: int = 0
    unmounts: int = 0
    faults: int = 0
    rotten: int = 0
    hit: bool = False  # whether the first life came to the plan's death, or its fault
    counts: Counts = field(default_factory=Counts)

    def figures(self) -> Counter[str]:
        """What is added up over many runs."""
        return Counter(
            runs=1,
            operations=self.operations,
            points=self.points,
            deaths=self.deaths,
            power_cuts=self.power_cuts,
            unmounts=self.unmounts,
            faults=self.faults,
            rotten=self.rotten,
            restores=self.counts.restores,
            fractures=self.counts.fractures,
            verifications=self.counts.verifications,
        )


class PointedMap(ExtentMap):
    """An extent map whose every change is a point of the world."""

    __slots__ = ("world",)
    world: World

    def mark(self, first: int, stop: int) -> None:
        for extent in range(first, stop):
            self.world.point()
            super().mark(extent, extent + 1)
        self.world.point()

    def clear(self, first: int, stop: int) -> None:
        for extent in range(first, stop):
            self.world.point()
            super().clear(extent, extent + 1)
        self.world.point()

    def mark_from(self, other: ExtentMap) -> None:
        self.world.point()
        super().mark_from(other)
        self.world.point()


class PointedVolume(MetadataVolume):
    """A volume in the world."""

    def __init__(self, world: World, boot: int) -> None:
        self._world = world
        super().__init__(SimulatedMedium(world), f"boot {boot}")

    def _new_map(
        self, bits: bitarray, extents: int, pieces: Pieces | None, resting: Iterable[int]
    ) -> ExtentMap:
        pointed = PointedMap(bits, extents, pieces, resting)
        pointed.world = self._world
        return pointed


@contextmanager
def _must_end(seconds: float) -> Iterator[None]:
    """Whatever happens comes to an end: nobody waits for ever."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Violation(f"nothing has moved for so long that {seconds} seconds went by")


def _deterministic_trio(seed: int) -> None:
    """Trio shuffles what is ready to run. It has a switch for this, meant for test libraries."""
    trio_run: Any = importlib.import_module("trio._core._run")
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio_run._r.seed(seed)


def _are_the_same(volume: bytearray, uuid: bytes, sector: int, starts: list[int]) -> bool:
    """Whether both copies of a sector of a PPRM, which begin at these bytes, are good and equal. Does
    not ask the code that is tested, which may take one for the other."""
    found = []
    for copy, start in enumerate(starts):
        place = Place(PERSISTENT_PROTECTED_RESTORE_MAP, uuid, copy, sector)
        try:
            found.append(unpack_sector(place, bytes(volume[start : start + DURABLE_SECTOR])))
        except DamagedError:
            return False
    return found[0] == found[1]


class Simulation:
    """The run of a plan: what lives longer than one daemon."""

    def __init__(self, plan: Plan) -> None:
        assert plan.extents <= 8 * plan.extents_per_sector  # a slot has a page for each copy
        self.plan = plan
        self.report = Report(plan.seed)
        self.random = random.Random(plan.seed)
        self.clock = Clock()
        self.world: World | None = None
        self._operations = 0
        self.boot = 0
        self.stamp = 0
        self.ordered: list[tuple[int, int, int]] = []
        self.groups = GROUPS[: plan.groups]
        self.clones = CLONES[: plan.clones]
        self.size = plan.extents * EXTENT - 3 * SECTOR  # the last extent is a short one
        names = [disk_name(group, lu) for group in self.groups for lu in (SOURCE, *self.clones)]
        self.disks = {name: Disk.of(self._first_content()) for name in names}
        self.ledgers = {group: self._ledger(group) for group in self.groups}
        self.volume, self.volume_on_disk = bytearray(VOLUME), bytearray(VOLUME)
        world = World(self.random, self.volume, self.volume_on_disk)
        format_medium(SimulatedMedium(world), bytes(16))

    def _first_content(self) -> bytearray:
        """Different everywhere, and a hole now and then."""
        content = bytearray()
        for _ in range(self.size // SECTOR):
            content.extend(stamp(self.next_stamp() if self.random.random() < 0.8 else 0))
        return content

    def _ledger(self, group: str) -> Ledger:
        source = stamps(self.disks[disk_name(group, SOURCE)].content)
        register = Register(f"the Source of {group}", source, self.clock.tick())
        return Ledger(group, self.clones, register, self.clock)

    def next_stamp(self) -> int:
        """A number that no sector has had yet."""
        self.stamp += 1
        return self.stamp

    def run(self) -> Report:
        """All lives. Raises Violation. What the daemon would log is not logged: it is expected."""
        logging.disable(logging.CRITICAL)
        try:
            with mock.patch.object(DurableMap, "extents_per_sector", self.plan.extents_per_sector):
                return self._run()
        finally:
            logging.disable(logging.NOTSET)

    def _run(self) -> Report:
        for life in range(self.plan.lives):
            last = life == self.plan.lives - 1
            world = self.world = self._world(life, last=last)
            _Life(self, world, last=last).live(work=not last or self.plan.scenario is None)
            self.report.points += world.points
            if not life:
                self.report.hit = world.failed > 0 if self.plan.fault else world.frozen_at_point
            self.report.faults += world.failed
            self.report.operations = self.operations()
            self._operations, self.world = self.report.operations, None
            self._after(world)
        return self.report

    def operations(self) -> int:
        """I/Os so far; also of a run that was broken off."""
        return self._operations + (0 if self.world is None else self.world.operations)

    def _world(self, life: int, *, last: bool) -> World:
        world = World(
            self.random,
            self.volume,
            self.volume_on_disk,
            die_at=None if last else self._death(life),
            power_cut=self.random.random() < self.plan.power_cuts,
            on_loss=self._on_loss,
        )
        for name, disk in self.disks.items():
            SimulatedUnit(world, name, disk)
        return world

    def _death(self, life: int) -> int | None:
        """The point at which a life ends, if it comes so far. One in four ends early: then it is
        recovery that is cut off."""
        plan = self.plan
        most = 60 if self.random.random() < 0.25 else plan.points_a_life
        drawn = self.random.randrange(1, most)  # drawn in any case, so that the rest is the same
        if life:
            return drawn
        if plan.scenario is not None or plan.death is not None:
            return plan.death
        return drawn

    def faults(self) -> Faults:
        """What fails in a life that is not the last."""
        plan = self.plan
        return Faults(
            plan.fault_rate,
            plan.flush_fault_rate,
            plan.volume_fault_rate,
            plan.lasting_rate,
            plan.fault,
            plan.lasting,
        )

    def _on_loss(self, disk: str, start: int, sector: bytes) -> None:
        group, name = disk.split(".")
        self.ledgers[group].lost(name, start, sector)

    def _after(self, world: World) -> None:
        """The daemon has died, or ended: what the next one finds must be sound before it does
        anything."""
        left = world.frozen
        assert left is not None
        died = world.frozen_at_point
        self.report.deaths += died
        self.report.unmounts += not died
        self.report.power_cuts += world.power_cut
        self.boot += world.power_cut
        self.disks, self.volume, self.volume_on_disk = left.disks, left.volume, left.volume_on_disk
        for ledger in self.ledgers.values():
            ledger.under_way_is_over()
        self._note_what_is_unknown(world)
        self._rot(world)
        when = "after a power cut" if world.power_cut else "after a death" if died else "unmounted"
        self._look(when, cut=world.power_cut)
        for ledger in self.ledgers.values():
            ledger.commanding = 0

    def _note_what_is_unknown(self, world: World) -> None:
        """A daemon may die between a flush that fails and the record that says so, or be unable to
        record it. Raises Violation if it had no excuse."""
        volume = MetadataVolume(SimulatedMedium(self._to_look_at()), f"boot {self.boot}")
        for group in volume.record.groups:
            known = unflushed(group)
            for name in (None, *(clone.name for clone in group.clones)):
                disk = self.disks[disk_name(group.name, name or SOURCE)]
                if name not in known and disk.lost - disk.unknown:
                    if not (world.frozen_at_point or world.volume_failed):
                        raise Violation(f"a flush of {name} has failed, and no record says so")
                    disk.unknown |= disk.lost

    def _rot(self, world: World) -> None:
        """The disk under the volume damages a sector of a durable map: one of the PDM, or one copy
        of one of the PPRM. Where only one copy is good, or newer, since no daemon has come so far as
        to write the other again, that is not done: the second copy is there for one failure."""
        if self.random.random() >= self.plan.rot:
            return
        volume = MetadataVolume(SimulatedMedium(self._to_look_at()), f"boot {self.boot}")
        if not volume.record.groups:
            return
        group = self.random.choice(volume.record.groups)
        durable, _ = volume.durable_maps(group, Geometry(group.size, group.extent_size).extents)
        which, sector = self.random.randrange(3), self.random.randrange(durable.sectors)
        starts = [start + sector * DURABLE_SECTOR for start in starts_of_maps(group.durable)]
        views = (self.volume, self.volume_on_disk)
        uuid = volume.superblock.uuid
        if which > 0 and not all(_are_the_same(view, uuid, sector, starts[1:]) for view in views):
            return
        start = starts[which]
        for view in views:
            view[start : start + SECTOR] = bytes(reversed(range(256))) * 2
        self.report.rotten += 1

    def _expected(self) -> set[Fault]:
        """What `clonefs check` may find: a commit that was cut off leaves half a record."""
        expected = {Fault.RECORD_SLOT}
        if self.plan.rot:
            expected |= {Fault.DELTA_SECTOR, Fault.PROTECTED_COPY}
        if self.plan.fault or self.plan.flush_fault_rate:
            # After a flush that failed all may differ, and it died before the volume had that, or the
            # volume did not take it. But what the PDM lacks was on disk when it was trimmed, and
            # nobody has written there since.
            expected.add(Fault.DELTA_BITS)
        return expected

    def _to_look_at(self) -> World:
        """A world that may be changed without changing anything."""
        return World(random.Random(0), bytearray(self.volume), bytearray(self.volume_on_disk))

    def _look(self, when: str, *, cut: bool) -> None:
        for finding in examine(SimulatedMedium(self._to_look_at()), f"boot {self.boot}"):
            if finding.severity is Severity.WRONG and finding.fault not in self._expected():
                raise Violation(f"{when}: {finding.where}: {finding.text}")
        volume = MetadataVolume(SimulatedMedium(self._to_look_at()), f"boot {self.boot}")
        for record in volume.record.groups:
            ledger = self.ledgers[record.name]
            group = load(volume, record).group
            # Committed, and not yet adopted when it died.
            ledger.observe(group, self.disks, since=ledger.commanded_at)
            ledger.look(group, self.disks, when, cut=cut)
        self._look_at_order()
        if cut:  # of what was not flushed, a power cut may have left the later and not the earlier
            self.ordered.clear()

    def _look_at_order(self) -> None:
        """Clones that were fractured together: no later write without an earlier one."""
        if len(self.groups) < 2 or not self.ordered:
            return
        first, second = (self.ledgers[group] for group in self.groups)
        states = (first.states.get("a"), second.states.get("a"))
        if states != (CloneState.FRACTURED, CloneState.FRACTURED):
            return
        contents = [stamps(self.disks[disk_name(group, "a")].content) for group in self.groups]
        for sector, earlier, later in self.ordered:
            if contents[1][sector] == later and contents[0][sector] != earlier:
                raise Violation(
                    f"the clones have a later write to sector {sector}, not the earlier"
                )


class _Life:
    """One daemon, from its start to its death, or to the end of the run."""

    def __init__(self, simulation: Simulation, world: World, *, last: bool) -> None:
        self.s = simulation
        self.world = world
        self.last = last
        self.random = simulation.random
        self.d: Driver

    def live(self, *, work: bool) -> None:
        _deterministic_trio(self.random.randrange(1 << 32))
        try:
            trio.run(self._main, work, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseExceptionGroup as group:
            found: BaseException = group
            while isinstance(found, BaseExceptionGroup):
                found = found.exceptions[0]
            if self.world.frozen is None:
                raise found from None
            # What a dying daemon still did, nobody has seen.

    async def _main(self, work: bool) -> None:
        async def blocking(work: Any) -> None:
            await self.world.delay()
            work()
            await self.world.delay()

        async def nothing(_group: str) -> None:
            await self.world.delay()

        system = StorageSystem(
            Recorder(PointedVolume(self.world, self.s.boot), blocking),
            self._open,
            forget_pages=nothing,
            wall_clock=trio.current_time,
            on_event=self._event,
            run=2 * EXTENT,
            checkpoint=0.02,
            run_ahead=1,
        )
        self.d = Driver(
            self.world,
            system,
            self.s.ledgers,
            self.s.clock,
            self.s.report.counts,
            self.s.next_stamp,
            self.s.ordered,
        )
        with trio.CancelScope() as self.world.scope, _must_end(A_LONG_TIME):
            async with trio.open_nursery() as nursery:
                await self._live(nursery, work)
                nursery.cancel_scope.cancel()

    async def _live(self, nursery: trio.Nursery, work: bool) -> None:
        if self.s.plan.scenario is not None and not self.last:
            self.world.faults = self.s.faults()
        try:
            await self.d.system.start(nursery)
        except ClonefsError:
            if self.last:
                raise
            self.world.freeze()  # the volume cannot be written: no mount
            return
        await self._set_up()
        if not self.last:
            self.world.faults = self.s.faults()
        if work:
            await self._work()
        if self.last:
            await self._settle()
        try:
            await self.d.system.stop()
        except ClonefsError:
            if self.last:
                raise
        if self.world.frozen is None:
            self.world.freeze()

    def _event(self, line: str) -> None:
        if "every extent is taken to differ" in line and self.world.frozen is None:
            raise Violation(f"no death can bring a group in doubt: {line}")
        if "no map has it" in line and self.world.frozen is None:
            raise Violation(f"a verification has found what is not there: {line}")
        if "in both copies" in line:
            raise Violation(f"never are both copies of a sector damaged: {line}")
        self.d.observe()

    async def _open(
        self, path: Path, *, create_size: int | None = None, size: int | None = None
    ) -> LogicalUnit:
        await self.world.delay()
        old = self.world.disks[path.name]
        return SimulatedUnit(self.world, old.name, old.disk)

    async def _set_up(self) -> None:
        """Make what is not there: an earlier daemon may have died half-way through this."""
        for group in self.s.groups:
            await self.d.add_group(group)
            for name in self.s.clones:
                await self.d.add_clone(group, name)
        self.d.observe()

    async def _work(self) -> None:
        if self.s.plan.scenario is not None:
            await SCENARIOS[self.s.plan.scenario](self.d)
            return
        async with trio.open_nursery() as nursery:
            for _ in range(self.s.plan.hosts):
                nursery.start_soon(self._host)
            await self._people()

    # Random hosts and people

    async def _host(self) -> None:
        for _ in range(self.s.plan.requests):
            await trio.sleep(self.random.choice((0.0, 0.0, 0.001, 0.01)))
            group, name = self._choose()
            first, count = self._range()
            what = self.random.random()
            if what < 0.1:
                await self.d.flush(group, name)
            elif what < 0.4:
                await self.d.read(group, name, first, count)
            else:
                await self.d.write(group, name, first, count)

    def _choose(self) -> tuple[str, str]:
        group = self.random.choice(self.s.groups)
        states = self.s.ledgers[group].states
        fractured = [name for name, state in states.items() if state is CloneState.FRACTURED]
        if fractured and self.random.random() < 0.15:
            return group, self.random.choice(fractured)
        return group, SOURCE

    def _range(self) -> tuple[int, int]:
        """Sectors: often a few, often whole extents, sometimes across several."""
        sectors = self.s.size // SECTOR
        if self.random.random() < 0.4:
            first = self.random.randrange(self.s.plan.extents) * PER_EXTENT
            count = PER_EXTENT * self.random.choice((1, 1, 2, 3))
        else:
            first = self.random.randrange(sectors)
            count = self.random.choice((1, 1, 2, 5, 9, 17))
        return first, min(count, sectors - first)

    async def _people(self) -> None:
        for _ in range(self.s.plan.commands):
            await trio.sleep(self.random.choice((0.0, 0.002, 0.02, 0.05)))
            await self._one_command(
                self.random.choice(self.s.groups), self.random.choice(self.s.clones)
            )

    async def _one_command(self, group: str, name: str) -> None:
        chance = self.random.random()
        match self.random.choice(_COMMANDS):
            case "sync":
                await self.d.sync(group, name, then_fracture=chance < 0.3)
            case "fracture":
                await self.d.fracture((group, name))
            case "several":
                others = [(each, other) for each in self.s.groups for other in self.s.clones[:2]]
                await self.d.fracture(*others)
            case "force":
                if chance < 0.3:
                    await self.d.fracture((group, name), force=True)
            case "rate":
                rate = self.random.choice((None, 100 << 10, 1 << 20, 16 << 20))
                await self.d.rate(group, name, rate)
            case "restore":
                await self.d.restore(group, name)
            case "reverse":
                await self.d.restore(group, name, reverse=True)
            case "verify":
                rate = self.random.choice((None, None, 1 << 20))
                await self.d.verify(group, name, rate)
            case "configure":
                if chance < 0.3:
                    await self.d.remove_clone(group, name)
                await self.d.add_clone(group, name, sync=chance < 0.8)

    # The end

    async def _settle(self) -> None:
        """Let everything that copies end, then look."""
        for group in self.s.groups:
            for name in self.s.clones:
                await self.d.rate(group, name, None)
        copying = (
            CloneState.SYNCHRONIZING,
            CloneState.RESTORING,
            CloneState.REVERSE_SYNCHRONIZING,
        )
        for server in self.d.system.servers.values():
            while any(clone.state in copying for clone in server.group.clones.values()):
                await server.progress()
        for name, server in self.d.system.servers.items():
            self._check_alive(server.group)
            self.s.ledgers[name].look(server.group, self.d.disks(), "at the end")

    def _check_alive(self, group: CloneGroup) -> None:
        if self.world.frozen is not None:
            raise Violation(f"the last daemon of {group.record.name} has died")


_COMMANDS = (
    *("sync", "sync", "fracture", "fracture", "restore", "restore"),
    *("reverse", "rate", "force", "several", "configure", "verify"),
)


def random_plan(seed: int) -> Plan:
    """A plan of its own for each seed: one in four without faults, the others with faults of disks,
    of flushes and the volume, or of everything, with rot. Most have many short lives, some have few
    long ones. Every second hundred has durable maps of several sectors."""
    plain = Plan(seed, groups=1 + seed // 4 % 2, clones=1 + seed // 8 % 3)
    if seed // 24 % 4:
        plain = replace(plain, lives=5, points_a_life=500, requests=12, commands=10)
    if seed // 100 % 2:
        plain = replace(plain, extents_per_sector=2)
    match seed % 4:
        case 0:
            return plain
        case 1:
            return replace(plain, fault_rate=0.02)
        case 2:
            rate = 0.2 if seed // 8 % 2 else 0.02
            return replace(plain, flush_fault_rate=rate, volume_fault_rate=0.002)
        case _:
            return replace(
                plain,
                fault_rate=0.005,
                flush_fault_rate=0.005,
                volume_fault_rate=0.001,
                lasting_rate=0.2,
                rot=0.3,
            )


def run_simulation(plan: Plan) -> Report:
    """Run `plan`. Raises Violation with what went wrong; the plan replays it."""
    return Simulation(plan).run()
