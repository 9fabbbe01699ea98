"""How fast copies run and when they will be done, and what hosts do, from one report after another.

It has no clock and no files: reports and the time of each go in, `Copy` comes out. Speed is the mean
over the last `WINDOW_S` seconds, or over as much as has been seen: long enough for a number that can
be read, short enough to notice a new rate. The time left is what is left by that mean.

What is left may grow while hosts write. A copy that begins again is a new one: nothing of the old one
is in its mean.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

WINDOW_S = 10.0

COPYING = frozenset({"synchronizing", "restoring", "reverse-synchronizing"})
_RESTORING = COPYING - {"synchronizing"}


@dataclass(frozen=True)
class Copy:
    """A copy that runs. Speeds are None until there are two looks, and for a clone that is no longer
    restored from; `left_s` is None also while nothing moves. Bytes are whole extents."""

    name: str
    state: str
    condition: str
    done: int
    total: int
    extent_size: int
    extents_s: float | None
    left_s: float | None
    cod_s: float | None
    cod_queue: int | None
    error: str | None


class _Sample(NamedTuple):
    at_s: float
    done: int
    cod: int


class Speeds:
    """The copies of one mount, or of one group of it."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[_Sample]] = {}
        self._states: dict[str, str] = {}

    def see(self, groups: dict[str, Any], now_s: float) -> list[Copy]:
        """The copies that run, by `groups` of a report that was read at `now_s` (monotonic)."""
        copies = [
            self._copy(f"{name}/{clone}", group, group["clones"][clone], now_s)
            for name, group, clone in _running(groups)
        ]
        for gone in self._samples.keys() - {copy.name for copy in copies}:
            del self._samples[gone], self._states[gone]
        return copies

    def _copy(self, name: str, group: dict[str, Any], clone: dict[str, Any], now_s: float) -> Copy:
        restore = group["restore"] if clone["state"] in _RESTORING else None
        done, total = clone["progress"]["done"], clone["progress"]["total"]
        sample = _Sample(now_s, done, restore["cod_copies"] if restore else 0)
        first = self._first(name, clone["state"], sample)
        passed_s = now_s - first.at_s
        extents_s = (done - first.done) / passed_s if passed_s > 0 else None
        return Copy(
            name=name,
            state=clone["state"],
            condition=clone["condition"],
            done=done,
            total=total,
            extent_size=group["extent_size"],
            extents_s=extents_s,
            left_s=(total - done) / extents_s if extents_s else None,
            cod_s=(sample.cod - first.cod) / passed_s if restore and passed_s > 0 else None,
            cod_queue=restore["cod_queue"] if restore else None,
            error=clone["error"] or group["error"],
        )

    def _first(self, name: str, state: str, sample: _Sample) -> _Sample:
        """The look that the mean begins with, after this one is remembered."""
        samples = self._samples.setdefault(name, deque())
        if samples and (
            self._states[name] != state
            or sample.done < samples[-1].done
            or sample.cod < samples[-1].cod
        ):
            samples.clear()
        self._states[name] = state
        samples.append(sample)
        while len(samples) > 2 and samples[1].at_s <= sample.at_s - WINDOW_S:
            samples.popleft()
        return samples[0]


@dataclass(frozen=True)
class HostIo:
    """What hosts do with an LU, each a second: requests, and bytes."""

    name: str
    reads_s: float
    read_bytes_s: float
    writes_s: float
    written_bytes_s: float


Counts = tuple[int, int, int, int]


class HostSpeeds:
    """The host I/O of one mount, or of one group of it."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[tuple[float, Counts]]] = {}

    def see(self, groups: dict[str, Any], now_s: float) -> list[HostIo]:
        """The LUs that hosts have used in the window, by `groups` of a report of `now_s`."""
        seen = dict(_host_counts(groups))
        for gone in self._samples.keys() - seen.keys():
            del self._samples[gone]
        speeds = [self._speed(name, counts, now_s) for name, counts in seen.items()]
        return [speed for speed in speeds if speed is not None]

    def _speed(self, name: str, counts: Counts, now_s: float) -> HostIo | None:
        samples = self._samples.setdefault(name, deque())
        if samples and any(now < then for now, then in zip(counts, samples[-1][1], strict=True)):
            samples.clear()  # another daemon counts anew
        samples.append((now_s, counts))
        while len(samples) > 2 and samples[1][0] <= now_s - WINDOW_S:
            samples.popleft()
        first_s, first = samples[0]
        if counts == first:
            return None
        return HostIo(
            name,
            *((now - then) / (now_s - first_s) for now, then in zip(counts, first, strict=True)),
        )


def _host_counts(groups: dict[str, Any]) -> Iterator[tuple[str, Counts]]:
    for name, group in groups.items():
        for lu, shown in (("source", group), *group["clones"].items()):
            io = shown.get("host_io")  # a daemon that was started by an older version has none
            if io is not None:
                counts = (io["reads"], io["read_bytes"], io["writes"], io["written_bytes"])
                yield f"{name}/{lu}", counts


def _running(groups: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    for name, group in groups.items():
        for clone, shown in group["clones"].items():
            if shown["state"] in COPYING:
                yield name, group, clone
