"""Verification: "every difference between a clone and its Source is in a map", looked at on the disks.

One task for each clone that is being verified, while hosts and engines go on. It reads both sides of
the extents that no map has and compares them. A difference may be there for an instant: a write that
is not mirrored sets its bit before it writes, a mirrored one has set it before the first of its two
writes and clears it after the second, and so does a copy. So a difference is only a suspicion. The
extent is then claimed while no map has it, so that nobody copies it and no write is mirrored into it;
both sides are read again; and the maps are looked at after that. What differs then, and is in no map,
nobody that obeys the rules has made.

What it asks holds in every state, so it goes on when the state changes. It must never wait for
anything but its reads while it has a claim, and it changes no byte and no bit.
"""

import logging
from dataclasses import dataclass
from enum import StrEnum

import trio

from clonefs.engines.server import GroupServer
from clonefs.errors import ClonefsError, failed
from clonefs.extents import Run, run_text
from clonefs.group import Claim
from clonefs.units import Buffer

log = logging.getLogger(__name__)

RUN = 1 << 20  # bytes that are read at a time
PATIENCE = 0.25  # seconds' worth of the rate to read at a time
RUNS_KEPT = 1024  # of what differs
ENOUGH_FAILURES = 64  # extents that cannot be read: the device is gone rather than bad in places


class Stage(StrEnum):
    """How far a verification is."""

    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class VerifyStatistics:
    """A verification that is running, or the last one. Counts are extents; `differences` are the
    first runs of those that differ, as an extent list."""

    state: str
    done: int
    total: int
    different: int
    unreadable: int
    differences: str


