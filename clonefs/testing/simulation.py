"""A run: hosts, a person who commands, faults, and deaths of the daemon, from one seed.

The world is small (a few extents of a few sectors), so that everything meets everything. After each
death, and at the end, the disks and the maps are looked at as they lie there:

- the Source, as hosts would see it, has only what the oracle allows;
- a point-in-time copy has not changed, but for what hosts wrote to it;
- every difference between a clone and the Source is in the maps.
"""

import importlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio
import trio.testing

from clonefs.engines import HostLu, Recorder, StorageSystem
from clonefs.engines.recovery import load
from clonefs.errors import ClonefsError
from clonefs.extents import SECTOR, ExtentMap
from clonefs.group import MIRRORED, CloneGroup
from clonefs.testing.oracle import Register, Violation, Write, stamp, stamps
from clonefs.testing.world import SimulatedMedium, SimulatedUnit, World
from clonefs.units import LogicalUnit
from clonefs.volume import CloneState, MapSlot, MetadataVolume, format_medium

GROUP = "g"
CLONES = ("a", "b", "c")
EXTENT = 4096
VOLUME = 1 << 20
A_LONG_TIME = 24 * 3600.0  # virtual seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made of. Everything that happens follows from this."""

    seed: int
    extents: int = 6
    lives: int = 3  # of the daemon: it dies at a random point of each but the last
    points_a_life: int = 1500
    hosts: int = 4
    requests: int = 40  # of each host, in each life
    commands: int = 25
    clones: int = 3
    fault_rate: float = 0.0
    power_cuts: float = 0.5  # of the deaths
    first_death: int | None = None  # the point at which the first daemon dies, if not at random


@dataclass(slots=True)
class Report:
    """What a run did."""

    seed: int
    operations: int = 0
    points: int = 0
    deaths: int = 0
    power_cuts: int = 0
    flushes: int = 0
    restores: int = 0
    fractures: int = 0
    faults: int = 0
    reads: int = 0
    writes: int = 0
    refused: int = 0


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

    def map(self, slot: MapSlot, extents: int) -> ExtentMap:
        found = super().map(slot, extents)
        if not isinstance(found, PointedMap):
            pointed = PointedMap(found.bits, extents)
            pointed.world = self._world
            self._maps[slot] = found = pointed
        return found


@dataclass(slots=True)
class Simulation:
    """The run of a plan: what lives longer than one daemon."""

    plan: Plan
    report: Report
    random: random.Random
    now: int = 0
    boot: int = 0
    stamp: int = 0
    source: Register | None = None
    copies: dict[str, Register] = field(default_factory=dict)
    states: dict[str, CloneState] = field(default_factory=dict)
    commanded_at: int = 0
    under_way: list[tuple[Register, list[tuple[int, Write]]]] = field(default_factory=list)

    @property
    def clones(self) -> tuple[str, ...]:
        return CLONES[: self.plan.clones]

    @property
    def size(self) -> int:
        # The last extent is a short one.
        return self.plan.extents * EXTENT - 3 * SECTOR

    def tick(self) -> int:
        self.now += 1
        return self.now


def _point_of_death(plan: Plan, life: int, rng: random.Random) -> int:
    drawn = rng.randrange(1, plan.points_a_life)  # drawn in any case, so that the rest is the same
    return drawn if life or plan.first_death is None else plan.first_death


def sweep(plan: Plan, step: int = 1) -> Iterator[Report]:
    """Run `plan` once for every `step`th point of its first life: the daemon dies there. Ends when a
    death comes after all that the first life does. Raises Violation like `run_simulation`."""
    point = 1
    while True:
        report = run_simulation(replace(plan, first_death=point, lives=2))
        if not report.deaths:
            return
        yield report
        point += step


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


