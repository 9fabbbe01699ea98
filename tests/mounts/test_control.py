"""The control directory: what it shows, its grammar, and how it refuses.

Every refusal is looked at through `Mount.refuses`: the errno, a sentence in the right `error` file,
and nothing else changed.
"""

import errno
import os
import shlex
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts.mount import (
    EXTENT,
    Clone,
    Group,
    KiB,
    MiB,
    Mount,
    attach,
    is_free,
    mount_disk,
    mounted,
    opened,
    read,
    run,
    wait_for,
    write,
)

# What there is -----------------------------------------------------------------------------------

READ, WRITE, BOTH = 0o400, 0o200, 0o600

TOP = {"status": READ, "status.json": READ, "events": READ, "error": READ}
TOP |= {"add_group": WRITE, "remove_group": WRITE, "fracture": WRITE}
OF_GROUP = dict.fromkeys(("status", "size", "extent_size", "backing", "state", "error"), READ)
OF_GROUP |= dict.fromkeys(("protected_restore_map", "cod_scoreboard", "cod_queue"), READ)
OF_GROUP |= {"copy": BOTH, "add_clone": WRITE, "remove_clone": WRITE}
OF_CLONE = dict.fromkeys(("state", "condition", "error", "backing", "progress", "delta_map"), READ)
OF_CLONE |= {"rate": BOTH, "sync": WRITE, "fracture": WRITE, "protected_restore": WRITE}


def modes(directory: Path) -> dict[str, int]:
    """The permissions of the regular files in a directory."""
    return {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in directory.iterdir()
        if path.is_file()
    }


def test_the_tree_has_every_file_with_its_mode_and_each_read_ends_in_a_newline(
    shared: Mount,
) -> None:
    group = shared.add_group()
    clone = group.add_fractured("nightly")
    control = shared.mountpoint / "control"
    for directory, files in (
        (control, TOP),
        (control / group.name, OF_GROUP),
        (control / group.name / clone.name, OF_CLONE),
    ):
        found = modes(directory)
        assert found | files == found
        for name in (name for name, mode in files.items() if mode & READ):
            assert (directory / name).read_text().endswith("\n"), name
    assert stat.S_IMODE(control.stat().st_mode) == 0o500
    assert {"control", group.name} <= {path.name for path in shared.mountpoint.iterdir()}
    volume = shared.status()["volume"]
    space = os.statvfs(shared.mountpoint)
    assert space.f_blocks * space.f_frsize == volume["size"]
    assert space.f_bfree * space.f_frsize == volume["size"] - volume["used"]
    lus = {path.name for path in (shared.mountpoint / group.name).iterdir()}
    assert lus == {"source", "nightly"}


def test_the_values_of_a_group_and_a_clone(shared: Mount) -> None:
    group = shared.add_group(1 * MiB, extent=16 * KiB)
    clone = group.add_fractured("nightly")
    values = {name: group.control(name).read() for name in ("size", "extent_size", "backing")}
    assert values == {"size": "1048576", "extent_size": "16384", "backing": str(group.backing)}
    assert (group.control("state").read(), group.control("error").read()) == ("normal", "")
    assert group.control("copy").read() == "auto"
    assert group.control("protected_restore_map").read() == ""
    assert group.control("cod_scoreboard").read() == ""
    assert group.control("cod_queue").read() == ""
    shown = {name: clone.control(name).read() for name, mode in OF_CLONE.items() if mode & READ}
    assert shown == {
        "state": "fractured",
        "condition": "administratively-fractured",
        "error": "",
        "backing": str(clone.backing),
        "progress": "64/64",
        "delta_map": "",
        "rate": "max",
    }


