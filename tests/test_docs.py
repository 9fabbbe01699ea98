"""The pages under docs/ say what the code does: names, tables and examples are compared with it."""

import ast
import json
import re
import struct
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from clonefs.cli import main
from clonefs.cli.guard import Result
from clonefs.engines.durability import CHECKPOINT, RUN_AHEAD
from clonefs.engines.recovery import Recovery
from clonefs.engines.statistics import (
    CloneStatistics,
    GroupStatistics,
    HostIo,
    RestoreStatistics,
)
from clonefs.fuse import options, render
from clonefs.fuse.control import CLONE, GROUP, TABLES, TOP, ControlFile
from clonefs.group.transitions import TABLE, Command
from clonefs.volume import (
    CloneRecord,
    CloneState,
    GroupRecord,
    MetadataVolume,
    Record,
    durable,
    layout,
    open_volume,
)
from clonefs.volume.record import decode_record
from tests import state_tables

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

Rows = list[list[str]]


def page(name: str) -> str:
    return (DOCS / name).read_text()


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one."""
    lines = text.splitlines()
    begin = lines.index(heading) + 1
    end = next((n for n in range(begin, len(lines)) if re.match("#+ ", lines[n])), len(lines))
    return "\n".join(lines[begin:end])


def tables(text: str) -> list[Rows]:
    """The cells of each table, its head first."""
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    return [
        [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines() if "|---" not in line]
        for block in blocks
    ]


def cells(rows: Rows) -> Rows:
    return [[cell.strip() for cell in row] for row in rows]


def bare(cell: str) -> str:
    """The cell without the marks of code."""
    return cell.strip().strip("`")


def first_block(text: str, heading: str, language: str) -> str:
    """The first fenced block below a heading."""
    after = text[text.index(f"\n{heading}\n") :]
    found = re.search(rf"^```{language}\n(.*?)^```$", after, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


# control-files.md


@pytest.mark.parametrize(
    ("heading", "files"),
    [("### control/", TOP), ("### control/GROUP/", GROUP), ("### control/GROUP/CLONE/", CLONE)],
)
def test_every_control_file_is_documented(heading: str, files: dict[str, ControlFile]) -> None:
    table = tables(section(page("control-files.md"), heading))[0]
    documented = {bare(row[0]): bare(row[1]) for row in table[1:]}
    modes = {
        name: ("r" if file.readable else "") + ("w" if file.write else "")
        for name, file in files.items()
    }
    assert documented == modes
    assert TABLES == (TOP, GROUP, CLONE)


def states_by_command() -> dict[Command, dict[CloneState, CloneState]]:
    """TABLE as the page has it; a removed clone has no state, so its own stands for it."""
    head, *rows = cells(tables(section(page("control-files.md"), "## States"))[1])
    found: dict[Command, dict[CloneState, CloneState]] = {}
    for column, name in enumerate(head[1:], 1):
        transitions = found[Command(bare(name))] = {}
        for row in rows:
            if row[column] == "gone":
                assert Command(bare(name)) is Command.REMOVE
                transitions[CloneState(row[0])] = CloneState(row[0])
            elif row[column] != "EBUSY":
                assert Command(bare(name)) is not Command.REMOVE
                transitions[CloneState(row[0])] = CloneState(row[column])
    return found


def test_the_table_of_states_and_commands_is_that_of_the_code() -> None:
    assert states_by_command() == TABLE


def test_the_table_and_the_diagram_of_states_are_made_from_the_code() -> None:
    text = page("control-files.md")
    assert state_tables.renewed(text) == text, "run python -m tests.state_tables"


def test_every_state_is_explained() -> None:
    table = cells(tables(section(page("control-files.md"), "## States"))[0])
    explained = {row[0]: row[2] for row in table[1:]}
    assert explained.keys() == set(CloneState)
    writable = [state for state, file in explained.items() if file == "read and write"]
    assert writable == [CloneState.FRACTURED]


def names_of(value: object) -> Iterator[str]:
    """The keys of an object and of the objects in it, but not the names of groups and clones."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("payroll", "nightly"):
                yield key
            yield from names_of(inner)


