"""Completion: what the shells themselves make of it, in a terminal; and what they are told."""

import json
import os
import sys
import threading
from pathlib import Path

import click
import pytest

from clonefs.cli import kernel, main, tree, tree_paths
from clonefs.cli.completion import SHELLS as MACHINERY
from clonefs.group import TABLE, Command
from clonefs.volume import CloneState
from tests.terminal import on_terminal
from tests.test_cli_support import make_mount, put, run

NIGHTLY, WEEKLY = "payroll/nightly", "payroll/weekly"


def forget_what_was_seen() -> None:
    tree_paths._mountpoints.cache_clear()
    tree_paths._groups.cache_clear()


@pytest.fixture
def mnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that the kernel knows as the only mount."""
    root = make_mount(tmp_path / "mnt")
    monkeypatch.setattr(kernel, "clonefs_mountpoints", lambda: [root])
    monkeypatch.setattr(tree_paths, "_LONGEST_S", 60.0)  # only one test is about a mount that hangs
    monkeypatch.chdir("/usr")
    return root


def completed(*words: str) -> list[str]:
    """What the last of these words may become; `(file)` where the shell is to complete files."""
    forget_what_was_seen()
    *args, incomplete = words
    shell = MACHINERY["fish"](main, {}, "clonefs", "")
    found = shell.get_completions(args, incomplete)
    return [f"({each.type})" if each.type in ("file", "dir") else each.value for each in found]


def test_commands_options_and_states(mnt: Path) -> None:
    assert completed("fra") == ["fracture"]
    assert completed("sync", "--th") == ["--then-fracture"]
    assert completed("wait", "--state", "rest") == ["restoring"]
    assert completed("wait", "--state=rest") == ["--state=restoring"]
    assert completed("completion", "") == ["bash", "zsh", "fish"]


def test_what_there_is_only_one_of_is_gone_into(mnt: Path) -> None:
    both = [f"{mnt}/payroll/nightly", f"{mnt}/payroll/weekly"]
    assert completed("wait", "") == [f"{mnt}/ledger/", f"{mnt}/payroll/"]
    assert completed("wait", f"{mnt}/") == [f"{mnt}/ledger/", f"{mnt}/payroll/"]
    assert completed("wait", f"{mnt}/pay") == both
    assert completed("wait", f"{mnt}/payroll/") == both
    assert completed("wait", f"{mnt}/payroll/w") == both[1:]


def test_groups_mounts_and_places(mnt: Path) -> None:
    assert completed("add-clone", f"{mnt}/") == [f"{mnt}/ledger", f"{mnt}/payroll"]
    assert completed("umount", str(mnt)[:-1]) == [str(mnt)]
    assert completed("status", "") == [f"{mnt}/"]
    assert completed("status", f"{mnt}/l") == [f"{mnt}/ledger/"]
    assert completed("map", f"{mnt}/ledger/") == [f"{mnt}/ledger/source", f"{mnt}/ledger/nightly"]


def test_relative_paths_and_links(
    mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert completed("umount", "m") == ["mnt"]
    assert completed("wait", "./mnt/led") == ["./mnt/ledger/nightly"]
    monkeypatch.chdir(mnt)
    assert completed("wait", "led") == ["ledger/nightly"]
    assert completed("add-clone", "") == ["ledger", "payroll"]
    monkeypatch.chdir(mnt / "payroll")
    assert completed("wait", "") == ["nightly", "weekly"]
    assert completed("wait", "../ledger/") == ["../ledger/nightly"]
    (tmp_path / "link").symlink_to(mnt)
    assert completed("wait", f"{tmp_path}/link/led") == [f"{tmp_path}/link/ledger/nightly"]


def test_a_clone_is_not_offered_twice(mnt: Path) -> None:
    assert completed("fracture", f"{mnt}/{NIGHTLY}", f"{mnt}/pay") == [f"{mnt}/{WEEKLY}"]


def test_clones_that_a_command_can_be_for_come_before_others(mnt: Path) -> None:
    states = {NIGHTLY: "synchronized", WEEKLY: "fractured"}
    report = {
        "payroll": {"clones": {name.split("/")[1]: {"state": s} for name, s in states.items()}}
    }
    put(mnt / "control/status.json", f'{{"groups": {report}}}\n'.replace("'", '"'))
    assert completed("restore", f"{mnt}/payroll/") == [f"{mnt}/{WEEKLY}"]
    assert completed("fracture", f"{mnt}/payroll/") == [f"{mnt}/{NIGHTLY}"]
    assert completed("wait", f"{mnt}/payroll/") == [f"{mnt}/{NIGHTLY}", f"{mnt}/{WEEKLY}"]
    assert completed("restore", f"{mnt}/payroll/n") == ["(file)"]  # the shell finds it all the same


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("sync", [Command.SYNC]),
        ("fracture", [Command.FRACTURE, Command.FORCE_FRACTURE]),
        ("restore", [Command.PROTECTED_RESTORE]),
        ("reverse-sync", [Command.REVERSE_SYNC]),
        ("remove-clone", [Command.REMOVE]),
    ],
)
def test_those_are_the_clones_that_it_changes(name: str, commands: list[Command]) -> None:
    changed: set[str] = set()
    for command in commands:
        for state, after in TABLE[command].items():
            if state is not after or command is Command.REMOVE:
                changed.add(state)
    if name == "fracture":  # nothing is left to break off
        changed.discard(CloneState.REVERSE_OUT_OF_SYNC)
    [argument] = [each for each in main.commands[name].params if isinstance(each, click.Argument)]
    assert set(argument.type.wish.states) == changed  # type: ignore[attr-defined]


def test_what_is_no_tree_is_the_shells(mnt: Path, tmp_path: Path) -> None:
    assert completed("format", "/var") == ["(file)"]
    assert completed("mount", "/meta", "/m") == ["(dir)"]
    assert completed("add-clone", f"{mnt}/payroll", "name", "/b") == ["(file)"]
    assert completed("restore", f"{tmp_path}/other/") == ["(file)"]
    assert completed("restore", "~/mnt/") == ["(file)"]


def test_mount_options(mnt: Path) -> None:
    assert completed("mount", "-o", "um") == ["umask="]
    assert completed("mount", "-o", "ro,uid=1,no") == [
        f"ro,uid=1,{name}" for name in ("nopoll", "nosuid", "nodev", "noexec", "noatime")
    ]
    assert "ro,uid=1,uid=" not in completed("mount", "-o", "ro,uid=1,")


def test_a_dead_mount_has_nothing_in_it(
    mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "clonefs_mountpoints", lambda: [tmp_path / "dead", mnt])
    assert completed("wait", f"{mnt}/led") == [f"{mnt}/ledger/nightly"]
    assert completed("wait", f"{tmp_path}/d") == [f"{tmp_path}/dead/"]
    assert completed("wait", f"{tmp_path}/dead/") == ["(file)"]


def test_no_mount_table_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel, "_MOUNTINFO", tmp_path / "none")
    assert completed("wait", "") == ["(file)"]


def test_a_mount_that_hangs_is_not_waited_for(mnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hangs(place: tree.Place) -> object:
        over.wait()
        return {"groups": {}}

    monkeypatch.setattr(tree, "report", hangs)
    monkeypatch.setattr(tree_paths, "_LONGEST_S", 0.01)
    assert completed("wait", f"{mnt}/pay") == ["(file)"]
    over.set()


def test_every_path_is_completed() -> None:
    for name, command in main.commands.items():
        for param in command.params:
            if isinstance(param, click.Argument) and param.name not in ("name", "shell"):
                overridden = type(param.type).shell_complete is not click.ParamType.shell_complete
                assert overridden, (name, param.name)


# Real shells

# Completes as `clonefs` does where the tree is the only mount, and else notes its arguments.
PROGRAM = """#!{python}
import json, os, sys
if "_CLONEFS_COMPLETE" in os.environ or sys.argv[1] == "completion":
    from pathlib import Path
    from clonefs.cli import kernel, main, tree_paths
    kernel.clonefs_mountpoints = lambda: [Path({root!r})]
    tree_paths._LONGEST_S = 60.0
    main(prog_name="clonefs")