class Verification:
    """The comparison of the clone `name` with its Source, once from the beginning to the end.

    `rate`: bytes of the LU a second; None for no bound. `turn`: one verification of the mount reads
    at a time.
    """

    def __init__(
        self, server: GroupServer, name: str, rate: int | None, turn: trio.CapacityLimiter
    ) -> None:
        self.stage = Stage.RUNNING
        self._server = server
        self._group = server.group
        self._name = name
        self._unit = server.units[name]
        self._rate = rate
        self._turn = turn
        self._cursor = 0
        self._different = 0
        self._runs: list[Run] = []
        self._unreadable = 0
        self._reason = ""
        self._due = 0.0  # when the rate allows to read again
        self._rate_changed = trio.Event()
        self._scope = trio.CancelScope()
        self._finished = trio.Event()

    # What others do with it

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.stage is Stage.RUNNING

    def set_rate(self, rate: int | None) -> None:
        """From now on at most `rate` bytes a second, also for what has been read already."""
        now = trio.current_time()
        owed = max(0.0, self._due - now) * (self._rate or 0)
        self._rate = rate
        self._due = now + owed / rate if rate else 0.0
        self._rate_changed.set()

    async def stop(self) -> None:
        """Stop it; when this returns, it reads nothing any more."""
        self._scope.cancel()
        await self._finished.wait()

    def statistics(self) -> VerifyStatistics:
        """What can be seen of it."""
        return VerifyStatistics(
            state=self.stage,
            done=self._cursor,
            total=self._group.geometry.extents,
            different=self._different,
            unreadable=self._unreadable,
            differences=self._found(),
        )

    def trouble(self) -> str | None:
        """What it has found, a sentence; None for nothing."""
        if self._different:
            return (
                f"a verification has found {self._different} extents that differ from the Source "
                f"though no map says so ({self._found(8)}): somebody else has written to a backing, "
                f"or a device has changed data; find out which side is right before you sync or "
                f"restore, which would not copy them"
            )
        if self._unreadable:
            return f"a verification could not read {self._unreadable} extents: {self._reason}"
        return None

    def _found(self, runs: int = RUNS_KEPT) -> str:
        text = ",".join(run_text(*run) for run in self._runs[:runs])
        return f"{text},..." if len(self._runs) > runs else text

    # The task

    async def run(self) -> None:
        """Compare everything once, until stopped."""
        try:
            with self._scope:
                await self._compare_all()
                self.stage = Stage.DONE
        except ClonefsError as error:
            self.stage = Stage.FAILED
            group = {"clonefs_group": self._server.name}
            log.error("%s: %s", self._place, error.reason, extra=group)
        finally:
            if self.running:
                self.stage = Stage.STOPPED
            self._finished.set()
        self._server.tell(f"{self._place} {self._summary()}")

    @property
    def _place(self) -> str:
        return f"{self._server.name}/{self._name}"

    def _summary(self) -> str:
        total = self._group.geometry.extents
        return (
            f"verified ({self.stage}): {self._cursor} of {total} extents, {self._different} differ "
            f"and are in no map, {self._unreadable} could not be read"
        )

    async def _compare_all(self) -> None:
        total = self._group.geometry.extents
        while self._cursor < total:
            await trio.lowlevel.checkpoint()
            await self._wait_for_the_rate()
            async with self._turn:
                run = self._equal_run(self._cursor, total, self._most())
                self._cursor = run.first
                if run.stop > run.first and not await self._pass_over_a_hole(run.first):
                    await self._compare(run)
                    self._cursor = run.stop
                    self._charge(run)

    def _most(self) -> int:
        length = RUN if self._rate is None else min(RUN, int(self._rate * PATIENCE))
        return max(1, length >> self._group.geometry.shift)

    def _charge(self, run: Run) -> None:
        if self._rate is not None:
            _, length = self._group.geometry.bytes_of(*run)
            self._due = max(self._due, trio.current_time()) + length / self._rate

    async def _wait_for_the_rate(self) -> None:
        while (delay := self._due - trio.current_time()) > 0:
            self._rate_changed = trio.Event()
            with trio.move_on_after(delay):
                await self._rate_changed.wait()

    async def _pass_over_a_hole(self, extent: int) -> bool:
        """Whether both sides have a hole of a whole extent or more there, which is passed over."""
        geometry = self._group.geometry
        offset, _ = geometry.bytes_of(extent, extent + 1)
        end = geometry.size
        for unit in (self._server.source, self._unit):
            if not unit.sparse:
                return False
            end = min(end, await unit.data_from(offset))
            if geometry.whole_extents_of(offset, end - offset)[1] <= extent:
                return False
        self._cursor = geometry.whole_extents_of(offset, end - offset)[1]
        return True

    async def _compare(self, run: Run) -> None:
        try:
            source, clone = await self._read(run)
        except ClonefsError as error:
            if run.stop - run.first == 1:
                self._failed(run.first, error)
                return
            for extent in range(*run):
                await self._compare(Run(extent, extent + 1))
            return
        if source != clone:
            for extent in self._suspects(run, source, clone):
                await self._look_again(extent)

    def _failed(self, extent: int, error: ClonefsError) -> None:
        self._unreadable += 1
        self._reason = error.reason
        if self._unreadable >= ENOUGH_FAILURES:
            self._cursor = extent
            raise failed(f"the verification ends: {error.reason}")

    async def _read(self, run: Run) -> tuple[Buffer, Buffer]:
        offset, length = self._group.geometry.bytes_of(*run)
        source = await self._server.source.read(offset, length)
        return source, await self._unit.read(offset, length)

    def _suspects(self, run: Run, source: Buffer, clone: Buffer) -> list[int]:
        """The extents of `run` that differ, and that no map has now."""
        size = self._group.geometry.extent_size
        parts = ((extent, (extent - run.first) * size) for extent in range(*run))
        return [
            extent
            for extent, at in parts
            if source[at : at + size] != clone[at : at + size] and self._should_be_equal(extent)
        ]

    def _equal_run(self, start: int, stop: int, most: int) -> Run:
        clone = self._group.clones.get(self._name)
        if clone is None:  # it is being removed, and this task stopped
            return Run(stop, stop)
        return self._group.equal_run(clone, start, stop, most)

    def _should_be_equal(self, extent: int) -> bool:
        run = self._equal_run(extent, extent + 1, 1)
        return run.stop > run.first

    async def _look_again(self, extent: int) -> None:
        """Compare an extent while nobody copies it or mirrors writes to it."""
        claim = await self._claim(extent)
        if claim is None:
            return
        try:
            source, clone = await self._read(Run(extent, extent + 1))
            if source != clone and self._should_be_equal(extent):
                self._report(extent)
        except ClonefsError as error:
            self._failed(extent, error)
        finally:
            self._group.end_verify(claim)
            self._server.wake()

    async def _claim(self, extent: int) -> Claim | None:
        """Claim an extent; None once a map has it."""
        while self._should_be_equal(extent):
            if not self._server.gate.held:
                claim = self._group.claim_to_verify(self._name, extent)
                if claim is not None:
                    return claim
            await self._server.progress()
        return None

    def _report(self, extent: int) -> None:
        if not self._different:
            line = f"{self._place}: extent {extent} differs from the Source, and no map has it"
            self._server.tell(line, logging.ERROR)
        self._different += 1
        if self._runs and self._runs[-1].stop == extent:
            self._runs[-1] = Run(self._runs[-1].first, extent + 1)
        elif len(self._runs) < RUNS_KEPT:
            self._runs.append(Run(extent, extent + 1))
