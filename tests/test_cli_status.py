"""`status` shows the daemon's own words; without a path it asks the kernel for the mounts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clonefs.cli import kernel, table
from clonefs.cli.terminal import Screen
from tests.terminal import drawn_by
from tests.test_cli_support import GROUPS, make_mount, refusal, run


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    return make_mount(tmp_path / "mnt")


def test_a_mount_shows_the_table_exactly_as_it_is(mnt: Path) -> None:
    table = b"GROUP  \t CLONE\npayroll \xff no newline at the end"
    (mnt / "control/status").write_bytes(table)
    result = run("status", mnt)
    assert (result.exit_code, result.stdout_bytes) == (0, table)


@pytest.mark.parametrize("path", ["payroll", "payroll/", "payroll/nightly", "payroll/source"])
def test_a_group_and_its_lus_show_the_groups_part(mnt: Path, path: str) -> None:
    assert run("status", f"{mnt}/{path}").stdout == "payroll's part of the table\n"


def test_json_of_a_mount_is_the_file_itself(mnt: Path) -> None:
    result = run("status", "--json", mnt)
    assert result.stdout_bytes == (mnt / "control/status.json").read_bytes()


@pytest.mark.parametrize("path", ["payroll", "payroll/nightly"])
def test_json_of_a_group_is_that_groups_object(mnt: Path, path: str) -> None:
    text = run("status", "--json", mnt / path).stdout
    assert json.loads(text) == GROUPS["payroll"]
    assert text.splitlines()[1] == '  "state": "normal",'


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("gone", "there is no group gone in the mount at MNT: see clonefs status"),
        (
            "payroll/gone",
            "there is no clone gone in the group payroll: see clonefs status",
        ),
        (
            "gone/source",
            "there is no group gone in the mount at MNT: see clonefs status",
        ),
    ],
)
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_what_is_not_there_has_no_status(
    mnt: Path, path: str, sentence: str, option: list[str]
) -> None:
    result = run("status", *option, mnt / path)
    assert refusal(result) == sentence.replace("MNT", str(mnt))
    assert result.stdout == ""


def mount_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *lines: str) -> None:
    """Let the kernel's mount table have these lines."""
    table = tmp_path / "mountinfo"
    table.write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(kernel, "_MOUNTINFO", table)


def line(
    mountpoint: Path | str, *, device: str = "0:50", root: str = "/", kind: str = "clonefs"
) -> str:
    return f"60 27 {device} {root} {mountpoint} rw,nosuid shared:1 - fuse.{kind} /meta rw,user_id=0"