with open({notes!r}, "a") as notes:
    print(json.dumps(sys.argv[1:]), file=notes)
"""

SHELLS: dict[str, tuple[tuple[str, ...], str]] = {
    "bash": (("bash", "--norc", "--noprofile", "-i"), 'eval "$(clonefs completion bash)"'),
    "zsh": (
        ("zsh", "-f", "-i"),
        'autoload -U compinit; compinit -D; eval "$(clonefs completion zsh)"',
    ),
    "fish": (("fish", "--no-config", "-i"), "clonefs completion fish | source"),
}

LINES: list[tuple[str, list[str]]] = [
    ("clonefs frac", ["fracture"]),
    (r"clonefs wait my\ mount/led", ["wait", "my mount/ledger/nightly"]),
    ('clonefs wait "my mount/led', ["wait", "my mount/ledger/nightly"]),
    ("clonefs wait --state=rest", ["wait", "--state=restoring"]),
    ("clonefs mount a b -o uid=1,al", ["mount", "a", "b", "-o", "uid=1,allow_other"]),
    ("clonefs format bi", ["format", "bin"]),
    ("true; clonefs umount my", ["umount", "my mount"]),
    # What goes on has no blank behind it.
    ("clonefs mount a b -o um\t077", ["mount", "a", "b", "-o", "umask=077"]),
    ("clonefs status my\tpay\tni", ["status", "my mount/payroll/nightly"]),
]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """With what arguments `clonefs` was called, a list a line."""
    file = tmp_path / "notes"
    root = make_mount(tmp_path / "my mount")
    text = PROGRAM.format(python=sys.executable, root=str(root), notes=str(file))
    put(tmp_path / "bin/clonefs", text)
    (tmp_path / "bin/clonefs").chmod(0o755)
    file.touch()
    return file


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(notes: Path, tmp_path: Path, shell: str) -> None:
    program, begin = SHELLS[shell]
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LC_ALL": "C.UTF-8",
    }
    with on_terminal(program=program, columns=400, environment=environment) as terminal:
        terminal.press(f"{begin}; cd {tmp_path}\r")
        for typed, expected in LINES:
            notes.write_text("")
            terminal.press(f"{typed}\t\r")
            terminal.wait_until(notes.read_text)
            given = [word.rstrip("/") for word in json.loads(notes.read_text())]
            assert given == expected, terminal.text  # zsh takes a last slash away, bash adds one
        terminal.press("exit\r")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.text


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_what_the_installer_puts_in_place(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert result.stdout.startswith(("# Completion of clonefs", "#compdef clonefs\n"))
    assert f"_CLONEFS_COMPLETE={shell}_complete" in result.stdout.replace("E fish", "E=fish")
