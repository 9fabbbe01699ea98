"""`map`: cells of any scale tell the truth about the extents in them."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bitarray import bitarray

from clonefs.cli import picture, svg
from clonefs.cli.picture import ASCII, UNICODE, Cells, Glyphs, Picture
from tests.test_cli_support import make_mount, put, refusal, run

KiB = 1 << 10


def lu(root: Path, *, extents: int = 100, last: int = 64 * KiB, **maps: str) -> Path:
    """A tree whose group payroll has so many extents of 64K, and these maps of nightly's; the file of
    its clone nightly."""
    make_mount(root)
    control = root / "control/payroll"
    put(control / "size", f"{(extents - 1) * 64 * KiB + last}\n")
    put(control / "extent_size", f"{64 * KiB}\n")
    put(control / "protected_restore_map", maps.get("protected", "") + "\n")
    put(control / "weekly/delta_map", "\n")
    put(control / "nightly/delta_map", maps.get("delta", "") + "\n")
    put(control / "nightly/state", maps.get("state", "fractured") + "\n")
    return root / "payroll/nightly"


def drawn(*words: str | Path) -> list[str]:
    result = run("map", "--ascii", *words)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def rows(lines: list[str]) -> str:
    """The cells alone: between the two head lines and the legend."""
    return "".join(line.split()[1] for line in lines[2:-1])


def test_each_extent_has_a_cell_if_there_is_room(tmp_path: Path) -> None:
    nightly = lu(tmp_path, extents=10, delta="0,4-7")
    assert drawn(nightly) == [
        "payroll/nightly fractured: a cell is one extent (64K)",
        "5 different (50.0%, 320K), of 10 extents",
        "0 #...####..",
        ". equal   # different",
    ]


def test_a_restore_shows_what_is_pending_and_what_is_protected(tmp_path: Path) -> None:
    nightly = lu(tmp_path, extents=10, delta="0-6", protected="5-8", state="restoring")
    lines = drawn(nightly)
    assert lines[1] == "5 pending (50.0%, 320K), 4 protected (40.0%, 256K), of 10 extents"
    assert lines[2] == "0 #####PPPP."
    assert lines[3] == ". equal   # pending   P protected"


def test_what_is_protected_counts_only_for_the_clone_that_is_restored_from(tmp_path: Path) -> None:
    nightly = lu(tmp_path, extents=4, delta="1-2", protected="2", state="fractured")
    assert drawn(nightly)[2] == "0 .##."


def test_a_line_says_where_it_begins(tmp_path: Path) -> None:
    nightly = lu(tmp_path, extents=40, delta="16")
    lines = drawn("--width", "24", nightly)
    assert [line.split() for line in lines[2:5]] == [
        ["0", "................"],
        ["1M", "#..............."],
        ["2M", "........"],
    ]
    assert lines[2].index(".") == lines[3].index("#")


def test_a_single_extent_is_drawn(tmp_path: Path) -> None:
    assert drawn(lu(tmp_path, extents=1, last=512, delta="0"))[2] == "0 #"


def test_one_extent_in_millions_is_seen(tmp_path: Path) -> None:
    nightly = lu(tmp_path, extents=5_000_000, delta="4999999")
    lines = drawn(nightly)
    assert lines[1] == "1 different (less than 0.1%, 64.0K), of 5000000 extents"
    cells = rows(lines)
    assert cells[-1] == "-"
    assert set(cells[:-1]) == {"."}


def test_all_but_one_is_not_all(tmp_path: Path) -> None:
    assert "99.9%" in drawn(lu(tmp_path, extents=100_000, delta="0-99998"))[1]


@pytest.mark.parametrize(("extents", "width", "height"), [(1, 8, 1), (7, 8, 1), (100, 9, 3)])
@pytest.mark.parametrize("factor", [1, 1000, 262_144])
def test_a_picture_is_never_larger_than_its_room(
    extents: int, width: int, height: int, factor: int
) -> None:
    extents *= factor
    cells = picture.divide(extents, 64 * KiB, width, height)
    assert cells.per_cell.bit_count() == 1
    lines = -(-extents // (cells.per_cell * cells.columns))
    assert lines <= height
    assert picture.label_width(extents, 64 * KiB, cells) + 1 + cells.columns <= max(width, 8)


@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
def test_glyphs_tell_all_kinds_of_cell_apart(glyphs: Glyphs) -> None:
    assert len(set("".join(glyphs))) == len("".join(glyphs)) == 8


@pytest.mark.parametrize(
    ("marked", "protected", "shown"),
    [
        (0, 0, "."),
        (1, 0, "-"),
        (16, 0, "-"),
        (17, 0, "+"),
        (32, 0, "+"),
        (33, 0, "*"),
        (48, 0, "*"),
        (49, 0, "#"),
        (64, 0, "#"),
        (0, 1, "p"),
        (0, 64, "P"),
        (1, 63, "%"),
    ],
)
def test_what_stands_for_a_cell(marked: int, protected: int, shown: str) -> None:
    one = Picture("n", "s", "w", 64, 4096, Cells(64, 1), (marked,), (protected,))
    assert picture.glyph(one, 0, ASCII) == shown


def test_a_short_last_cell_is_full_when_all_of_it_is() -> None:
    one = Picture("n", "s", "w", 65, 4096, Cells(64, 2), (0, 1), (0, 0))
    assert picture.glyph(one, 1, ASCII) == "#"
    assert picture.glyph(replace(one, marked=(0, 0), protected=(0, 1)), 1, ASCII) == "P"


def test_counts_are_those_of_the_list() -> None:
    random_bits = bitarray([random.Random(1).random() < 0.3 for _ in range(1000)])
    text = ",".join(str(at) for at, bit in enumerate(random_bits) if bit)
    assert picture.parse_extents(text, 1000) == random_bits
    counts = picture.count(random_bits, 64)
    assert [*counts] == [sum(random_bits[at : at + 64]) for at in range(0, 1000, 64)]


@pytest.mark.parametrize("path", ["payroll", "payroll/source"])
def test_a_group_shows_all_its_clones(tmp_path: Path, path: str) -> None:
    lu(tmp_path, extents=4)
    put(tmp_path / "control/payroll/weekly/state", "synchronizing\n")
    lines = drawn(tmp_path / path)
    assert [line.split(":")[0] for line in lines if ": a cell" in line] == [
        "payroll/nightly fractured",
        "payroll/weekly synchronizing",
    ]
    assert "0 pending" in lines[6]


def test_a_group_without_clones_has_nothing_to_draw(tmp_path: Path) -> None:
    lu(tmp_path)
    report: dict[str, object] = {"volume": {}, "groups": {"payroll": {"clones": {}}}}
    put(tmp_path / "control/status.json", json.dumps(report))
    sentence = f"{tmp_path}/payroll has no clones: add one with clonefs add-clone"
    assert refusal(run("map", tmp_path / "payroll")) == sentence


def test_what_is_not_there_has_no_map(tmp_path: Path) -> None:
    lu(tmp_path)
    assert "no clone gone" in refusal(run("map", tmp_path / "payroll/gone"))


def test_json_has_the_counts_of_each_cell(tmp_path: Path) -> None:
    nightly = lu(tmp_path, extents=100, delta="0-9,99", protected="9", state="restoring")
    found = json.loads(run("map", "--json", "--lines", "1", "--width", "30", nightly).stdout)
    assert found["payroll/nightly"] == {
        "state": "restoring",
        "extents": 100,
        "extent_size": 65536,
        "marked_means": "pending",
        "marked_extents": 10,
        "protected_extents": 1,
        "extents_per_cell": 8,
        "marked": [8, 1, *[0] * 10, 1],
        "protected": [0, 1, *[0] * 11],
    }


def test_svg_is_a_picture_with_the_same_words(tmp_path: Path) -> None:
    lu(tmp_path / "mnt", extents=100_000, delta="0-5000", protected="70000", state="restoring")
    file = tmp_path / "report.svg"
    assert run("map", "--svg", file, tmp_path / "mnt/payroll").output == ""
    document = ElementTree.parse(file).getroot()
    texts = [element.text or "" for element in document.iter("{http://www.w3.org/2000/svg}text")]
    assert "payroll/nightly, restoring: 5001 of 100000 extents pending, 1 protected" in texts
    assert any(text.startswith("payroll/weekly") for text in texts)
    fills = {rect.get("fill") for rect in document.iter("{http://www.w3.org/2000/svg}rect")}
    assert {svg._FILLS["█"], svg._FILLS["p"], svg._FILLS["·"]} <= fills
    width = float(document.get("width") or 0)
    for rect in document.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width", 0)) <= width


def test_an_svg_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    nightly = lu(tmp_path / "mnt")
    file = tmp_path / "no/such/report.svg"
    assert refusal(run("map", "--svg", file, nightly)) == f"{file}: No such file or directory"


@pytest.mark.parametrize(("option", "coloured"), [("always", True), ("auto", False)])
def test_colours_change_nothing_but_the_colours(
    tmp_path: Path, option: str, coloured: bool
) -> None:
    nightly = lu(tmp_path, extents=10, delta="0-6", protected="5-8", state="restoring")
    plain = run("map", nightly)
    result = run("map", "--color", option, nightly)
    assert ("\x1b[33m█████\x1b[0m\x1b[36mPPPP\x1b[0m" in result.stdout) is coloured
    unstyled = subprocess.run(
        ["sed", r"s/\x1b\[[0-9;]*m//g"],
        input=result.stdout,
        text=True,
        capture_output=True,
        check=True,
    )
    assert unstyled.stdout == plain.stdout


def test_a_terminal_without_unicode_gets_ascii(tmp_path: Path) -> None:
    nightly = lu(tmp_path, extents=2, delta="1")
    command = [sys.executable, "-m", "clonefs", "map", str(nightly)]
    done = subprocess.run(
        command, capture_output=True, check=True, env={"PYTHONIOENCODING": "latin-1"}
    )
    assert b"\n0 .#\n" in done.stdout
