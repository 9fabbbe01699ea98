"""Syncs: a new clone of everything, a clone of which one extent in a hundred differs, and a sparse
Source; against `cp --sparse=always` of the same file."""

import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.results import Part, spread
from tests.bench.scale import Scale, rounds, shuffled
from tests.bench.stage import EXTENT, MiB, Mount, TiB, fill, fill_pieces, flush, must_be_equal, run
from tests.bench.tables import table

CLONEFS, CLONEFS_FSYNC = "clonefs", "clonefs, then fractured"
CP, CP_FSYNC = "cp --sparse=always", "cp --sparse=always, fsync"
FULL, FEW, SPARSE = "full, 1 GiB", "1% scattered, of 1 GiB", "sparse, 1 GiB in 16 places of 1 TiB"
PLACES = 16


def measure_part(work: Path, part: Part, scale: Scale) -> None:
    """All rounds."""
    mount = Mount(work)
    with mount.served():
        mount.split_group("dense", scale.whole, scale.whole, ["kept"])
        mount.add_group("sparse", TiB)
        for at in range(PLACES):
            fill(mount.lu("sparse"), scale.whole // PLACES, at * TiB // PLACES)
        ways: list[Callable[[], None]] = [
            lambda: _first_sync(mount, part, "dense", FULL),
            lambda: _first_sync(mount, part, "sparse", SPARSE),
            lambda: _resync(mount, part, scale),
            lambda: _cp(mount, part, "dense", (FULL, FEW)),
            lambda: _cp(mount, part, "sparse", (SPARSE,)),
        ]
        for _ in rounds(part, scale):
            for way in shuffled(ways):
                way()


def _first_sync(mount: Mount, part: Part, group: str, case: str) -> None:
    """A new clone, into a new file."""
    started = time.perf_counter()
    mount.add_clone(group)
    synchronized = time.perf_counter()
    mount.fracture(group, "clone")
    fractured = time.perf_counter()
    _look(mount, group, "clone")
    mount.remove(group, "clone")
    part.add(case, CLONEFS, synchronized - started)
    part.add(case, CLONEFS_FSYNC, fractured - started)


def _resync(mount: Mount, part: Part, scale: Scale) -> None:
    """A clone that was equal some time ago."""
    extents = range(7, scale.whole // EXTENT, 100)
    fill_pieces(mount.lu("dense"), ((extent * EXTENT, EXTENT) for extent in extents))
    assert mount.group("dense")["clones"]["kept"]["delta_extents"] == len(extents)
    started = time.perf_counter()
    mount.command("dense/kept/sync")
    mount.wait("dense", "synchronized", "kept")
    synchronized = time.perf_counter()
    mount.fracture("dense", "kept")
    fractured = time.perf_counter()
    _look(mount, "dense", "kept")
    part.add(FEW, CLONEFS, synchronized - started)
    part.add(FEW, CLONEFS_FSYNC, fractured - started)


def _look(mount: Mount, group: str, clone: str) -> None:
    """Raise AssertionError if the copy is not one."""
    if group == "dense":
        must_be_equal(mount.backing(group), mount.backing(group, clone))
        return
    for backing in (mount.backing(group), mount.backing(group, clone)):
        assert backing.stat().st_blocks * 512 < TiB // 64, f"{backing} is not sparse"
    run(
        *("cmp", f"--bytes={64 * MiB}", f"--ignore-initial={TiB // PLACES}"),
        *(mount.backing(group), mount.backing(group, clone)),
    )


def _cp(mount: Mount, part: Part, group: str, cases: tuple[str, ...]) -> None:
    """Into a new file, as for a first sync. For a later one there is nothing that cp could leave out."""
    target = mount.work / "target"
    started = time.perf_counter()
    run("cp", "--sparse=always", mount.backing(group), target)
    copied = time.perf_counter()
    flush(target)
    flushed = time.perf_counter()
    target.unlink()
    for case in cases:
        part.add(case, CP, copied - started)
        part.add(case, CP_FSYNC, flushed - started)


COMPARED = (
    (CLONEFS, CP, "synchronized, against cp"),
    (CLONEFS_FSYNC, CP_FSYNC, "fractured, which flushes, against cp and fsync"),
)


def report(part: Part) -> str:
    """Markdown."""
    return table(
        ("what differs", "until", "clonefs, s", "cp, s", "clonefs is so many times as fast"),
        *(
            (
                case,
                words,
                spread(part.values(case, ours)),
                spread(part.values(case, theirs)),
                spread(part.ratios(case, theirs, ours)),
            )
            for case in (FULL, FEW, SPARSE)
            for ours, theirs, words in COMPARED
        ),
    )
