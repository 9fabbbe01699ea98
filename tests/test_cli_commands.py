"""Each command is one write(2) of one line to the right control file, as echo would do it."""

import errno
import os
import re
from pathlib import Path
from typing import NoReturn

import pytest

import clonefs
from clonefs.cli import main, tree
from tests.test_cli_support import always_fails, make_mount, put, refusal, run


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    return make_mount(tmp_path / "mnt")


Writes = list[tuple[str, bytes]]


@pytest.fixture
def writes(mnt: Path, monkeypatch: pytest.MonkeyPatch) -> Writes:
    """Every write(2) that was made below control/: the file, and the bytes."""
    made: Writes = []
    write = os.write

    def recording(descriptor: int, data: bytes) -> int:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_relative_to(mnt / "control"):
            made.append((str(path.relative_to(mnt / "control")), data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", recording)
    return made


NIGHTLY = "payroll/nightly"


@pytest.mark.parametrize(
    ("arguments", "file", "line"),
    [
        (["sync", NIGHTLY], f"{NIGHTLY}/sync", b"1\n"),
        (["sync", "--then-fracture", NIGHTLY], f"{NIGHTLY}/sync", b"then-fracture\n"),
        (["fracture", NIGHTLY], f"{NIGHTLY}/fracture", b"1\n"),
        (["fracture", NIGHTLY, "--force"], f"{NIGHTLY}/fracture", b"force\n"),
        (["fracture", NIGHTLY, NIGHTLY], f"{NIGHTLY}/fracture", b"1\n"),
        (
            ["fracture", NIGHTLY, "ledger/nightly"],
            "fracture",
            b"payroll/nightly ledger/nightly\n",
        ),
        (["restore", NIGHTLY], f"{NIGHTLY}/protected_restore", b"1\n"),
        (["restore", f"{NIGHTLY}/"], f"{NIGHTLY}/protected_restore", b"1\n"),
        (["remove-clone", NIGHTLY], "payroll/remove_clone", b"nightly\n"),
        (["remove-group", "payroll"], "remove_group", b"payroll\n"),
        (["add-group", ".", "new", "/a"], "add_group", b"new /a\n"),
        (
            ["add-group", ".", "new", "/a", "--size", "10G", "--extent", "4K"],
            "add_group",
            b"new /a size=10G extent=4K\n",
        ),
        (["add-group", ".", "new", "/my disks/a'b"], "add_group", b"new '/my disks/a'\"'\"'b'\n"),
        (["add-clone", "payroll", "new", "/a b"], "payroll/add_clone", b"new '/a b'\n"),
        (
            ["add-clone", "payroll", "new", "/a", "--no-sync"],
            "payroll/add_clone",
            b"new /a sync=no\n",
        ),
    ],
)
def test_a_command_is_one_write_of_one_line(
    mnt: Path,
    writes: Writes,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    file: str,
    line: bytes,
) -> None:
    monkeypatch.chdir(mnt)
    result = run(*arguments)
    assert (result.exit_code, result.output) == (0, "")
    assert writes == [(file, line)]


def test_a_backing_is_made_absolute_and_keeps_its_meaning(
    mnt: Path, writes: Writes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    monkeypatch.chdir(tmp_path)
    assert run("add-group", mnt, "new", "./image").exit_code == 0
    assert run("add-clone", mnt / "payroll", "new", "link/../image").exit_code == 0
    # Through the link, `..` is far and not tmp_path: the path must not be shortened.
    assert writes == [
        ("add_group", f"new {tmp_path}/image\n".encode()),
        ("payroll/add_clone", f"new {tmp_path}/link/../image\n".encode()),
    ]


def test_a_clone_is_found_through_symbolic_links(mnt: Path, writes: Writes, tmp_path: Path) -> None:
    (tmp_path / "mount").symlink_to(mnt)
    (tmp_path / "good-copy").symlink_to(mnt / NIGHTLY)
    assert run("restore", tmp_path / "good-copy").exit_code == 0
    assert run("restore", tmp_path / "mount" / NIGHTLY).exit_code == 0
    assert writes == [(f"{NIGHTLY}/protected_restore", b"1\n")] * 2


def test_a_clone_is_found_from_within_its_group(
    mnt: Path, writes: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mnt / "ledger")
    assert run("restore", "nightly").exit_code == 0
    assert run("restore", "../payroll/nightly").exit_code == 0
    assert [file for file, _ in writes] == [
        "ledger/nightly/protected_restore",
        "payroll/nightly/protected_restore",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["restore", "/nowhere/nightly"],
            "/nowhere/nightly is not inside a clonefs mount: see clonefs status",
        ),
        (["restore", "."], ". is not a clone: name one by its own path, MOUNTPOINT/GROUP/CLONE"),
        (["restore", "payroll/source"], "payroll/source is a Source: name one of its clones"),
        (
            ["restore", "payroll/gone"],
            "there is no clone gone in the group payroll: see clonefs status",
        ),
        (
            ["restore", "gone/nightly"],
            "there is no group gone in the mount at MNT: see clonefs status",
        ),
        (["restore", "payroll/nightly/x"], "there is nothing below the LU MNT/payroll/nightly"),
        (
            ["restore", "control/payroll/nightly"],
            "MNT/control/payroll/nightly is a control file: name a group or an LU by its own path",
        ),
        (
            ["remove-clone", "payroll/gone"],
            "there is no clone gone in the group payroll: see clonefs status",
        ),
        (
            ["remove-group", "gone"],
            "there is no group gone in the mount at MNT: see clonefs status",
        ),
        (
            ["remove-group", NIGHTLY],
            "payroll/nightly is not a group: name its directory, MNT/payroll",
        ),
        (
            ["add-clone", "gone", "x", "/a"],
            "there is no group gone in the mount at MNT: see clonefs status",
        ),
        (["add-clone", ".", "x", "/a"], ". is a mount point: name a group in it, as MNT/GROUP"),
        (
            ["add-group", "payroll", "x", "/a"],
            "payroll is inside the mount at MNT: name the mount point",
        ),
    ],
)
def test_a_path_that_names_the_wrong_thing_is_a_sentence(
    mnt: Path,
    writes: Writes,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(mnt)
    assert refusal(run(*arguments)) == sentence.replace("MNT", str(mnt))
    assert writes == []


@pytest.mark.parametrize(
    ("arguments", "file", "error"),
    [
        (["restore", NIGHTLY], f"{NIGHTLY}/protected_restore", f"{NIGHTLY}/error"),
        (["sync", "--wait", NIGHTLY], f"{NIGHTLY}/sync", f"{NIGHTLY}/error"),
        (["fracture", NIGHTLY], f"{NIGHTLY}/fracture", f"{NIGHTLY}/error"),
        (["fracture", NIGHTLY, "payroll/weekly"], "fracture", "error"),
        (["add-clone", "payroll", "x", "/a"], "payroll/add_clone", "payroll/error"),
        (["remove-clone", NIGHTLY], "payroll/remove_clone", "payroll/error"),
        (["add-group", ".", "x", "/a"], "add_group", "error"),
        (["remove-group", "payroll"], "remove_group", "error"),
    ],
)
def test_a_refusal_is_told_in_the_daemons_words(
    mnt: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], file: str, error: str
) -> None:
    monkeypatch.chdir(mnt)
    always_fails(mnt / "control" / file)
    put(mnt / "control" / error, "nightly is synchronized:\nfracture it first\n")
    assert refusal(run(*arguments)) == "nightly is synchronized: fracture it first"


@pytest.mark.parametrize("error_file", ["\n", None])
def test_a_refusal_without_words_is_told_in_the_systems(mnt: Path, error_file: str | None) -> None:
    always_fails(mnt / "control/payroll/nightly/sync")
    (mnt / "control/payroll/nightly/error").unlink()
    if error_file is not None:
        put(mnt / "control/payroll/nightly/error", error_file)
    sentence = refusal(run("sync", mnt / NIGHTLY))
    assert sentence == f"{mnt}/control/payroll/nightly/sync: No space left on device"


def test_a_control_file_that_may_not_be_opened_is_named(mnt: Path) -> None:
    (mnt / "control/add_group").unlink()
    (mnt / "control/add_group").mkdir()  # to open a directory for writing fails for root too
    assert refusal(run("add-group", mnt, "x", "/a")) == f"{mnt}/control/add_group: Is a directory"


@pytest.mark.parametrize(("name", "backing"), [("a\nb", "/a"), ("a", "/a\nb")])
def test_a_newline_is_refused_before_anything_is_written(
    mnt: Path, writes: Writes, name: str, backing: str
) -> None:
    sentence = refusal(run("add-group", mnt, name, backing))
    assert "has a newline in it" in sentence
    assert writes == []


def test_a_part_of_a_command_is_no_command(mnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1]))
    sentence = refusal(run("restore", mnt / NIGHTLY))
    assert sentence.endswith("protected_restore took only a part of the command")


