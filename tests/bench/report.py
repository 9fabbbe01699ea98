"""The report: tables and pictures of all parts that were measured, and the page they go into."""

from collections.abc import Callable
from pathlib import Path

from tests.bench import aims, growth, isolation, restore, steady, sync
from tests.bench.plot import Bar, draw
from tests.bench.results import Part, Spread, number

DOCS = Path(__file__).parents[2] / "docs"
PAGE = "performance.md"

REPORTS: dict[str, Callable[[Part], str]] = {
    "steady": steady.report,
    "restore": restore.report,
    "sync": sync.report,
    "growth": growth.report,
    "isolation": isolation.report,
}


def sections(parts: dict[str, Part]) -> dict[str, str]:
    """Markdown, by the name of the section."""
    found = {"aims": _aims(parts)} if any(aims.outcomes(parts)) else {}
    return found | {
        name: _section(parts[name], report) for name, report in REPORTS.items() if name in parts
    }


def _aims(parts: dict[str, Part]) -> str:
    measured = (f"{part.name}: {_how_many(part)}" for part in parts.values())
    return f"{aims.aims_table(parts)}\n\nMeasured: {'; '.join(measured)}."


def _section(part: Part, report: Callable[[Part], str]) -> str:
    notes = "\n".join(f"- {note}" for note in part.notes)
    return "\n\n".join(filter(None, (_measured_on(part), report(part), notes)))


def _measured_on(part: Part) -> str:
    return f"{part.machine}; {_how_many(part)}."


def _how_many(part: Part) -> str:
    rounds = "1 round" if part.rounds == 1 else f"{part.rounds} rounds"
    return (
        f"{rounds} of a quick run, which shows that it works, and no more" if part.quick else rounds
    )


def pictures(parts: dict[str, Part]) -> dict[str, str]:
    """SVG documents, by the name of the file."""
    found = {}
    if bars := [aim_bar(outcome) for outcome in aims.outcomes(parts)]:
        found["performance-aims.svg"] = draw(
            "What clonefs aims at, and what was measured", "times as good as needed", bars
        )
    if "steady" in parts:
        found["performance-steady.svg"] = draw(
            "A Source without clones against qemu-storage-daemon",
            "requests a second, times qemu-storage-daemon",
            _steady_bars(parts["steady"]),
        )
    return found


def aim_bar(outcome: aims.Outcome) -> Bar:
    """How many times as good as needed."""
    margins = sorted(
        outcome.aim.margin(value) for value in (outcome.measured.least, outcome.measured.greatest)
    )
    ratio = Spread(outcome.aim.margin(outcome.measured.median), *margins)
    return Bar(outcome.aim.text, ratio, aims.margin_text(outcome))


def _steady_bars(part: Part) -> list[Bar]:
    bars = []
    for cell in steady.CELLS:
        ratio = Spread.of(part.ratios(cell.case, steady.PLAIN, steady.QEMU))
        if ratio is not None:
            bars.append(Bar(cell.case, ratio, f"{number(ratio.median)}×"))
    return bars


def record(parts: dict[str, Part], docs: Path = DOCS) -> None:
    """Put all of it into the page, in place of what was there; a part that was not measured stays."""
    page = docs / PAGE
    text = page.read_text()
    for name, section in sections(parts).items():
        text = replaced(text, name, section)
    page.write_text(text)
    for name, picture in pictures(parts).items():
        (docs / name).write_text(picture)


def replaced(text: str, name: str, section: str) -> str:
    """The page with another text between the marks of a section. Raises ValueError if there are none."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, mark, rest = text.partition(begin)
    _, ending, after = rest.partition(end)
    if not mark or not ending:
        raise ValueError(f"the page has no marks for {name}")
    return f"{before}{begin}\n{section}\n\n{end}{after}"