def test_without_a_path_one_mount_is_shown_as_it_is(
    mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount_table(monkeypatch, tmp_path, line("/elsewhere", kind="sshfs"), line(mnt))
    assert run("status").stdout == (mnt / "control/status").read_text()


def test_without_a_path_each_of_several_mounts_has_a_heading(
    mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_mount(tmp_path / "other")
    (other / "control/status").write_text("the other table\n")
    mount_table(monkeypatch, tmp_path, line(mnt), line(other, device="0:51"))
    table = (mnt / "control/status").read_text()
    assert run("status").stdout == f"{mnt}:\n{table}{other}:\nthe other table\n"


def test_a_mount_that_cannot_be_seen_does_not_hide_the_others(
    mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount_table(monkeypatch, tmp_path, line("/nowhere", device="0:51"), line(mnt))
    result = run("status")
    assert refusal(result) == "/nowhere is not inside a clonefs mount: see clonefs status"
    assert (mnt / "control/status").read_text() in result.stdout


def test_without_a_path_and_without_a_mount_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount_table(monkeypatch, tmp_path, line("/elsewhere", kind="sshfs"))
    assert refusal(run("status")) == "nothing is mounted: see clonefs mount --help"


def test_the_mount_table_is_read_as_the_kernel_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount_table(
        monkeypatch,
        tmp_path,
        "22 27 0:21 / /proc rw,relatime - proc proc rw",
        line(r"/mnt/my\040disks\134a\011b\012c"),
        line("/bound", root="/payroll", device="0:60"),
        line("/bound-whole"),
        "61 27 0:52 / /plain rw - fuse.clonefs x rw",
        "62 27 0:53 / /optional rw shared:7 master:2 - fuse.clonefs x rw",
    )
    assert kernel.clonefs_mountpoints() == [
        Path("/mnt/my disks\\a\tb\nc"),
        Path("/plain"),
        Path("/optional"),
    ]


def test_of_mounts_on_one_directory_the_last_is_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount_table(monkeypatch, tmp_path, line("/mnt"), line("/mnt", device="0:60", kind="sshfs"))
    top = kernel.topmost(Path("/mnt"))
    assert top is not None
    assert (top.device, top.fstype) == ("0:60", "fuse.sshfs")
    assert kernel.topmost(Path("/mnt/payroll")) is None


def test_status_starts_without_what_it_does_not_need(mnt: Path) -> None:
    script = (
        "import sys\n"
        "from clonefs.cli import main\n"
        f"main(['status', {str(mnt)!r}], standalone_mode=False)\n"
        "heavy = {'rich', 'trio', 'pyfuse3', 'bitarray', 'msgspec'} & sys.modules.keys()\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


# On a terminal

TABLE = """\
NAME             STATE                   CONDITION  PROGRESS  DELTA  SIZE  RATE  FRACTURED             BACKING
payroll/source   restoring from nightly  normal     -         -      1G    -     -                     /srv/pay roll.img
payroll/nightly  restoring               normal     9/1600    1591   -     2M    2026-11-23T02:04:48Z  /srv/nightly.img
payroll/weekly   out-of-sync             faulted    7/1600    1600   -     max   -                     /srv/\x1b[2Jx
payroll/weekly: the disk has failed
recovery: payroll/nightly: the restore goes on
"""  # noqa: E501


@pytest.fixture
def full(mnt: Path) -> Path:
    (mnt / "control/status").write_text(TABLE)
    return mnt


def test_a_wide_terminal_has_the_same_words(full: Path) -> None:
    shown = drawn_by("status", full, columns=130)
    assert shown.text == TABLE.replace("\x1b[2J", "?[2J")
    for coloured in (
        "\x1b[33mrestoring\x1b[0m",
        "\x1b[33mrestoring from nightly\x1b[0m",
        "\x1b[31m\x1b[1mout-of-sync\x1b[0m",
        "\x1b[31m\x1b[1mfaulted\x1b[0m",
        "\x1b[31m\x1b[1mpayroll/weekly: the disk has failed\x1b[0m",
    ):
        assert coloured in shown.drawn
    assert "\x1b[2J" not in shown.drawn


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--color", "never"], {}),
        ([], {"NO_COLOR": "1"}),
        ([], {"TERM": "dumb"}),
    ],
)
def test_a_terminal_without_colours_has_none(
    full: Path, words: list[str], environment: dict[str, str]
) -> None:
    shown = drawn_by("status", *words, full, columns=130, environment=environment)
    assert "\x1b" not in shown.drawn


def test_an_empty_no_color_says_nothing(full: Path) -> None:
    assert "\x1b[33m" in drawn_by("status", full, environment={"NO_COLOR": ""}).drawn


def test_a_pipe_has_colours_if_it_is_told_so_and_all_columns(full: Path) -> None:
    shown = run("status", "--color", "always", full)
    assert "\x1b[33mrestoring\x1b[0m" in shown.stdout
    assert "/srv/nightly.img" in shown.stdout
    assert "\x1b" not in run("status", "--color", "never", full).stdout.replace("\x1b[2J", "")


def test_json_on_a_terminal_is_the_file(full: Path) -> None:
    text = (full / "control/status.json").read_text()
    assert drawn_by("status", "--json", full, columns=20).text == text


@pytest.mark.parametrize(
    ("columns", "hidden"),
    [
        (120, 0),
        (119, 1),
        (101, 1),
        (100, 2),
        (79, 2),
        (78, 3),
        (72, 4),
        (66, 5),
        (59, 6),
        (48, 7),
        (39, 7),
        (30, 7),
    ],
)
def test_a_narrow_terminal_loses_whole_columns_and_says_which(
    full: Path, columns: int, hidden: int
) -> None:
    where = Screen(is_terminal=True, colour=False, columns=columns, lines=24, unicode=True)
    head, *rest = table.fitted(TABLE, where)
    lost = table.DROPPED[:hidden]
    left = [name for name in TABLE.splitlines()[0].split() if name not in lost]
    assert head.split() == left
    assert all(len(line) <= columns for line in (head, *rest[:3]))
    said = f"({columns} columns are too few for {', '.join(lost)})"
    assert rest[3:] == ([said] if lost else []) + TABLE.splitlines()[4:]


def test_a_very_narrow_terminal_cuts_names_short(full: Path) -> None:
    where = Screen(is_terminal=True, colour=False, columns=36, lines=24, unicode=True)
    rows = list(table.fitted(TABLE, where))
    assert rows[2] == "payroll/nig…  restoring"
    assert rows[1] == "payroll/sou…  restoring from nightly"


def test_a_table_without_groups_is_its_head(mnt: Path) -> None:
    (mnt / "control/status").write_text(TABLE.splitlines(keepends=True)[0])
    assert drawn_by("status", mnt, columns=130).text.split() == TABLE.splitlines()[0].split()
