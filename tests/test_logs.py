"""The log: what journald, syslog and standard error get, and that nobody ever waits for them."""

import contextlib
import itertools
import logging
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from clonefs import logs
from clonefs.fuse.complaints import PERIOD, Complaints
from tests.machine import Machine
from tests.mounts.mount import write

MOUNTPOINT = Path("/srv/clone fs")


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Somebody who takes datagrams at `path`, without waiting for one."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(str(path))
        yield listener


def record(text: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("clonefs.test").makeRecord(
        "clonefs.test", level, "file", 1, "%s", (text,), None, extra=extra
    )
    made.created = 0.0
    return made


def fields(datagram: bytes) -> dict[str, str]:
    """What journald makes of a datagram in its native protocol."""
    found: dict[str, str] = {}
    while datagram:
        head, _, datagram = datagram.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            length = int.from_bytes(datagram[:8], "little")
            value, end, datagram = (
                datagram[8 : 8 + length],
                datagram[8 + length : 9 + length],
                datagram[9 + length :],
            )
            assert end == b"\n"
        found[name.decode()] = os.fsdecode(value)
    return found


# Journald


def test_journald_gets_fields(tmp_path: Path) -> None:
    with (
        listening(tmp_path / "socket") as journal,
        closing(logs.JournalHandler(tmp_path / "socket", MOUNTPOINT)) as handler,
    ):
        handler.handle(record("payroll/nightly added: synchronizing", clonefs_group="payroll"))
        assert fields(journal.recv(4096)) == {
            "MESSAGE": "payroll/nightly added: synchronizing",
            "PRIORITY": "6",
            "SYSLOG_FACILITY": "3",
            "SYSLOG_IDENTIFIER": "clonefs",
            "SYSLOG_PID": str(os.getpid()),
            "CLONEFS_MOUNTPOINT": "/srv/clone fs",
            "CLONEFS_GROUP": "payroll",
        }
        handler.handle(record("unmounting"))
        assert "CLONEFS_GROUP" not in fields(journal.recv(4096))


@pytest.mark.parametrize(
    ("level", "number"),
    [
        (logging.DEBUG, 7),
        (logging.INFO, 6),
        (logging.WARNING, 4),
        (logging.ERROR, 3),
        (logging.CRITICAL, 3),
    ],
)
def test_levels_have_the_numbers_of_syslog(level: int, number: int) -> None:
    assert logs.severity(level) == number


def test_several_lines_and_bytes_that_are_no_text_reach_journald_as_they_are(
    tmp_path: Path,
) -> None:
    where = Path(os.fsdecode(b"/srv/\xff"))
    with (
        listening(tmp_path / "socket") as journal,
        closing(logs.JournalHandler(tmp_path / "socket", where)) as handler,
    ):
        handler.handle(record("one\ntwo=2\n\nthree"))
        found = fields(journal.recv(4096))
    assert found["MESSAGE"] == "one\ntwo=2\n\nthree"
    assert found["CLONEFS_MOUNTPOINT"] == str(where)


def test_an_exception_is_logged_with_where_it_came_from(tmp_path: Path) -> None:
    with (
        listening(tmp_path / "socket") as journal,
        closing(logs.JournalHandler(tmp_path / "socket", MOUNTPOINT)) as handler,
    ):
        try:
            raise ValueError("a defect")
        except ValueError:
            broken = record("it failed", logging.ERROR)
            broken.exc_info = sys.exc_info()
        handler.handle(broken)
        message = fields(journal.recv(1 << 16))["MESSAGE"]
    assert message.startswith("it failed\nTraceback")
    assert message.endswith("ValueError: a defect")


# Nobody waits


def test_a_full_socket_loses_lines_and_says_later_how_many(tmp_path: Path) -> None:
    with (
        listening(tmp_path / "socket") as journal,
        closing(logs.JournalHandler(tmp_path / "socket", MOUNTPOINT)) as handler,
    ):
        sent = 0
        while not handler.dropped:
            handler.handle(record(f"line {sent}"))
            sent += 1
        handler.handle(record("lost too"))
        assert handler.dropped == 2
        taken = [fields(journal.recv(4096))["MESSAGE"] for _ in range(sent - 1)]
        assert taken == [f"line {number}" for number in range(sent - 1)]
        handler.handle(record("and on"))
        handler.handle(record("and on"))
        told = [fields(journal.recv(4096)) for _ in range(3)]
    assert told[0]["MESSAGE"] == "2 lines of the log were lost: nobody took them in time"
    assert told[0]["PRIORITY"] == "4"
    assert [each["MESSAGE"] for each in told[1:]] == ["and on", "and on"]
    assert handler.dropped == 2


def test_a_journald_that_starts_anew_is_found_again(tmp_path: Path) -> None:
    with closing(logs.JournalHandler(tmp_path / "socket", MOUNTPOINT)) as handler:
        handler.handle(record("too early"))
        assert handler.dropped == 1
        for name in ("one", "two"):
            with listening(tmp_path / "socket") as journal:
                handler.handle(record(name))
                if name == "one":
                    assert "1 lines" in fields(journal.recv(4096))["MESSAGE"]
                assert fields(journal.recv(4096))["MESSAGE"] == name
        handler.handle(record("gone"))
        assert handler.dropped == 2


def test_what_was_lost_is_counted_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logs.SyslogHandler(Path("/nowhere"))])
    assert logs.dropped() == 0
    root.handlers[0].handle(record("lost"))
    assert logs.dropped() == 1


