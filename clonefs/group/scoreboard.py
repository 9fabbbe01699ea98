"""The COD Scoreboard: which extents are being copied now, and by which engine.

"This allows both engines to know which extents the other (and themselves) is copying." Only who has
claimed an extent copies it (rule L3); a host write that overwrites pending extents whole claims them
like an engine does, and so does a verification while it looks at an extent for the second time.
Claims are few at any time, so they are kept as runs and looked through.

Invariant: no two claims overlap.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from clonefs.extents import Run


class Engine(StrEnum):
    """Who has claimed an extent."""

    SYNC = "sync"
    COD = "cod"
    HOST = "host"
    VERIFY = "verify"


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """The extents [first, stop), claimed by `engine`, to be copied from or to `clone`, or compared
    with it."""

    first: int
    stop: int
    engine: Engine
    clone: str


class CodScoreboard:
    """The claims of one Clone Group."""

    __slots__ = ("_claims",)

    def __init__(self) -> None:
        self._claims: list[Claim] = []

    def __len__(self) -> int:
        return len(self._claims)

    def __iter__(self) -> Iterator[Claim]:
        return iter(sorted(self._claims, key=lambda claim: claim.first))

    def claim(self, first: int, stop: int, engine: Engine, clone: str) -> Claim:
        """Claim [first, stop), none of which may be claimed."""
        if self.overlapping(first, stop) is not None:
            raise AssertionError(f"extents {first} to {stop - 1} are claimed already")
        claim = Claim(first, stop, engine, clone)
        self._claims.append(claim)
        return claim

    def release(self, claim: Claim) -> None:
        """Give the extents of `claim` free again."""
        self._claims.remove(claim)

    def overlapping(self, first: int, stop: int) -> Claim | None:
        """A claim that has an extent of [first, stop), the lowest one first, if there is one."""
        found = None
        for claim in self._claims:
            if (
                claim.first < stop
                and first < claim.stop
                and (found is None or claim.first < found.first)
            ):
                found = claim
        return found

    def free_run(self, first: int, stop: int) -> Run:
        """The part of [first, stop) before the first claim in it; empty if `first` is claimed."""
        claim = self.overlapping(first, stop)
        return Run(first, stop if claim is None else max(first, claim.first))
