"""The guard: a process beside the command that freezes, and thaws whatever becomes of the command.

It alone freezes and thaws, so that it knows which freezes are its own: it thaws those, and no others.
The command asks for nothing but the end. The guard runs through these steps and tells of each:

    before    the command of the user that comes first
    sync      everything dirty is written out, twice, so that the freeze finds little to do
    freeze    in the order given
    frozen    it waits until the command says what has come of the fracture
    thaw      in the opposite order
    after     the command of the user that comes last, if `before` has begun

When the line to the command ends, or the limit is over, what is left of the steps up to `frozen` is
left out. The limit counts from the first freeze on. Whatever can hang (in the kernel, on a device that
does not answer) hangs in a thread; the guard itself waits for its line, the thread and the clock only.
What is still being frozen then is thawed as soon as the kernel lets go of it. A thaw that hangs holds
up `after`, but neither another thaw nor the command.

It must be ready before anything is frozen, and write to no file: each may be on what it has frozen.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from clonefs.cli.background import silence_standard_streams
from clonefs.cli.beside import Line, first_ready
from clonefs.cli.freezing import FileSystem
from clonefs.errors import ClonefsError

_GRACE_S = 1.0
"""How long a thaw may take before it is said to hang."""


class Result(StrEnum):
    """What has come of it, as `--after` is told in CLONEFS_RESULT."""

    FRACTURED = "fractured"
    REFUSED = "refused"
    BEFORE_FAILED = "before-failed"
    NOT_FROZEN = "not-frozen"
    LIMIT = "limit"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Hooks:
    """Commands for sh; None for none. `clones` are their paths, for the environment."""

    before: str | None
    after: str | None
    clones: str

    def environment(self, **more: str) -> dict[str, str]:
        """What a hook finds in its environment."""
        return dict(os.environ) | {"CLONEFS_CLONES": self.clones} | more


class Frozen:
    """The file systems that this process has frozen. A thread freezes; the guard thaws."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frozen: list[FileSystem] = []
        self._over = threading.Event()

    def freeze(self, file_system: FileSystem) -> bool:
        """Freeze it. False: it is all over, and this one stays, or is again, as it was."""
        if self._over.is_set():
            return False
        file_system.freeze()
        with self._lock:
            if not self._over.is_set():
                self._frozen.append(file_system)
                return True
        file_system.thaw()
        return False

    def thaw_all(self) -> "Thawing":
        """Thaw them, what is frozen later too."""
        with self._lock:
            self._over.set()
        thawing = Thawing()
        while self._frozen:
            thawing.add(self._frozen.pop())
        return thawing


class Thawing:
    """Thaws, each in a thread: one can hang, since ext4 writes to its device."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self._threads: list[tuple[FileSystem, threading.Thread]] = []

    def add(self, file_system: FileSystem) -> None:
        """Thaw it; returns when that is done, or takes too long."""
        thread = threading.Thread(target=self._thaw, args=[file_system])
        self._threads.append((file_system, thread))
        thread.start()
        thread.join(_GRACE_S)

    def _thaw(self, file_system: FileSystem) -> None:
        try:
            if not file_system.thaw():
                self.wrong.append(f"{file_system.mountpoint} was thawed by somebody else meanwhile")
        except ClonefsError as error:
            self.wrong.append(error.reason)

    @property
    def hanging(self) -> list[FileSystem]:
        """What has not been thawed yet."""
        return [file_system for file_system, thread in self._threads if thread.is_alive()]

    def join(self) -> None:
        """Return when everything is thawed."""
        for _, thread in self._threads:
            thread.join()


def _hangs(file_system: FileSystem) -> str:
    return (
        f"the thaw of {file_system.mountpoint} waits for its device, and is done when that goes on"
    )


def run_after(hooks: Hooks, result: str, frozen_ns: int) -> int | None:
    """Run `--after`, if there is one; its exit status."""
    if hooks.after is None:
        return None
    more = {"CLONEFS_RESULT": result, "CLONEFS_FROZEN_MS": f"{frozen_ns / 1e6:.1f}"}
    return _start(hooks.after, hooks.environment(**more)).wait()


def _start(command: str, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start a hook, in a process group of its own. What it prints goes to standard error."""
    return subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=2,
        env=environment,
        process_group=0,
    )