def test_status_json_has_what_the_contract_says(shared: Mount) -> None:
    group = shared.add_group(1 * MiB)
    clone = group.add_fractured("nightly")
    volume = shared.status()["volume"]
    assert volume["path"] == str(shared.meta)
    assert volume["size"] == shared.meta.stat().st_size
    assert 0 < volume["used"] < volume["size"]
    assert len(volume["uuid"]) == 36
    status = group.status()
    clones = status.pop("clones")
    assert status == {
        "state": "normal",
        "size": 1 * MiB,
        "extent_size": 64 * KiB,
        "extents": 16,
        "backing": str(group.backing),
        "copy": "auto",
        "error": None,
        "restore": None,
    }
    fractured_at = clones["nightly"].pop("fractured_at")
    assert len(fractured_at) == len("2026-11-22T12:00:00Z")
    assert fractured_at.endswith("Z")
    assert clones == {
        "nightly": {
            "state": "fractured",
            "condition": "administratively-fractured",
            "backing": str(clone.backing),
            "delta_extents": 0,
            "progress": {"done": 16, "total": 16},
            "rate": "max",
            "written": False,
            "verify": None,
            "error": None,
        }
    }
    write(clone.path, 0, b"by a host")
    assert clone.status()["written"] is True
    assert clone.status()["delta_extents"] == 1


def test_the_tables_have_a_line_for_each_lu(shared: Mount) -> None:
    one, two = shared.add_group(1 * MiB), shared.add_group(1 * MiB)
    one.add_fractured("nightly")
    whole = shared.control("status").read().splitlines()
    part = one.control("status").read().splitlines()
    names = [line.split()[0] for line in whole]
    assert {f"{one.name}/source", f"{one.name}/nightly", f"{two.name}/source"} <= set(names)
    assert [line.split()[0] for line in part[1:]] == [f"{one.name}/source", f"{one.name}/nightly"]
    assert "fractured" in part[2]


def test_what_is_read_is_the_state_at_the_moment_of_open(shared: Mount) -> None:
    clone = shared.add_group(1 * MiB).add_clone()
    with opened(clone.control("state").path, os.O_RDONLY) as before:
        clone.fracture()
        with opened(clone.control("state").path, os.O_RDONLY) as after:
            assert os.pread(after, 100, 0) == b"fractured\n"
        assert os.pread(before, 100, 0) == b"synchronized\n"
        assert os.pread(before, 100, 6) == b"onized\n"


def test_events_has_a_line_for_each_change_of_state(shared: Mount) -> None:
    group = shared.add_group(1 * MiB)
    before = len(shared.control("events").read())
    clone = group.add_clone("nightly")
    clone.fracture()
    clone.fracture()
    lines = [
        line.partition(" ") for line in shared.control("events").read()[before:].split("\n") if line
    ]
    assert [event for _, _, event in lines] == [
        f"{group.name}/nightly added: synchronizing",
        f"{group.name}/nightly synchronizing -> synchronized",
        f"{group.name}/nightly synchronized -> fractured",
    ]
    assert {len(time) for time, _, _ in lines} == {len("2026-11-22T12:00:00Z")}


def test_tail_follows_the_events(shared: Mount) -> None:
    clone = shared.add_group(1 * MiB).add_clone()
    printed = shared.work / "tail"
    events = shared.mountpoint / "control" / "events"
    with printed.open("wb") as output:
        tail = subprocess.Popen(["tail", "-n", "+1", "-s", "0.05", "-f", events], stdout=output)
    try:
        wait_for(lambda: "synchronized" in printed.read_text(), "for what was there")
        clone.fracture()
        event = f"{clone.group.name}/nightly synchronized -> fractured\n"
        wait_for(lambda: printed.read_text().endswith(event), "for tail to show it")
    finally:
        tail.kill()
        tail.wait()


# The grammar -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [b"1", b"1\n", b" 1 \n", b"'1'\n"])
def test_a_command_needs_no_newline(shared: Mount, command: bytes) -> None:
    clone = shared.add_group(1 * MiB).add_clone()
    clone.control("fracture").write_bytes(command)
    assert clone.state == "fractured"


