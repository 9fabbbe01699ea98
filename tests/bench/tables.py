"""Tables in Markdown."""

from collections.abc import Iterable


def table(*rows: Iterable[object]) -> str:
    """A Markdown table; the first row is its head."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|---" * len(cells[0]) + "|")
    return "\n".join(lines)
