"""Waiting for a copy: look, judge, wait for a change, look again.

`judge` decides from one look, without a clock or a file. The rest only reads the clone's control
files. A wait must end: a state that a running copy can no longer leave is a failure with a reason,
never a reason to wait for ever.
"""

import errno
import math
import time
from dataclasses import dataclass
from enum import Enum, auto

from clonefs.cli import tree
from clonefs.cli.changes import Look, looked_at
from clonefs.cli.progress import Bar, progress_bar
from clonefs.errors import ClonefsError, failed

COPYING = frozenset({"synchronizing", "restoring", "reverse-synchronizing"})
SETTLED = frozenset({"synchronized", "fractured"})
BROKEN = frozenset({"out-of-sync", "reverse-out-of-sync"})
STATES = (
    "synchronizing",
    "synchronized",
    "fractured",
    "out-of-sync",
    "restoring",
    "reverse-synchronizing",
    "reverse-out-of-sync",
)

# Progress is read last: a bar for a state that says done must not stand still at 99%.
_FILES = ("state", "condition", "progress")
_LONGEST_WAIT_S = 0.5  # poll(2) wakes before; this is for a mount with `nopoll`


@dataclass(frozen=True)
class View:
    """What one look at a clone shows. `trouble` is a sentence, or empty."""

    state: str
    condition: str
    done: int
    total: int
    trouble: str = ""


class Verdict(Enum):
    """What a look means for somebody who waits."""

    DONE = auto()
    GO_ON = auto()
    HOPELESS = auto()


def judge(view: View, wanted: str | None) -> Verdict:
    """Whether the state `wanted` is reached; without one, whether the copy is done."""
    if view.state == wanted or (wanted is None and view.state in SETTLED):
        return Verdict.DONE
    if view.state in BROKEN or _is_stopped(view):
        return Verdict.HOPELESS
    return Verdict.GO_ON


def _is_stopped(view: View) -> bool:
    """A copy that waits without a trouble is only queued behind others, and has its turn later."""
    return view.condition == "waiting" and view.trouble != ""


def wait_for(
    clone: tree.Place, *, wanted: str | None = None, timeout_s: float | None = None
) -> None:
    """Return when the copy is done or `wanted` is reached. Raises ClonefsError if it cannot be."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with progress_bar(str(clone)) as bar:
        faults = _FaultNotice(clone, bar)
        while True:
            with looked_at(clone, *_FILES) as look:
                view = _view(clone, look)
                bar.show(view.state, view.done, view.total)
                verdict = judge(view, wanted)
                if verdict is Verdict.DONE:
                    return
                if verdict is Verdict.HOPELESS:
                    raise _hopeless(clone, view)
                faults.see(view)
                look.wait(min(_LONGEST_WAIT_S, _time_left_s(clone, view, deadline)))


def _view(clone: tree.Place, look: Look) -> View:
    state, condition = look.value("state"), look.value("condition")
    done, _, total = look.value("progress").partition("/")
    troubled = state in BROKEN or condition in ("waiting", "faulted")
    return View(state, condition, int(done), int(total), tree.trouble(clone) if troubled else "")


def _time_left_s(clone: tree.Place, view: View, deadline: float | None) -> float:
    """How long is left until the deadline. Raises ClonefsError (ETIMEDOUT) when it is past."""
    if deadline is None:
        return math.inf
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise ClonefsError(
            errno.ETIMEDOUT,
            f"{clone} is still {view.state}, {view.done} of {view.total} extents copied: "
            "the time is up: wait longer",
        )
    return left_s


def _hopeless(clone: tree.Place, view: View) -> ClonefsError:
    what = view.state if view.state in BROKEN else f"{view.state}, and waits for somebody to act"
    return failed(f"{clone} is {what}: {view.trouble}" if view.trouble else f"{clone} is {what}")


class _FaultNotice:
    """Says once that a clone is faulted: the engines try again, so the wait goes on."""

    def __init__(self, clone: tree.Place, bar: Bar) -> None:
        self._clone = clone
        self._bar = bar
        self._said = False

    def see(self, view: View) -> None:
        if view.condition == "faulted" and not self._said:
            self._said = True
            why = view.trouble or "its backing fails"
            self._bar.say(f"clonefs: {self._clone} is faulted, and is tried again: {why}")
