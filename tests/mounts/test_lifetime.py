"""How a mount begins and ends: the command line, signals, and what is refused."""

import contextlib
import errno
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from clonefs.volume import was_closed_cleanly
from tests.mounts.load import Writer
from tests.mounts.mount import (
    EXTENT,
    MiB,
    Mount,
    assert_same,
    attach,
    mounted,
    mounts_below,
    noise,
    opened,
    read,
    run,
    wait_for,
    write,
)

SIZE = 4 * MiB


def clonefs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command `clonefs`."""
    words = [str(argument) for argument in arguments]
    return subprocess.run(
        [sys.executable, "-m", "clonefs", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def done(*arguments: str | Path) -> str:
    """Run the command `clonefs`, which must succeed and not complain; what it prints."""
    result = clonefs(*arguments)
    assert (result.returncode, result.stderr) == (0, ""), arguments
    return result.stdout


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command that was refused has printed."""
    assert (result.returncode, result.stdout) == (1, ""), result
    assert result.stderr.startswith("clonefs: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def background(tmp_path: Path, cleanup: contextlib.ExitStack) -> Mount:
    """A volume that is formatted and not mounted; whatever mounts it, it is taken away."""
    mount = Mount(tmp_path / "work")
    mount.format()

    def put_away() -> None:
        for place in mounts_below(mount.work):
            run("umount", "--lazy", place)
        wait_for(lambda: _is_free(mount.meta), "for the daemon to end")

    cleanup.callback(put_away)
    return mount


def _is_free(meta: Path) -> bool:
    return not (meta.exists() and _users_of(meta))


def _users_of(path: Path) -> list[int]:
    """The processes that have the file open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(path == fd.readlink() for fd in process.joinpath("fd").iterdir()):
                found.append(int(process.name))
    return found


# Signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_mount_cleanly(mount: Mount, number: signal.Signals) -> None:
    group = mount.add_group(data=noise("data", SIZE))
    clone = group.add_fractured()
    write(group.source, 9 * EXTENT, b"before the signal")
    mount.signal(number)
    assert mount.wait_for_end() == 0
    assert mounts_below(mount.work) == []
    assert was_closed_cleanly(mount.meta)
    mount.start()
    assert clone.delta() == {9}
    assert read(group.source, 9 * EXTENT, 17) == b"before the signal"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_files_are_open_and_hosts_write(
    mount: Mount, number: signal.Signals, rng_seed: str
) -> None:
    """What was acknowledged is there, whatever was under way: a sync, a restore, and writes."""
    data = noise("data", SIZE)
    group, other = mount.add_group(data=data), mount.add_group(data=data)
    clone, late = group.add_fractured(), other.add_clone("late", sync=False)
    write(group.source, 0, noise("ruin", SIZE))
    clone.rate(1)
    late.rate(1)
    clone.restore()
    late.sync()
    writers = [
        Writer(path, data, f"{rng_seed} {path}", EXTENT) for path in (group.source, other.source)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.wait_for_more(20)
    mount.signal(number)
    assert mount.wait_for_end() == 0
    for writer in writers:
        writer.failed()
    assert was_closed_cleanly(mount.meta)
    mount.start()
    # Writers that overwrite all that was to be copied end a restore.
    assert clone.state in ("restoring", "fractured")
    assert late.state == "synchronizing"
    for writer, path in zip(writers, (group.source, other.source), strict=True):
        writer.check(path.read_bytes(), str(path))
    assert_same(clone.path.read_bytes(), data, "the clone")


@pytest.mark.parametrize("kind", ["sync", "restore"])
def test_unmounting_at_the_moment_at_which_copies_end(mount: Mount, kind: str) -> None:
    """The end of a copy is a change of state, and it must not meet the end of the mount half-way."""
    groups = [mount.add_group(data=noise(number, 256 * 1024)) for number in range(8)]
    clones = [group.add_fractured() for group in groups]
    for number in range(6):
        for group, clone in zip(groups, clones, strict=True):
            write(group.source, 0, noise(f"{number} {group.name}", 128 * 1024))
            clone.rate(1)
            if kind == "sync":
                clone.sync("then-fracture")
            else:
                clone.restore()
        for clone in clones:
            clone.rate("max")
        mount.umount()
        mount.start()
        for group, clone in zip(groups, clones, strict=True):
            clone.wait("fractured")
            assert_same(clone.path.read_bytes(), group.source.read_bytes(), f"round {number}")


def test_unmounting_at_the_moment_of_commands(mount: Mount) -> None:
    """Signals come when they like. A command takes effect whole or not at all, and the mount ends
    cleanly."""
    group = mount.add_group(data=noise("data", SIZE))
    clone = group.add_clone()
    for number in range(5):

        def give_commands() -> None:
            with contextlib.suppress(OSError):
                while True:
                    clone.fracture()
                    clone.sync()
                    clone.rate("1M")
                    clone.rate("max")

        thread = threading.Thread(target=give_commands)
        thread.start()
        events = mount.control("events").path
        wait_for(lambda: len(events.read_bytes()) > 1000, "for some changes of state")  # noqa: B023
        mount.signal(signal.SIGTERM)
        assert mount.wait_for_end() == 0, f"round {number}: {mount.log.read_text()[-2000:]}"
        thread.join()
        assert was_closed_cleanly(mount.meta)
        mount.start()
        assert clone.state in ("fractured", "synchronizing", "synchronized")
        clone.sync()
        clone.wait("synchronized")


# The command line --------------------------------------------------------------------------------


def test_mount_in_the_background_and_umount(background: Mount) -> None:
    mount = background
    done("mount", mount.meta, mount.mountpoint)
    group = mount.group("payroll")
    mount.control("add_group").write(f"payroll {group.backing} size=1M")
    write(group.source, 0, b"written")
    (pid,) = _users_of(mount.meta)
    assert mount.status()["volume"]["path"] == str(mount.meta)
    assert os.getsid(pid) == pid
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    done("umount", mount.mountpoint)
    assert not _users_of(mount.meta)
    assert mounts_below(mount.work) == []
    assert was_closed_cleanly(mount.meta)
    done("mount", mount.meta, mount.mountpoint)
    assert read(group.source, 0, 7) == b"written"
    done("umount", mount.mountpoint)


def test_the_whole_story_with_commands(background: Mount) -> None:
    """format is done already; everything else is."""
    mount, work = background, background.work
    payroll = mount.mountpoint / "payroll"
    image = work / "an image"
    image.write_bytes(noise("good", SIZE))

    done("mount", mount.meta, mount.mountpoint)
    done("add-group", mount.mountpoint, "payroll", image, "--extent", "16K")
    done("add-clone", payroll, "nightly", work / "a copy")
    done("wait", payroll / "nightly", "--state", "synchronized", "--timeout", "60")
    done("fracture", payroll / "nightly")
    write(payroll / "source", 0, noise("ruin", SIZE))
    done("restore", payroll / "nightly", "--wait")
    assert_same((payroll / "source").read_bytes(), noise("good", SIZE), "the Source")
    assert "payroll/nightly" in done("status", payroll)
    done("sync", payroll / "nightly", "--then-fracture", "--wait")
    assert "fractured" in done("status", mount.mountpoint)
    assert "ENOENT" not in refused(clonefs("fracture", payroll / "nobody"))
    assert "payroll" in refused(clonefs("remove-group", payroll))
    done("remove-clone", payroll / "nightly")
    done("remove-group", payroll)
    done("umount", mount.mountpoint)
    assert_same(image.read_bytes(), noise("good", SIZE), "the image")


def test_umount_of_what_is_in_use_is_refused_and_says_what_to_do(
    background: Mount, cleanup: contextlib.ExitStack
) -> None:
    mount = background
    clonefs("mount", mount.meta, mount.mountpoint)
    group = mount.group("payroll")
    mount.control("add_group").write(f"payroll {group.backing} size=1M")
    with opened(group.source, os.O_RDONLY):
        assert str(mount.mountpoint) in refused(clonefs("umount", mount.mountpoint))
    loop = attach(cleanup, group.source)
    assert str(loop.path) in refused(clonefs("umount", mount.mountpoint))
    loop.detach()
    wait_for(lambda: clonefs("umount", mount.mountpoint).returncode == 0, "for the umount")


def test_umount_of_a_dead_mount_takes_it_away(background: Mount) -> None:
    mount = background
    mount.start()
    mount.signal(signal.SIGKILL)
    mount.wait_for_end()
    assert mounts_below(mount.work) == [mount.mountpoint]
    result = clonefs("umount", mount.mountpoint)
    assert result.returncode == 0
    assert "died" in result.stderr
    assert mounts_below(mount.work) == []
    assert not was_closed_cleanly(mount.meta)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("foreground", [[], ["-f"]], ids=["background", "foreground"])
def test_mount_says_why_not(tmp_path: Path, foreground: list[str]) -> None:
    mountpoint, meta = tmp_path / "mnt", tmp_path / "meta"
    mountpoint.mkdir()
    for content in (None, b"", b"x" * 4096, bytes(2 * MiB), noise("no volume", 2 * MiB)):
        if content is not None:
            meta.write_bytes(content)
        assert str(meta) in refused(clonefs("mount", *foreground, meta, mountpoint))
        assert mounts_below(tmp_path) == []
    assert clonefs("format", meta, "--force").returncode == 0
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refused(clonefs("mount", *foreground, meta, nowhere))
    assert str(meta) in refused(clonefs("mount", *foreground, meta, meta))
    assert "'nonsense'" in refused(
        clonefs("mount", *foreground, meta, mountpoint, "-o", "nonsense")
    )
    assert was_closed_cleanly(meta)
    assert clonefs("mount", meta).returncode == 2


def test_a_volume_that_was_cut_short_or_damaged_is_not_mounted(tmp_path: Path) -> None:
    mountpoint, meta = tmp_path / "mnt", tmp_path / "meta"
    mountpoint.mkdir()
    assert clonefs("format", meta, "--size", "2M").returncode == 0
    whole = meta.read_bytes()
    meta.write_bytes(whole[: 1 * MiB + 4096])
    assert "cut short" in refused(clonefs("mount", meta, mountpoint))
    meta.write_bytes(whole[:20] + b"?" + whole[21:])
    assert "damaged" in refused(clonefs("mount", meta, mountpoint))
    meta.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    assert "damaged" in refused(clonefs("mount", meta, mountpoint))


def test_a_second_mount_is_refused_by_volume_and_by_mount_point(
    shared: Mount, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "in use" in refused(clonefs("mount", shared.meta, elsewhere))
    assert "in use" in refused(clonefs("mount", "-f", shared.meta, elsewhere))
    meta = tmp_path / "meta"
    assert clonefs("format", meta).returncode == 0
    assert "already" in refused(clonefs("mount", meta, shared.mountpoint))
    assert mounts_below(tmp_path) == []
    assert was_closed_cleanly(meta)
    assert shared.control("status").read()


def test_a_dead_mount_point_is_taken_away_by_the_next_mount(mount: Mount) -> None:
    group = mount.add_group(data=noise("data", SIZE))
    mount.signal(signal.SIGKILL)
    assert mount.wait_for_end() == -signal.SIGKILL
    with pytest.raises(OSError) as failure:
        os.statvfs(mount.mountpoint)
    assert failure.value.errno == errno.ENOTCONN
    mount.start_over_dead()
    assert mounts_below(mount.work) == [mount.mountpoint]
    assert_same(group.source.read_bytes(), noise("data", SIZE), "the Source")


def test_format_does_not_overwrite_and_does_not_touch_what_is_mounted(
    shared: Mount, tmp_path: Path
) -> None:
    group = shared.add_group(data=noise("data", SIZE))
    for arguments in ([], ["--force"]):
        assert "in use" in refused(clonefs("format", shared.meta, *arguments))
        assert "in use" in refused(clonefs("format", group.backing, *arguments))
    assert_same(group.source.read_bytes(), noise("data", SIZE), "the Source")
    meta = tmp_path / "meta"
    assert clonefs("format", meta).returncode == 0
    assert meta.stat().st_size == 64 * MiB
    before = meta.read_bytes()
    assert "--force" in refused(clonefs("format", meta))
    assert meta.read_bytes() == before
    assert clonefs("format", meta, "--force", "--size", "2M").returncode == 0
    assert meta.stat().st_size == 2 * MiB
    image = tmp_path / "image"
    image.write_bytes(noise("precious", 2 * MiB))
    assert "--force" in refused(clonefs("format", image))
    assert_same(image.read_bytes(), noise("precious", 2 * MiB), "the image")
    assert "small" in refused(clonefs("format", tmp_path / "tiny", "--size", "64K"))
    assert not (tmp_path / "tiny").exists()


def test_a_volume_and_a_mount_point_with_odd_names(tmp_path: Path) -> None:
    with mounted(tmp_path / "blank, comma \\ backslash = é 'quote'") as mount:
        assert mount.status()["volume"]["path"] == str(mount.meta)
        group = mount.group("payroll")
        mount.control("add_group").write(f"payroll {shlex.quote(str(group.backing))} size=1M")
        write(group.source, 0, b"written")
        mount.remount()
        assert read(group.source, 0, 7) == b"written"
        done("status", mount.mountpoint)
        done("umount", mount.mountpoint)
        assert mount.wait_for_end() == 0
        mount.start()


def test_the_tree_of_an_empty_volume(tmp_path: Path) -> None:
    with mounted(tmp_path / "work") as mount:
        assert [path.name for path in mount.mountpoint.iterdir()] == ["control"]
        assert mount.status()["groups"] == {}
        assert len(mount.control("status").read().splitlines()) == 1
        assert mount.control("error").read() == ""