def shape(value: object) -> object:
    """Which fields there are, and what is in them is left out."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return None


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def test_status_json_is_what_the_example_shows_and_every_field_is_explained(
    example_volume: MetadataVolume,
) -> None:
    text = page("control-files.md")
    example = json.loads(first_block(text, "## status.json", "json"))
    group = example["groups"]["payroll"]
    clone = group["clones"]["nightly"]
    statistics = GroupStatistics(
        name="payroll",
        full_copies=group["copy"] == "full",
        restore=RestoreStatistics(**group["restore"]),
        clones=(
            CloneStatistics(
                name="nightly",
                done=clone["progress"]["done"],
                total=clone["progress"]["total"],
                fractured_at=0.0,
                host_io=HostIo(**clone["host_io"]),
                **without(clone, "progress", "fractured_at", "host_io"),
            ),
        ),
        host_io=HostIo(**group["host_io"]),
        **without(group, "restore", "clones", "copy", "host_io"),
    )
    recovery = Recovery(at=0.0, found="", damage=(), done=())
    shown = json.loads(render.status_json(example_volume, [statistics], recovery))
    assert shape(shown) == shape(example)

    explained = tables(section(text, "## status.json"))[0]
    names = {name for row in explained for name in re.findall(r"`(\w+)`", " ".join(row))}
    assert set(names_of(example)) <= names


def test_every_mount_option_is_documented() -> None:
    text = section(page("control-files.md"), "## Mount options")
    documented = {
        name for row in tables(text)[0][1:] for name in re.findall(r"`([a-z_]+=?)`", row[0])
    }
    with pytest.raises(Exception, match="there are") as refusal:
        options.parse_options("no such option", uid=0, gid=0)
    known = str(refusal.value).partition("there are ")[2].split(", ")
    assert documented == set(known)
    for name in re.findall(r"`([a-z_]+)`", text.split("\n\n")[-1]):
        options.parse_options(name, uid=0, gid=0)


# commands.md


def test_every_command_has_its_row() -> None:
    rows = cells(tables(section(page("commands.md"), "# Commands"))[0])[1:]
    usages = {bare(row[0]).split()[1]: bare(row[0]) for row in rows}
    assert usages.keys() == main.commands.keys()
    for name, usage in usages.items():
        words = [word.strip("[].") for word in usage.split()[2:]]
        taken = [each for each in main.commands[name].params if isinstance(each, click.Argument)]
        assert len(words) == len(taken), usage


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_commands_within_sentences_are_commands(path: Path) -> None:
    for command in re.findall(r"`(clonefs [^`]+)`", path.read_text()):
        name, *words = command.split()[1:]
        if name.startswith("-") or name.isupper():
            continue  # of clonefs itself, or any of them
        assert name in main.commands, command
        known = {each for parameter in main.commands[name].params for each in parameter.opts}
        given = {word.strip("[],.").partition("=")[0] for word in words if re.match(r"\[?-", word)}
        assert given <= known | {"--help"}, command


# errors.md


def texts_of_the_code() -> list[str]:
    """Each text of the code; a null character stands for each value that it is filled with."""
    found = []
    for file in (ROOT / "clonefs").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    each.value if isinstance(each, ast.Constant) else "\0" for each in node.values
                )
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_what_is_said_is_what_the_code_says() -> None:
    sentences = "\n".join(text.replace("\n", " ") for text in texts_of_the_code())
    rows = [row for table in tables(page("errors.md")) for row in cells(table)[1:]]
    assert len(rows) > 20
    for said, _ in rows:
        pieces = (re.escape(piece) for piece in bare(said).split("..."))
        assert re.search(".*".join(pieces), sentences), said


def test_every_result_of_a_frozen_fracture_is_documented() -> None:
    text = page("commands.md")
    table = next(rows for rows in tables(text) if bare(rows[0][0]) == "CLONEFS_RESULT")
    assert [bare(row[0]) for row in table[1:]] == list(Result)


# data-format.md


def example_bytes() -> bytearray:
    """The volume of the example, as far as the page shows it."""
    dump = first_block(page("data-format.md"), "## An example", "sample")
    volume = bytearray(1 << 20)
    for line in dump.splitlines():
        found = re.match(r"([0-9a-f]{8})  ((?:[0-9a-f]{2} +){16})", line)
        if found is not None:
            offset = int(found[1], 16)
            volume[offset : offset + 16] = bytes.fromhex(found[2])
    return volume


@pytest.fixture
def example_volume(tmp_path: Path) -> Iterator[MetadataVolume]:
    """The volume of the example, open."""
    path = tmp_path / "meta"
    path.write_bytes(example_bytes())
    volume = open_volume(path)
    try:
        yield volume
    finally:
        volume.close(clean=False)


def test_the_example_is_a_volume() -> None:
    volume = example_bytes()
    superblock = layout.Superblock.unpack(bytes(volume[: layout.PAGE]))
    assert (superblock.size, superblock.record_size) == (len(volume), 0x10000)
    at = superblock.record_slot(6)
    slot = bytes(volume[at : at + superblock.record_size])
    generation, payload = layout.unpack_record(superblock, slot)
    assert (at, generation, len(payload)) == (0x1000, 6, 0x20A)
    record = decode_record(payload)
    group = record.groups[0]
    clone = group.clone("nightly")
    assert not record.clean
    assert clone.state is CloneState.FRACTURED
    assert (group.protected.offset, group.durable.offset, clone.delta.offset) == (
        135168,
        139264,
        151552,
    )
    assert volume[clone.delta.offset] == 0x70
    start, *copies = durable.starts_of_maps(group.durable)
    place = durable.Place(durable.PERSISTENT_DELTA_MAP, superblock.uuid, copy=0, sector=0)
    sector = durable.unpack_sector(place, bytes(volume[start : start + layout.DURABLE_SECTOR]))
    assert (sector.generation, sector.epoch, sector.payload[0]) == (4, 0, 0x70)
    assert not any(any(volume[at : at + layout.PAGE]) for at in copies)


def test_the_numbers_of_the_durable_maps_are_those_of_the_code() -> None:
    text = section(page("crash-safety.md"), "## Rules")
    assert f"{RUN_AHEAD} extents, aligned" in text
    assert f"every {CHECKPOINT:.0f} s" in text
    assert f"{layout.EXTENTS_PER_DURABLE_SECTOR} extents each" in section(
        page("data-format.md"), "## Durable maps"
    )


def test_the_fields_of_the_record_are_documented() -> None:
    table = cells(tables(section(page("data-format.md"), "## Record slots"))[1])
    documented: dict[str, list[str]] = {}
    last = ""
    for row in table[1:]:
        last = row[0] or last
        documented.setdefault(last, []).append(bare(row[1]))
    assert documented == {
        name: [field.name for field in msgspec.structs.fields(kind)]
        for name, kind in (("record", Record), ("group", GroupRecord), ("clone", CloneRecord))
    }


@pytest.mark.parametrize(
    ("heading", "number", "form"),
    [
        ("## Superblock", 0, "<8sI16sQQI"),
        ("## Record slots", 0, "<8sQII"),
        ("## Durable maps", 0, "<IBBHQII8s"),
    ],
)
def test_the_fields_of_the_headers_are_documented(heading: str, number: int, form: str) -> None:
    table = cells(tables(section(page("data-format.md"), heading))[number])
    fields = [(int(row[0]), int(row[1])) for row in table[1:] if row[1]]
    sizes = [struct.calcsize(f"<{each}") for each in re.findall(r"[0-9]*[a-zA-Z]", form.strip("<"))]
    assert fields == [(sum(sizes[:n]), size) for n, size in enumerate(sizes)]
    headers = (layout._SUPERBLOCK, layout._RECORD_HEADER, durable._HEADER)
    assert form in [header.format for header in headers]


def pages_of(extents: int, clones: int) -> int:
    """The formula of the page."""
    return (clones + 1) * -(-extents // 32768) + 3 * -(-extents // 30720)


def test_the_limits_are_those_of_the_layout() -> None:
    superblock = layout.plan(64 << 20, bytes(16))
    room = (superblock.size - superblock.first_map_byte) // layout.PAGE
    assert room == 15359
    for number in (1, 3840, 30720, 30721, 32768, 32769, 10**7):
        length = 3 * layout.live_map_length(number) + layout.durable_maps_length(number)
        assert pages_of(number, clones=2) * layout.PAGE == length
    table = cells(tables(section(page("data-format.md"), "## Limits"))[0])
    for clones, extents, at_64k, at_4m in table[1:]:
        assert pages_of(int(extents), int(clones)) <= room
        assert pages_of(int(extents) + 1, int(clones)) > room
        for extent_size, words in ((64 << 10, at_64k), (4 << 20, at_4m)):
            stated = float(words.removesuffix(" TiB"))
            assert stated <= int(extents) * extent_size / 2**40 < stated * 1.03


# All pages


def links(text: str) -> list[str]:
    """The files that a page points to."""
    return re.findall(r"\]\(([^)#]+)[^)]*\)", text)


def anchors(text: str) -> set[str]:
    """The names that its headings have as targets of links."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_links_and_names_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for link in links(text):
        assert (path.parent / link).exists(), link
    for link, anchor in re.findall(r"\]\(([^)#]*)#([^)]*)\)", text):
        target = path.parent / link if link else path
        assert anchor in anchors(target.read_text()), f"{link}#{anchor}"
    for name in re.findall(r"`((?:clonefs|tests|mount-helpers)/[\w./-]*)(?:::[\w.]+)?`", text):
        assert (ROOT / name).exists(), name
    for name, what in re.findall(r"`([\w./-]+\.py)::([\w.]+)`", text):
        source = (ROOT / name).read_text()
        for part in what.split("."):
            assert re.search(rf"^\s*(?:async )?(?:def|class) {part}\b", source, re.MULTILINE), what


def test_every_page_is_in_the_index() -> None:
    listed = {(DOCS / link).resolve() for link in links(page("README.md"))}
    decisions = DOCS / "decisions"
    assert decisions in listed
    missing = {each for each in PAGES if each.parent != decisions} - listed
    assert missing == {DOCS / "README.md"}


def test_every_layer_and_every_test_has_its_place() -> None:
    architecture, testing = page("architecture.md"), page("testing.md")
    for package in sorted((ROOT / "clonefs").iterdir()):
        if (package / "__init__.py").exists():
            assert f"`clonefs/{package.name}`" in architecture, package.name
    for test in sorted((ROOT / "tests").glob("test_*.py")):
        assert f"`tests/{test.name}`" in testing, test.name


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = section(page("architecture.md"), "## Dependencies, each with its reason")
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        name = re.split(r"[<>=!~ ]", requirement)[0]
        assert re.search(rf"\b{name}\b", text), name