@pytest.mark.parametrize("redirect", [">", ">>"])
def test_a_shell_can_do_everything(shared: Mount, redirect: str) -> None:
    group = shared.group(shared.new_name())
    control = shared.mountpoint / "control"
    run("sh", "-ec", f"echo {group.name} {group.backing} size=1M {redirect} {control}/add_group")
    clone = group.clone("nightly")
    run("sh", "-ec", f"echo nightly {clone.backing} {redirect} {control}/{group.name}/add_clone")
    clone.wait("synchronized")
    run("sh", "-ec", f"printf 1 {redirect} {control}/{group.name}/nightly/fracture")
    assert clone.state == "fractured"


def test_each_write_through_one_descriptor_is_a_command(shared: Mount) -> None:
    group = shared.add_group(1 * MiB)
    for name in ("a", "b"):
        group.add_clone(name)
    with opened(shared.control("fracture").path, os.O_WRONLY) as fd:
        for name in ("a", "b"):
            assert os.write(fd, f"{group.name}/{name}".encode()) == len(group.name) + 2
    assert {group.clone(name).state for name in ("a", "b")} == {"fractured"}


def test_a_path_with_blanks_is_quoted_as_in_a_shell(shared: Mount) -> None:
    directory = shared.work / 'with blanks, a "quote" and a \'nother'
    directory.mkdir()
    group = shared.group(shared.new_name())
    source, copy = directory / "the source", directory / "the copy  of it"
    shared.control("add_group").write(f"{group.name} {shlex.quote(str(source))} size=128K")
    group.control("add_clone").write(f"nightly {shlex.quote(str(copy))}")
    group.clone("nightly").wait("synchronized")
    assert (source.stat().st_size, copy.stat().st_size) == (128 * KiB, 128 * KiB)
    assert group.control("backing").read() == str(source)
    assert group.clone("nightly").control("backing").read() == str(copy)


def test_a_path_is_any_bytes_that_a_path_can_be(shared: Mount) -> None:
    """A file name on Linux is bytes. One that is no UTF-8 works, or is refused with a sentence."""
    group = shared.group(shared.new_name())
    path = bytes(shared.work) + b"/latin-\xe9.img"
    command = b"%s %s size=128K\n" % (group.name.encode(), path)
    try:
        shared.control("add_group").write_bytes(command)
    except OSError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017 - either is good, nothing else is
        assert shared.control("error").read()
        assert not Path(os.fsdecode(path)).exists()
    else:
        assert group.status()["size"] == 128 * KiB
        assert group.control("backing").path.read_bytes() == path + b"\n"


NO_COMMAND = ["", " ", "'", '"unfinished', "one\ntwo", "nul\0byte"]
BAD_NAMES = [".hidden", "-dash", "_low", "a/b", "a b", "é", "x" * 64, "", "..", "a\\"]
RESERVED_GROUPS = ["control", "status", "status.json", "events", "error", "add_group", "fracture"]
RESERVED_CLONES = ["source", "status", "size", "state", "error", "add_clone", "cod_queue"]


@pytest.mark.parametrize(
    "command",
    [
        *NO_COMMAND,
        "NAME",
        "NAME relative/path size=1M",
        "NAME {work}/new size=",
        "NAME {work}/new size=0",
        "NAME {work}/new size=-1",
        "NAME {work}/new size=513",
        "NAME {work}/new size=1.5M",
        "NAME {work}/new size=1P",
        "NAME {work}/new size=much",
        "NAME {work}/new size=17T",
        "NAME {work}/new size=1M size=1M",
        "NAME {work}/new size=1M extent=2K",
        "NAME {work}/new size=1M extent=8M",
        "NAME {work}/new size=1M extent=96K",
        "NAME {work}/new size=1M extent=",
        "NAME {work}/new size=1M sync=no",
        "NAME {work}/new 1M",
        "NAME {work}/new size=1M more",
        *(f"{shlex.quote(name)} {{work}}/new size=1M" for name in BAD_NAMES),
        *(f"{name} {{work}}/new size=1M" for name in RESERVED_GROUPS),
    ],
)
def test_what_is_no_good_add_group_is_einval(shared: Mount, command: str) -> None:
    line = command.replace("NAME", "never").format(work=shared.work)
    with shared.refuses(errno.EINVAL, ""):
        shared.control("add_group").write(line)
    assert not (shared.work / "new").exists()


