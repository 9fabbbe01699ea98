"""What hosts get while all of an LU is restored, beside a qcow2 overlay under block-stream.

The overlay lies on the very file of the clone, so that both copy the same bytes out of the same cache.
"""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.copying import SELDOM, Copying, Whole, watch
from tests.bench.load import Hosts, Job, Measured, Requests, hosts
from tests.bench.peers import Overlay, overlay
from tests.bench.results import Part, median, spread
from tests.bench.scale import Scale, shuffled
from tests.bench.stage import EXTENT, opened, read_through
from tests.bench.tables import table

CLONEFS, OVERLAY = "clonefs", "qcow2 overlay"
JOBS = [Job(rw, "4k", depth) for rw in ("randread", "randwrite") for depth in (1, 16)]
IDLE, SWEEP = "idle", "while it copies"
IOPS, P50, P99, COPY = "requests/s", "p50, µs", "p99, µs", "whole copy, s"
SHORTEST = 0.2  # seconds of copying without which a round says nothing


def load_case(job: Job, what: str) -> str:
    """The name of the case."""
    return f"random 4 KiB {'writes' if job.writes else 'reads'}, depth {job.depth}: {what}"


def measure_under_load(whole: Whole, part: Part, job: Job, scale: Scale) -> None:
    for who, measure in shuffled([(CLONEFS, _clonefs_loaded), (OVERLAY, _overlay_loaded)]):
        idle, during, seconds = measure(whole, job, scale)
        for when, got in ((IDLE, idle), (SWEEP, during)):
            if got is None:
                part.note(
                    f"A round of {who}, {load_case(job, when)}, was thrown away: "
                    f"the copy took {seconds:.2f} s, too short to tell."
                )
            for what, value in _numbers(got).items():
                part.add(load_case(job, what), f"{who}, {when}", value)
        part.add(load_case(job, COPY), who, seconds)


def _numbers(got: Measured | None) -> dict[str, float | None]:
    if got is None:
        return dict.fromkeys((IOPS, P50, P99))
    return {IOPS: got.iops, P50: 1e6 * got.p50, P99: 1e6 * got.p99}


Loaded = tuple[Measured | None, Measured | None, float]


def _clonefs_loaded(whole: Whole, job: Job, scale: Scale) -> Loaded:
    """Idle, while a restore copies, and the seconds of the restore."""
    whole.ruin()
    whole.warm()
    with hosts(whole.mount.work, whole.lu, job, whole.size) as load:
        loaded = _live_through(load, scale, whole.restore, whole.restoring)
    whole.must_be_restored()
    return loaded


def _overlay_loaded(whole: Whole, job: Job, scale: Scale) -> Loaded:
    """The same of an overlay on the clone."""
    work = whole.mount.work
    read_through(whole.clone)
    with overlay(work, whole.clone, writable=job.writes) as over:
        with hosts(work, over.where, job, whole.size) as load:
            loaded = _live_through(load, scale, over.stream, over.streaming)
        if not job.writes:
            must_look_like(over, whole.clone)
    return loaded


def _live_through(
    load: Hosts, scale: Scale, begin: Callable[[], None], copies: Callable[[], bool]
) -> Loaded:
    idle_from = time.time()
    time.sleep(scale.seconds)
    idle_until = time.time()
    copying = watch(begin, copies, SELDOM)
    requests = load.stop()
    return requests.within(idle_from, idle_until), _of_hosts(requests, copying), copying.seconds


def _of_hosts(requests: Requests, copying: Copying) -> Measured | None:
    """What hosts got while it was surely copying; None if that was too short to tell."""
    if copying.last_seen - copying.begun < SHORTEST:
        return None
    return requests.within(copying.begun, copying.last_seen)


def must_look_like(over: Overlay, clone: Path) -> None:
    assert isinstance(over.where, Path)
    with opened(over.where) as one, opened(clone) as other:
        size = os.fstat(other).st_size
        for at in random.sample(range(0, size, EXTENT), 64):
            if os.pread(one, EXTENT, at) != os.pread(other, EXTENT, at):
                raise AssertionError("the overlay does not read as the clone does")


def load_table(part: Part) -> str:
    whos = [f"{who}, {when}" for who in (CLONEFS, OVERLAY) for when in (IDLE, SWEEP)]
    cases = [load_case(job, what) for job in JOBS for what in (IOPS, P50, P99)]
    return table(
        ("", *whos),
        *((case, *(median(part.values(case, who)) for who in whos)) for case in cases),
        *(
            (case, "", median(part.values(case, CLONEFS)), "", median(part.values(case, OVERLAY)))
            for case in (load_case(job, COPY) for job in JOBS)
        ),
    )


def compared_table(part: Part) -> str:
    head = ("", f"clonefs: times {IDLE}", f"{OVERLAY}: times {IDLE}", f"clonefs: times {OVERLAY}")
    rows = [
        (
            case,
            *(
                spread(part.ratios(case, f"{who}, {SWEEP}", f"{who}, {IDLE}"))
                for who in (CLONEFS, OVERLAY)
            ),
            spread(part.ratios(case, f"{CLONEFS}, {SWEEP}", f"{OVERLAY}, {SWEEP}")),
        )
        for case in (load_case(job, what) for job in JOBS for what in (IOPS, P50, P99))
    ]
    copies = [
        (case, "", "", spread(part.ratios(case, CLONEFS, OVERLAY)))
        for case in (load_case(job, COPY) for job in JOBS)
    ]
    return table(head, *rows, *copies)
