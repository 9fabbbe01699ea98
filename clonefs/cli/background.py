"""Turn a job into a daemon, and return only when it is ready.

The child does the job; a pipe carries one message to the parent: that the job is ready, or the
sentence that says why it will not be. Whatever becomes of the child, the parent has something to
say: a pipe that closes without a message means that the child has died, and then it says how.

The fork must come before anything of the job is imported, for trio and pyfuse3 do not survive one.
"""

import errno
import logging
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from clonefs import logs
from clonefs.errors import ClonefsError, failed

Job = Callable[[Callable[[], None]], None]
"""Runs until it is done, and calls what it is given once it is ready."""

_READY = b"ready"
_log = logging.getLogger("clonefs")


@dataclass(frozen=True)
class Daemon:
    """The child, as its parent knows it until it leaves it behind."""

    pid: int

    def how_it_ended(self) -> str:
        """Wait until the child has ended; say how."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if code < 0:
            return f"the daemon was killed by {signal.Signals(-code).name}"
        return f"the daemon ended with exit status {code}"


def start(job: Job, handler: Callable[[], logging.Handler]) -> Daemon:
    """Run `job` in the background; `handler` makes what takes its log, in the child.

    Raises ClonefsError with the child's reason.
    """
    read_end, write_end = os.pipe()
    # Ctrl-C waits from here until there is somebody who ends the child for it: a daemon whose start
    # was broken off must not mount all the same.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pid = os.fork()
    if pid == 0:
        _child(job, _Report(write_end), handler, before)
    daemon = Daemon(pid)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(write_end)
        message = _receive(read_end)
    except KeyboardInterrupt:
        os.kill(daemon.pid, signal.SIGTERM)  # it does not listen to Ctrl-C
        raise
    if message == _READY:
        return daemon
    code, _, reason = os.fsdecode(message).partition(" ")
    if not reason:
        raise failed(f"{daemon.how_it_ended()} before it was ready: clonefs mount -f may show why")
    raise ClonefsError(int(code), reason)


def _receive(read_end: int) -> bytes:
    with os.fdopen(read_end, "rb") as pipe:
        return pipe.read()


class _Report:
    """The child's end of the pipe: it carries the first thing that is said, and is closed then."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._said = False

    def ready(self) -> None:
        """The terminal belongs to others from here on, and so does the session.

        Not sooner: an automounter knows by the process group who is mounting for it, and lets
        everybody else who comes to the mount point wait for the mount.
        """
        os.setsid()
        silence_standard_streams()
        self._say(_READY)

    def failure(self, code: int, reason: str) -> None:
        """Tell the parent, or the log if the parent is gone."""
        if self._said:
            _log.error("%s", reason)
        else:
            self._say(b"%d %s" % (code, os.fsencode(reason)))

    def _say(self, message: bytes) -> None:
        self._said = True
        with suppress(BrokenPipeError):  # the parent was interrupted
            os.write(self.descriptor, message)
        os.close(self.descriptor)


def _child(
    job: Job, report: _Report, handler: Callable[[], logging.Handler], mask: Iterable[int]
) -> NoReturn:
    """Never returns: what the parent would do next is not the child's to do."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which tells us
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _leave_behind(keep=report.descriptor)
        logs.begin(handler())
        job(report.ready)
        status = 0
    except ClonefsError as error:
        report.failure(error.errno, error.reason)
    except BaseException as error:
        _log.exception("the daemon failed")
        report.failure(errno.EIO, f"the daemon failed: {type(error).__name__}: {error}")
    finally:
        logging.shutdown()
        os._exit(status)


def _leave_behind(keep: int) -> None:
    """What the shell has open (a lock, a pipe) must not stay open as long as the daemon lives."""
    os.chdir("/")
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if descriptor > 2 and descriptor != keep:
            with suppress(OSError):  # the listing's own is closed already
                os.close(descriptor)


def silence_standard_streams() -> None:
    """Let go of them: whoever reads to their end must not wait for this process."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