# Syslog


def test_syslog_gets_lines(tmp_path: Path) -> None:
    with (
        listening(tmp_path / "log") as syslog,
        closing(logs.SyslogHandler(tmp_path / "log")) as handler,
    ):
        handler.handle(record("the disk fails", logging.WARNING))
        assert syslog.recv(1000) == f"<28>clonefs[{os.getpid()}]: the disk fails".encode()


# Where to


def test_in_the_background_journald_comes_before_syslog_before_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "JOURNAL", tmp_path / "journal")
    monkeypatch.setattr(logs, "SYSLOG", tmp_path / "log")
    assert type(logs.in_background(MOUNTPOINT)) is logging.NullHandler
    with listening(tmp_path / "log"):
        assert type(logs.in_background(MOUNTPOINT)) is logs.SyslogHandler
        with listening(tmp_path / "journal"):
            assert type(logs.in_background(MOUNTPOINT)) is logs.JournalHandler


FRONT = """
import logging, sys
from pathlib import Path
from clonefs import logs
logs.JOURNAL = Path(sys.argv[1])
logs.begin(logs.in_front(Path("/srv")))
for level in (10, 20, 30):
    logging.getLogger("clonefs.x").log(level, "one\\ntwo")
logging.getLogger("other").info("not ours")
"""


def in_front(journal: Path, **environment: str) -> str:
    """What a program that logs in front writes to standard error, a pipe that the environment may
    call {stream}."""
    read_end, write_end = os.pipe()
    stat = os.fstat(write_end)
    stream = f"{stat.st_dev}:{stat.st_ino}"
    subprocess.run(
        [sys.executable, "-c", FRONT, journal],
        stderr=write_end,
        check=True,
        env=os.environ | {k: v.replace("{stream}", stream) for k, v in environment.items()},
    )
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        return pipe.read()


def test_in_front_lines_have_times_and_levels(tmp_path: Path) -> None:
    lines = in_front(tmp_path / "none").splitlines()
    assert [line[23:] for line in lines] == [" INFO one", "", " WARNING one", ""]
    assert [line for line in lines if line[:2] != "20"] == ["two", "two"]


def test_under_a_service_manager_lines_have_their_severity(tmp_path: Path) -> None:
    said = in_front(tmp_path / "none", JOURNAL_STREAM="{stream}")
    assert said.splitlines() == ["<6>one", "<6>two", "<4>one", "<4>two"]


def test_under_systemd_the_journal_gets_it_directly(tmp_path: Path) -> None:
    with listening(tmp_path / "journal") as journal:
        assert in_front(tmp_path / "journal", JOURNAL_STREAM="{stream}") == ""
        assert fields(journal.recv(4096))["MESSAGE"] == "one\ntwo"


@pytest.mark.parametrize("stream", ["", "nonsense", "1:2", "1"])
def test_standard_error_that_was_redirected_is_not_the_journal(tmp_path: Path, stream: str) -> None:
    with listening(tmp_path / "journal"):
        said = in_front(tmp_path / "journal", JOURNAL_STREAM=stream)
    assert " INFO one" in said