def test_fracture_at_one_instant_takes_clones_of_one_mount(mnt: Path, tmp_path: Path) -> None:
    other = make_mount(tmp_path / "other")
    sentence = refusal(run("fracture", mnt / NIGHTLY, other / NIGHTLY))
    assert sentence.startswith(f"{mnt}/{NIGHTLY} and {other}/{NIGHTLY} are in different mounts")
    for root in (mnt, other):
        assert (root / "control/fracture").read_text() == ""
        assert (root / "control/payroll/nightly/fracture").read_text() == ""


def test_force_takes_one_clone(mnt: Path, writes: Writes) -> None:
    result = run("fracture", "--force", mnt / NIGHTLY, mnt / "ledger/nightly")
    assert result.exit_code == 2
    assert writes == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["restore"],
        ["restore", ""],
        ["fracture"],
        ["add-group", "/", "x", ""],
        ["thaw"],
        ["status", "-x"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_dead_mount_is_named_with_what_to_do(mnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_below(mnt, errno.ENOTCONN, monkeypatch)
    sentence = refusal(run("restore", mnt / NIGHTLY))
    assert sentence == f"the daemon of the mount at {mnt} has died: mount it again, and it recovers"


def test_a_mount_that_others_may_not_see_is_named(
    mnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_below(mnt, errno.EACCES, monkeypatch)
    sentence = refusal(run("restore", mnt / NIGHTLY))
    assert sentence == f"{mnt}/{NIGHTLY}: no permission to look into {mnt}"


def _fail_below(root: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Path.stat

    def failing(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path.is_relative_to(root):
            raise OSError(code, os.strerror(code), str(path))
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", failing)


def test_a_daemon_that_dies_during_the_command_is_no_refusal(
    mnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(descriptor: int, data: bytes) -> NoReturn:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    put(mnt / "control/payroll/nightly/error", "an old story\n")
    monkeypatch.setattr(os, "write", dying)
    assert "has died" in refusal(run("restore", mnt / NIGHTLY))


def test_ctrl_c_is_status_130_and_says_nothing(mnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(tree, "clone_at", interrupted)
    result = run("restore", mnt / NIGHTLY)
    assert (result.exit_code, result.output) == (130, "")


def test_version() -> None:
    assert run("--version").output == f"clonefs {clonefs.__version__}\n"


def test_every_command_is_listed_and_has_a_help_text() -> None:
    listing = run("--help").output
    assert len(main.commands) == 20
    for name, command in main.commands.items():
        start = re.escape((command.short_help or "-")[:40])
        assert re.search(rf"^  {name} +{start}", listing, re.MULTILINE), name
        result = run(name, "--help")
        assert (result.exit_code, result.output.count(".") > 0) == (0, True), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "clonefs: Missing command: see clonefs --help"),
        (["--what"], "clonefs: No such option"),
        (["what"], "clonefs: No such command 'what'"),
        (["restore"], "clonefs restore: Missing argument 'MOUNTPOINT/GROUP/CLONE': see"),
        (
            ["restore", ""],
            "clonefs restore: Invalid value for 'MOUNTPOINT/GROUP/CLONE': the path is",
        ),
        (["wait", "--timeout", "x", "y"], "clonefs wait: Invalid value for '--timeout'"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(said)
    assert result.stderr.endswith("--help\n")
    assert result.stderr.count("\n") == 1
