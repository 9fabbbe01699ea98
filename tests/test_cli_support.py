"""A directory with the shape of a mounted tree, and what the tests of the command line do with it.

It has no daemon behind it: a command that is written stays in its file, and nothing changes unless
the test changes it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clonefs.cli import main

GROUPS = {
    "payroll": {"state": "normal", "clones": {"nightly": {"state": "fractured"}, "weekly": {}}},
    "ledger": {"state": "normal", "clones": {"nightly": {"state": "synchronizing"}}},
}
COMMANDS = ("sync", "fracture", "reverse_sync", "protected_restore")


def run(*arguments: str | Path) -> Result:
    """Run `clonefs` with these arguments, as a shell would."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="clonefs")


def refusal(result: Result) -> str:
    """The sentence of a command that was refused, which must be one line with status 1."""
    assert result.exit_code == 1, result.output
    line, end, rest = result.stderr.partition("\n")
    assert (end, rest) == ("\n", "")
    assert line.startswith("clonefs: ")
    return line.removeprefix("clonefs: ")


def make_mount(root: Path) -> Path:
    """Make a tree with the groups `payroll` and `ledger` and their clones."""
    for name, text in {
        "status": "GROUP    CLONE\npayroll  nightly\nledger   nightly\n",
        "status.json": json.dumps({"volume": {"path": "/meta"}, "groups": GROUPS}) + "\n",
        "error": "\n",
        "add_group": "",
        "remove_group": "",
        "fracture": "",
    }.items():
        put(root / "control" / name, text)
    for group, clones in {"payroll": ("nightly", "weekly"), "ledger": ("nightly",)}.items():
        _make_group(root, group, clones)
    return root


def _make_group(root: Path, group: str, clones: tuple[str, ...]) -> None:
    put(root / group / "source", "the source's data")
    control = root / "control" / group
    for name in ("add_clone", "remove_clone"):
        put(control / name, "")
    put(control / "error", "\n")
    put(control / "status", f"{group}'s part of the table\n")
    for clone in clones:
        put(root / group / clone, "the clone's data")
        for command in COMMANDS:
            put(control / clone / command, "")
        for name, text in {"state": "fractured", "condition": "normal", "progress": "8/8"}.items():
            put(control / clone / name, f"{text}\n")
        put(control / clone / "error", "\n")


def show(
    root: Path,
    group: str,
    clone: str,
    *,
    state: str,
    condition: str = "normal",
    progress: str = "7/8",
    error: str = "",
) -> None:
    """Make the control files of a clone show this; `error` is what is wrong with the clone."""
    values = {"state": state, "condition": condition, "progress": progress, "error": error}
    for name, text in values.items():
        put(root / "control" / group / clone / name, f"{text}\n")
    report = json.loads((root / "control/status.json").read_text())
    report["groups"][group]["clones"][clone]["error"] = error or None
    put(root / "control/status.json", json.dumps(report) + "\n")


def put(path: Path, text: str) -> None:
    """Write a file, and the directories that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def always_fails(path: Path) -> None:
    """Make this control file one that every write to fails (with ENOSPC)."""
    path.unlink()
    path.symlink_to("/dev/full")


class Clock:
    """Stands in for the module `time` and for poll(2): a wait lasts no time, and lets the next thing
    happen."""

    def __init__(self, *events: Callable[[], None]) -> None:
        self.now_s = 1000.0
        self.pauses_s: list[float] = []
        self._events = list(events)

    def monotonic(self) -> float:
        return self.now_s

    def wait(self, pause_s: float) -> None:
        self.now_s += pause_s
        self.pauses_s.append(pause_s)
        if not self._events:
            pytest.fail("it would wait for ever")
        self._events.pop(0)()