@pytest.mark.parametrize(
    "command",
    [
        *NO_COMMAND,
        "nightly",
        "nightly relative/path",
        "nightly {work}/new sync=maybe",
        "nightly {work}/new sync",
        "nightly {work}/new size=1M",
        "nightly {work}/new sync=no sync=no",
        *(f"{shlex.quote(name)} {{work}}/new" for name in BAD_NAMES),
        *(f"{name} {{work}}/new" for name in RESERVED_CLONES),
    ],
)
def test_what_is_no_good_add_clone_is_einval(shared: Mount, command: str) -> None:
    group = shared.add_group(128 * KiB)
    with shared.refuses(errno.EINVAL, group.name):
        group.control("add_clone").write(command.format(work=shared.work))
    assert not (shared.work / "new").exists()


def test_what_is_no_command_of_a_clone_is_einval(shared: Mount) -> None:
    clone = shared.add_group(128 * KiB).add_fractured()
    for name, words in {
        "sync": ["0", "2", "1 1", "then fracture", "force", "THEN-FRACTURE"],
        "fracture": ["0", "forced", "1 force", "then-fracture"],
        "protected_restore": ["0", "force", "1 1", "nightly"],
        "rate": ["0", "-1", "1.5M", "fast", "64M 1", "64MB", "MAX 1", "0K"],
    }.items():
        for word in [*words, *NO_COMMAND]:
            with shared.refuses(errno.EINVAL, f"{clone.group.name}/nightly"):
                clone.control(name).write(word)


def test_what_is_too_long_for_a_command_is_einval(shared: Mount) -> None:
    with shared.refuses(errno.EINVAL, ""):
        shared.control("remove_group").write("x" * (20 << 10))


def test_the_consistent_fracture_wants_group_and_clone(shared: Mount) -> None:
    group = shared.add_group(128 * KiB)
    clone = group.add_clone()
    good = f"{group.name}/{clone.name}"
    for bad in (*NO_COMMAND, group.name, f"{group.name}/", f"/{clone.name}", f"{good}/more", "/"):
        with shared.refuses(errno.EINVAL, ""):
            shared.control("fracture").write(bad)
    for bad in (group.name, f"{group.name}/", f"/{clone.name}", f"{good}/more", "/", "''", '"'):
        with shared.refuses(errno.EINVAL, ""):
            shared.control("fracture").write(f"{good} {bad}")
    for absent in (f"{group.name}/nobody", "nobody/nightly", f"{group.name}/source"):
        with shared.refuses(errno.ENOENT, ""):
            shared.control("fracture").write(f"{good} {absent}")
    assert clone.state == "synchronized"
    shared.control("fracture").write(f"{good} {good}")
    assert clone.state == "fractured"


# Names, sizes and what is not there --------------------------------------------------------------


@pytest.mark.parametrize("name", ["A", "0", "a.b_c-d", "x" * 63, "source", "1.", "CONTROL"])
def test_a_group_can_have_any_good_name(shared: Mount, name: str) -> None:
    shared.control("add_group").write(f"{name} {shared.work}/{name}.img size=128K")
    assert (shared.mountpoint / name / "source").stat().st_size == 128 * KiB
    shared.control("remove_group").write(name)
    assert not (shared.mountpoint / name).exists()
    assert not (shared.mountpoint / "control" / name).exists()


@pytest.mark.parametrize("name", ["0", "a.b_c-d", "x" * 63, "control", "SOURCE"])
def test_a_clone_can_have_any_good_name(shared: Mount, name: str) -> None:
    group = shared.add_group(128 * KiB)
    clone = group.add_clone(name)
    group.control("remove_clone").write(name)
    assert not clone.path.exists()
    assert clone.backing.stat().st_size == 128 * KiB


