"""A process beside the command, which outlives it, and the line between the two.

The child is in a session of its own and is not ended by the signals that end a command from a
terminal or a service manager; it learns of the command's death, whatever that is, from the line,
which ends then. So no other process must keep the command's end open: each child closes what it
has inherited of the lines of its elder siblings.

A child of a command that runs in one thread only, started before there is any other.
"""

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

Word = str | int | None

_LONGEST = 64 << 10  # bytes of a message
_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Line:
    """One end of a line. A message is a list of words, and comes whole or not at all."""

    def __init__(self, end: socket.socket, process: int | None = None) -> None:
        self._end = end
        self._process = process

    def fileno(self) -> int:
        """For poll(2)."""
        return self._end.fileno()

    def say(self, *words: Word) -> None:
        """Send a message; nothing, if nobody is there any more."""
        with suppress(OSError):
            self._end.send(json.dumps(words).encode())

    def hear(self) -> list[Any] | None:
        """The next message; None if there will be none."""
        try:
            message = self._end.recv(_LONGEST)
        except ConnectionResetError:
            # The other end has gone without hearing our last message. Its own are still here, and
            # the error comes only once.
            message = self._end.recv(_LONGEST)
        return json.loads(message) if message else None

    def hang_up(self) -> None:
        """Nothing more will be said; the other end can go on talking."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_WR)

    def wait_for_end(self, timeout_s: float) -> None:
        """Return when the child has let go of everything, or after this time."""
        if self._process is not None:
            first_ready([self._process], timeout_s)

    def close(self) -> None:
        """Let go of it."""
        self._end.close()


def start(job: Callable[[Line], None], siblings: Sequence[Line] = ()) -> Line:
    """Run `job` in a child with one end of a line. Returns the other."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            _leave(ours, siblings)
            job(Line(theirs))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)  # what the command would do next is not the child's to do
    theirs.close()
    return Line(ours, os.pidfd_open(pid))


def _leave(ours: socket.socket, siblings: Sequence[Line]) -> None:
    os.setsid()
    for number in _DEAF_TO:
        # Not SIG_IGN: programs that the child starts would inherit that.
        signal.signal(number, lambda *_: None)
    ours.close()
    for line in siblings:
        line.close()


def first_ready(descriptors: Sequence[int], timeout_s: float | None) -> int | None:
    """The first of these, in this order, that has something to read, or has ended; None: too late."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    found = {each for each, _ in poll.poll(None if timeout_s is None else max(timeout_s, 0) * 1e3)}
    return next((each for each in descriptors if each in found), None)
