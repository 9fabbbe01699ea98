"""What docs/control-files.md says of states and commands, made from the code.

    .venv/bin/python -m tests.state_tables

writes it anew between the two marks in the page. A test fails while the page is another.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from clonefs.group import TABLE, Command, transitions
from clonefs.volume import CloneRecord, CloneState, GroupRecord, MapSlot

PAGE = Path(__file__).parents[1] / "docs" / "control-files.md"
BEGIN = "<!-- made from clonefs.group.TABLE by tests/state_tables.py -->"
END = "<!-- end of what is made -->"

Edges = dict[tuple[CloneState, str], list[str]]


def table() -> str:
    """A row for each state, a column for each command."""
    head = ["state", *(f"`{command}`" for command in Command)]
    cells = [[state, *(_cell(command, state) for command in Command)] for state in CloneState]
    rows = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace(" --- ", "---")


def _cell(command: Command, state: CloneState) -> str:
    following = TABLE[command].get(state)
    if following is None:
        return "EBUSY"
    return "gone" if command is Command.REMOVE else following


def diagram() -> str:
    """A state diagram in the language of mermaid: commands that lead elsewhere, and, in italics,
    what happens by itself."""
    lines = ["stateDiagram-v2"]
    lines += [f'    state "{state}" as {_alias(state)}' for state in CloneState]
    lines += [
        f"    [*] --> {_alias(CloneState.SYNCHRONIZING)} : add_clone",
        f"    [*] --> {_alias(CloneState.OUT_OF_SYNC)} : add_clone sync=no",
    ]
    for (state, following), labels in _edges().items():
        lines.append(f"    {_alias(state)} --> {following} : {', '.join(labels)}")
    return "\n".join(lines)


def _edges() -> Edges:
    edges: Edges = {}
    for command in Command:
        for state, following in TABLE[command].items():
            if command is Command.REMOVE:
                edges.setdefault((state, "[*]"), []).append(command)
            elif following is not state:
                labels = edges.setdefault((state, _alias(following)), [])
                if command is not Command.FORCE_FRACTURE or Command.FRACTURE not in labels:
                    labels.append(command)
    for state, following, why in _by_itself():
        edges.setdefault((state, _alias(following)), []).append(f"({why})")
    return edges


def _by_itself() -> Iterable[tuple[CloneState, CloneState, str]]:
    """The changes that nobody has commanded, as the functions of the transitions make them."""
    s = CloneState

    def group(state: CloneState) -> GroupRecord:
        clone = CloneRecord("c", "/c", state, MapSlot(4096, 4096))
        return GroupRecord(
            "g", "/s", 1 << 20, 65536, MapSlot(0, 4096), MapSlot(8192, 4096), (clone,)
        )

    done = "copied"
    after = {
        (s.SYNCHRONIZING, done): transitions.complete_sync(group(s.SYNCHRONIZING), "c"),
        (s.RESTORING, done): transitions.complete_restore(group(s.RESTORING), "c"),
        (s.REVERSE_SYNCHRONIZING, done): transitions.complete_reverse_sync(
            group(s.REVERSE_SYNCHRONIZING), "c", now=0.0
        ),
        (s.SYNCHRONIZED, "may differ"): transitions.no_longer_equal(group(s.SYNCHRONIZED), "c", 1),
    }
    for state in sorted(transitions.MIRRORED):
        after[state, "clone fails"] = transitions.split_off_failed(
            group(state), "c", reason="", now=0.0
        )
    for (state, why), record in after.items():
        yield state, record.clone("c").state, why


def _alias(state: CloneState) -> str:
    return state.replace("-", "_")


def section() -> str:
    """What stands between the marks."""
    return f"\n{table()}\n\n```mermaid\n{diagram()}\n```\n"


def renewed(page: str) -> str:
    """The page with the section as it should be."""
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{PAGE} has no place for what is made: {BEGIN} ... {END}")
    return f"{before}{begin}{section()}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
