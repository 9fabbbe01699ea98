"""Restores: when they are in effect, what hosts get while they copy, and how fast they copy."""

import contextlib
from pathlib import Path

from tests.bench import effects, sweeps, under_load
from tests.bench.copying import Whole
from tests.bench.results import Part
from tests.bench.scale import Scale, rounds, shuffled
from tests.bench.stage import MAKE, GiB, Mount


def measure_part(work: Path, part: Part, scale: Scale) -> None:
    """All rounds of everything here."""
    with contextlib.ExitStack() as stack:
        mount = Mount(work, volume=GiB)
        restored = effects.prepare(mount, scale)
        file_systems = [
            stack.enter_context(sweeps.on(work, kind, scale))
            for kind in ([] if scale.quick else MAKE)
        ]
        stack.enter_context(mount.served())
        whole = Whole(mount, "whole", scale.whole)
        mount.split_group("reads", effects.FIRST_READ_SIZE, effects.FIRST_READ_SIZE, ["clone"])
        for _ in rounds(part, scale):
            effects.measure_effects(mount, part, restored)
            effects.measure_first_reads(mount, part)
            for job in shuffled(under_load.JOBS):
                under_load.measure_under_load(whole, part, job, scale)
            sweeps.measure_sweeps(whole, part)
            for kind, there in file_systems:
                sweeps.measure_shared(there, part, kind)


def report(part: Part) -> str:
    """Markdown."""
    return "\n\n".join(
        [
            "Milliseconds until a restore is in effect:",
            effects.effect_table(part),
            "Reads of 4 KiB through the mount, one after the other:",
            effects.first_read_table(part),
            "Hosts at random places, idle and while all of it is copied:",
            under_load.load_table(part),
            "The same, compared:",
            under_load.compared_table(part),
            "Seconds of the copying, without hosts:",
            sweeps.sweep_table(part),
        ]
    )