STALLED = """
import logging
from pathlib import Path
from clonefs import logs
handler = logs.in_front(Path("/srv"))
logs.begin(handler)
sent = 0
while not handler.dropped:
    logging.getLogger("clonefs.x").info("x" * 1000)
    sent += 1
    assert sent < 100000
print("dropped")
"""


def test_a_pipe_that_nobody_reads_does_not_hold_it_up() -> None:
    read_end, write_end = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", STALLED],
            stdout=subprocess.PIPE,
            stderr=write_end,
            timeout=60,
            check=True,
        )
    finally:
        os.close(read_end)
        os.close(write_end)
    assert done.stdout == b"dropped\n"


def test_who_reads_standard_error_may_go_away() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-c", STALLED],
            stdout=subprocess.PIPE,
            stderr=write_end,
            timeout=60,
            check=True,
        )
    finally:
        os.close(write_end)
    assert done.stdout == b"dropped\n"


def test_what_cannot_be_written_down_hurts_nobody(tmp_path: Path) -> None:
    with (
        listening(tmp_path / "log") as syslog,
        closing(logs.SyslogHandler(tmp_path / "log")) as handler,
    ):
        broken = record("")
        broken.msg, broken.args = "%d", ("no number",)
        before, logging.raiseExceptions = logging.raiseExceptions, False
        try:
            handler.handle(broken)
        finally:
            logging.raiseExceptions = before
        handler.handle(record("the next one"))
        assert syslog.recv(1000).endswith(b"the next one")


def test_a_terminal_that_stands_still_does_not_hold_it_up() -> None:
    master, slave = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", STALLED],
            stdout=subprocess.PIPE,
            stderr=slave,
            timeout=60,
            check=True,
        )
    finally:
        os.close(master)
        os.close(slave)
    assert done.stdout == b"dropped\n"


# I/O errors


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The lines, as they come."""
    caplog.set_level(logging.INFO, "clonefs.fuse.complaints")
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert record.levelno == logging.ERROR
            assert record.getMessage().startswith(f"{record.__dict__['clonefs_group']}/")
            lines.append(f"{trio.current_time() - START:.0f} {record.getMessage()}")

    logger = logging.getLogger("clonefs.fuse.complaints")
    handler = Lines()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


START = 0.0


async def test_the_first_error_is_said_at_once_and_the_others_are_counted(
    said: list[str], autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "START", trio.current_time())
    complaints = Complaints()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(complaints.run)
        for number in range(1000):
            complaints.complain("payroll", "source", f"read at {number}: broken")
        complaints.complain("payroll", "nightly", "another")
        assert said == ["0 payroll/source: read at 0: broken", "0 payroll/nightly: another"]
        del said[:]
        await trio.sleep(PERIOD + 1)
        assert said == ["30 payroll/source: read at 999: broken (one of 999 more in the last 30 s)"]
        # Nothing more was said of the clone: its next one is said at once.
        complaints.complain("payroll", "nightly", "again")
        complaints.complain("payroll", "source", "still")
        assert said[1:] == ["31 payroll/nightly: again"]
        await trio.sleep(PERIOD - 2)
        assert said[2:] == []
        await trio.sleep(2)
        assert said[2:] == ["60 payroll/source: still (one of 1 more in the last 30 s)"]
        await trio.sleep(3 * PERIOD)
        complaints.complain("payroll", "source", "after a long time")
        complaints.complain("payroll", "source", "unsaid")
        nursery.cancel_scope.cancel()
    assert said[3:] == [
        "151 payroll/source: after a long time",
        "151 payroll/source: unsaid (one of 1 more in the last 0 s)",
    ]


async def test_a_device_that_fails_all_the_time_gets_a_line_in_30_s(
    said: list[str], autojump_clock: MockClock
) -> None:
    complaints = Complaints()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(complaints.run)
        for _ in itertools.repeat(None, 10000):
            complaints.complain("payroll", "source", "broken")
            await trio.sleep(0.1)
        assert 30 < len(said) < 40
        nursery.cancel_scope.cancel()
    counted = [int(line.split("one of ")[1].split()[0]) for line in said if " more in " in line]
    assert sum(counted) + 1 == 10000


# The log of a daemon


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    try:
        machine.install()
        yield machine
    finally:
        machine.close()


def taken(journal: socket.socket) -> list[dict[str, str]]:
    """What has come so far."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(fields(journal.recv(1 << 16)))
    return found


