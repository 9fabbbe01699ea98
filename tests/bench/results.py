"""What was measured, as it was measured: one number for each case, contestant and round.

The numbers of a round belong together: they were taken next to each other. So what is compared is
compared within a round, and what is told is the median of the rounds' ratios, never the ratio of
medians. Parts are measured apart and kept in one file; a report is made from whatever is there.
"""

import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

Case = str
Who = str


@dataclass
class Part:
    """One part of the benchmark, after some rounds."""

    name: str
    machine: str = ""
    rounds: int = 0
    quick: bool = False
    notes: list[str] = field(default_factory=list)
    samples: dict[Case, dict[Who, list[float | None]]] = field(default_factory=dict)

    def add(self, case: Case, who: Who, value: float | None) -> None:
        """The next round's number; None if it was thrown away, which `note` must explain."""
        self.samples.setdefault(case, {}).setdefault(who, []).append(value)

    def note(self, text: str) -> None:
        """Something that the reader of the numbers has to know. Said once, however often."""
        if text not in self.notes:
            self.notes.append(text)

    def has(self, case: Case, *whos: Who) -> bool:
        """Whether each of them was measured."""
        return all(any(self.values(case, who)) for who in whos)

    def values(self, case: Case, who: Who) -> list[float]:
        """What counts of all rounds."""
        found = self.samples.get(case, {}).get(who, [])
        return [value for value in found if value is not None]

    def ratios(self, case: Case, who: Who, to: Who) -> list[float]:
        """How many times `to`, in each round in which both count; none if either does not do it."""
        whos = self.samples.get(case, {})
        return ratios(whos[who], whos[to]) if who in whos and to in whos else []


def ratios(ones: Iterable[float | None], others: Iterable[float | None]) -> list[float]:
    """Round by round; a round in which either is missing does not count."""
    pairs = zip(ones, others, strict=True)
    return [one / other for one, other in pairs if one is not None and other]


@dataclass(frozen=True)
class Spread:
    """The median, the least and the greatest of some rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """None if there are no values."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1]) if found else None

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.least)}–{number(self.greatest)})"


def number(value: float) -> str:
    """With as many digits as one can believe."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def spread(values: Iterable[float]) -> str:
    """Median, least and greatest as a cell of a table; empty if nothing was measured."""
    found = Spread.of(values)
    return "" if found is None else str(found)


def median(values: Iterable[float]) -> str:
    """The median as a cell of a table; empty if nothing was measured."""
    found = Spread.of(values)
    return "" if found is None else number(found.median)


def load(path: Path) -> dict[str, Part]:
    """The parts in a file of results; none if it is not there."""
    if not path.exists():
        return {}
    return {name: Part(**part) for name, part in json.loads(path.read_text()).items()}


def save(path: Path, part: Part) -> None:
    """Put a part into the file, in place of what was measured before."""
    parts = load(path) | {part.name: part}
    text = json.dumps({name: asdict(each) for name, each in parts.items()}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text + "\n")
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
