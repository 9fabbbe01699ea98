"""Block devices as Source, as clone and as metadata volume."""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from clonefs.errors import ClonefsError
from tests.mounts.load import Writer
from tests.mounts.mount import (
    EXTENT,
    Clone,
    Group,
    KiB,
    Loop,
    MiB,
    Mount,
    assert_same,
    attach,
    noise,
    opened,
    write,
)

SIZE = 4 * MiB


def device(cleanup: contextlib.ExitStack, image: Path, data: bytes) -> Loop:
    """A loop device on a new file with these bytes."""
    image.write_bytes(data)
    return attach(cleanup, image)


def test_everything_on_block_devices(
    tmp_path: Path, cleanup: contextlib.ExitStack, rng_seed: str
) -> None:
    """The whole story, with a kill in the middle."""
    data, ruin = noise("data", SIZE), noise("ruin", SIZE)
    source = device(cleanup, tmp_path / "source-image", data)
    copy = device(cleanup, tmp_path / "copy-image", noise("something else", SIZE + 64 * KiB))
    meta = device(cleanup, tmp_path / "meta-image", bytes(2 * MiB))
    mount = Mount(tmp_path / "work", volume_size=2 * MiB)
    mount.meta = meta.path
    cleanup.callback(mount.close)
    mount.format()
    mount.start()
    assert mount.status()["volume"]["size"] == 2 * MiB

    mount.control("add_group").write(f"payroll {source.path}")
    group = Group(mount, "payroll", source.path)
    assert group.status()["size"] == SIZE
    assert group.source.stat().st_size == SIZE
    assert group.source.stat().st_blocks == SIZE // 512
    clone = Clone(group, "nightly", copy.path)
    group.control("add_clone").write(f"nightly {copy.path}")
    clone.wait("synchronized")
    clone.fracture()
    assert_same(clone.path.read_bytes(), data, "the clone")
    assert (tmp_path / "copy-image").read_bytes()[SIZE:] == noise(
        "something else", SIZE + 64 * KiB
    )[SIZE:]
    write(group.source, 0, ruin)

    clone.rate("4M")
    clone.restore()
    writer = Writer(group.source, data, rng_seed, EXTENT)
    writer.start()
    writer.wait_for_more(20)
    mount.kill()
    writer.failed()
    mount.start()
    assert clone.state in ("restoring", "fractured")
    writer.check(group.source.read_bytes(), "after the kill")
    clone.rate("max")
    clone.wait("fractured")
    assert_same(group.source.read_bytes(), writer.expected, "the Source")
    assert_same(clone.path.read_bytes(), data, "the clone")
    mount.remount()
    assert_same(group.source.read_bytes(), writer.expected, "the Source after a remount")
    assert writer.written <= clone.delta() <= writer.written | writer.extents_in_doubt()


def test_a_hole_of_the_source_overwrites_what_the_device_of_a_clone_had(
    shared: Mount, cleanup: contextlib.ExitStack, tmp_path: Path
) -> None:
    """A file can have holes and a device cannot: zeros have to be written."""
    copy = device(cleanup, tmp_path / "copy-image", noise("not zeros", SIZE))
    group = shared.add_group(SIZE)
    write(group.source, 10 * EXTENT + 5, b"not a hole")
    clone = Clone(group, "nightly", copy.path)
    group.control("add_clone").write(f"nightly {copy.path}")
    cleanup.callback(lambda: group.control("remove_clone").write("nightly"))
    clone.wait("synchronized")
    clone.fracture()
    expected = bytes(10 * EXTENT + 5) + b"not a hole" + bytes(SIZE - 10 * EXTENT - 15)
    assert_same(clone.path.read_bytes(), expected, "the clone")
    write(group.source, 0, noise("ruin", SIZE))
    clone.restore()
    assert_same(group.source.read_bytes(), expected, "the Source")
    clone.wait("fractured")


def test_a_device_that_is_a_backing_is_nobody_elses(
    shared: Mount, cleanup: contextlib.ExitStack, tmp_path: Path
) -> None:
    loop = device(cleanup, tmp_path / "image", noise("data", SIZE))
    name = shared.new_name()
    shared.control("add_group").write(f"{name} {loop.path}")
    cleanup.callback(lambda: shared.control("remove_group").write(name))
    with pytest.raises(OSError) as failure, opened(loop.path, os.O_RDWR | os.O_EXCL):
        pass
    assert failure.value.errno == errno.EBUSY
    other = Mount(tmp_path / "other")
    other.meta = loop.path
    with pytest.raises(ClonefsError, match="in use") as refusal:
        other.format()
    assert refusal.value.errno == errno.EBUSY


def test_a_device_smaller_than_its_source_is_refused(
    shared: Mount, cleanup: contextlib.ExitStack, tmp_path: Path
) -> None:
    loop = device(cleanup, tmp_path / "image", bytes(SIZE - 4096))
    group = shared.add_group(SIZE)
    with shared.refuses(errno.EINVAL, group.name, str(loop.path)):
        group.control("add_clone").write(f"nightly {loop.path}")
    with shared.refuses(errno.EINVAL, "", str(loop.path)):
        shared.control("add_group").write(f"never {loop.path} size=1M")
