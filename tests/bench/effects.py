"""Restores as hosts meet them first: when one is in effect, and the first read of a pending extent."""

import os
import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

from tests.bench.copying import timed
from tests.bench.load import Job, hosts
from tests.bench.results import Part, spread
from tests.bench.scale import Scale, shuffled
from tests.bench.stage import (
    EXTENT,
    LARGEST,
    STUCK,
    GiB,
    MiB,
    Mount,
    TiB,
    fill,
    fill_pieces,
    must_be_equal,
    opened,
)
from tests.bench.tables import table

# A restore is in effect when the write returns


class Effect(NamedTuple):
    """A Source, and how much of it differs from its clone."""

    group: str
    title: str
    size: int
    full: bool


SECONDS = "in effect, s"
FEW, ALL, BUSY = "8 extents differ", "all extents differ", "8 extents differ, four programs write"
EFFECT_SIZES = {"1 GiB": GiB, "1 TiB": TiB, "16 TiB": LARGEST}
EFFECTS_A_ROUND = 3


def effect(title: str, differs: str) -> str:
    """The name of the case."""
    return f"{title}, {differs}"


def prepare(mount: Mount, scale: Scale) -> list[Effect]:
    """The Sources, sparse, with a fractured clone each. The first 16 MiB are data and the rate is low
    where all of it differs: the Sync Engine stays there, and the rest stays pending."""
    sizes = {"1 GiB": GiB, "1 TiB": TiB} if scale.quick else EFFECT_SIZES
    found = [
        Effect(f"{title.replace(' ', '')}-{'full' if full else 'few'}", title, size, full)
        for title, size in sizes.items()
        for full in (False, True)
    ]
    with mount.served():
        for each in found:
            mount.split_group(each.group, each.size, 16 * MiB, ["clone"])
            if each.full:
                mount.command(f"{each.group}/clone/rate", STUCK)
    mount.fill_delta_maps(*(each.group for each in found if each.full))
    return found


def measure_effects(mount: Mount, part: Part, effects: list[Effect]) -> None:
    """Some restores of each; the median of a round counts."""
    for each in shuffled(effects):
        differs = ALL if each.full else FEW
        times = [_restore_once(mount, each) for _ in range(EFFECTS_A_ROUND)]
        part.add(effect(each.title, differs), SECONDS, statistics.median(times))
    busy = next(each for each in effects if each.size == TiB and not each.full)
    job = Job("randwrite", "4k", 4, direct=False)
    with hosts(mount.work, mount.lu(busy.group), job, 16 * MiB):
        times = [_restore_once(mount, busy, looks=False) for _ in range(EFFECTS_A_ROUND)]
    part.add(effect(busy.title, BUSY), SECONDS, statistics.median(times))


def _restore_once(mount: Mount, each: Effect, *, looks: bool = True) -> float:
    """Ruin 8 extents, restore; seconds until it was in effect. What is read next must be right."""
    if mount.state(each.group) == "restoring":
        mount.command(f"{each.group}/clone/fracture", "force")
    places = [(2 * number + 1) * each.size // 16 // EXTENT * EXTENT for number in range(8)]
    fill_pieces(mount.lu(each.group), ((place, 4096) for place in places))
    took = mount.command(f"{each.group}/clone/protected_restore")
    with opened(mount.lu(each.group)) as source:
        if any(os.pread(source, 4096, place).strip(b"\0") for place in places):
            raise AssertionError("the Source does not read as the clone does")
    if each.full:
        pending = mount.group(each.group)["restore"]["pending"]
        if pending < 0.98 * each.size // EXTENT:
            raise AssertionError(f"only {pending} extents of {each.group} were pending")
    else:
        mount.wait(each.group, "fractured")
    return took


# The first read of a pending extent

FIRST_READ_SIZE = 256 * MiB
FIRST_READS = 400
READ = "4 KiB read"
OF_CLONE, PENDING, AGAIN = "of the clone", "of a pending extent, first", "of the same extent again"


def measure_first_reads(mount: Mount, part: Part) -> None:
    """Read one extent of the clone and one of the Source, which is pending, in turns. The Sync
    Engine is far from the second half."""
    fill(mount.lu("reads"), FIRST_READ_SIZE)
    mount.command("reads/clone/rate", STUCK)
    mount.command("reads/clone/protected_restore")
    extents = FIRST_READ_SIZE // EXTENT
    chosen = random.sample(range(extents // 2, extents), 2 * FIRST_READS)
    times: dict[str, list[float]] = {OF_CLONE: [], PENDING: [], AGAIN: []}
    with opened(mount.lu("reads", "clone")) as clone, opened(mount.lu("reads")) as source:
        for other, extent in zip(chosen[::2], chosen[1::2], strict=True):
            for name, fd, at in (
                (OF_CLONE, clone, other),
                (PENDING, source, extent),
                (AGAIN, source, extent),
            ):
                times[name].append(timed(_read(fd, at * EXTENT + 8192)))
    if mount.group("reads")["restore"]["sync_copies"] > extents // 2:
        raise AssertionError("the extents were not pending")
    mount.command("reads/clone/rate", "max")
    mount.wait("reads", "fractured")
    must_be_equal(mount.backing("reads"), mount.backing("reads", "clone"))
    for name, values in times.items():
        part.add(READ, name, 1e6 * statistics.median(values))


def _read(fd: int, offset: int) -> Callable[[], None]:
    def work() -> None:
        if len(os.pread(fd, 4096, offset)) != 4096:
            raise AssertionError("a short read")

    return work


def effect_table(part: Part) -> str:
    cases = [effect(title, differs) for title in EFFECT_SIZES for differs in (FEW, ALL, BUSY)]
    return table(
        ("", "ms"),
        *(
            (case, spread(1e3 * value for value in part.values(case, SECONDS)))
            for case in cases
            if part.has(case, SECONDS)
        ),
    )


def first_read_table(part: Part) -> str:
    return table(
        ("", "µs", f"times one {OF_CLONE}"),
        *(
            (name, spread(part.values(READ, name)), spread(part.ratios(READ, name, OF_CLONE)))
            for name in (OF_CLONE, PENDING, AGAIN)
        ),
    )