def test_a_name_that_is_taken_is_eexist(shared: Mount) -> None:
    group = shared.add_group(128 * KiB)
    group.add_clone("nightly")
    with shared.refuses(errno.EEXIST, "", group.name):
        shared.control("add_group").write(f"{group.name} {shared.work}/new size=128K")
    with shared.refuses(errno.EEXIST, group.name, "nightly"):
        group.control("add_clone").write(f"nightly {shared.work}/new")
    assert not (shared.work / "new").exists()


def test_what_is_not_there_is_enoent(shared: Mount) -> None:
    group = shared.add_group(128 * KiB)
    nowhere = shared.work / "no" / "such" / "directory"
    dangling = shared.work / "dangling"
    dangling.symlink_to(nowhere)
    with shared.refuses(errno.ENOENT, "", "nobody"):
        shared.control("remove_group").write("nobody")
    with shared.refuses(errno.ENOENT, group.name, "nobody"):
        group.control("remove_clone").write("nobody")
    with shared.refuses(errno.ENOENT, "", str(shared.work / "new")):
        shared.control("add_group").write(f"never {shared.work}/new")
    for path in (nowhere / "image", dangling):
        with shared.refuses(errno.ENOENT, "", str(path)):
            shared.control("add_group").write(f"never {path} size=128K")
        with shared.refuses(errno.ENOENT, group.name, str(path)):
            group.control("add_clone").write(f"nightly {path}")
    dangling.unlink()
    assert not (shared.work / "new").exists()
    assert not nowhere.exists()


@pytest.mark.parametrize(
    ("words", "size", "extent_size", "extents"),
    [
        ("size=131072", 131072, 65536, 2),
        ("size=512", 512, 65536, 1),
        ("size=1m extent=4k", 1048576, 4096, 256),
        ("size=8M extent=4M", 8388608, 4194304, 2),
        ("extent=4096 size=4608", 4608, 4096, 2),
        ("size=1T extent=4M", 1 << 40, 4194304, 262144),
    ],
)
def test_sizes_of_groups(
    shared: Mount, words: str, size: int, extent_size: int, extents: int
) -> None:
    group = shared.group(shared.new_name())
    shared.control("add_group").write(f"{group.name} {group.backing} {words}")
    status = group.status()
    assert (status["size"], status["extent_size"], status["extents"]) == (
        size,
        extent_size,
        extents,
    )
    assert group.source.stat().st_size == size == group.backing.stat().st_size
    shared.control("remove_group").write(group.name)
    group.backing.unlink()


def test_an_existing_backing_gives_the_size(shared: Mount) -> None:
    backing = shared.work / "existing.img"
    backing.write_bytes(b"x" * 1536)
    with shared.refuses(errno.EINVAL, "", str(backing)):
        shared.control("add_group").write(f"never {backing} size=2048")
    shared.control("add_group").write(f"existing {backing}")
    assert (shared.mountpoint / "existing" / "source").read_bytes() == b"x" * 1536


@pytest.mark.parametrize("size", [0, 511, 513, 100 * KiB + 1])
def test_a_backing_of_no_good_size_is_einval(shared: Mount, size: int) -> None:
    backing = shared.work / f"odd-{size}.img"
    backing.write_bytes(bytes(size))
    with shared.refuses(errno.EINVAL, "", str(backing), str(size)):
        shared.control("add_group").write(f"never {backing}")
    assert backing.stat().st_size == size


def test_a_clone_that_is_too_small_is_einval_and_left_alone(shared: Mount) -> None:
    group = shared.add_group(128 * KiB)
    backing = shared.work / "small.img"
    backing.write_bytes(b"x" * (128 * KiB - 512))
    with shared.refuses(errno.EINVAL, group.name, str(backing)):
        group.control("add_clone").write(f"nightly {backing}")
    assert backing.read_bytes() == b"x" * (128 * KiB - 512)


