"""The daemon is killed at any moment, and nothing that was acknowledged is lost.

Between the kill and the next mount the maps are read from the volume and compared with the backing
files, bit for bit. The moments are random; the seed of the run is in the first line of its output.
"""

import contextlib
import errno
import os
import random
import threading

import pytest

from tests.mounts.load import Writer
from tests.mounts.mount import (
    Clone,
    Group,
    KiB,
    MiB,
    Mount,
    assert_same,
    differing,
    noise,
    read,
    wait_for,
    write,
)

SIZE = 4 * MiB
EXTENT = 16 * KiB
ALL = set(range(SIZE // EXTENT))
ROUNDS = 6


def writer_on(group: Group, expected: bytes, seed: object) -> Writer:
    """A writer that has begun."""
    writer = Writer(group.source, expected, seed, EXTENT)
    writer.start()
    return writer


def kill_under(mount: Mount, writer: Writer, rng: random.Random) -> None:
    """Kill the daemon after a random number of writes."""
    writer.wait_for_more(rng.randint(1, 60))
    mount.kill()
    writer.failed()


def differences(group: Group, clone: Clone) -> set[int]:
    """The extents that differ in the backing files."""
    return differing(group.backing.read_bytes(), clone.backing.read_bytes(), EXTENT)


def test_killed_during_syncs(mount: Mount, rng: random.Random, rng_seed: str) -> None:
    """The sync goes on by itself, and ends."""
    data = noise("data", SIZE)
    group = mount.add_group(data=data, extent=EXTENT)
    clone = group.add_clone("nightly", sync=False)
    equal = group.add_clone("equal")
    for number in range(ROUNDS):
        clone.rate(rng.choice(["512K", "2M", "8M"]))
        clone.sync()
        writer = writer_on(group, data, f"{rng_seed} {number}")
        kill_under(mount, writer, rng)
        maps = mount.look_behind(group.name).delta
        assert differences(group, clone) <= maps["nightly"], f"round {number}"
        assert differences(group, equal) <= maps["equal"], f"round {number}"
        assert maps["equal"] <= writer.extents_in_doubt(), f"round {number}"

        mount.start()
        assert clone.state in ("synchronizing", "synchronized")
        writer.check(group.source.read_bytes(), f"round {number}")
        writer = writer_on(group, bytes(writer.expected), f"{rng_seed} {number} again")
        writer.wait_for_more(5)
        clone.rate("max")
        equal.wait("synchronized")
        clone.wait("synchronized")
        mount.control("fracture").write(f"{group.name}/nightly {group.name}/equal")
        writer.stop()
        data = bytes(writer.expected)
        assert_same(group.source.read_bytes(), data, f"round {number}: the Source")
        for each in (clone, equal):
            assert differences(group, each) <= each.delta()
        equal.sync()
        equal.wait("synchronized")
        assert_same(equal.path.read_bytes(), data, f"round {number}: equal")


def test_killed_during_protected_restores(mount: Mount, rng: random.Random, rng_seed: str) -> None:
    """The restore goes on: hosts keep what they wrote, the clone keeps every byte, and the maps are
    exact, so that the Delta Map at the end is what hosts have written and nothing else."""
    good = noise("good", SIZE)
    group = mount.add_group(data=good, extent=EXTENT)
    clone = group.add_fractured()
    for number in range(ROUNDS):
        write(group.source, 0, noise(f"ruin {number}", SIZE))
        clone.rate(rng.choice(["1", "512K", "2M", "8M"]))
        clone.restore()
        expected, written, in_doubt = good, set[int](), set[int]()
        for turn in range(2):
            writer = writer_on(group, expected, f"{rng_seed} {number} {turn}")
            kill_under(mount, writer, rng)
            written |= writer.written
            in_doubt |= writer.extents_in_doubt()
            _check_the_maps_of_a_restore(mount, clone, written, in_doubt)
            assert_same(clone.backing.read_bytes(), good, f"round {number}: the clone")
            mount.start()
            writer.check(group.source.read_bytes(), f"round {number}, turn {turn}")
            expected = bytes(writer.expected)
        clone.rate("max")
        clone.wait("fractured")
        assert_same(group.source.read_bytes(), expected, f"round {number}: at the end")
        assert_same(clone.path.read_bytes(), good, f"round {number}: the clone at the end")
        assert written <= clone.delta() <= written | in_doubt


def _check_the_maps_of_a_restore(
    mount: Mount, clone: Clone, written: set[int], in_doubt: set[int]
) -> None:
    """An extent is pending, protected, or equal. If the restore had just ended, the Protected
    Restore Map is the Delta Map already."""
    found = mount.look_behind(clone.group.name)
    delta, protected = found.delta[clone.name], found.protected
    assert differences(clone.group, clone) <= delta | protected
    if found.states[clone.name] == "restoring":
        assert not delta & written, "an extent that was written is not pending"
    else:
        assert not protected
        protected = delta
    assert written <= protected <= written | in_doubt


def test_killed_while_clones_are_split(mount: Mount, rng: random.Random, rng_seed: str) -> None:
    """Nothing is being copied: one clone is mirrored, one is split off, one is written to itself."""
    data = noise("data", SIZE)
    group = mount.add_group(data=data, extent=EXTENT)
    mirror, split, own = (group.add_clone(name) for name in ("mirror", "split", "own"))
    mount.control("fracture").write(f"{group.name}/split {group.name}/own")
    write(own.path, 0, b"its own")
    own_data = own.path.read_bytes()
    marked: set[int] = set()
    in_doubt: set[int] = set()
    for number in range(ROUNDS):
        to_source = writer_on(group, data, f"{rng_seed} {number}")
        to_own = Writer(own.path, own_data, f"{rng_seed} {number} own", EXTENT)
        to_own.start()
        to_own.wait_for_more(rng.randint(1, 30))
        kill_under(mount, to_source, rng)
        to_own.failed()
        marked |= to_source.written
        in_doubt |= to_source.extents_in_doubt()
        maps = mount.look_behind(group.name).delta
        for clone in (mirror, split, own):
            assert differences(group, clone) <= maps[clone.name], f"{clone.name}, round {number}"
        assert maps["mirror"] <= to_source.extents_in_doubt()
        assert marked <= maps["split"] <= marked | in_doubt
        assert marked | to_own.written | {0} <= maps["own"]

        mount.start()
        assert (split.state, own.state) == ("fractured", "fractured")
        to_source.check(group.source.read_bytes(), f"the Source, round {number}")
        to_own.check(own.path.read_bytes(), f"the written clone, round {number}")
        data, own_data = bytes(to_source.expected), bytes(to_own.expected)
        assert_same(split.path.read_bytes(), noise("data", SIZE), f"the split one, {number}")
        mirror.wait("synchronized")
        assert_same(mirror.path.read_bytes(), data, f"the mirror, round {number}")
    own.restore()
    assert_same(group.source.read_bytes(), own_data, "restored")
    own.wait("fractured")
    assert own.delta() == set()


COMMANDS = ["fracture", "sync", "then-fracture", "restore", "restore again", "force"]


@pytest.mark.parametrize("words", COMMANDS)
def test_killed_during_a_command(mount: Mount, rng: random.Random, words: str) -> None:
    """It has taken effect whole, or not at all; if it had returned, it has."""
    good, ruin = noise("good", SIZE), noise("ruin", SIZE)
    for _ in range(3):
        group = mount.add_group(data=good, extent=EXTENT)
        clone = group.add_fractured()
        write(group.source, 0, ruin)
        before, after = _prepare(clone, words)
        returned = _kill_during(mount, clone, words, rng.random() * 0.01)
        differ = differences(group, clone)
        found = mount.look_behind(group.name)
        assert differ <= found.delta["nightly"] | found.protected
        mount.start()
        assert clone.state in (after if returned else before | after)
        if clone.state == "restoring":
            # Where it was to begin again and has not, what the host wrote is there and protected.
            expected = bytearray(good)
            if words in ("restore again", "force") and not returned and group.protected():
                expected[5 * EXTENT : 5 * EXTENT + 9] = b"by a host"
            assert group.protected() in (set(), {5})
            assert_same(group.source.read_bytes(), expected, "the Source")
        elif words not in ("restore again", "force"):
            assert_same(group.source.read_bytes(), ruin, "the Source")
        if clone.state in ("fractured", "restoring", "reverse-out-of-sync"):
            copy = ruin if words in ("fracture", "then-fracture") else good
            if words != "then-fracture" or clone.delta() == set():
                assert_same(clone.path.read_bytes(), copy, "the clone")
        clone.rate("max")


def _prepare(clone: Clone, words: str) -> tuple[set[str], set[str]]:
    """Bring a fractured clone to where the command is given. Returns the states before and after."""
    if words == "fracture":
        clone.sync()
        clone.wait("synchronized")
        return {"synchronized"}, {"fractured"}
    clone.rate(1)
    if words in ("sync", "then-fracture"):
        return {"fractured"}, {"synchronizing"}
    if words == "restore":
        return {"fractured"}, {"restoring"}
    clone.restore()
    write(clone.group.source, 5 * EXTENT, b"by a host")
    return {"restoring"}, {"restoring" if words == "restore again" else "reverse-out-of-sync"}


def _kill_during(mount: Mount, clone: Clone, words: str, delay_s: float) -> bool:
    """Kill the daemon a moment after the command was given. Whether it had returned."""
    returned = False

    def give() -> None:
        nonlocal returned
        with contextlib.suppress(OSError):
            match words:
                case "fracture":
                    clone.fracture()
                case "force":
                    clone.fracture("force")
                case "sync":
                    clone.sync()
                case "then-fracture":
                    clone.sync("then-fracture")
                case _:
                    clone.restore()
            returned = True

    thread = threading.Thread(target=give)
    thread.start()
    thread.join(delay_s)
    mount.kill()
    thread.join()
    return returned


def test_killed_while_groups_and_clones_come_and_go(mount: Mount, rng: random.Random) -> None:
    """A clone is there whole or not at all, and in either case it can be added and removed again."""
    data = noise("data", SIZE)
    group = mount.add_group(data=data, extent=EXTENT)

    def come_and_go() -> None:
        with contextlib.suppress(OSError):
            for number in range(1000):
                clone = group.add_clone(f"c{number % 3}")
                clone.fracture()
                group.control("remove_clone").write(clone.name)
                mount.control("add_group").write(f"other {mount.work}/other size=1M")
                mount.control("remove_group").write("other")

    for _ in range(ROUNDS):
        thread = threading.Thread(target=come_and_go)
        thread.start()
        thread.join(rng.random() * 0.2)
        mount.kill()
        thread.join()
        mount.start()
        assert_same(group.source.read_bytes(), data, "the Source")
        assert set(mount.status()["groups"]) <= {group.name, "other"}
        if "other" in mount.status()["groups"]:
            mount.control("remove_group").write("other")
        for name in group.status()["clones"]:
            clone = group.clone(name)
            assert clone.state in ("synchronizing", "synchronized", "fractured")
            clone.sync()
            clone.wait("synchronized")
            assert_same(clone.path.read_bytes(), data, name)
            group.control("remove_clone").write(name)
    assert mount.status()["groups"][group.name]["clones"] == {}


def test_killed_with_descriptors_open_they_fail_and_the_next_mount_goes_on(mount: Mount) -> None:
    data = noise("data", SIZE)
    group = mount.add_group(data=data, extent=EXTENT)
    clone = group.add_clone()
    old = os.open(group.source, os.O_RDWR)
    os.pwrite(old, b"acknowledged", 1000)
    mount.kill()
    for request in (
        lambda: os.pread(old, 10, 0),
        lambda: os.pwrite(old, b"x", 0),
        lambda: os.fsync(old),
        lambda: os.close(old),
    ):
        with pytest.raises(OSError) as failure:
            request()
        assert failure.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    mount.start()
    assert read(group.source, 1000, 12) == b"acknowledged"
    assert read(clone.path, 1000, 12) == b"acknowledged"
    assert clone.state == "synchronized"


def test_killed_again_and_again_while_it_recovers(mount: Mount, rng: random.Random) -> None:
    """Recovery can itself be cut off at any point, and begins again."""
    good = noise("good", SIZE)
    group = mount.add_group(data=good, extent=EXTENT)
    clone = group.add_fractured()
    write(group.source, 0, noise("ruin", SIZE))
    clone.rate("100K")
    clone.restore()
    write(group.source, 9 * EXTENT, b"acknowledged")
    expected = good[: 9 * EXTENT] + b"acknowledged" + good[9 * EXTENT + 12 :]
    mount.kill()
    for _ in range(5):
        mount.start_and_kill(rng.random() * 0.3)
    mount.start()
    assert clone.state == "restoring"
    assert_same(group.source.read_bytes(), expected, "the Source")
    clone.rate("max")
    clone.wait("fractured")
    assert clone.delta() == {9}
    assert_same(group.backing.read_bytes(), expected, "its backing")
    assert_same(clone.backing.read_bytes(), good, "the clone")


def test_a_mirrored_write_that_was_cut_off_is_made_equal(
    mount: Mount, rng: random.Random, rng_seed: str
) -> None:
    """The Source may have it and the mirrors not: the maps say so, and the next mount copies it."""
    data = noise("data", SIZE)
    group = mount.add_group(data=data, extent=EXTENT)
    clones = [group.add_clone(f"c{number}") for number in range(4)]
    cut_off = 0
    for number in range(ROUNDS):
        writer = writer_on(group, data, f"{rng_seed} {number}")
        kill_under(mount, writer, rng)
        maps = mount.look_behind(group.name).delta
        for clone in clones:
            assert differences(group, clone) <= maps[clone.name] <= writer.extents_in_doubt()
        cut_off += any(maps[clone.name] for clone in clones)
        mount.start()
        writer.check(group.source.read_bytes(), f"round {number}")
        data = bytes(writer.expected)
        for clone in clones:
            wait_for(lambda clone=clone: clone.state == "synchronized")  # type: ignore[misc]
            assert_same(clone.path.read_bytes(), data, f"{clone.name}, round {number}")
    print(f"{cut_off} of {ROUNDS} kills have cut a write off")
