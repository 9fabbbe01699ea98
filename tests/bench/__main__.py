"""Measure clonefs beside its peers, and report."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import growth, isolation, report, restore, steady, sync
from tests.bench.results import Part, load, save
from tests.bench.scale import Scale, load_average, machine, say
from tests.bench.stage import stage


@dataclass(frozen=True)
class Kind:
    """How a part is measured, and about how many seconds it takes: before the rounds, and for each."""

    measure: Callable[[Path, Part, Scale], None]
    before: float
    round: float

    def estimate(self, scale: Scale) -> float:
        """Seconds."""
        return self.before + scale.rounds * self.round


KINDS = {
    "steady": Kind(steady.measure_part, 30, 115),
    "restore": Kind(restore.measure_part, 80, 70),
    "sync": Kind(sync.measure_part, 5, 10),
    "growth": Kind(growth.measure_part, 50, 60),
    "isolation": Kind(isolation.measure_part, 10, 20),
}
PROGRAMS = ("fio", "qemu-storage-daemon", "qemu-img", "losetup", "mkfs.xfs", "mkfs.btrfs")
RESULTS = Path(os.environ.get("TMPDIR", "/var/tmp")) / "clonefs-bench.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, and print or record the report of all that was measured."""
    options = _parser().parse_args(arguments)
    scale = (
        Scale(options.rounds or 1, options.seconds or 0.2, quick=True)
        if options.quick
        else Scale(options.rounds or 5, options.seconds or 0.5)
    )
    names = [name for name in KINDS if name in options.parts or "all" in options.parts]
    if names:
        _must_be_able()
        _measure_all(names, scale, options.results)
    parts = load(options.results)
    if not parts:
        sys.exit(f"nothing was measured yet that could be reported: {options.results} is not there")
    for name, section in report.sections(parts).items():
        print(f"\n## {name}\n\n{section}")
    if options.record:
        report.record(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests/bench/run", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="+",
        choices=[*KINDS, "all", "report"],
        metavar="PART",
        help=f"{', '.join(KINDS)}; all; or report, which measures nothing",
    )
    parser.add_argument("--rounds", type=_positive, help="of each part (5, or 1 with --quick)")
    parser.add_argument("--seconds", type=float, help="of each run of fio (0.5, or 0.2)")
    parser.add_argument("--quick", action="store_true", help="small and short: only to try it")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help=f"where all parts that were measured are kept, as JSON ({RESULTS})",
    )
    parser.add_argument(
        "--record", action="store_true", help="put tables and pictures into docs/, too"
    )
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _must_be_able() -> None:
    """Exit with a sentence if something is missing."""
    if os.geteuid() != 0:
        sys.exit("tests/bench/run mounts and makes loop devices: run it as root")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} not found: run mount-helpers/setup --tests")


def _measure_all(names: list[str], scale: Scale, results: Path) -> None:
    seconds = sum(KINDS[name].estimate(scale) for name in names) / (4 if scale.quick else 1)
    say(f"measuring {', '.join(names)}: about {max(1, round(seconds / 60))} minutes")
    for name in names:
        started = time.monotonic()
        save(results, _measure(name, scale))
        say(f"{name}: done after {time.monotonic() - started:.0f} s, kept in {results}")


def _measure(name: str, scale: Scale) -> Part:
    part = Part(name, quick=scale.quick)
    with stage() as work:
        before = load_average()
        KINDS[name].measure(work, part, scale)
        part.machine = (
            f"{machine(work)}; load average {before:.1f} before and {load_average():.1f} after"
        )
    return part


if __name__ == "__main__":
    main()
