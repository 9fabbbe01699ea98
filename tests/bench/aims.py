"""What clonefs aims at, and how far it is."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import geometric_mean

from tests.bench import effects, growth, isolation, steady, sweeps, under_load
from tests.bench.results import Part, Spread, number
from tests.bench.stage import MAKE
from tests.bench.tables import table

Cases = list[tuple[str, list[float]]]
"""What was measured in each round, by the name of the case."""


@dataclass(frozen=True)
class Aim:
    """A bound, and where to find what it is held against. With several cases the worst one counts,
    unless `mean`: then it is the geometric mean of all in a round."""

    part: str
    text: str
    cases: Callable[[Part], Cases]
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    mean: bool = False

    @property
    def bound(self) -> str:
        """In words."""
        if self.at_least is not None:
            return f"at least {_plain(self.at_least)}{self.unit}"
        assert self.at_most is not None
        return f"at most {_plain(self.at_most)}{self.unit}"

    def margin(self, value: float) -> float:
        """How many times as good as needed."""
        if self.at_least is not None:
            return value / self.at_least
        assert self.at_most is not None
        return self.at_most / value


@dataclass(frozen=True)
class Outcome:
    """An aim, what was measured, and the worst case if there are several."""

    aim: Aim
    measured: Spread
    worst: str

    @property
    def reached(self) -> bool:
        """By the median."""
        return self.aim.margin(self.measured.median) >= 1


def outcomes(parts: dict[str, Part]) -> Iterator[Outcome]:
    """Of all aims about which something was measured."""
    for aim in AIMS:
        if aim.part in parts:
            found = [(name, values) for name, values in aim.cases(parts[aim.part]) if values]
            if found:
                yield _outcome(aim, found)


def _outcome(aim: Aim, cases: Cases) -> Outcome:
    def margin(case: tuple[str, list[float]]) -> float:
        return aim.margin(_spread(case[1]).median)

    name, values = min(cases, key=margin)
    worst = "" if len(cases) == 1 else f"{name}: {_spread(values)}{aim.unit}"
    if not aim.mean:
        return Outcome(aim, _spread(values), "" if len(cases) == 1 else name)
    rounds = zip(*(values for _, values in cases), strict=False)
    return Outcome(aim, _spread([geometric_mean(values) for values in rounds]), worst)


def _spread(values: Iterable[float]) -> Spread:
    found = Spread.of(values)
    assert found is not None
    return found


def _plain(value: float) -> str:
    return f"{value:g}"


def aims_table(parts: dict[str, Part]) -> str:
    """Markdown."""
    return table(
        ("aim", "needed", "measured (spread)", "reached", "worst case"),
        *(
            (
                outcome.aim.text,
                outcome.aim.bound,
                f"{outcome.measured}{outcome.aim.unit}",
                "yes" if outcome.reached else "**no**",
                outcome.worst,
            )
            for outcome in outcomes(parts)
        ),
    )


# Where to look


def _ratios(cells: Iterable[steady.Cell], who: str, to: str) -> Callable[[Part], Cases]:
    chosen = list(cells)
    return lambda part: [(cell.case, part.ratios(cell.case, who, to)) for cell in chosen]


def _cells(
    what: str, *, depth: int | None = None, ways: tuple[str, ...] = steady.WAYS
) -> list[steady.Cell]:
    """The cells of steady state whose name has `what` in it."""
    return [
        cell
        for cell in steady.CELLS
        if what in cell.what and depth in (None, cell.job.depth) and cell.way in ways
    ]


def _first_writes(part: Part) -> Cases:
    return [
        (each.case, part.ratios(each.case, f"{who}: {steady.FIRST}", f"{who}: {steady.LATER}"))
        for each in steady.FIRSTS
        if each.job.rw == "write"
        for who in (steady.SPLIT,)
    ]


def _in_effect(part: Part) -> Cases:
    cases = [
        effects.effect(title, differs)
        for title in effects.EFFECT_SIZES
        for differs in (effects.FEW, effects.ALL)
    ]
    return [(case, [1e3 * value for value in part.values(case, effects.SECONDS)]) for case in cases]


def _first_read(part: Part) -> Cases:
    return [(effects.READ, part.ratios(effects.READ, effects.PENDING, effects.OF_CLONE))]


READS = [job for job in under_load.JOBS if not job.writes]
OURS, THEIRS = (
    f"{under_load.CLONEFS}, {under_load.SWEEP}",
    f"{under_load.OVERLAY}, {under_load.SWEEP}",
)


def _under_load(what: str, one: str, other: str) -> Callable[[Part], Cases]:
    cases = [under_load.load_case(job, what) for job in READS]
    return lambda part: [(case, part.ratios(case, one, other)) for case in cases]


def _sweep(what: str) -> Callable[[Part], Cases]:
    case = sweeps.COPY_SECONDS + what
    return lambda part: [(what, part.ratios(case, sweeps.CP_FSYNC, under_load.CLONEFS))]


def _sharing(*, cached: bool) -> Callable[[Part], Cases]:
    def cases(part: Part) -> Cases:
        return [case for kind in MAKE for case in _sweep(sweeps.shared(kind, cached=cached))(part)]

    return cases


def _neighbours(beside: str) -> Callable[[Part], Cases]:
    cases = [what + isolation.P99 for what in isolation.JOBS]
    return lambda part: [(case, part.ratios(case, beside, isolation.ALONE)) for case in cases]


def _among_clones(part: Part) -> Cases:
    points = [point.who for point in growth.POINTS]
    return [(who, part.values(growth.IN_EFFECT, who)) for who in points]


def _huge(what: str) -> Callable[[Part], Cases]:
    return lambda part: [(growth.HUGE.who, part.values(what, growth.HUGE.who))]


NO_CACHE = (steady.DIRECT, steady.LOOP)
BUFFERED = [
    *_cells("4 KiB", depth=1, ways=(steady.BUFFERED,)),
    *_cells("1 MiB", ways=(steady.BUFFERED,)),
]
OF_QEMU = "against qemu-storage-daemon"
BESIDE_SWEEP = "random 4 KiB reads at depth 1 and 16 while all of it is restored"

AIMS = [
    Aim(
        "steady",
        f"4 KiB reads, depth 16, O_DIRECT and loop, {OF_QEMU}",
        _ratios(_cells("4 KiB reads", depth=16, ways=NO_CACHE), steady.PLAIN, steady.QEMU),
        at_least=2.0,
    ),
    Aim(
        "steady",
        "the same against it with its default, aio=threads",
        _ratios(_cells("4 KiB reads", depth=16, ways=NO_CACHE), steady.PLAIN, steady.QEMU_DEFAULT),
        at_least=2.0,
    ),
    Aim(
        "steady",
        f"4 KiB writes, depth 16, O_DIRECT and loop, {OF_QEMU}",
        _ratios(_cells("4 KiB writes", depth=16, ways=NO_CACHE), steady.PLAIN, steady.QEMU),
        at_least=1.5,
    ),
    Aim(
        "steady",
        "the same against it with its default, aio=threads",
        _ratios(_cells("4 KiB writes", depth=16, ways=NO_CACHE), steady.PLAIN, steady.QEMU_DEFAULT),
        at_least=1.5,
    ),
    Aim(
        "steady",
        f"4 KiB, depth 1, O_DIRECT and loop, {OF_QEMU}",
        _ratios(_cells("4 KiB", depth=1, ways=NO_CACHE), steady.PLAIN, steady.QEMU),
        at_least=1.0,
    ),
    Aim(
        "steady",
        f"sequential 1 MiB, O_DIRECT and loop, {OF_QEMU}",
        _ratios(_cells("1 MiB", ways=NO_CACHE), steady.PLAIN, steady.QEMU),
        at_least=1.0,
    ),
    Aim(
        "steady",
        f"sequential 1 MiB reads, O_DIRECT and loop, {OF_QEMU}",
        _ratios(_cells("1 MiB reads", ways=NO_CACHE), steady.PLAIN, steady.QEMU),
        at_least=1.5,
    ),
    Aim(
        "steady",
        f"4 KiB at depth 1 and sequential 1 MiB, buffered, {OF_QEMU}",
        _ratios(BUFFERED, steady.PLAIN, steady.QEMU),
        at_least=1.0,
    ),
    Aim(
        "steady",
        f"the same on a mount with -o cached, {OF_QEMU}",
        _ratios(BUFFERED, steady.CACHED, steady.QEMU),
        at_least=1.0,
    ),
    Aim(
        "steady",
        "a Source with a fractured clone against one without clones, mean of all requests",
        _ratios(steady.CELLS, steady.SPLIT, steady.PLAIN),
        at_least=0.95,
        mean=True,
    ),
    Aim("steady", "sequential first writes against later ones", _first_writes, at_least=0.85),
    Aim(
        "steady",
        "writes to a Source with a mirrored clone against one without",
        _ratios(_cells("writes"), steady.MIRROR, steady.PLAIN),
        at_least=0.45,
    ),
    Aim(
        "restore",
        "a restore is in effect, at any size and delta",
        _in_effect,
        at_most=20,
        unit=" ms",
    ),
    Aim("growth", "the same among up to 64 clones", _among_clones, at_most=20, unit=" ms"),
    Aim(
        "restore",
        "time of the first read of a pending extent, against a read of the clone",
        _first_read,
        at_most=2.0,
    ),
    Aim(
        "restore",
        f"{BESIDE_SWEEP}, against the qcow2 overlay: requests/s",
        _under_load(under_load.IOPS, OURS, THEIRS),
        at_least=5,
    ),
    Aim(
        "restore",
        f"{BESIDE_SWEEP}, against the qcow2 overlay: p99",
        _under_load(under_load.P99, OURS, THEIRS),
        at_most=0.2,
    ),
    Aim(
        "restore",
        f"{BESIDE_SWEEP}, against idle: p50",
        _under_load(under_load.P50, OURS, f"{under_load.CLONEFS}, {under_load.IDLE}"),
        at_most=1.5,
    ),
    Aim(
        "restore",
        "the whole restore under that load: times as fast as block-stream",
        lambda part: [
            (case, part.ratios(case, under_load.OVERLAY, under_load.CLONEFS))
            for case in (under_load.load_case(job, under_load.COPY) for job in READS)
        ],
        at_least=3,
    ),
    Aim(
        "restore",
        "copying a full delta: times as fast as cp --reflink=never, both flushed",
        _sweep(sweeps.FULL),
        at_least=0.9,
    ),
    Aim(
        "restore",
        "the same on XFS and Btrfs, which share blocks",
        _sharing(cached=True),
        at_least=50,
    ),
    Aim(
        "restore",
        "the same with nothing of the Source in the page cache",
        _sharing(cached=False),
        at_least=50,
    ),
    Aim(
        "growth",
        f"resident memory of the daemon, {growth.HUGE.who}",
        _huge(growth.RESIDENT),
        at_most=300,
        unit=" MiB",
    ),
    Aim("growth", f"mount, {growth.HUGE.who}", _huge(growth.MOUNT), at_most=2, unit=" s"),
    Aim(
        "isolation",
        "p99 of a group beside one whose backing hangs, against alone",
        _neighbours(isolation.HANGS),
        at_most=1.5,
    ),
    Aim(
        "isolation",
        "p99 of a group beside one whose backing is slow, against alone",
        _neighbours(isolation.SLOW),
        at_most=1.5,
    ),
]


def margin_text(outcome: Outcome) -> str:
    """What was measured, and what was needed, for a picture."""
    return f"{number(outcome.measured.median)}{outcome.aim.unit} ({outcome.aim.bound})"
