"""What a run knows of each group: what hosts may read, which copies must not change, and what has to
be in the maps.

The oracle knows of one LU; this module knows what a change of state means for the LUs of a group,
and looks at disks and maps as they lie there:

- the Source, as hosts would see it, has only what the oracle allows;
- a point-in-time copy has not changed, but for what hosts wrote to it;
- every difference between a clone and the Source is in the maps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from clonefs.extents import SECTOR
from clonefs.group import MIRRORED, RESTORES, CloneGroup
from clonefs.testing.oracle import Register, Violation, Write, stamps
from clonefs.testing.world import Disk
from clonefs.volume import CloneState

S = CloneState
Disks = Mapping[str, Disk]
Begun = list[tuple[int, Write]]

SOURCE = "source"
KEEPS_ITS_BYTES = frozenset({S.FRACTURED, S.RESTORING, S.REVERSE_OUT_OF_SYNC})


def disk_name(group: str, lu: str) -> str:
    """The name of the disk under an LU."""
    return f"{group}.{lu}"


@dataclass(slots=True)
class Clock:
    """Counts events."""

    now: int = 0

    def tick(self) -> int:
        """A moment later."""
        self.now += 1
        return self.now


@dataclass(slots=True)
class Ledger:
    """A group. `copies` has the clones whose bytes must not change but by their hosts; `commanded_at`
    is when the last command was given, `commanding` how many have no answer yet, `written_since`
    whether a host write to the Source has been acknowledged after the last answer; `under_way` are
    host writes and commands that have not ended."""

    group: str
    clones: tuple[str, ...]
    source: Register
    clock: Clock
    copies: dict[str, Register] = field(default_factory=dict)
    states: dict[str, CloneState] = field(default_factory=dict)
    commanded_at: int = 0
    commanding: int = 0
    written_since: bool = False
    under_way: list[tuple[Register, Begun]] = field(default_factory=list)

    def observe(self, group: CloneGroup, disks: Disks, *, since: int) -> None:
        """The state of a clone may have changed, at some time from `since` on. What is split off at
        the instant of a restore has the Source as it was before."""
        news = []
        for name, clone in group.clones.items():
            was, self.states[name] = self.states.get(name), clone.state
            if was is not clone.state:
                news.append((name, was, clone.state))
        for gone in self.states.keys() - group.clones.keys():
            del self.states[gone]
            self.copies.pop(gone, None)
        for name, was, state in sorted(news, key=lambda each: each[2] in RESTORES):
            self._learn(name, was, state, disks, since)

    def _learn(
        self, name: str, was: CloneState | None, state: CloneState, disks: Disks, since: int
    ) -> None:
        now = self.clock.tick()
        disk = disks[disk_name(self.group, name)]
        content = stamps(disk.content)
        if state is S.FRACTURED and was not in RESTORES:
            self.source.check(0, content, since, now, f"the point in time of {name}")
            self.copies[name] = Register(name, content, now)
        elif state in RESTORES:
            if was not in RESTORES and self.written_since and not self.commanding:
                raise Violation(
                    f"a restore from {name} that was refused drops what hosts have written"
                )
            mirrored = [other for other, its in self.states.items() if its in MIRRORED]
            if mirrored:
                raise Violation(f"{mirrored} were not split off when a restore from {name} began")
            raw = disks[disk_name(self.group, SOURCE)]
            self.restored(self.source.begin(0, content, now), disk, raw)
            if state is S.REVERSE_SYNCHRONIZING:
                self.copies.pop(name, None)
            else:
                self.copies[name].flushed(now)  # it is what the Source shows from now on
        elif state is S.REVERSE_OUT_OF_SYNC and was in RESTORES:
            # Part old, part clone: whatever lies there, if it could still be flushed.
            raw = disks[disk_name(self.group, SOURCE)]
            begun = self.source.begin(0, stamps(raw.content), now)
            self.takes_effect(begun, raw, {*raw.lost, *raw.unflushed})
            if was is S.REVERSE_SYNCHRONIZING:
                self.copies[name] = Register(name, content, now)
                self._doubt(self.copies[name], disk, {*disk.lost, *disk.unflushed})
        elif state not in KEEPS_ITS_BYTES:
            self.copies.pop(name, None)

    def restored(self, begun: Begun, clone: Disk, raw: Disk) -> None:
        """A restore has taken effect. What the Source has lost, and nobody knows to differ, is not
        copied again."""
        self.takes_effect(begun, clone, clone.lost)
        self._doubt(self.source, raw, raw.lost)

    def takes_effect(self, begun: Begun, disk: Disk, doubtful: Iterable[int]) -> None:
        """The Source shows what `disk` has from now on, durably, but for the sectors `doubtful`."""
        now = self.clock.tick()
        self.source.end(begun, now)
        for _, write in begun:
            write.flushed = True
        self.source.flushed(begun[0][1].start)
        self._doubt(self.source, disk, doubtful)

    def _doubt(self, register: Register, disk: Disk, doubtful: Iterable[int]) -> None:
        for start in sorted(doubtful):
            # A power cut may leave what is on disk, or whatever was written since and not flushed.
            versions = [disk.on_disk[start : start + SECTOR], *disk.unflushed.get(start, ())]
            for version in versions:
                register.dropped(start // SECTOR, stamps(version)[0], self.clock.tick())

    def lost(self, name: str, start: int, sector: bytes) -> None:
        """A failed flush of the LU `name` has lost a sector; `sector` is on disk."""
        value, now = stamps(sector)[0], self.clock.tick()
        registers = [self.source] if name == SOURCE else []
        if name in self.copies:
            registers.append(self.copies[name])
        if self.states.get(name) in RESTORES:
            registers.append(self.source)  # hosts see the clone where it differs
        for register in registers:
            register.dropped(start // SECTOR, value, now)

    def under_way_is_over(self) -> None:
        """The daemon has died: what was under way may have happened or not, but is over."""
        for register, begun in self.under_way:
            register.give_up(begun, self.clock.tick())
        self.under_way.clear()

    def look(self, group: CloneGroup, disks: Disks, when: str, *, cut: bool = False) -> None:
        """Check disks and maps as they lie there; `cut`: after a power cut."""
        now = self.clock.tick()
        contents = {name: disks[disk_name(self.group, name)].content for name in group.clones}
        contents[SOURCE] = disks[disk_name(self.group, SOURCE)].content
        # An earlier daemon was told that it was lost, and died before the record said so: a later one
        # flushes in vain, and cannot know it.
        its = {name: disks[disk_name(self.group, name)] for name in contents}
        reverted = {name: disk.reverted for name, disk in its.items()}
        unknown = {name: disk.reverted | disk.unknown for name, disk in its.items()}
        for name, starts in reverted.items() if cut else ():
            for start in sorted(starts):
                self.lost(name, start, bytes(contents[name][start : start + SECTOR]))
        for extent in range(group.geometry.extents):
            self._look_at(extent, group, contents, when, now, cut=cut)
            self._look_at_maps(extent, group, contents, unknown, when)
        for start in sorted(reverted[SOURCE]) if cut else ():
            for name in group.clones:  # it may be split off with what it has
                value = stamps(contents[name][start : start + SECTOR])[0]
                self.source.dropped(start // SECTOR, value, self.clock.tick())
        for name, clone in group.clones.items():
            if clone.state is S.SYNCHRONIZED and clone.delta.count:
                raise Violation(f"{when}: {name} of {self.group} is synchronized, and differs")
        for name, register in self.copies.items():
            what = f"{when}, the clone {name} of {self.group}"
            _check(register, 0, stamps(contents[name]), now, what, cut=cut)

    def _look_at(
        self,
        extent: int,
        group: CloneGroup,
        contents: dict[str, bytearray],
        when: str,
        now: int,
        *,
        cut: bool,
    ) -> None:
        offset, length = group.geometry.bytes_of(extent, extent + 1)
        part = slice(offset, offset + length)
        restoring = group.restoring if group.is_pending(extent) else None
        shown = SOURCE if restoring is None else restoring.name
        values = stamps(contents[shown][part])
        what = f"{when}, the Source of {self.group} as hosts see it"
        _check(self.source, offset // SECTOR, values, now, what, cut=cut)

    def _look_at_maps(
        self,
        extent: int,
        group: CloneGroup,
        contents: dict[str, bytearray],
        unknown: dict[str, set[int]],
        when: str,
    ) -> None:
        offset, length = group.geometry.bytes_of(extent, extent + 1)
        for name, clone in group.clones.items():
            # A Reverse Sync whose clone could not be flushed goes on for the Source's sake. At its end
            # all of the clone counts as different.
            if clone.state is S.REVERSE_SYNCHRONIZING and clone.record.split_by is not None:
                continue
            marked = clone.delta[extent] or (clone is group.restoring and group.protected[extent])
            excused = unknown[name] | unknown[SOURCE]
            if not marked and any(
                contents[name][at : at + SECTOR] != contents[SOURCE][at : at + SECTOR]
                for at in range(offset, offset + length, SECTOR)
                if at not in excused
            ):
                raise Violation(f"{when}: extent {extent} of {name} differs and no map says so")


def _check(
    register: Register, first: int, values: list[int], now: int, what: str, *, cut: bool
) -> None:
    if cut:
        register.after_a_power_cut(first, values, what)
    else:
        register.check(first, values, now, now, what)
