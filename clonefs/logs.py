"""Where the log goes: journald, syslog, or standard error.

The log is written by the event loop that answers hosts, so writing must never wait: a socket that is
full, or a terminal that stands still, loses the line, and the number of lines that were lost comes
with the next one that gets through. Records may have the name of a group as `clonefs_group`. This
module must never import another one of clonefs.
"""

import contextlib
import logging
import os
import select
import socket
from abc import ABC, abstractmethod
from pathlib import Path

JOURNAL = Path("/run/systemd/journal/socket")
SYSLOG = Path("/dev/log")
LEVELS = {name.lower(): getattr(logging, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR")}
IDENTIFIER = "clonefs"

_STDERR = 2
_DAEMON = 3  # the facility of syslog
_SEVERITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_LINE = "%(asctime)s %(levelname)s %(message)s"
_AT_ONCE = select.PIPE_BUF  # bytes that a pipe with room takes without waiting


def severity(level: int) -> int:
    """The number that journald and syslog have for a level."""
    return next((number for least, number in _SEVERITIES if level >= least), 7)


class LossyHandler(logging.Handler, ABC):
    """Writes a record at once or not at all. `dropped`: how many were lost."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        self._untold = 0  # of these, how many nobody has been told of

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(record)
        except Exception:  # what is logged may be no text; who logs has other things to do
            self.handleError(record)

    def _write(self, record: logging.LogRecord) -> None:
        if self._untold:
            told = f"{self._untold} lines of the log were lost: nobody took them in time"
            about = logging.LogRecord(IDENTIFIER, logging.WARNING, "", 0, told, None, None)
            if self._sent(about):
                self._untold = 0
        if not self._sent(record):
            self.dropped += 1
            self._untold += 1

    @abstractmethod
    def _sent(self, record: logging.LogRecord) -> bool:
        """Write it; False if that would wait, or nobody is there to take it."""


def dropped() -> int:
    """How many lines this process has lost."""
    return sum(
        handler.dropped
        for handler in logging.getLogger().handlers
        if isinstance(handler, LossyHandler)
    )


class SocketHandler(LossyHandler):
    """Sends a datagram for each record to the socket at `path`, which may be replaced meanwhile."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._socket: socket.socket | None = None

    def _sent(self, record: logging.LogRecord) -> bool:
        message = self._message(record)
        for _ in range(2):  # who listened may have gone, and another come
            try:
                self._connected().send(message)
                return True
            except BlockingIOError:
                return False
            except OSError:
                self._disconnect()
        return False

    @abstractmethod
    def _message(self, record: logging.LogRecord) -> bytes:
        """The datagram for a record."""

    def _connected(self) -> socket.socket:
        if self._socket is None:
            kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            self._socket = socket.socket(socket.AF_UNIX, kind)
            self._socket.connect(str(self._path))
        return self._socket

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        self._disconnect()
        super().close()


class JournalHandler(SocketHandler):
    """Speaks the native protocol of journald, with the mount point and the group in fields of their
    own."""

    def __init__(self, path: Path, mountpoint: Path) -> None:
        super().__init__(path)
        self._mountpoint = str(mountpoint)

    def _message(self, record: logging.LogRecord) -> bytes:
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(severity(record.levelno)),
            "SYSLOG_FACILITY": str(_DAEMON),
            "SYSLOG_IDENTIFIER": IDENTIFIER,
            "SYSLOG_PID": str(os.getpid()),
            "CLONEFS_MOUNTPOINT": self._mountpoint,
        }
        group = getattr(record, "clonefs_group", None)
        if group is not None:
            fields["CLONEFS_GROUP"] = group
        return b"".join(_field(name, value) for name, value in fields.items())


def _field(name: str, value: str) -> bytes:
    """A field; with its length if it has more than one line."""
    data = os.fsencode(value)
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    return b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data)


class SyslogHandler(SocketHandler):
    """Sends what a syslog daemon understands."""

    def _message(self, record: logging.LogRecord) -> bytes:
        number = _DAEMON << 3 | severity(record.levelno)
        return os.fsencode(f"<{number}>{IDENTIFIER}[{os.getpid()}]: {self.format(record)}")


class StandardErrorHandler(LossyHandler):
    """Writes lines to standard error; with the number of their severity before each, if a service
    manager reads them."""

    def __init__(self, *, for_service_manager: bool) -> None:
        super().__init__()
        self._numbered = for_service_manager
        self._descriptor = _without_waiting()
        self.setFormatter(logging.Formatter(None if for_service_manager else _LINE))

    def _sent(self, record: logging.LogRecord) -> bool:
        text = self.format(record)
        if self._numbered:
            number = severity(record.levelno)
            text = "\n".join(f"<{number}>{line}" for line in text.splitlines())
        data = os.fsencode(f"{text}\n")
        try:
            while data:
                if not _has_room(self._descriptor):
                    return False
                data = data[os.write(self._descriptor, data[:_AT_ONCE]) :]
        except OSError:  # the terminal, or who read, has gone
            return False
        return True


def _without_waiting() -> int:
    """A descriptor of standard error whose writes do not wait. Of a pipe it is the one that there is:
    what fits into it is known before. A terminal must be opened anew, since how the shell and
    others have it open is not ours to change; a file takes everything."""
    if os.isatty(_STDERR):
        with contextlib.suppress(OSError):  # a terminal of another user
            flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{_STDERR}", flags)
    return _STDERR


def _has_room(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(events & select.POLLOUT for _, events in poll.poll(0))


# Where to


def in_background(mountpoint: Path) -> logging.Handler:
    """To journald if it is there, else to syslog, else nowhere."""
    if JOURNAL.is_socket():
        return JournalHandler(JOURNAL, mountpoint)
    return SyslogHandler(SYSLOG) if SYSLOG.is_socket() else logging.NullHandler()


def in_front(mountpoint: Path) -> logging.Handler:
    """To standard error. If that is the journal's, what systemd has started talks to it directly."""
    journal = _is_journal()
    if journal and JOURNAL.is_socket():
        return JournalHandler(JOURNAL, mountpoint)
    return StandardErrorHandler(for_service_manager=journal)


def _is_journal() -> bool:
    """Whether standard error is what JOURNAL_STREAM says, and was not redirected since."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    with contextlib.suppress(OSError, ValueError):
        found = os.fstat(_STDERR)
        return (found.st_dev, found.st_ino) == (int(device), int(inode))
    return False


def begin(handler: logging.Handler) -> None:
    """Log to `handler`, and to nothing else. What clonefs says has the level of `set_level`."""
    logging.raiseExceptions = False  # a log that nobody takes must not print on the terminal
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    set_level("info")


def set_level(name: str) -> None:
    """Log what is of this level (one of LEVELS) or worse."""
    logging.getLogger("clonefs").setLevel(LEVELS[name])