def run_simulation(plan: Plan) -> Report:
    """Run `plan`. Raises Violation with what went wrong; the plan replays it."""
    rng = random.Random(plan.seed)
    _deterministic_trio(plan.seed)
    simulation = Simulation(plan, Report(plan.seed), rng)
    disks = {name: bytearray() for name in ("source", *simulation.clones)}
    left: dict[str, str | None] = {}  # stamps
    for content in disks.values():  # different everywhere, and a hole now and then
        for _ in range(simulation.size // SECTOR):
            simulation.stamp += 1
            content.extend(stamp(simulation.stamp if rng.random() < 0.8 else 0))
    simulation.source = Register("the Source", stamps(disks["source"]), simulation.tick())
    volume = bytearray(VOLUME)
    first = World(rng, volume=volume, volume_on_disk=bytearray(VOLUME))
    format_medium(SimulatedMedium(first), bytes(16))
    for life in range(plan.lives):
        last = life == plan.lives - 1
        world = World(
            rng,
            die_at=None if last else _point_of_death(plan, life, rng),
            fault_rate=plan.fault_rate,
            volume=volume,
            volume_on_disk=bytearray(volume),
            power_cut=rng.random() < plan.power_cuts,
        )
        for name, content in disks.items():
            SimulatedUnit(world, name, content, left.get(name))
        _Life(simulation, world).live()
        simulation.report.operations += world.operations
        simulation.report.points += world.points
        simulation.report.faults += world.faults
        if world.frozen is not None:
            simulation.report.deaths += 1
            simulation.report.power_cuts += world.power_cut
            simulation.boot += world.power_cut
            disks, volume, left = world.frozen.disks, world.frozen.volume, world.frozen.stamps
            _look_at_what_is_left(simulation, disks, volume, cut=world.power_cut)
    return simulation.report


class _Life:
    """One daemon, from its start to its death, or to the end of the run."""

    def __init__(self, simulation: Simulation, world: World) -> None:
        self.s = simulation
        self.world = world
        self.random = simulation.random
        self.system: StorageSystem

    def live(self) -> None:
        try:
            trio.run(self._main, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseExceptionGroup as group:
            found: BaseException = group
            while isinstance(found, BaseExceptionGroup):
                found = found.exceptions[0]
            if self.world.frozen is None:
                raise found from None
            # What a dying daemon still did, nobody has seen.

    async def _main(self) -> None:
        async def blocking(work: object) -> None:
            await self.world.delay()
            work()  # type: ignore[operator]
            await self.world.delay()

        async def nothing(_group: str) -> None:
            await self.world.delay()

        self.system = StorageSystem(
            Recorder(PointedVolume(self.world, self.s.boot), blocking),
            self._open,
            forget_pages=nothing,
            wall_clock=trio.current_time,
            on_event=self._event,
            run=2 * EXTENT,
            checkpoint=0.02,
            run_ahead=1,
        )
        with trio.CancelScope() as self.world.scope, _must_end(A_LONG_TIME):
            async with trio.open_nursery() as nursery:
                await self.system.start(nursery)
                await self._set_up()
                await self._work()
                await self._settle()
                nursery.cancel_scope.cancel()

    async def _open(
        self, path: Path, *, create_size: int | None = None, size: int | None = None
    ) -> LogicalUnit:
        await self.world.delay()
        return self.world.disks[path.name]

    async def _set_up(self) -> None:
        """Make what is not there: an earlier daemon may have died half-way through this."""
        if GROUP not in self.system.servers:
            await self.system.add_group(GROUP, Path("/source"), size=None, extent_size=EXTENT)
        for name in self.s.clones:
            if name not in self._group.clones:
                await self.system.add_clone(GROUP, name, Path(f"/{name}"), sync=True)
        self._observe()

    @property
    def _group(self) -> CloneGroup:
        return self.system.servers[GROUP].group

    # What the oracle learns when the state changes: the group is held and drained then.

    def _event(self, line: str) -> None:
        if "every extent is taken to differ" in line and self.world.frozen is None:
            raise Violation(f"no death can bring a group in doubt: {line}")
        self._observe()

    def _observe(self) -> None:
        if self.world.frozen is not None or GROUP not in self.system.servers:
            return
        assert self.s.source is not None
        for name, was, state in _news(self.s, self._group):
            self._changed(name, was, state)

    def _changed(self, name: str, was: CloneState | None, state: CloneState) -> None:
        content = stamps(self.world.disks[name].content)
        raw = stamps(self.world.disks["source"].content)
        _learn(self.s, name, was, state, content, raw, since=self.s.now)

    # Hosts

    async def _work(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(self.s.plan.hosts):
                nursery.start_soon(self._host)
            await self._command()

    async def _host(self) -> None:
        for _ in range(self.s.plan.requests):
            await trio.sleep(self.random.choice((0.0, 0.0, 0.001, 0.01)))
            register, lu = self._choose()
            first, count = self._range()
            what = self.random.random()
            if what < 0.1:
                await self._flush(register, lu)
            elif what < 0.4:
                await self._read(register, lu, first, count)
            else:
                await self._write(register, lu, first, count)

    def _choose(self) -> tuple[Register, HostLu]:
        fractured = [n for n, state in self.s.states.items() if state is CloneState.FRACTURED]
        if fractured and self.random.random() < 0.15:
            name = self.random.choice(fractured)
            if name in self.s.copies:
                return self.s.copies[name], self.system.clones[GROUP, name]
        assert self.s.source is not None
        return self.s.source, self.system.sources[GROUP]

    def _range(self) -> tuple[int, int]:
        """Sectors: often a few, often whole extents, sometimes across several."""
        sectors = self.s.size // SECTOR
        per_extent = EXTENT // SECTOR
        if self.random.random() < 0.4:
            first = self.random.randrange(self.s.plan.extents) * per_extent
            count = per_extent * self.random.choice((1, 1, 2, 3))
        else:
            first = self.random.randrange(sectors)
            count = self.random.choice((1, 1, 2, 5, 9, 17))
        return first, min(count, sectors - first)

    async def _read(self, register: Register, lu: HostLu, first: int, count: int) -> None:
        self.s.report.reads += 1
        start = self.s.tick()
        try:
            data = lu.read_now(first * SECTOR, count * SECTOR)
            if data is None:
                data = await lu.read(first * SECTOR, count * SECTOR)
        except ClonefsError:
            return
        if self.world.frozen is None and self._still_a_copy(register):
            register.check(first, stamps(data), start, self.s.tick(), "a read")

    async def _flush(self, register: Register, lu: HostLu) -> None:
        self.s.report.flushes += 1
        start = self.s.tick()
        try:
            await lu.flush()
        except ClonefsError:
            return
        if self.world.frozen is None:
            register.flushed(start)

    def _still_a_copy(self, register: Register) -> bool:
        return register is self.s.source or register in self.s.copies.values()

    async def _write(self, register: Register, lu: HostLu, first: int, count: int) -> None:
        self.s.report.writes += 1
        values = list(range(self.s.stamp + 1, self.s.stamp + 1 + count))
        self.s.stamp += count
        data = b"".join(stamp(value) for value in values)
        begun = register.begin(first, values, self.s.tick())
        entry = (register, begun)
        self.s.under_way.append(entry)
        try:
            if not lu.write_now(first * SECTOR, data):
                await lu.write(first * SECTOR, data)
        except ClonefsError:
            if self.world.frozen is None:
                self.s.under_way.remove(entry)
                register.give_up(begun, self.s.tick())
            return
        if self.world.frozen is None:
            self.s.under_way.remove(entry)
            register.end(begun, self.s.tick())

    # The person

    async def _command(self) -> None:
        for _ in range(self.s.plan.commands):
            await trio.sleep(self.random.choice((0.0, 0.002, 0.02, 0.05)))
            name = self.random.choice(self.s.clones)
            self.s.commanded_at = self.s.tick()
            try:
                await self._one_command(name)
            except ClonefsError:
                self.s.report.refused += 1

    async def _one_command(self, name: str) -> None:
        clone = self._group.clones[name]
        match self.random.choice(
            ("sync", "sync", "fracture", "fracture", "restore", "restore", "rate", "force", "two")
        ):
            case "sync":
                await self.system.sync(GROUP, name, then_fracture=self.random.random() < 0.3)
            case "fracture":
                await self.system.fracture([(GROUP, name)])
                self.s.report.fractures += 1
            case "two":
                await self.system.fracture([(GROUP, each) for each in self.s.clones[:2]])
                self.s.report.fractures += 1
            case "force":
                if self.random.random() < 0.3:
                    await self.system.force_fracture(GROUP, name)
            case "rate":
                rate = self.random.choice((None, 100 << 10, 1 << 20, 16 << 20))
                await self.system.set_rate(GROUP, name, rate)
            case "restore":
                begun = self._begin_again(name) if clone.state is CloneState.RESTORING else None
                await self.system.protected_restore(GROUP, name)
                self.s.report.restores += 1
                if begun is not None and self.world.frozen is None:
                    assert self.s.source is not None
                    self.s.source.end(begun, self.s.tick())
                    self.s.under_way.remove((self.s.source, begun))

    def _begin_again(self, name: str) -> list[tuple[int, Write]]:
        """No state changes when a restore begins again, so it takes effect while the command runs,
        like a write of the clone's content to all of the Source."""
        assert self.s.source is not None
        content = stamps(self.world.disks[name].content)
        begun = self.s.source.begin(0, content, self.s.tick())
        self.s.under_way.append((self.s.source, begun))
        return begun

    # The end

    async def _settle(self) -> None:
        """Let everything that copies end, then look."""
        self.world.fault_rate = 0.0
        for name in self.s.clones:
            await self.system.set_rate(GROUP, name, None)
        while any(
            clone.state in (CloneState.SYNCHRONIZING, CloneState.RESTORING)
            for clone in self._group.clones.values()
        ):
            await self.system.server(GROUP).progress()
        if self.world.frozen is None:
            contents = {name: disk.content for name, disk in self.world.disks.items()}
            _look(self.s, self._group, contents, "at the end")


def _news(s: Simulation, group: CloneGroup) -> list[tuple[str, CloneState | None, CloneState]]:
    """The clones whose state has changed: (name, before, now). What is split off at the instant of
    a restore has the Source as it was before."""
    news = []
    for name, clone in group.clones.items():
        was, s.states[name] = s.states.get(name), clone.state
        if was is not clone.state:
            news.append((name, was, clone.state))
    return sorted(news, key=lambda each: each[2] is CloneState.RESTORING)


def _learn(
    s: Simulation,
    name: str,
    was: CloneState | None,
    state: CloneState,
    content: list[int],
    raw: list[int],
    *,
    since: int,
) -> None:
    """A clone has changed its state: what follows for what may be read."""
    assert s.source is not None
    now = s.tick()
    if state is CloneState.FRACTURED and was is not CloneState.RESTORING:
        s.source.check(0, content, since, now, f"the point in time of {name}")
        s.copies[name] = Register(name, content, now)
    elif state is CloneState.RESTORING:
        mirrored = [other for other, its in s.states.items() if its in MIRRORED]
        if mirrored:
            raise Violation(f"{mirrored} were not split off when a restore from {name} began")
        s.copies[name].flushed(now)  # it is what the Source shows from now on
        s.source.all_at_once(content, now, s.tick())
    elif state is CloneState.REVERSE_OUT_OF_SYNC and was is CloneState.RESTORING:
        s.source.all_at_once(raw, now, now)  # part old, part clone: whatever lies there
    elif state in MIRRORED or state is CloneState.OUT_OF_SYNC:
        s.copies.pop(name, None)


def _look_at_what_is_left(
    s: Simulation, disks: dict[str, bytearray], volume: bytearray, *, cut: bool
) -> None:
    """The daemon has died: what the next one finds must be sound before it does anything."""
    for register, begun in s.under_way:
        register.give_up(begun, s.tick())
    s.under_way.clear()
    world = World(random.Random(0), volume=bytearray(volume), volume_on_disk=bytearray(volume))
    opened = MetadataVolume(SimulatedMedium(world), f"boot {s.boot}")
    groups = [load(opened, record).group for record in opened.record.groups]
    if not groups or s.source is None:
        return
    group = groups[0]
    raw = stamps(disks["source"])
    for name, was, state in _news(s, group):  # committed, and not yet adopted when it died
        _learn(s, name, was, state, stamps(disks[name]), raw, since=s.commanded_at)
    _look(s, group, disks, "after a power cut" if cut else "after a death", cut=cut)


def _look(
    s: Simulation,
    group: CloneGroup,
    disks: dict[str, bytearray],
    when: str,
    *,
    cut: bool = False,
) -> None:
    """Check disks and maps as they lie there."""
    assert s.source is not None
    now = s.tick()
    for extent in range(group.geometry.extents):
        offset, length = group.geometry.bytes_of(extent, extent + 1)
        pending = group.is_pending(extent)
        assert not pending or group.restoring is not None
        shown = group.restoring.name if pending and group.restoring else "source"
        values = stamps(disks[shown][offset : offset + length])
        what = f"{when}, the Source as hosts see it"
        if cut:
            s.source.after_a_power_cut(offset // SECTOR, values, what)
        else:
            s.source.check(offset // SECTOR, values, now, now, what)
        for name, clone in group.clones.items():
            marked = clone.delta[extent] or (clone is group.restoring and group.protected[extent])
            part = slice(offset, offset + length)
            if not marked and disks[name][part] != disks["source"][part]:
                raise Violation(f"{when}: extent {extent} of {name} differs and no map says so")
    for name, register in s.copies.items():
        if cut:
            register.after_a_power_cut(0, stamps(disks[name]), f"{when}, the clone {name}")
        else:
            register.check(0, stamps(disks[name]), now, now, f"{when}, the clone {name}")
