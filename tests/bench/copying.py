"""A copy of a whole LU: one that can be made again and again, and one that is watched."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.stage import (
    EXTENT,
    Mount,
    fill,
    fill_pieces,
    flush,
    must_be_equal,
    opened,
    parse_extents,
    read_through,
    run,
)

SELDOM, OFTEN = 0.01, 0.002  # seconds between two looks at it


@dataclass
class Whole:
    """A group whose Source can be ruined again and again, and a file to copy to by other means."""

    mount: Mount
    group: str
    size: int

    def __post_init__(self) -> None:
        self.mount.split_group(self.group, self.size, self.size, ["clone"])
        run("cp", "--reflink=never", self.source, self.target)
        flush(self.target)

    @property
    def source(self) -> Path:
        """The file of the Source."""
        return self.mount.backing(self.group)

    @property
    def clone(self) -> Path:
        """The file of the clone."""
        return self.mount.backing(self.group, "clone")

    @property
    def target(self) -> Path:
        """A file like the Source's that clonefs knows nothing of."""
        return self.mount.work / f"{self.group}.target"

    @property
    def lu(self) -> Path:
        """The Source as hosts see it."""
        return self.mount.lu(self.group)

    def ruin(self, pieces: list[range] | None = None) -> None:
        """Let all extents differ, or only these runs of extents."""
        if pieces is None:
            fill(self.lu, self.size)
        else:
            fill_pieces(self.lu, ((run_of[0] * EXTENT, len(run_of) * EXTENT) for run_of in pieces))

    def warm(self) -> None:
        """Everything that is going to be copied, and what it is copied to, is in the page cache."""
        for path in (self.clone, self.source):
            read_through(path)

    def forget(self) -> None:
        """Nothing of the Source is in the page cache."""
        with opened(self.source) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def restore(self) -> None:
        """Begin."""
        self.mount.command(f"{self.group}/clone/protected_restore")

    def restoring(self) -> bool:
        """Whether it still copies."""
        return self.mount.state(self.group) == "restoring"

    def must_be_restored(self) -> None:
        """Raise AssertionError if the Source is not the clone, but for what the Delta Map says."""
        assert self.mount.state(self.group) == "fractured"
        delta = parse_extents(self.mount.control(f"{self.group}/clone/delta_map").read_text())
        must_be_equal(self.source, self.clone, but=delta)


@dataclass(frozen=True)
class Copying:
    """A copy that was watched, in time.time(): when it was asked for, when it had begun, when it was
    last seen running, and when it was seen to be over."""

    asked: float
    begun: float
    last_seen: float
    over: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.over - self.asked


def watch(begin: Callable[[], None], copies: Callable[[], bool], pause: float) -> Copying:
    """Begin, and wait until it is over."""
    asked = time.time()
    begin()
    begun = last_seen = time.time()
    while True:
        looking = time.time()
        if not copies():
            break
        last_seen = looking
        time.sleep(pause)
    return Copying(asked, begun, last_seen, time.time())


def timed(work: Callable[[], object]) -> float:
    """Its seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