class Guard:
    """The guard of one command."""

    def __init__(
        self, line: Line, file_systems: list[FileSystem], hooks: Hooks, limit_s: float
    ) -> None:
        self._line = line
        self._file_systems = file_systems
        self._hooks = hooks
        self._limit_s = limit_s
        self._frozen = Frozen()
        self._began_ns: int | None = None
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        """All steps. Returns when nothing is frozen any more."""
        result = Result.NOT_FROZEN
        try:
            result = self._run_before() or self._freeze() or self._wait_for_the_fracture()
        finally:
            result, frozen_ns = self._thaw(result)
            self._line.say("after", run_after(self._hooks, result, frozen_ns))
            silence_standard_streams()  # the next may take long, and the command has ended
            for thread in self._threads:
                thread.join()

    # The steps. Each returns what has come of it all if the steps end here, or else None.

    def _run_before(self) -> Result | None:
        self._line.say("hooks")
        if self._hooks.before is None:
            return None
        hook = _start(self._hooks.before, self._hooks.environment())
        if self._is_gone_before(os.pidfd_open(hook.pid)):
            with suppress(ProcessLookupError):
                os.killpg(hook.pid, signal.SIGTERM)
            hook.wait()
            return Result.INTERRUPTED
        if hook.wait() != 0:
            self._line.say("before-failed", hook.returncode)
            return Result.BEFORE_FAILED
        return None

    def _freeze(self) -> Result | None:
        synced = self._in_thread(self._sync_all)
        if self._is_gone_before(synced):
            return Result.INTERRUPTED
        self._began_ns = time.monotonic_ns()
        frozen = self._in_thread(self._freeze_all)
        ready = first_ready([self._line.fileno(), frozen], self._left_s())
        if ready is None:
            return Result.LIMIT
        if ready != frozen:
            return Result.INTERRUPTED
        if os.eventfd_read(frozen) == _FAILED:
            return Result.NOT_FROZEN
        self._line.say("all-frozen")
        return None

    def _wait_for_the_fracture(self) -> Result:
        if first_ready([self._line.fileno()], self._left_s()) is None:
            return Result.LIMIT
        message = self._line.hear()
        return Result.INTERRUPTED if message is None else Result(message[0])

    def _thaw(self, result: Result) -> tuple[Result, int]:
        """Thaw; what has come of it all, and how long it was frozen, in nanoseconds, 0 if it has not
        come to that."""
        thawing_ns = time.monotonic_ns()
        thawing = self._frozen.thaw_all()
        frozen_ns = self._frozen_for_ns()
        wrong = [*thawing.wrong, *map(_hangs, thawing.hanging)]
        if wrong and result is Result.FRACTURED:
            result = Result.NOT_FROZEN
        hanging = bool(thawing.hanging)
        self._line.say("thawed", result, thawing_ns, frozen_ns, "; ".join(wrong), hanging)
        if hanging:
            silence_standard_streams()  # the command does not wait for this
            thawing.join()
        return result, frozen_ns

    # What they need

    def _frozen_for_ns(self) -> int:
        if self._began_ns is None or not self._file_systems:
            return 0
        return time.monotonic_ns() - self._began_ns

    def _is_gone_before(self, descriptor: int) -> bool:
        """Whether the command is gone before there is something to read from this."""
        return first_ready([self._line.fileno(), descriptor], None) != descriptor

    def _left_s(self) -> float:
        assert self._began_ns is not None
        return self._limit_s - (time.monotonic_ns() - self._began_ns) / 1e9

    def _in_thread(self, job: Callable[[], bool]) -> int:
        """Do it in a thread; a descriptor from which _DONE or _FAILED can be read at its end."""
        done = os.eventfd(0)

        def run() -> None:
            os.eventfd_write(done, _DONE if job() else _FAILED)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        return done

    def _sync_all(self) -> bool:
        """Twice: what is written during the first, long one is little for the second. What cannot be
        written out shows when it is frozen."""
        for file_system in 2 * self._file_systems:
            with suppress(ClonefsError):
                file_system.sync()
        return True

    def _freeze_all(self) -> bool:
        for number, file_system in enumerate(self._file_systems):
            self._line.say("freezing", number)
            try:
                if not self._frozen.freeze(file_system):
                    return False
            except ClonefsError as error:
                self._line.say("not-frozen", number, error.errno, error.reason)
                return False
        return True


_DONE, _FAILED = 1, 2
