"""The daemon is killed under an ext4 that is in use, and under hosts that write beside it.

A Source has an ext4 on its first part, through a loop device, and a raw area behind it. What may be
asked of each after a SIGKILL is not the same:

- In the raw area all that was acknowledged must be there: the page cache of the backing has it.
- Of the ext4, all that was acknowledged *to ext4* must be there. What a program wrote into a file and
  did not fsync may never have left ext4's own page cache, and goes with the mount: so a file that was
  fsynced is there whole; one that was not may lack its end, or be missing, or have zeros where data
  did not come to the disk, and has no byte that is not its own.

When the daemon has died, the loop device answers every request with an error; ext4 stops its journal
and can only be unmounted. Nothing that it cannot write any more reaches the Source, so what is there
is what an ext4 leaves whose machine was switched off: its journal must be replayed before anybody may
ask whether it is sound. That is done by mounting it, which shows that it can be mounted; then
`e2fsck -fn`, which changes nothing, must find nothing. (`e2fsck -fn` before the replay would complain
of what the journal has; `-fy` would mend a real fault, and hide it.)
"""

import contextlib
import random
from dataclasses import dataclass, field

import pytest

from tests.mounts.load import FileWriter, Writer
from tests.mounts.mount import (
    Clone,
    Group,
    KiB,
    MiB,
    Mount,
    assert_same,
    attach,
    differing,
    digest,
    mount_disk,
    noise,
    read,
    run,
    write,
)

DISK = 12 * MiB
RAW = 2 * MiB
EXTENT = 16 * KiB
ROUNDS = 8


@dataclass
class Production:
    """The Source in use: `files` of the ext4 and the bytes `raw` of the other area are what must be
    there."""

    group: Group
    cleanup: contextlib.ExitStack
    direct: bool
    files: dict[str, bytes] = field(default_factory=dict)
    raw: bytes = bytes(RAW)

    def begin(self) -> None:
        """Mount the ext4, which replays its journal."""
        self.where = self.group.mount.work / "disk"
        self.loop = attach(self.cleanup, self.group.source, direct=self.direct, size=DISK)
        self.unmount = mount_disk(self.cleanup, self.loop.path, self.where, "ext4")

    def end(self) -> None:
        """Unmount it; it must be sound."""
        self.unmount()
        run("e2fsck", "-fn", self.loop.path)
        self.loop.detach()

    def make(self) -> None:
        """An ext4 with a few files in it, and noise in the raw area."""
        loop = attach(self.cleanup, self.group.source, size=DISK)
        run("mkfs.ext4", "-q", loop.path)
        loop.detach()
        self.begin()
        (self.where / "lost+found").rmdir()
        for number in range(8):
            data = self.files[f"first {number}"] = noise(number, 30 * KiB)
            (self.where / f"first {number}").write_bytes(data)
        self.end()
        self.raw = noise("raw", RAW)
        write(self.group.source, DISK, self.raw)

    def work_until_killed(self, seed: str, rng: random.Random) -> None:
        """Files are made and raw bytes written, until the daemon is killed at a random moment; what
        must be there is then known, and looked for after the next mount."""
        mount = self.group.mount
        raw = Writer(self.group.source, self.raw, f"{seed} raw", EXTENT, start=DISK)
        names = [f"{seed} {number}".replace("/", " ") for number in range(2)]
        # Each has half of the old files to remove.
        own = [dict(sorted(self.files.items())[number::2]) for number in range(2)]
        files = [
            FileWriter(self.where, name, name, old) for name, old in zip(names, own, strict=True)
        ]
        writers: tuple[Writer | FileWriter, ...] = (raw, *files)
        for each in writers:
            each.start()
        raw.wait_for_more(rng.randint(1, 150))
        mount.kill()
        for each in writers:
            each.failed()
        self.unmount()
        self.loop.detach()
        self._raw_writer, self._file_writers = raw, files

    def check(self, what: str) -> None:
        """All that must be there is."""
        self._raw_writer.check(read(self.group.source, DISK, RAW), f"{what}: the raw area")
        self.raw = bytes(self._raw_writer.expected)
        found = _merged(self._file_writers).check(what)
        self.files = found


def _merged(writers: list[FileWriter]) -> FileWriter:
    """What several writers in one directory know together."""
    whole = writers[0]
    for each in writers[1:]:
        whole.flushed |= each.flushed
        whole.begun |= each.begun
        whole.removed |= each.removed
        whole.being_removed |= each.being_removed
    return whole


def check_the_maps(mount: Mount, clones: list[Clone]) -> None:
    """Every difference of the backing files is in a map."""
    for clone in clones:
        found = mount.look_behind(clone.group.name)
        source, copy = clone.group.backing.read_bytes(), clone.backing.read_bytes()
        marked = found.delta[clone.name]
        if found.states[clone.name] == "restoring":
            marked |= found.protected
        assert differing(source, copy, EXTENT) <= marked, clone.name


@pytest.mark.parametrize("during", ["steady state", "sync", "restore"])
def test_killed_under_a_file_system(
    mount: Mount,
    cleanup: contextlib.ExitStack,
    rng: random.Random,
    rng_seed: str,
    during: str,
) -> None:
    """One clone is mirrored or being synchronized, or nothing of the kind goes on while a restore is
    running from the other, which is split off and never changes."""
    group = mount.add_group(DISK + RAW, extent=EXTENT)
    production = Production(group, cleanup, direct=rng.random() < 0.5)
    production.make()
    good_files, good_raw = dict(production.files), production.raw
    keeper, mirror = group.add_clone("keeper"), group.add_clone("mirror")
    keeper.fracture()
    kept = digest(keeper.backing)
    for number in range(ROUNDS):
        what = f"round {number}, {during}"
        if during == "restore":
            keeper.rate(rng.choice(["1", "1M", "4M"]))
            keeper.restore()
            production.files, production.raw = dict(good_files), good_raw
        elif during == "sync":
            mirror.fracture()
            production.raw = noise(f"{rng_seed} {number}", RAW)  # something to copy
            write(group.source, DISK, production.raw)
            mirror.rate(rng.choice(["256K", "1M", "4M"]))
            mirror.sync()
        production.begin()
        production.work_until_killed(f"{rng_seed} {number}", rng)
        check_the_maps(mount, [keeper, mirror])
        assert digest(keeper.backing) == kept, f"{what}: the clone that was split off"

        mount.start()
        production.begin()
        production.check(what)
        for clone in (keeper, mirror):
            clone.rate("max")
        if during == "restore":
            keeper.wait("fractured")
        production.end()
        _check_at_rest(production, keeper, kept, what)
        if during != "restore":
            mirror.wait("synchronized")
            assert_same(mirror.path.read_bytes(), group.source.read_bytes(), f"{what}: the mirror")


def _check_at_rest(production: Production, keeper: Clone, kept: str, what: str) -> None:
    """With nothing going on: the mounted files show it too, and the map of the clone is whole."""
    group = production.group
    assert_same(read(group.source, DISK, RAW), production.raw, f"{what}: the raw area at rest")
    assert digest(keeper.path) == kept, f"{what}: the clone that was split off"
    differ = differing(group.source.read_bytes(), keeper.path.read_bytes(), EXTENT)
    assert differ <= keeper.delta(), what
