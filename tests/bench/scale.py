"""How much is measured, and what every part has in common."""

import os
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.bench.results import Part
from tests.bench.stage import GiB, MiB, run

T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """The whole benchmark, or with `quick` a small one that shows that it works."""

    rounds: int = 5
    seconds: float = 0.5  # of each run of fio
    quick: bool = False

    @property
    def steady(self) -> int:
        """Bytes of each file that hosts read and write."""
        return 32 * MiB if self.quick else 256 * MiB

    @property
    def first_writes(self) -> int:
        """Bytes that are written to for the first time, at once."""
        return 64 * MiB if self.quick else 128 * MiB

    @property
    def whole(self) -> int:
        """Bytes of an LU that is copied as a whole."""
        return 512 * MiB if self.quick else GiB


def shuffled(things: Sequence[T]) -> list[T]:
    """In an order of its own for each round, so that nobody is always behind the same other."""
    return random.sample(things, len(things))


def rounds(part: Part, scale: Scale) -> Iterator[int]:
    """The rounds of a part; it says how far it is."""
    started = time.monotonic()
    for number in range(scale.rounds):
        yield number
        part.rounds = number + 1
        say(
            f"{part.name}: round {number + 1} of {scale.rounds}, {time.monotonic() - started:.0f} s"
        )


def say(text: str) -> None:
    """Progress, for who waits."""
    print(text, file=sys.stderr, flush=True)


def machine(work: Path) -> str:
    """What it is measured on, in one line."""
    kernel = ".".join(platform.release().split(".")[:2])
    kind = run("stat", "--file-system", "--format=%T", work).strip()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GiB
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {kernel}, "
        f"{'ext4' if kind == 'ext2/ext3' else kind}, Python {platform.python_version()}"
    )


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]
