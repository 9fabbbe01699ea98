"""clonefs grow: a volume gets room, and nothing else of it changes, wherever it is stopped."""

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from clonefs.cli import main
from clonefs.errors import ClonefsError
from clonefs.volume import format_volume, grow_volume, layout, open_volume
from clonefs.volume.check import Fault, examine
from clonefs.volume.dump import describe
from clonefs.volume.volume import open_medium
from tests.mounts.mount import MiB, attach
from tests.test_volume import EXTENTS, a_group

# The child dies before the n-th call that changes something, or lives.
DIES = """
import os, signal, sys
from pathlib import Path
from clonefs.volume import grow_volume
left = int(sys.argv[2])
def deadly(function):
    def called(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return called
for name in ("posix_fallocate", "fsync", "ftruncate", "pwritev"):
    setattr(os, name, deadly(getattr(os, name)))
grow_volume(Path(sys.argv[1]), size=4 << 20)
"""


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """A volume with a group, whose live and durable maps have bits, as a daemon leaves it that dies."""
    path = tmp_path / "meta"
    format_volume(path, size=MiB, force=False)
    volume = open_volume(path)
    group = a_group(volume)
    volume.commit(volume.opened().with_group(group))
    volume.map(group.clones[0].delta, EXTENTS).mark(7, 9000)
    delta, _ = volume.durable_maps(group, EXTENTS)
    delta.mark(0, 10_000)
    for offset, data in delta.begin_write().writes:
        volume.write_durably(offset, data)
    volume.close(clean=False)
    return path


def told(meta: Path) -> dict[str, object]:
    """All that a dump says, but for the size."""
    medium = open_medium(meta, read_only=True)
    try:
        described = describe(medium, "a boot")
    finally:
        medium.close()
    for size in ("size", "formatted_size", "used", "free"):
        described["volume"].pop(size, None)
    return described


def size_of(meta: Path) -> int:
    volume = open_volume(meta)
    try:
        return volume.superblock.size
    finally:
        volume.close(clean=False)


def grow(*arguments: str | Path) -> str:
    """The one line that the command says; empty if it succeeds."""
    result = CliRunner().invoke(main, ["grow", *map(str, arguments)])
    assert result.exit_code == (1 if result.output else 0), result
    return result.output


def test_only_the_size_changes(meta: Path) -> None:
    before, content = told(meta), meta.read_bytes()
    assert grow(meta, "--size", "4M") == ""
    assert told(meta) == before
    assert size_of(meta) == meta.stat().st_size == 4 * MiB
    assert meta.stat().st_blocks * 512 >= 4 * MiB, "it must be allocated in full"
    assert meta.read_bytes()[layout.PAGE : MiB] == content[layout.PAGE :]
    assert meta.read_bytes()[layout.DURABLE_SECTOR : MiB] == content[layout.DURABLE_SECTOR :]


def test_there_is_room_for_more(meta: Path) -> None:
    large = 512 * 1024 * 8  # a map of half of the volume
    volume = open_volume(meta)
    first = volume.new_map_slot(large)
    with pytest.raises(ClonefsError, match="clonefs grow"):
        volume.new_map_slot(large, beside=(first,))
    volume.close(clean=False)
    grow_volume(meta, size=4 * MiB)
    volume = open_volume(meta)
    second = volume.new_map_slot(large, beside=(first,))
    assert second.offset + second.length > MiB
    volume.close(clean=False)


def test_killed_anywhere_it_is_whole_and_can_be_grown_again(meta: Path) -> None:
    before, sizes = told(meta), []
    for number in range(1, 20):
        child = subprocess.run([sys.executable, "-c", DIES, meta, str(number)], check=False)
        assert told(meta) == before
        sizes.append(size_of(meta))
        medium = open_medium(meta, read_only=True)
        assert examine(medium, "a boot") == ()
        medium.close()
        if child.returncode == 0:
            break
    # Before it is made longer, before that is on disk, before the superblock, and not at all.
    assert sizes == [MiB, MiB, MiB, 4 * MiB]


def test_it_is_long_on_disk_before_the_superblock_says_so(
    meta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def note(name: str) -> None:
        function = getattr(os, name)

        def noted(*arguments: object) -> object:
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(os, name, noted)

    for name in ("posix_fallocate", "fsync", "pwritev"):
        note(name)
    grow_volume(meta, size=4 * MiB)
    assert calls == ["posix_fallocate", "fsync", "pwritev"]


def test_a_full_disk_leaves_it_as_it_was(meta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = meta.read_bytes()

    def part_of_it(fd: int, _offset: int, length: int) -> None:
        os.ftruncate(fd, length - 1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", part_of_it)
    assert "no room for" in grow(meta, "--size", "4M")
    assert meta.read_bytes() == content


def test_what_it_refuses_leaves_it_as_it_was(meta: Path, tmp_path: Path) -> None:
    content = meta.read_bytes()
    assert "cannot be made smaller" in grow(meta, "--size", "512K")
    assert "say with --size" in grow(meta)
    assert "does not exist" in grow(tmp_path / "nothing", "--size", "4M")
    volume = open_volume(meta)
    assert "in use" in grow(meta, "--size", "4M")
    volume.close(clean=False)
    assert grow(meta, "--size", "1M") == ""
    assert meta.read_bytes() == content
    garbage = tmp_path / "garbage"
    garbage.write_bytes(bytes(2 * MiB))
    assert "not a clonefs metadata volume" in grow(garbage, "--size", "4M")
    assert garbage.read_bytes() == bytes(2 * MiB)


def test_a_file_that_is_longer_already_is_taken_whole(meta: Path) -> None:
    os.truncate(meta, 3 * MiB + 5)
    assert grow(meta) == ""
    assert size_of(meta) == 3 * MiB


@pytest.fixture
def device(meta: Path) -> Iterator[Path]:
    """The volume on a block device."""
    with contextlib.ExitStack() as cleanup:
        yield attach(cleanup, meta).path


def test_a_device_that_has_become_larger(meta: Path, device: Path) -> None:
    before = told(device)
    assert "make the device larger first" in grow(device)
    assert "less than 4M: make the device larger first" in grow(device, "--size", "4M")
    os.truncate(meta, 4 * MiB)
    subprocess.run(["losetup", "--set-capacity", device], check=True)
    assert grow(device, "--size", "2M") == ""
    assert size_of(device) == 2 * MiB
    assert grow(device) == ""
    assert size_of(device) == 4 * MiB
    assert {**told(device), "volume": None} == {**before, "volume": None}


def test_the_records_of_a_grown_volume_are_found_though_its_superblock_is_damaged(
    tmp_path: Path,
) -> None:
    meta = tmp_path / "meta"
    format_volume(meta, size=MiB, force=False)
    grow_volume(meta, size=8 * MiB)
    with meta.open("r+b") as file:
        file.seek(45)
        file.write(b"x")
    medium = open_medium(meta, read_only=True)
    slots = describe(medium, "a boot")["record_slots"]
    assert [finding.fault for finding in examine(medium, "a boot")] == [Fault.SUPERBLOCK]
    medium.close()
    assert [slot["generation"] for slot in slots] == [0, 1]