def test_only_files_and_block_devices_are_backings(shared: Mount) -> None:
    group = shared.add_group(128 * KiB)
    fifo = shared.work / "fifo"
    os.mkfifo(fifo)
    for path in (shared.work, fifo, Path("/dev/zero")):
        for tail in ("", " size=128K"):
            with shared.refuses(errno.EINVAL, "", str(path)):
                shared.control("add_group").write(f"never {path}{tail}")
        with shared.refuses(errno.EINVAL, group.name, str(path)):
            group.control("add_clone").write(f"nightly {path}")


# What is in use ----------------------------------------------------------------------------------

Backing = Callable[[Mount, Path], Path]


def _as_it_is(mount: Mount, path: Path) -> Path:
    return path


def _symbolic_link(mount: Mount, path: Path) -> Path:
    link = mount.work / "symbolic-link"
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    return link


def _hard_link(mount: Mount, path: Path) -> Path:
    link = mount.work / "hard-link"
    link.unlink(missing_ok=True)
    link.hardlink_to(path)
    return link


def _by_another_way(mount: Mount, path: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


@pytest.mark.parametrize("named", [_as_it_is, _symbolic_link, _hard_link, _by_another_way])
def test_a_backing_that_is_in_use_is_ebusy_by_whatever_name(shared: Mount, named: Backing) -> None:
    group, other = shared.add_group(128 * KiB), shared.add_group(128 * KiB)
    clone = group.add_clone("nightly")
    for backing in (group.backing, clone.backing, other.backing, shared.meta):
        path = named(shared, backing)
        before = backing.stat().st_size
        with shared.refuses(errno.EBUSY, "", str(path)):
            shared.control("add_group").write(f"never {path}")
        with shared.refuses(errno.EBUSY, group.name, str(path)):
            group.control("add_clone").write(f"weekly {path}")
        assert backing.stat().st_size == before


def test_a_backing_of_another_mount_is_ebusy(shared: Mount, tmp_path: Path) -> None:
    group = shared.add_group(128 * KiB)
    clone = group.add_clone("nightly")
    with mounted(tmp_path / "other") as other:
        for backing in (group.backing, clone.backing, shared.meta, other.meta):
            with other.refuses(errno.EBUSY, "", str(backing)):
                other.control("add_group").write(f"never {backing}")
        shared.control(f"{group.name}/remove_clone").write("nightly")
        other.control("add_group").write(f"mine {clone.backing}")
        with shared.refuses(errno.EBUSY, group.name):
            group.control("add_clone").write(f"nightly {clone.backing}")


def test_a_block_device_that_is_mounted_or_in_use_is_ebusy(shared: Mount, tmp_path: Path) -> None:
    import contextlib

    group = shared.add_group(128 * KiB)
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 16 * MiB)
    with contextlib.ExitStack() as cleanup:
        loop = attach(cleanup, image)
        run("mkfs.ext4", "-q", loop.path)
        unmount = mount_disk(cleanup, loop.path, tmp_path / "disk", "ext4")
        with shared.refuses(errno.EBUSY, "", str(loop.path)):
            shared.control("add_group").write(f"never {loop.path}")
        with shared.refuses(errno.EBUSY, group.name, str(loop.path)):
            group.control("add_clone").write(f"nightly {loop.path}")
        unmount()
        wait_for(lambda: is_free(loop.path), f"for {loop.path} to be free")
        shared.control("add_group").write(f"device {loop.path}")
        with shared.refuses(errno.EBUSY, group.name, str(loop.path)):
            group.control("add_clone").write(f"nightly {loop.path}")
        shared.control("remove_group").write("device")
        group.control("add_clone").write(f"nightly {loop.path} sync=no")
        group.control("remove_clone").write("nightly")


def test_a_backing_on_the_mount_itself_is_ebusy(shared: Mount) -> None:
    group = shared.add_group(128 * KiB)
    clone = group.add_clone("nightly")
    for path in (group.source, clone.path):
        with shared.refuses(errno.EBUSY, "", str(path)):
            shared.control("add_group").write(f"never {path}")
        with shared.refuses(errno.EBUSY, group.name, str(path)):
            group.control("add_clone").write(f"weekly {path}")


