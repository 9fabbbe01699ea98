"""What grows: the costs of everything at several sizes and numbers of clones.

The first MiB of a Source are data and the rest is sparse; so what is copied is the same everywhere, and
what grows is what clonefs does for the size of the LU, or for the number of clones.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.bench.copying import OFTEN, watch
from tests.bench.load import Job, measure, write_once
from tests.bench.results import Part, median, spread
from tests.bench.scale import Scale, rounds, say, shuffled
from tests.bench.stage import (
    EXTENT,
    LARGEST,
    GiB,
    MiB,
    Mount,
    TiB,
    cpu_seconds,
    fill_pieces,
    must_be_equal,
    resident,
)
from tests.bench.tables import table

DATA = 16 * MiB
GROUP = "group"


class Point(NamedTuple):
    """A size and a number of clones."""

    title: str
    size: int
    clones: int

    @property
    def who(self) -> str:
        """Its name."""
        return f"{self.title}, {self.clones} clone{'s' if self.clones > 1 else ''}"

    @property
    def names(self) -> list[str]:
        """Its clones."""
        return [f"clone{number}" for number in range(self.clones)]


BASE = Point("1 GiB", GiB, 1)
HUGE = Point("16 TiB", LARGEST, 8)
POINTS = [
    BASE,
    Point("1 GiB", GiB, 8),
    Point("1 GiB", GiB, 64),
    Point("64 GiB", 64 * GiB, 1),
    Point("1 TiB", TiB, 1),
    Point("1 TiB", TiB, 64),
    HUGE,
]
QUICK = [BASE, Point("1 TiB", TiB, 8)]

MOUNT = "mount, s"
IDLE, RESIDENT, ANONYMOUS = (
    "daemon when mounted, MiB",
    "daemon after all of this, MiB",
    "of which its own, MiB",
)
FIRST, IN_EFFECT, SWEEP, SYNC = (
    "4 KiB write, first in its extent, p50, µs",
    "restore in effect, ms",
    "restore of 16 MiB, s",
    "sync of 16 MiB to all clones, then fractured, s",
)
IOPS, CPU = ": requests/s", ": daemon's processor time, µs"
JOBS = {
    "4 KiB reads, depth 16": Job("randread", "4k", 16),
    "4 KiB writes, depth 16": Job("randwrite", "4k", 16),
}
MEASURES = [
    *(MOUNT, IDLE, RESIDENT, ANONYMOUS),
    *(what + unit for what in JOBS for unit in (IOPS, CPU)),
    *(FIRST, IN_EFFECT, SWEEP, SYNC),
]


def measure_part(work: Path, part: Part, scale: Scale) -> None:
    """All rounds. Each point has a volume of its own, and only one is mounted at a time: memory, the
    time of a mount and processor time are those of the daemon."""
    points = QUICK if scale.quick else POINTS
    mounts = {point: _prepare(work, number, point) for number, point in enumerate(points)}
    for _ in rounds(part, scale):
        for point in shuffled(points):
            with _mounted(mounts[point]) as there:
                _measure_point(there, part, point, scale)


def _prepare(work: Path, number: int, point: Point) -> Mount:
    say(f"growth: preparing {point.who}")
    mount = Mount(work / f"point{number}", volume=_volume_size(point))
    with mount.served():
        mount.split_group(GROUP, point.size, DATA, point.names)
    return mount


def _volume_size(point: Point) -> int:
    """A bit for each extent in each clone and some maps more, and room to spare."""
    return 64 * MiB + (point.clones + 8) * point.size // EXTENT // 8


@dataclass
class There:
    """A point that is mounted."""

    mount: Mount
    pid: int

    @property
    def lu(self) -> Path:
        """Its Source."""
        return self.mount.lu(GROUP)


@contextlib.contextmanager
def _mounted(mount: Mount) -> Iterator[There]:
    with mount.served() as daemon:
        yield There(mount, daemon.pid)


def _measure_point(there: There, part: Part, point: Point, scale: Scale) -> None:
    part.add(MOUNT, point.who, there.mount.mounting)
    part.add(IDLE, point.who, resident(there.pid)["VmRSS"])
    _first_write(there, part, point)
    _host_io(there, part, point, scale)
    _sync(there, part, point)
    _restore(there, part, point)
    memory = resident(there.pid)
    part.add(RESIDENT, point.who, memory["VmRSS"])
    part.add(ANONYMOUS, point.who, memory["RssAnon"])


def _first_write(there: There, part: Part, point: Point) -> None:
    """Every extent is equal in all clones: each write sets a bit in every Delta Map."""
    there.mount.wait_for_checkpoint(GROUP)
    offsets = shuffled(range(0, DATA, EXTENT))
    measured = write_once(there.mount.work, there.lu, Job("randwrite", "4k", 1), offsets)
    part.add(FIRST, point.who, 1e6 * measured.p50)


def _host_io(there: There, part: Part, point: Point, scale: Scale) -> None:
    for what, job in JOBS.items():
        before = cpu_seconds(there.pid)
        measured = measure(there.lu, job, DATA, scale.seconds)
        used = cpu_seconds(there.pid) - before
        part.add(what + IOPS, point.who, measured.iops)
        part.add(what + CPU, point.who, 1e6 * used / measured.requests)


def _sync(there: There, part: Part, point: Point) -> None:
    """Everything that is data differs in every clone."""
    mount = there.mount
    fill_pieces(there.lu, ((at, EXTENT) for at in range(0, DATA, EXTENT)))

    def begin() -> None:
        for name in point.names:
            mount.command(f"{GROUP}/{name}/sync")

    def runs() -> bool:
        return any(mount.state(GROUP, name) != "synchronized" for name in point.names)

    copying = watch(begin, runs, OFTEN)
    mount.fracture(GROUP, *point.names)
    part.add(SYNC, point.who, copying.seconds)


def _restore(there: There, part: Part, point: Point) -> None:
    """From the last clone, which hosts have ruined as much of."""
    mount, last = there.mount, point.names[-1]
    fill_pieces(there.lu, ((at, EXTENT) for at in range(0, DATA, EXTENT)))
    delta = mount.group(GROUP)["clones"][last]["delta_extents"]
    assert delta == DATA // EXTENT, f"{delta} extents differ"
    copying = watch(
        lambda: _effective(there, part, point),
        lambda: mount.state(GROUP, last) == "restoring",
        OFTEN,
    )
    part.add(SWEEP, point.who, copying.seconds)
    _look(mount, last)
    mount.resync(GROUP, point.names)


def _effective(there: There, part: Part, point: Point) -> None:
    took = there.mount.command(f"{GROUP}/{point.names[-1]}/protected_restore")
    part.add(IN_EFFECT, point.who, 1e3 * took)


def _look(mount: Mount, clone: str) -> None:
    """Raise AssertionError if the Source is not the clone, as far as there is data."""
    must_be_equal(mount.backing(GROUP), mount.backing(GROUP, clone), stop=DATA)


def report(part: Part) -> str:
    """Markdown."""
    points = [point.who for point in POINTS + QUICK if point.who in part.samples[MOUNT]]
    whos = list(dict.fromkeys(points))
    others = [who for who in whos if who != BASE.who]
    return "\n\n".join(
        [
            table(
                ("", *whos),
                *((what, *(median(part.values(what, who)) for who in whos)) for what in MEASURES),
            ),
            f"Times *{BASE.who}*:",
            table(
                ("", *others),
                *(
                    (what, *(spread(part.ratios(what, who, BASE.who)) for who in others))
                    for what in MEASURES
                ),
            ),
        ]
    )
