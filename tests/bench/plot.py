"""Ratios as horizontal bars in one SVG file, for light and dark pages.

The axis is logarithmic, so that twice as good is as long as half as good. A bar goes from the line
at 1 to the median, and a thin line shows the least and the greatest round. What is beyond 1 differs
from what is short of it in place, in shade and in the shape at its end.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from tests.bench.results import Spread

WIDTH = 960
LEFT, RIGHT = 24, 24
TOP, LINE, BAR = 64, 40, 10
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

STYLE = """
svg { background: #ffffff; font: 13px system-ui, sans-serif; }
.title { font-weight: 600; font-size: 15px; } .ground { fill: #ffffff; }
text { fill: #1f2328; } .faint { fill: #59636e; } .grid { stroke: #d8dee4; }
.one { stroke: #1f2328; stroke-width: 1.5; } .beyond { fill: #1a7f5a; } .short { fill: #c4571b; }
.spread { stroke: #1f2328; stroke-width: 1.5; } .mark { stroke: #1f2328; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
svg { background: #0d1117; } .ground { fill: #0d1117; } text { fill: #e6edf3; }
.faint { fill: #9198a1; } .grid { stroke: #2a313a; } .one, .spread, .mark { stroke: #e6edf3; }
.beyond { fill: #3fb68b; } .short { fill: #e8834a; }
}
"""


@dataclass(frozen=True)
class Bar:
    """A row: what it is, how many times, and what stands at its right end."""

    label: str
    ratio: Spread
    text: str


@dataclass(frozen=True)
class _Axis:
    least: float
    greatest: float

    def x(self, value: float) -> float:
        """Where a ratio lies."""
        share = math.log(value / self.least) / math.log(self.greatest / self.least)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    @property
    def ticks(self) -> list[float]:
        return [tick for tick in TICKS if self.least <= tick <= self.greatest]


def draw(title: str, axis_title: str, bars: Sequence[Bar]) -> str:
    """One SVG document."""
    axis = _axis(bars)
    height = TOP + LINE * len(bars) + 16
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{escape(title, {chr(34): ""})}">'
    )
    ground = f'<rect class="ground" width="{WIDTH}" height="{height}"/>'
    lines = [head, f"<style>{STYLE}</style>", ground, *_frame(title, axis_title, axis, height)]
    for number, bar in enumerate(bars):
        lines += _bar(bar, axis, TOP + LINE * number)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _axis(bars: Sequence[Bar]) -> _Axis:
    """Room for all of them, and for half and twice in any case; it ends at ticks."""
    least = min([0.5, *(bar.ratio.least for bar in bars)])
    greatest = max([2.0, *(bar.ratio.greatest for bar in bars)])
    return _Axis(
        max((tick for tick in TICKS if tick <= least), default=least),
        min((tick for tick in TICKS if tick >= greatest), default=greatest),
    )


def _frame(title: str, axis_title: str, axis: _Axis, height: int) -> Iterator[str]:
    yield _text(LEFT, 24, title, "title")
    yield _text(WIDTH - RIGHT, 24, axis_title, "faint", "end")
    for tick in axis.ticks:
        x = axis.x(tick)
        yield _line("one" if tick == 1 else "grid", x, TOP - 8, x, height - 8)
        anchor = {axis.ticks[0]: "start", axis.ticks[-1]: "end"}.get(tick, "middle")
        yield _text(x, TOP - 14, f"{tick:g}×", "faint", anchor)


def _bar(bar: Bar, axis: _Axis, top: int) -> Iterator[str]:
    beyond = bar.ratio.median >= 1
    at, one = axis.x(bar.ratio.median), axis.x(1)
    y = top + 18
    yield f'<rect class="ground" x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="16"/>'
    yield _text(LEFT, top + 13, bar.label)
    yield _text(WIDTH - RIGHT, top + 13, bar.text, "faint", "end")
    yield (
        f'<rect class="{"beyond" if beyond else "short"}" x="{min(at, one):.1f}" y="{y}" '
        f'width="{max(abs(at - one), 1):.1f}" height="{BAR}" rx="1"/>'
    )
    middle = y + BAR / 2
    yield _line("spread", axis.x(bar.ratio.least), middle, axis.x(bar.ratio.greatest), middle)
    if beyond:
        yield _line("mark", at, y - 2, at, y + BAR + 2)
    else:
        yield f'<circle class="short mark" cx="{at:.1f}" cy="{middle}" r="4"/>'


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:g}" x2="{x2:.1f}" y2="{y2:g}"/>'


def _text(x: float, y: float, text: str, name: str = "", anchor: str = "start") -> str:
    kind = f' class="{name}"' if name else ""
    return f'<text{kind} x="{x:.1f}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
