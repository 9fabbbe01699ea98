"""LU files behave as a block device does: fixed size, honest ends, and a mode that says who writes."""

import errno
import mmap
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts.mount import (
    EXTENT,
    Clone,
    KiB,
    MiB,
    Mount,
    assert_same,
    noise,
    opened,
    read,
    run,
    touched,
    write,
)

# The size never changes --------------------------------------------------------------------------


@pytest.mark.parametrize("lu", ["source", "nightly"])
def test_truncating_does_nothing_and_setting_another_size_is_refused(
    shared: Mount, lu: str
) -> None:
    data = noise(lu, 256 * KiB)
    group = shared.add_group(data=data)
    group.add_fractured("nightly")
    path = group.source.with_name(lu)
    with opened(path, os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == len(data)
        assert_same(os.pread(fd, len(data), 0), data, "after O_TRUNC")
        for size in (0, 1, len(data) - 512, len(data) + 512):
            with pytest.raises(OSError) as failure:
                os.ftruncate(fd, size)
            assert failure.value.errno == errno.EINVAL
            with pytest.raises(OSError) as failure:
                os.truncate(path, size)
            assert failure.value.errno == errno.EINVAL
        os.ftruncate(fd, len(data))
        os.truncate(path, len(data))
        assert os.lseek(fd, 0, os.SEEK_END) == len(data)
    assert path.stat().st_size == len(data)
    assert_same(path.read_bytes(), data, "after all that")
    assert group.clone("nightly").delta() == set()


def test_dd_of_writes_what_it_has_and_leaves_the_rest(shared: Mount) -> None:
    data, new = noise("old", 256 * KiB), noise("new", 100 * KiB)
    group = shared.add_group(data=data)
    image = shared.work / "image"
    image.write_bytes(new)
    with opened(group.source, os.O_RDONLY) as other:
        run("dd", f"if={image}", f"of={group.source}", "bs=10K", "conv=fsync")
        assert_same(os.pread(other, len(data), 0), new + data[len(new) :], "an old descriptor")
    assert_same(group.source.read_bytes(), new + data[len(new) :], "a new one")
    run("dd", f"if={image}", f"of={group.source}", "bs=4K", "seek=32", "conv=notrunc,fsync")
    expected = (new + data[len(new) :])[: 128 * KiB] + new + data[228 * KiB :]
    assert_same(group.source.read_bytes(), expected, "with seek=")


def test_cp_onto_an_lu_and_from_it(shared: Mount) -> None:
    data, new = noise("old", 256 * KiB), noise("new", 256 * KiB)
    group = shared.add_group(data=data)
    image, copy = shared.work / "image", shared.work / "copy"
    image.write_bytes(new)
    run("cp", image, group.source)
    assert_same(group.source.read_bytes(), new, "the Source")
    run("cp", group.source, copy)
    assert_same(copy.read_bytes(), new, "the copy of it")
    image.write_bytes(new[: 64 * KiB] + bytes(128 * KiB) + new[192 * KiB :])
    run("fallocate", "--dig-holes", image)
    write(group.source, 0, data)
    run("cp", "--sparse=never", image, group.source)
    assert_same(group.source.read_bytes(), image.read_bytes(), "with holes")


def test_copying_within_the_mount(shared: Mount) -> None:
    """From a clone to the Source by hand, with what the kernel has for that."""
    good, ruin = noise("good", 1 * MiB), noise("ruin", 1 * MiB)
    group = shared.add_group(data=good)
    clone = group.add_fractured("nightly")
    write(group.source, 0, ruin)
    run("cp", "--sparse=never", clone.path, group.source)
    assert_same(group.source.read_bytes(), good, "by cp")
    write(group.source, 0, ruin)
    with opened(clone.path, os.O_RDONLY) as origin, opened(group.source, os.O_WRONLY) as target:
        done = 0
        while done < len(good):
            done += os.copy_file_range(origin, target, len(good) - done)
    assert_same(group.source.read_bytes(), good, "by copy_file_range")
    assert_same(clone.path.read_bytes(), good, "the clone")


# The ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [256 * KiB, 100 * KiB + 512, 512])
@pytest.mark.parametrize("lu", ["source", "nightly"])
def test_reads_are_short_at_the_end_and_writes_too(shared: Mount, lu: str, size: int) -> None:
    data = noise(size, size)
    group = shared.add_group(data=data)
    group.add_fractured("nightly")
    path = group.source.with_name(lu)
    with opened(path, os.O_RDWR) as fd:
        assert os.pread(fd, 1000, size - 100) == data[-100:]
        assert [os.pread(fd, 10, at) for at in (size, size + 1, 1 << 40)] == [b"", b"", b""]
        assert os.pwrite(fd, b"x" * 1000, size - 100) == 100
        for offset in (size, size + 1, 1 << 40):
            with pytest.raises(OSError) as failure:
                os.pwrite(fd, b"x", offset)
            assert failure.value.errno == errno.ENOSPC
        assert os.pread(fd, 1000, size - 100) == b"x" * 100
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd, pytest.raises(OSError) as failure:
        os.write(fd, b"more")
    assert failure.value.errno == errno.ENOSPC
    assert path.stat().st_size == size
    assert_same(path.read_bytes(), data[:-100] + b"x" * 100, "all of it")
    assert group.clone("nightly").delta() == touched(size - 100, 100)


def test_a_large_write_across_the_end_is_as_long_as_there_is_room(shared: Mount) -> None:
    group = shared.add_group(1 * MiB)
    data = noise("large", 2 * MiB)
    with opened(group.source, os.O_WRONLY) as fd:
        assert os.pwrite(fd, data, 512 * KiB) == 512 * KiB
    assert_same(
        read(group.source, 512 * KiB, 1 * MiB), data[: 512 * KiB], "what there was room for"
    )
    with pytest.raises(AssertionError, match="No space left on device"):
        run("dd", "if=/dev/zero", f"of={group.source}", "bs=64K")
    assert_same(group.source.read_bytes(), bytes(1 * MiB), "all zeros")


# The mode, and who may write ---------------------------------------------------------------------


def _synchronizing(clone: Clone) -> None:
    clone.rate(1)
    clone.sync()
    clone.wait_for_the_one_extent()


def _synchronized(clone: Clone) -> None:
    clone.sync()
    clone.wait("synchronized")


def _out_of_sync(clone: Clone) -> None:
    _synchronizing(clone)
    clone.fracture()


def _restoring(clone: Clone) -> None:
    clone.rate(1)
    clone.restore()
    clone.wait_for_the_one_extent()


def _reverse_out_of_sync(clone: Clone) -> None:
    _restoring(clone)
    clone.fracture("force")


# What leads from fractured, with differences, to the state.
READ_ONLY: dict[str, Callable[[Clone], None]] = {
    "synchronizing": _synchronizing,
    "synchronized": _synchronized,
    "out-of-sync": _out_of_sync,
    "restoring": _restoring,
    "reverse-out-of-sync": _reverse_out_of_sync,
}


@pytest.mark.parametrize("state", READ_ONLY)
def test_a_clone_is_written_to_only_while_it_is_fractured(shared: Mount, state: str) -> None:
    data, ruin = noise("data", 512 * KiB), noise("ruin", 512 * KiB)
    group = shared.add_group(data=data)
    clone = group.add_fractured("nightly")
    write(group.source, 0, ruin)
    assert stat.S_IMODE(clone.path.stat().st_mode) == 0o600
    with opened(clone.path, os.O_RDWR) as old:
        assert os.pwrite(old, b"allowed", 0) == 7
        READ_ONLY[state](clone)
        before = clone.path.read_bytes()
        assert clone.state == state
        assert stat.S_IMODE(clone.path.stat().st_mode) == 0o400
        for offset in (0, len(data) - 1):
            with pytest.raises(OSError) as failure:
                os.pwrite(old, b"x", offset)
            assert failure.value.errno == errno.EBUSY
        assert_same(os.pread(old, len(data), 0), before, "reads go on")
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
            place = f"{group.name}/nightly"
            with shared.refuses(errno.EBUSY, place, state), opened(clone.path, flags):
                pass
        assert_same(clone.path.read_bytes(), before, "nothing was written")
    write(group.source, 0, b"the Source is written to in every state")


def test_an_old_descriptor_writes_again_once_the_clone_is_fractured_again(shared: Mount) -> None:
    group = shared.add_group(data=noise("data", 512 * KiB))
    clone = group.add_fractured("nightly")
    with opened(clone.path, os.O_WRONLY) as old:
        _synchronized(clone)
        with pytest.raises(OSError) as failure:
            os.pwrite(old, b"x", 0)
        assert failure.value.errno == errno.EBUSY
        clone.fracture()
        assert os.pwrite(old, b"again", 70000) == 5
    assert read(clone.path, 70000, 5) == b"again"
    assert clone.delta() == {1}


def test_writing_to_a_fractured_clone_leaves_the_source_alone(shared: Mount) -> None:
    data = noise("data", 512 * KiB)
    group = shared.add_group(data=data)
    clone = group.add_fractured("nightly")
    assert clone.status()["written"] is False
    write(clone.path, 3 * EXTENT - 5, b"across two")
    assert clone.status()["written"] is True
    assert clone.delta() == {2, 3}
    assert_same(group.source.read_bytes(), data, "the Source")
    expected = data[: 3 * EXTENT - 5] + b"across two" + data[3 * EXTENT + 5 :]
    assert_same(clone.path.read_bytes(), expected, "the clone")


def test_programs_that_ask_read_an_lu_in_large_requests(shared: Mount) -> None:
    group = shared.add_group()
    clone = group.add_clone()
    assert group.source.stat().st_blksize == clone.path.stat().st_blksize == 128 * KiB
    assert group.control("status").path.stat().st_blksize == 4096


def test_blocks_are_those_that_the_backing_holds(shared: Mount) -> None:
    group = shared.add_group(16 * MiB)
    write(group.source, 1 * MiB, noise("some", 1 * MiB))
    clone = group.add_fractured("nightly")
    run("sync", group.source, clone.path)  # blocks are allocated when they are written out
    for path, backing in ((group.source, group.backing), (clone.path, clone.backing)):
        assert path.stat().st_blocks == backing.stat().st_blocks
        assert 1 * MiB <= path.stat().st_blocks * 512 < 2 * MiB


# Every way to read and write ---------------------------------------------------------------------


@pytest.mark.parametrize("lu", ["mirrored Source", "split Source", "fractured clone"])
def test_reads_and_writes_of_any_offset_and_length(
    shared: Mount, lu: str, rng: random.Random
) -> None:
    size = 1 * MiB + 512
    model = bytearray(noise("data", size))
    group = shared.add_group(data=bytes(model), extent=16 * KiB)
    clone = group.add_clone("nightly")
    if lu != "mirrored Source":
        clone.fracture()
    path = clone.path if lu == "fractured clone" else group.source
    written: set[int] = set()
    with opened(path, os.O_RDWR) as fd:
        for _ in range(400):
            offset = rng.randrange(size)
            length = min(rng.choice((1, 511, 4096, 16 * KiB, 50000, 300000)), size - offset)
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                assert os.pwrite(fd, data, offset) == length
                model[offset : offset + length] = data
                written |= touched(offset, length, 16 * KiB)
            else:
                assert_same(os.pread(fd, length, offset), model[offset : offset + length], "read")
    assert_same(path.read_bytes(), model, lu)
    if lu == "mirrored Source":
        assert_same(clone.path.read_bytes(), model, "the mirror")
        written = set()
    assert clone.delta() == written


@pytest.mark.parametrize("flags", [0, os.O_SYNC, os.O_DSYNC, os.O_DIRECT], ids=hex)
@pytest.mark.parametrize("lu", ["source", "nightly"])
def test_flushing_and_the_flags_of_open(shared: Mount, lu: str, flags: int) -> None:
    group = shared.add_group(256 * KiB)
    group.add_fractured("nightly")
    path = group.source.with_name(lu)
    with mmap.mmap(-1, 8192) as aligned, opened(path, os.O_RDWR | flags) as fd:
        aligned.write(noise(flags, 8192))
        assert os.pwritev(fd, [aligned], 4096) == 8192
        os.fsync(fd)
        os.fdatasync(fd)
        aligned.seek(0)
        aligned.write(bytes(8192))
        assert os.preadv(fd, [aligned], 4096) == 8192
        assert_same(aligned[:], noise(flags, 8192), "read again")
    assert_same(read(path, 4096, 8192), noise(flags, 8192), "read through another descriptor")
    run("sync", path)


def test_a_mirrored_write_is_in_the_clone_when_it_returns(shared: Mount) -> None:
    group = shared.add_group(256 * KiB)
    clones = [group.add_clone("a"), group.add_clone("b")]
    with opened(group.source, os.O_WRONLY) as fd:
        for number in range(50):
            os.pwrite(fd, b"%04d" % number, number * 5000)
            for clone in clones:
                assert read(clone.path, number * 5000, 4) == b"%04d" % number
    for clone in clones:
        assert clone.delta() == set()
        assert_same(clone.backing.read_bytes(), group.backing.read_bytes(), clone.name)


def test_a_private_mapping_works_and_a_shared_one_is_refused(shared: Mount) -> None:
    """Without the mount option `cached` the kernel keeps no pages that others could share."""
    data = noise("data", 128 * KiB)
    group = shared.add_group(data=data)
    with opened(group.source, os.O_RDWR) as fd:
        with mmap.mmap(fd, len(data), mmap.MAP_PRIVATE) as private:
            assert_same(private[:], data, "the mapping")
        with pytest.raises(OSError) as failure:
            mmap.mmap(fd, len(data), mmap.MAP_SHARED)
        assert failure.value.errno == errno.ENODEV


def test_the_backing_of_a_larger_clone_is_left_alone_behind_the_end(shared: Mount) -> None:
    group = shared.add_group(data=noise("data", 256 * KiB))
    backing = shared.work / "larger"
    backing.write_bytes(b"z" * (300 * KiB))
    group.control("add_clone").write(f"nightly {backing}")
    clone = Clone(group, "nightly", backing)
    clone.wait("synchronized")
    assert clone.path.stat().st_size == 256 * KiB
    write(group.source, 250 * KiB, b"y" * (6 * KiB))
    assert backing.read_bytes() == group.source.read_bytes() + b"z" * (44 * KiB)


def test_a_sparse_lu_stays_sparse(shared: Mount) -> None:
    """A terabyte with a megabyte in it is copied, split off and restored as a megabyte."""
    group = shared.add_group(1 << 40, extent=4 * MiB)
    write(group.source, 1 << 39, noise("some", 1 * MiB))
    clone = group.add_clone("nightly", sync=False)
    assert clone.control("delta_map").read() == "0-262143"
    clone.sync("then-fracture")
    clone.wait("fractured")
    assert_same(read(clone.path, 1 << 39, 1 * MiB), noise("some", 1 * MiB), "the clone")
    write(group.source, 1 << 39, bytes(1 * MiB))
    assert clone.control("delta_map").read() == "131072"
    clone.restore()
    assert_same(read(group.source, 1 << 39, 1 * MiB), noise("some", 1 * MiB), "the Source")
    clone.wait("fractured")
    run("sync", group.source, clone.path)
    held = [path.stat().st_blocks * 512 for path in (group.backing, clone.backing)]
    assert max(held) < 16 * MiB


def _paths_of(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_what_is_removed_is_gone_from_the_tree_and_stays_in_its_backing(shared: Mount) -> None:
    data = noise("data", 256 * KiB)
    group = shared.add_group(data=data)
    clone = group.add_fractured("nightly")
    write(group.source, 0, b"later")
    group.control("remove_clone").write("nightly")
    assert _paths_of(group.source.parent) == {"source"}
    assert not clone.control("state").path.exists()
    shared.control("remove_group").write(group.name)
    assert group.name not in _paths_of(shared.mountpoint)
    assert group.name not in _paths_of(shared.mountpoint / "control")
    assert_same(clone.backing.read_bytes(), data, "the clone's backing")
    assert_same(group.backing.read_bytes(), b"later" + data[5:], "the Source's backing")
    shared.control("add_group").write(f"{group.name} {clone.backing}")
    assert_same(group.source.read_bytes(), data, "the clone as the Source of another group")