def test_what_is_open_cannot_be_removed(shared: Mount) -> None:
    group = shared.add_group(128 * KiB)
    clone = group.add_clone("nightly")
    with opened(clone.path, os.O_RDONLY), shared.refuses(errno.EBUSY, group.name, "nightly"):
        group.control("remove_clone").write("nightly")
    group.control("remove_clone").write("nightly")
    with opened(group.source, os.O_RDONLY), shared.refuses(errno.EBUSY, "", group.name):
        shared.control("remove_group").write(group.name)
    shared.control("remove_group").write(group.name)


def test_a_file_that_was_just_closed_is_open_no_more(shared: Mount) -> None:
    """And a clone that comes again by the same name is another file, with its own bytes."""
    group = shared.add_group(128 * KiB)
    for number in range(20):
        write(group.source, 0, b"%08d" % number)
        clone = group.add_clone("nightly")
        assert read(clone.path, 0, 8) == b"%08d" % number
        group.control("remove_clone").write("nightly")


# What a failed command leaves behind -------------------------------------------------------------


def test_a_command_that_fails_leaves_no_file_behind(shared: Mount) -> None:
    """The backing has been created when these fail."""
    with shared.refuses(errno.ENOSPC, "", "full"):
        shared.control("add_group").write(f"never {shared.work}/new size=512G extent=4K")
    assert not (shared.work / "new").exists()
    group = shared.add_group(8 << 30, extent=4 * KiB)
    clones = add_until_full(group)
    with shared.refuses(errno.ENOSPC, group.name, "full"):
        group.add_clone("never", sync=False)
    assert not group.clone("never").backing.exists()
    for clone in clones:
        group.control("remove_clone").write(clone.name)
    shared.control("remove_group").write(group.name)


def add_until_full(group: Group) -> list[Clone]:
    """Add clones until the volume has no more room for a map. Those that there was room for."""
    for number in range(100):
        clone = group.clone(f"c{number}")
        try:
            group.add_clone(clone.name, sync=False)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - which of them fails is not known
            assert not clone.backing.exists()
            return [group.clone(f"c{before}") for before in range(number)]
    pytest.fail("the volume is never full")


def test_a_full_volume_keeps_what_it_has_and_frees_what_is_removed(tmp_path: Path) -> None:
    with mounted(tmp_path / "work", volume_size=1 * MiB) as mount:
        group = mount.add_group(1 << 30, extent=4 * KiB)
        clones = add_until_full(group)
        assert len(clones) > 2
        assert set(group.status()["clones"]) == {clone.name for clone in clones}
        write(group.source, 4096, b"still here")
        assert read(group.source, 4096, 10) == b"still here"
        group.control("remove_clone").write("c0")
        again = group.add_clone("again", sync=False)
        assert again.status()["delta_extents"] == 262144
        mount.remount()
        assert set(group.status()["clones"]) == {c.name for c in clones[1:]} | {"again"}


def test_as_many_groups_and_clones_as_the_contract_says(tmp_path: Path) -> None:
    """256 groups, and 64 clones in one of them."""
    with mounted(tmp_path / "work", volume_size=16 * MiB) as mount:
        sample = mount.add_group(256 * KiB)
        for _ in range(255):
            mount.add_group(4 * KiB, extent=4 * KiB)
        clones = [sample.clone(f"c{number}") for number in range(64)]
        for clone in clones:
            sample.control("add_clone").write(f"{clone.name} {clone.backing}")
        for clone in clones:
            clone.wait("synchronized")
        write(sample.source, 0, b"to all of them")
        mount.control("fracture").write(" ".join(f"{sample.name}/{c.name}" for c in clones))
        write(sample.source, 0, b"to none of them")
        mount.remount()
        assert len(mount.status()["groups"]) == 256
        assert len(list(mount.mountpoint.iterdir())) == 257
        assert len(list(sample.source.parent.iterdir())) == 65
        for clone in clones:
            assert read(clone.path, 0, 14) == b"to all of them"
            assert clone.delta() == {0}


