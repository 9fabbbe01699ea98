"""The pages for users as something that runs: their blocks, the script of a page, and what it shows.

The convention, which tests/mounts/test_docs_commands.py enforces: all blocks of a page that are `sh` are
one script, in their order. A `text` block is what the `sh` block before it printed. `sh elsewhere` is
for commands that another test runs, or none can; `usage` has words in capitals that stand for something
else.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

SHOWN_AT = "/srv"  # where pages say that they were run
_FENCE = re.compile(r" *```(.*)")
_VARYING = (
    # Of random data, the first one in 256 is equal.
    (r"\bdiffer: byte \d+, line \d+", "differ: byte N, line N"),
    (r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
    (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "UUID"),
    (r"/dev/loop\d+", "/dev/loopN"),
    (r"/\S*/tmp\.\w{10}", "/tmp/tmp.XXXXXXXXXX"),
    (r"(?m)^\S+: line \d+: ", "bash: "),  # as bash says it to a person
    (r"[ \t]+", " "),  # a column is as wide as what is in it
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its opening fence, and the first of a page is 1."""

    line: int
    language: str
    text: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    begin: int | None = None
    language = ""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        fence = _FENCE.fullmatch(line)
        if begin is not None and fence is not None:
            found.append(Block(begin, language, tuple(lines[begin : number - 1])))
            begin = None
        elif fence is not None:
            begin, language = number, fence[1]
    assert begin is None, f"{page}:{begin}: a block without an end"
    return found


def indented_blocks(page: Path) -> Iterator[int]:
    """The lines at which code begins that is set off by blanks only, so that its language is unknown."""
    fenced = {
        number
        for block in blocks(page)
        for number in range(block.line, block.line + len(block.text) + 2)
    }
    before = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if number not in fenced and line.startswith("    ") and not before.strip():
            yield number
        before = line


def script(page: Path, outputs: Path, last_line: Path) -> str:
    """The commands of a page, each at the line that it has there. The output of a block goes to the file
    in `outputs` that has its number, the line of the last command to `last_line`."""
    lines = [""] * len(page.read_text().splitlines())
    lines[0] = f"""trap 'printf %s "$LINENO" > {last_line}' DEBUG"""
    for number, block in enumerate(runnable(page)):
        assert block.line > 1, f"{page} begins with a block"
        lines[block.line - 1] = f"exec > {outputs}/{number} 2>&1"
        lines[block.line : block.line + len(block.text)] = block.text
    return "\n".join(lines) + "\n"


def runnable(page: Path) -> list[Block]:
    """The blocks that the script of a page consists of."""
    return [block for block in blocks(page) if block.language == "sh"]


def shown(page: Path) -> Iterator[tuple[int, Block]]:
    """What the page shows as printed, each with the number of the `sh` block that prints it."""
    number, taken = -1, True
    for block in blocks(page):
        if block.language == "sh":
            number, taken = number + 1, False
        elif block.language == "text":
            assert not taken, f"{page}:{block.line}: there is no sh block that prints this"
            taken = True
            yield number, block


def is_shown(text: tuple[str, ...], output: str, work: Path) -> bool:
    """Whether a page that shows `text` shows what a block printed in the directory `work`. `...` stands
    for anything within a line, and in a line of its own for any lines. What is different in each run
    (times, UUIDs, numbers of loop devices) is not compared, nor is how many blanks there are."""
    parts = ("(?:.*\n)*" if line.strip() == "..." else _pattern(line) for line in text)
    return re.fullmatch("".join(parts), constant(output, work)) is not None


def _pattern(line: str) -> str:
    return ".*".join(map(re.escape, constant(f"{line}\n", None).split("...")))


def constant(text: str, work: Path | None) -> str:
    """The text without what is different in each run; `work` is called as pages call it."""
    if work is not None:
        text = text.replace(str(work), SHOWN_AT)
    for pattern, word in _VARYING:
        text = re.sub(pattern, word, text)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())
