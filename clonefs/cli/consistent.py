"""A fracture of what a frozen file system has on its disk: `clonefs fracture --freeze`.

Three processes: the guard, which freezes and thaws (`clonefs.cli.guard`); the writer, which writes to
the `fracture` file once everything is frozen; and the command, which waits for both and says what has
come of it. The write is in a process of its own since a process that waits for a daemon that hangs
cannot end, not even by SIGKILL, and then the guard would not hear of it.

The copy counts as consistent only if the write has returned before the guard began to thaw, and the
thaw found everything frozen. Where it is not known, the command says so and fails.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from clonefs.cli import beside, ground, tree
from clonefs.cli.background import silence_standard_streams
from clonefs.cli.beside import Line, first_ready
from clonefs.cli.freezing import FileSystem, opened
from clonefs.cli.guard import Guard, Hooks, Result, run_after
from clonefs.errors import ClonefsError, busy, failed, invalid

_GRACE_S = 1.0
"""After a thaw that came too early: how long the fracture may still take before the command says that
it does not know."""


@dataclass(frozen=True)
class Order:
    """What is to be done: `write` is the control file and the words."""

    places: Sequence[tree.Place]
    write: tuple[tree.Place, str, Sequence[str]]
    mountpoints: Sequence[Path]
    before: str | None
    after: str | None
    limit_s: float


@dataclass(frozen=True)
class Report:
    """What has been done. `after_status` is that of `--after`, None if there is none."""

    mountpoints: list[Path]
    frozen_ns: int
    after_status: int | None


def fracture_and_say(order: Order, *, as_json: bool) -> None:
    """Do it, and say for how long what was frozen. Raises ClonefsError as `fracture` does, and if
    `--after` has failed."""
    report = fracture(order)
    click.echo(_as_json(order, report) if as_json else _in_words(order, report))
    if report.after_status:
        raise failed(f"--after failed ({_ended(report.after_status)}); the copy is good")


def _in_words(order: Order, report: Report) -> str:
    clones = ", ".join(map(str, order.places))
    if not report.mountpoints:
        return f"{clones} fractured"
    frozen = ", ".join(map(str, report.mountpoints))
    return f"{clones} fractured; {frozen} frozen for {report.frozen_ns / 1e6:.1f} ms"


def _as_json(order: Order, report: Report) -> str:
    return json.dumps(
        {
            "fractured": [str(place) for place in order.places],
            "frozen": [str(mountpoint) for mountpoint in report.mountpoints],
            "frozen_ms": round(report.frozen_ns / 1e6, 3),
        }
    )


def fracture(order: Order) -> Report:
    """Freeze, fracture, thaw, with the hooks around it. Raises ClonefsError if what is in the clones
    is not, or may not be, what the frozen file systems had on their disks."""
    for place in order.places:
        _check_synchronized(place)
    with opened(order.mountpoints) as file_systems:
        _check_ground(order.places[0], file_systems)
        _note_what_is_elsewhere(order.places, file_systems)
        hooks = Hooks(order.before, order.after, "\n".join(map(str, order.places)))
        sys.dont_write_bytecode = True  # what is written may be on what is frozen
        writer = beside.start(lambda line: _write(line, file_systems, *order.write))
        guard = beside.start(
            lambda line: Guard(line, file_systems, hooks, order.limit_s).run(), [writer]
        )
        return _Command(order, file_systems, hooks, guard, writer).run()


def _write(
    line: Line,
    file_systems: Sequence[FileSystem],
    place: tree.Place,
    file: str,
    words: Sequence[str],
) -> None:
    """The writer: says when the write has returned, in nanoseconds of the monotonic clock."""
    # It may outlive the command by much, and must keep nothing in use.
    silence_standard_streams()
    for file_system in file_systems:
        os.close(file_system.descriptor)
    if line.hear() is None:
        return
    try:
        tree.command(place, file, *words)
    except ClonefsError as error:
        line.say("refused", error.errno, error.reason)
    else:
        line.say("done", time.monotonic_ns())


# What is refused before anything is done ---------------------------------------------------------


def _check_synchronized(place: tree.Place) -> None:
    """Any other state would give no copy of this instant."""
    state = tree.value(place, "state")
    if state == "fractured":
        raise busy(f"{place} is fractured already, so it is an older copy: clonefs sync it first")
    if state != "synchronized":
        raise busy(
            f"{place} is {state}, so no copy would come of it: it has to be synchronized "
            f"(clonefs wait {place} --state synchronized)"
        )


def _check_ground(place: tree.Place, file_systems: Sequence[FileSystem]) -> None:
    """A fracture that needs what is frozen would wait for itself."""
    needed = list(_files_needed(tree.report(place)))
    for number, file_system in enumerate(file_systems):
        where = file_system.mountpoint
        if where == Path("/"):
            raise invalid("/ is not frozen: this machine needs it to go on")
        for what, path in needed:
            if file_system.device in ground.below(path).file_systems:
                raise invalid(
                    f"{where} is not frozen: the fracture has to write to {what}, {path}, which is "
                    "on it, and would wait for itself; move that to another file system"
                )
        for later in file_systems[number + 1 :]:
            if file_system.device in ground.below(later.mountpoint).file_systems:
                raise invalid(
                    f"{later.mountpoint} lies on a file of {where}, and could not be frozen after "
                    "it: name it first"
                )


def _note_what_is_elsewhere(
    places: Sequence[tree.Place], file_systems: Sequence[FileSystem]
) -> None:
    """A wrong mount point would go unnoticed. It is no error: how a Source comes to be under a file
    system cannot always be seen (by a network, from a virtual machine)."""
    sources = {str(tree.Place(each.mountpoint, each.group, tree.SOURCE)) for each in places}
    for file_system in file_systems:
        where = file_system.mountpoint
        if not sources & set(map(str, ground.below(where).files)):
            click.echo(
                f"clonefs: note: {where} is not on {' or '.join(sorted(sources))}, as far as can be "
                "seen: is it the right one?",
                err=True,
            )


def _files_needed(report: Any) -> Iterator[tuple[str, Path]]:
    """What the daemon writes to. Of all groups: one write that waits can make all others wait."""
    yield "the metadata volume", Path(report["volume"]["path"])
    for name, group in report["groups"].items():
        yield f"the backing of {name}/source", Path(group["backing"])
        for clone, its in group["clones"].items():
            yield f"the backing of {name}/{clone}", Path(its["backing"])


# The command ---------------------------------------------------------------------------------------


class _GuardGoneError(Exception):
    """The guard has been killed."""


class _StoppedError(BaseException):
    """A signal wants the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Command:
    """What is known of the other two, and what is made of it."""

    def __init__(
        self,
        order: Order,
        file_systems: list[FileSystem],
        hooks: Hooks,
        guard: Line,
        writer: Line,
    ) -> None:
        self._order = order
        self._file_systems = file_systems
        self._hooks = hooks
        self._guard = guard
        self._writer = writer
        self._heard: dict[str, list[Any]] = {}
        self._perhaps_frozen: list[FileSystem] = []
        self._asked = False
        self._written: list[Any] | None = None

    def run(self) -> Report:
        """All of it."""
        try:
            with _signals_raise():
                self._go_along()
        except _GuardGoneError:
            self._take_over()
        except (KeyboardInterrupt, _StoppedError) as stop:
            self._stop(stop)
        finally:
            if "after" in self._heard:
                self._guard.wait_for_end(_GRACE_S)  # what it has open could not be unmounted
        return self._judge()

    def _go_along(self) -> None:
        while not self._heard.keys() & {"all-frozen", "thawed"}:
            self._listen()
        if "thawed" not in self._heard:
            self._write_now()
        while not self._is_over:
            self._listen()

    @property
    def _is_over(self) -> bool:
        """Whether there is nothing more to wait for: not for a thaw that hangs."""
        return "after" in self._heard or ("thawed" in self._heard and self._heard["thawed"][-1])

    def _write_now(self) -> None:
        self._asked = True
        self._writer.say("go")
        written = self._writer.fileno()
        # The guard speaks before it is spoken to if the limit is over.
        if first_ready([written, self._guard.fileno()], None) == written:
            self._written = self._writer.hear()
            self._guard.say(self._result)

    @property
    def _result(self) -> Result:
        """What the writer has said."""
        if self._written is None:
            return Result.INTERRUPTED
        return Result.REFUSED if self._written[0] == "refused" else Result.FRACTURED

    def _listen(self) -> None:
        """Hear one message of the guard."""
        message = self._guard.hear()
        if message is None:
            raise _GuardGoneError
        word, *rest = message
        self._heard[word] = rest
        if word == "freezing":
            self._perhaps_frozen.append(self._file_systems[rest[0]])
        elif word == "not-frozen":
            self._perhaps_frozen.pop()
        elif word == "thawed":
            self._perhaps_frozen.clear()

    # When something comes between

    def _take_over(self) -> NoReturn:
        """The guard has been killed: what it was there for is done here."""
        told = ["the process that guards the freeze has been killed"]
        for file_system in reversed(self._perhaps_frozen):
            try:
                if file_system.thaw():
                    told.append(f"{file_system.mountpoint} has been thawed")
            except ClonefsError as error:
                told.append(error.reason)
        if "hooks" in self._heard and "thawed" not in self._heard:
            run_after(self._hooks, Result.INTERRUPTED, 0)
        raise failed("; ".join([*told, self._fate()]))

    def _stop(self, stop: KeyboardInterrupt | _StoppedError) -> NoReturn:
        """Return when nothing is frozen any more and `--after` is done; not if asked once more."""
        self._guard.hang_up()
        try:
            while not self._is_over:
                self._listen()
        except _GuardGoneError:
            self._take_over()
        wrong = self._heard["thawed"][3]
        told = "; ".join(filter(None, ["interrupted", wrong, self._fate()]))
        click.echo(f"clonefs: {told}", err=True)
        if isinstance(stop, _StoppedError):
            sys.exit(128 + stop.number)
        raise stop

    def _fate(self) -> str:
        """What has become of a fracture that did not go as it should, as part of a sentence."""
        if not self._asked:
            return "nothing has been fractured"
        if self._written is None and first_ready([self._writer.fileno()], _GRACE_S) is None:
            return f"the fracture is under way and may take effect later: see {self._state}"
        written = self._written or self._writer.hear()
        self._written = written
        if written is None:
            return f"it is not known whether the fracture has taken effect: see {self._state}"
        if written[0] == "refused":
            return f"nothing has been fractured: {written[2]}"
        return (
            f"{self._clones} has been fractured, but perhaps when it was not frozen any more: "
            "what a power cut would leave"
        )

    # What has come of it

    def _judge(self) -> Report:
        result, thawing_ns, frozen_ns, wrong, _ = self._heard["thawed"]
        self._check_begun(wrong)
        in_time = self._done_ns is not None and self._done_ns <= thawing_ns
        trouble = [self._too_long] if result == Result.LIMIT and not in_time else []
        trouble += [wrong] if wrong else []
        if not trouble and self._written is not None and self._written[0] == "refused":
            raise ClonefsError(self._written[1], self._written[2])
        if trouble or not in_time:
            raise failed("; ".join([*trouble, self._fate()]))
        for place in self._order.places:
            if (state := tree.value(place, "state")) != "fractured":
                raise failed(f"{place} is {state} after the fracture, and no copy")
        mountpoints = [each.mountpoint for each in self._file_systems]
        return Report(mountpoints, frozen_ns, self._heard["after"][0])

    @property
    def _done_ns(self) -> int | None:
        """When the fracture was done, or None."""
        if self._written is None or self._written[0] != "done":
            return None
        return int(self._written[1])

    def _check_begun(self, wrong: str) -> None:
        """Raise ClonefsError if it has not come to the fracture."""
        if "before-failed" in self._heard:
            status = self._heard["before-failed"][0]
            raise failed(f"--before failed ({_ended(status)}): nothing has been fractured")
        if "not-frozen" in self._heard:
            _, code, reason = self._heard["not-frozen"]
            told = "; ".join(filter(None, [reason, wrong]))
            raise ClonefsError(code, f"{told}. Nothing has been fractured")

    @property
    def _too_long(self) -> str:
        limit = f"{self._order.limit_s:g} s"
        names = ", ".join(str(each.mountpoint) for each in self._file_systems)
        if not names:
            return f"the fracture took longer than {limit}"
        thawed = "" if self._heard["thawed"][3] else ", and has been thawed"
        if not self._asked:
            return f"{names} could not be frozen within {limit}{thawed}"
        return f"{names} was frozen for longer than {limit}{thawed}"

    @property
    def _clones(self) -> str:
        return ", ".join(map(str, self._order.places))

    @property
    def _state(self) -> str:
        return ", ".join(str(place.control / "state") for place in self._order.places)


def _ended(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end the body as Ctrl-C does, so that the command ends after the thaw."""

    def stop(number: int, _frame: object) -> None:
        raise _StoppedError(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