# What the tree does not have ---------------------------------------------------------------------


def test_nothing_can_be_made_removed_or_renamed(shared: Mount) -> None:
    group = shared.add_group(128 * KiB)
    clone = group.add_fractured("nightly")
    top = shared.mountpoint
    for directory in (top, top / group.name, top / "control", top / "control" / group.name):
        new = directory / "new"
        for make in (
            new.mkdir,
            new.touch,
            lambda new=new: os.mkfifo(new),
            lambda new=new: new.symlink_to("/"),
            lambda new=new: new.hardlink_to(group.source),
            lambda new=new: group.source.rename(new),
            lambda new=new: os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
        ):
            with pytest.raises(PermissionError) as failure:
                make()
            assert failure.value.errno == errno.EPERM
            assert not new.exists()
    for there in (group.source, clone.path, shared.control("status").path):
        for change in (
            there.unlink,
            lambda there=there: there.rename(top / "new"),
            lambda there=there: there.chmod(0o666),
            lambda there=there: os.chown(there, 1, 1),
        ):
            with pytest.raises(PermissionError) as failure:
                change()
            assert failure.value.errno == errno.EPERM
    for directory in (top / group.name, top / "control" / group.name):
        with pytest.raises(PermissionError) as failure:
            directory.rmdir()
        assert failure.value.errno == errno.EPERM
    assert stat.S_IMODE(group.source.stat().st_mode) == 0o600


# Owners and modes --------------------------------------------------------------------------------

NOBODY = 65534


def as_user(user: int, *command: str | Path) -> int:
    """The exit status of a program that another user runs."""
    words = [str(word) for word in command]
    result = subprocess.run(
        words, check=False, user=user, group=user, capture_output=True, timeout=60
    )
    return result.returncode


def test_owner_and_mode_are_those_of_the_options_and_decide_who_may(tmp_path: Path) -> None:
    options = f"allow_other,uid={NOBODY},gid={NOBODY},umask=027"
    for directory in (tmp_path, *tmp_path.parents[:-1]):
        if not directory.stat().st_mode & 1:
            directory.chmod(directory.stat().st_mode | 0o011)
    with mounted(tmp_path / "work", options=options) as mount:
        group = mount.add_group(1 * MiB)
        clone = group.add_clone("nightly")
        found = group.source.stat()
        assert (found.st_uid, found.st_gid) == (NOBODY, NOBODY)
        assert stat.S_IMODE(found.st_mode) == 0o640
        assert stat.S_IMODE(clone.path.stat().st_mode) == 0o440
        fracture = clone.control("fracture").path
        assert stat.S_IMODE(fracture.stat().st_mode) == 0o200
        stranger = NOBODY - 1
        echo = f"echo 1 > {fracture}"
        assert as_user(stranger, "sh", "-c", echo) != 0
        assert as_user(stranger, "cat", group.source) != 0
        assert clone.state == "synchronized"
        assert as_user(NOBODY, "sh", "-c", echo) == 0
        assert clone.state == "fractured"
        assert stat.S_IMODE(clone.path.stat().st_mode) == 0o640
        assert as_user(NOBODY, "dd", "if=/dev/zero", f"of={clone.path}", "bs=64K", "count=1") == 0
        assert as_user(stranger, "dd", "if=/dev/zero", f"of={clone.path}", "count=1") != 0
        assert clone.delta() == {0}


def test_without_options_the_tree_is_for_who_mounted_it(shared: Mount) -> None:
    group = shared.add_group(EXTENT)
    assert group.source.stat().st_uid == os.getuid()
    assert stat.S_IMODE(group.source.stat().st_mode) == 0o600
    assert as_user(NOBODY, "ls", shared.mountpoint) != 0