def lifetime(machine: Machine, options: str) -> list[str]:
    """Mount, let states change, and unmount; the lines of `events` without their times."""
    machine.run("mount", "-t", "clonefs", "-o", options, machine.meta, machine.mountpoint)
    machine.add_group()
    machine.add_clone()
    control = machine.tree() / "control"
    with pytest.raises(OSError):
        (control / "payroll/nightly/protected_restore").write_text("1")
    (control / "payroll/nightly/fracture").write_text("1")
    for _ in range(20):
        (machine.tree() / "payroll/source").write_bytes(bytes(4096))
    events = (control / "events").read_text().splitlines()
    machine.run("umount", machine.mountpoint)
    return [line.partition(" ")[2] for line in events]


def test_the_journal_of_a_daemon_has_one_line_for_each_event(machine: Machine) -> None:
    with listening(machine.path("/run/systemd/journal/socket")) as journal:
        events = lifetime(machine, "log=info")
        lines = taken(journal)
    assert events == [
        "payroll added",
        "payroll/nightly added: synchronizing",
        "payroll/nightly synchronizing -> synchronized",
        "payroll/nightly synchronized -> fractured",
    ]
    mounted, *changes = [line["MESSAGE"] for line in lines]
    assert mounted == f"{machine.meta} is mounted on {machine.mountpoint}"
    assert changes == events
    assert {line["CLONEFS_MOUNTPOINT"] for line in lines} == {str(machine.mountpoint)}
    assert [line.get("CLONEFS_GROUP") for line in lines] == [None] + ["payroll"] * 4
    assert len({line["SYSLOG_PID"] for line in lines}) == 1
    assert {line["PRIORITY"] for line in lines} == {"6"}


def test_debug_has_refusals_and_nothing_of_requests(machine: Machine) -> None:
    with listening(machine.path("/run/systemd/journal/socket")) as journal:
        events = lifetime(machine, "log=debug")
        lines = [line["MESSAGE"] for line in taken(journal) if line["PRIORITY"] == "7"]
    assert len(events) == 4
    refused = [line for line in lines if "refused" in line]
    assert refused
    assert all(line.startswith("control/payroll/nightly: refused: ") for line in refused)
    assert len(lines) < 20


def test_warning_leaves_out_what_is_in_order(machine: Machine) -> None:
    with listening(machine.path("/run/systemd/journal/socket")) as journal:
        lifetime(machine, "log=warning")
        assert taken(journal) == []


def test_a_journal_that_stands_still_holds_no_host_up(machine: Machine) -> None:
    """Nobody reads from the socket, and more comes than it has room for."""
    with listening(machine.path("/run/systemd/journal/socket")) as journal:
        machine.run("mount", "-t", "clonefs", "-o", "log=debug", machine.meta, machine.mountpoint)
        machine.add_group()
        control = machine.tree() / "control"
        lost = re.compile(r"^clonefs_log_lines_dropped_total{.*} ([0-9]+)$", re.MULTILINE)

        def dropped() -> int:
            found = lost.search((control / "metrics").read_text())
            assert found is not None
            return int(found[1])

        while not dropped():
            for _ in range(100):
                with pytest.raises(OSError):
                    (control / "remove_group").write_text("none")
        write(machine.tree() / "payroll/source", 0, bytes(4096))  # O_TRUNC has a line of its own
        before = dropped()
        taken(journal)
        (control / "remove_group").write_text("payroll")
        told = [line["MESSAGE"] for line in taken(journal)]
        lost_ones = f"{before} lines of the log were lost: nobody took them in time"
        assert told[:2] == [lost_ones, "payroll removed"]
        machine.run("umount", machine.mountpoint)


def test_an_unknown_level_is_refused(machine: Machine) -> None:
    options = ("-o", "log=loud", machine.meta, machine.mountpoint)
    said = machine.refusal("mount", "-t", "clonefs", *options)
    assert "'log=loud' has no level: there are debug, info, warning, error" in said
