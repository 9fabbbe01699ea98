"""How fast a restore copies, without hosts: against cp, a bare loop of copy_file_range and block-stream;
and on file systems that can share blocks."""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.bench.copying import OFTEN, Whole, timed, watch
from tests.bench.peers import overlay
from tests.bench.results import Part, spread
from tests.bench.scale import Scale, shuffled
from tests.bench.stage import EXTENT, MAKE, Mount, file_system, flush, opened, read_through, run
from tests.bench.tables import table
from tests.bench.under_load import CLONEFS, must_look_like

FULL, SCATTERED = "all extents", "every 8th extent"
COPY_SECONDS = "seconds: "
CP, CP_FSYNC = "cp --reflink=never", "cp --reflink=never, fsync"
RANGES, RANGES_FSYNC = "copy_file_range", "copy_file_range, fsync"
STREAM = "block-stream"


def measure_sweeps(whole: Whole, part: Part) -> None:
    """Each way to copy what differs."""
    extents = -(-whole.size // EXTENT)
    scattered = [range(extent, extent + 1) for extent in range(3, extents, 8)]
    ways: list[Callable[[], None]] = [
        lambda: _sweep(whole, part, FULL, None),
        lambda: _sweep(whole, part, SCATTERED, scattered),
        lambda: _ranges(whole, part, FULL, [range(extents)]),
        lambda: _ranges(whole, part, SCATTERED, scattered),
        lambda: _cp(whole, part, FULL),
        lambda: _stream(whole, part),
    ]
    for way in shuffled(ways):
        way()


def _sweep(
    whole: Whole, part: Part, what: str, pieces: list[range] | None, *, cached: bool = True
) -> None:
    if pieces is not None:  # what hosts wrote to during the last restore is no part of it
        watch(whole.restore, whole.restoring, OFTEN)
    whole.ruin(pieces)
    delta = whole.mount.group(whole.group)["clones"]["clone"]["delta_extents"]
    assert delta == (len(pieces) if pieces else -(-whole.size // EXTENT))
    whole.warm()
    if not cached:
        whole.forget()
    copying = watch(whole.restore, whole.restoring, OFTEN)
    whole.must_be_restored()
    part.add(COPY_SECONDS + what, CLONEFS, copying.seconds)


def _cp(whole: Whole, part: Part, what: str) -> None:
    """Over the old file, which cp empties first."""
    read_through(whole.clone)
    took = timed(lambda: run("cp", "--reflink=never", whole.clone, whole.target))
    part.add(COPY_SECONDS + what, CP, took)
    part.add(COPY_SECONDS + what, CP_FSYNC, took + timed(lambda: flush(whole.target)))


def _ranges(whole: Whole, part: Part, what: str, pieces: list[range]) -> None:
    """Into the old file, a call for each run of extents."""
    for path in (whole.clone, whole.target):
        read_through(path)
    took = timed(lambda: _copy_ranges(whole, pieces))
    part.add(COPY_SECONDS + what, RANGES, took)
    part.add(COPY_SECONDS + what, RANGES_FSYNC, took + timed(lambda: flush(whole.target)))


def _copy_ranges(whole: Whole, pieces: list[range]) -> None:
    with opened(whole.clone) as clone, opened(whole.target, os.O_WRONLY) as target:
        for run_of in pieces:
            at, stop = run_of[0] * EXTENT, min(whole.size, (run_of[-1] + 1) * EXTENT)
            while at < stop:
                at += os.copy_file_range(clone, target, stop - at, at, at)


def _stream(whole: Whole, part: Part) -> None:
    read_through(whole.clone)
    with overlay(whole.mount.work, whole.clone, writable=False) as over:
        copying = watch(over.stream, over.streaming, OFTEN)
        must_look_like(over, whole.clone)
    part.add(COPY_SECONDS + FULL, STREAM, copying.seconds)


# File systems that can share blocks


@contextlib.contextmanager
def on(work: Path, kind: str, scale: Scale) -> Iterator[tuple[str, Whole]]:
    """An LU whose backings are on a file system of that kind."""
    with file_system(work, kind, 6 * scale.whole) as place:
        mount = Mount(place)
        with mount.served():
            yield kind, Whole(mount, "shared", scale.whole)


def measure_shared(whole: Whole, part: Part, kind: str) -> None:
    """A full delta there, against cp: the kernel has to give up the pages of what is overwritten,
    which takes it longer than to share blocks; so also without any."""
    for cached, what in shuffled([(True, shared(kind)), (False, shared(kind, cached=False))]):
        ways: list[Callable[[], None]] = [
            partial(_sweep, whole, part, what, None, cached=cached),
            partial(_cp, whole, part, what),
        ]
        for way in shuffled(ways):
            way()


def shared(kind: str, *, cached: bool = True) -> str:
    """The name of the case."""
    return f"{FULL}, {kind}" + ("" if cached else ", Source not in the page cache")


def sweep_table(part: Part) -> str:
    rows = []
    sharing = (shared(kind, cached=cached) for kind in MAKE for cached in (True, False))
    for what in (FULL, SCATTERED, *sharing):
        case = COPY_SECONDS + what
        for who in (CLONEFS, CP, CP_FSYNC, RANGES, RANGES_FSYNC, STREAM):
            if part.has(case, who):
                how = "" if who == CLONEFS else spread(part.ratios(case, who, CLONEFS))
                rows.append((what, who, spread(part.values(case, who)), how))
    return table(("what differs", "way", "s", "clonefs is so many times as fast"), *rows)
