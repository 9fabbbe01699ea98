"""`status --watch`: speeds from reports, lines into a pipe, and a terminal that is left as it was."""

import io
import itertools
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clonefs.cli import tree, watch
from clonefs.cli.speed import Copy, HostIo, HostSpeeds, Speeds
from tests.terminal import CLONEFS, on_terminal
from tests.test_cli_support import make_mount, put, refusal, run

CLONE = {
    "state": "synchronizing",
    "condition": "normal",
    "error": None,
    "progress": {"done": 0, "total": 1000},
}


def groups(done: int, *, state: str = "synchronizing", **restore: int) -> dict[str, Any]:
    """The groups of a report: one copy that is so far."""
    clone = CLONE | {"state": state, "progress": {"done": done, "total": 1000}}
    counts = {"clone": "nightly", "cod_copies": 0, "cod_queue": 0} | restore
    return {
        "payroll": {
            "extent_size": 65536,
            "error": None,
            "restore": counts if restore else None,
            "clones": {"nightly": clone, "weekly": CLONE | {"state": "fractured"}},
        }
    }


def last(*looks: tuple[float, dict[str, Any]]) -> Copy:
    """The one copy that runs, after these looks, each at its second."""
    speeds = Speeds()
    for at_s, shown in looks:
        copies = speeds.see(shown, at_s)
    (copy,) = copies
    return copy


# Speeds


def test_one_look_has_no_speed() -> None:
    copy = last((5.0, groups(10)))
    assert (copy.name, copy.done, copy.total) == ("payroll/nightly", 10, 1000)
    assert (copy.extents_s, copy.left_s, copy.cod_s, copy.cod_queue) == (None, None, None, None)


def test_speed_is_the_mean_and_the_time_left_follows_from_it() -> None:
    copy = last((0.0, groups(0)), (1.0, groups(100)), (4.0, groups(200)))
    assert copy.extents_s == 50
    assert copy.left_s == 16


def test_the_mean_is_that_of_the_last_10_s() -> None:
    looks = [(float(at), groups(at if at < 20 else 20 + 5 * (at - 20))) for at in range(31)]
    assert last(*looks[:20]).extents_s == 1
    assert last(*looks[:26]).extents_s == pytest.approx(3)
    assert last(*looks).extents_s == 5


def test_a_copy_that_stands_still_has_no_time_left() -> None:
    copy = last((0.0, groups(100)), (1.0, groups(100)))
    assert (copy.extents_s, copy.left_s) == (0, None)


def test_a_copy_that_begins_again_is_a_new_one() -> None:
    again = last((0.0, groups(0)), (1.0, groups(900)), (2.0, groups(10)))
    assert again.extents_s is None
    other = last((0.0, groups(0)), (1.0, groups(900, state="restoring", cod_copies=0)))
    assert other.extents_s is None


def test_a_copy_that_was_away_is_a_new_one() -> None:
    away = groups(0, state="synchronized")
    assert last((0.0, groups(0)), (1.0, away), (2.0, groups(500))).extents_s is None


def test_cod_copies_count_by_themselves() -> None:
    copy = last(
        (0.0, groups(0, state="restoring", cod_copies=5, cod_queue=1)),
        (2.0, groups(100, state="restoring", cod_copies=11, cod_queue=3)),
    )
    assert (copy.cod_s, copy.cod_queue) == (3, 3)


# The picture


COPY = Copy(
    name="payroll/nightly",
    state="restoring",
    condition="normal",
    done=999,
    total=1000,
    extent_size=65536,
    extents_s=32.0,
    left_s=3725.4,
    cod_s=2.5,
    cod_queue=3,
    error=None,
)


def frame(
    *copies: Copy, columns: int, lines: int = 20, hosts: tuple[HostIo, ...] = ()
) -> list[str]:
    console = Console(width=columns, height=lines, no_color=True, file=io.StringIO())
    picture = watch.frame(tree.Place(Path("/mnt")), {}, [*copies], [*hosts], columns, lines)
    with console.capture() as capture:
        console.print(picture)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_wide_terminal_shows_everything() -> None:
    lines = frame(COPY, columns=160)
    assert " ".join(lines[1].split()) == "NAME STATE CONDITION DONE EXTENTS BYTES LEFT COD"
    assert " ".join(lines[2].split()[2:]) == (
        "99% restoring normal 999/1000 32.0 extents/s 2.0M/s 1:02:05 2.5/s, 3 waiting"
    )
    assert lines[3] == "no host reads or writes"
    assert "means of the last 10 s" in lines[4]


def test_a_narrow_terminal_loses_columns_in_their_order_and_never_wraps() -> None:
    seen = []
    for columns in range(160, 37, -1):
        lines = frame(COPY, columns=columns)
        assert len(lines) == 5, columns
        heads = lines[1].split()
        if heads not in seen:
            seen.append(heads)
    lost = [(set(one) - set(other)).pop() for one, other in itertools.pairwise(seen)]
    assert lost == ["CONDITION", "EXTENTS", "DONE", "COD", "STATE", "BYTES"]
    assert seen[-1] == ["NAME", "LEFT"]


def test_a_low_terminal_says_how_many_copies_it_does_not_show() -> None:
    lines = frame(*[COPY] * 30, columns=160, lines=10)
    assert len(lines) <= 10
    assert "and 26 more copies" in lines[-3]


HOST = HostIo("payroll/source", 1200.0, 75 * 2**20, 31.25, 2 * 2**20)


def test_host_io_has_a_table_of_its_own() -> None:
    lines = [" ".join(line.split()) for line in frame(COPY, columns=80, hosts=(HOST,))]
    assert lines[3:5] == [
        "HOST I/O READS READ WRITES WRITTEN",
        "payroll/source 1200/s 75.0M/s 31.2/s 2.0M/s",
    ]
    narrow = [" ".join(line.split()) for line in frame(columns=45, hosts=(HOST,))]
    assert narrow[2:4] == ["HOST I/O READ WRITTEN", "payroll/source 75.0M/s 2.0M/s"]


@pytest.mark.parametrize("lines", [8, 11, 24, 50])
@pytest.mark.parametrize(("copies", "hosts"), [(0, 1), (1, 40), (40, 1), (40, 40), (3, 3)])
def test_nothing_is_higher_than_the_terminal(copies: int, hosts: int, lines: int) -> None:
    shown = frame(*[COPY] * copies, columns=100, lines=lines, hosts=(HOST,) * hosts)
    assert len(shown) <= lines
    assert "q ends this" in shown[-1]
    rows = [line.split()[0] for line in shown if "payroll/" in line]
    assert rows.count("payroll/nightly") >= min(copies, 1)
    assert rows.count("payroll/source") >= min(hosts, 1)


# Host I/O


def host_groups(*counts: int, clone: int = 0) -> dict[str, Any]:
    names = ("reads", "read_bytes", "writes", "written_bytes")
    io = dict(zip(names, counts, strict=True))
    of_clone = CLONE | {"host_io": dict.fromkeys(names, clone)}
    return {"payroll": {"host_io": io, "clones": {"nightly": of_clone}}}


def host_io(*looks: tuple[float, dict[str, Any]]) -> list[HostIo]:
    speeds = HostSpeeds()
    for at_s, shown in looks:
        hosts = speeds.see(shown, at_s)
    return hosts


def test_host_io_is_the_mean_of_the_last_10_s_of_who_was_used() -> None:
    first = (0.0, host_groups(100, 5000, 7, 7))
    assert host_io(first) == []
    (host,) = host_io(first, (2.0, host_groups(104, 5800, 7, 7)))
    assert host == HostIo("payroll/source", 2, 400, 0, 0)
    looks = [(float(at), host_groups(min(at, 20), 0, 0, 0, clone=at)) for at in range(40)]
    assert [host.name for host in host_io(*looks[:25])] == ["payroll/source", "payroll/nightly"]
    assert [host.name for host in host_io(*looks)] == ["payroll/nightly"]


def test_a_daemon_that_counts_anew_is_not_taken_for_negative_io() -> None:
    looks = ((0.0, host_groups(9, 9, 9, 9)), (1.0, host_groups(3, 3, 3, 3)))
    assert host_io(*looks) == []
    assert host_io(*looks, (2.0, host_groups(4, 3, 3, 3)))[0].reads_s == 1


def test_an_older_daemon_tells_nothing_of_hosts() -> None:
    assert host_io((0.0, groups(0)), (1.0, groups(1))) == []


def test_what_is_wrong_is_said() -> None:
    from dataclasses import replace

    lines = frame(replace(COPY, error="no\x1b[2J disk"), columns=160)
    assert "payroll/nightly: no?[2J disk" in lines


# The command


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    root = make_mount(tmp_path / "mnt")
    report(root, groups(500))
    return root


def report(root: Path, shown: dict[str, Any]) -> None:
    put(root / "control/status.json.new", json.dumps({"volume": {}, "groups": shown}))
    (root / "control/status.json.new").rename(root / "control/status.json")


def ending(*events: Callable[[], object]) -> Callable[[float], None]:
    """A sleep in which these things happen one after the other, and then Ctrl-C."""
    left = list(events)

    def sleep(interval_s: float) -> None:
        assert interval_s == 0.5
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    return sleep


@pytest.fixture
def lines_of(mnt: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What a pipe gets while these reports come, without waiting for anything."""

    def watched(*words: str, then: tuple[dict[str, Any], ...] = ()) -> list[str]:
        events = [lambda shown=shown: report(mnt, shown) for shown in then]
        monkeypatch.setattr("clonefs.cli.watch.time.sleep", ending(*events))
        monkeypatch.setattr("clonefs.cli.changes.Look.wait", lambda *_, **__: False)
        result = run("status", "--watch", *words)
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    return watched


def test_a_pipe_gets_a_line_for_each_look_and_each_change(
    mnt: Path, lines_of: Callable[..., list[str]]
) -> None:
    lines = lines_of(str(mnt), then=(groups(600), groups(1000, state="synchronized")))
    said = [line.partition(" ")[2] for line in lines]
    assert said[0] == "payroll/nightly synchronizing normal 500/1000 50%, -, -, - left"
    assert said[1] == "payroll/weekly fractured normal"
    assert said[2].startswith("payroll/nightly synchronizing normal 600/1000 60%, ")
    assert said[3:] == ["payroll/nightly synchronized normal"]


def test_a_pipe_gets_a_line_for_each_lu_that_hosts_use(
    mnt: Path, lines_of: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = groups(1000, state="synchronized")
    shown["payroll"] |= host_groups(0, 0, 0, 0)["payroll"]
    report(mnt, shown)
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr("clonefs.cli.watch.time.monotonic", lambda: next(clock))
    used = shown | {"payroll": shown["payroll"] | host_groups(8, 4096, 1, 600)["payroll"]}
    lines = lines_of(str(mnt), then=(used,))
    said = [line.partition(" ")[2] for line in lines]
    assert said[-1] == "payroll/source hosts: 4.0/s reads, 2.0K/s, 0.5/s writes, 300/s"


def test_json_is_one_report_a_line(mnt: Path, lines_of: Callable[..., list[str]]) -> None:
    lines = lines_of("--json", str(mnt), then=(groups(600),))
    done = [
        json.loads(line)["groups"]["payroll"]["clones"]["nightly"]["progress"]["done"]
        for line in lines
    ]
    assert done == [500, 600]


def test_a_clone_can_be_watched_alone(mnt: Path, lines_of: Callable[..., list[str]]) -> None:
    (line,) = lines_of(str(mnt / "payroll/weekly"))
    assert line.endswith("payroll/weekly fractured normal")


def test_what_is_watched_may_go_away(mnt: Path, lines_of: Callable[..., list[str]]) -> None:
    with pytest.raises(AssertionError, match="there is no group payroll in the mount"):
        lines_of(str(mnt / "payroll"), then=({},))


def test_of_several_mounts_one_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from clonefs.cli import kernel

    monkeypatch.setattr(kernel, "clonefs_mountpoints", lambda: [Path("/a"), Path("/b")])
    sentence = refusal(run("status", "--watch"))
    assert sentence == "there are several mounts: name the one to watch: /a, /b"


@pytest.mark.parametrize(("key", "status"), [("q", 0), ("Q", 0), ("\x03", 0)])
def test_keys_end_it_and_the_terminal_is_as_it_was(mnt: Path, key: str, status: int) -> None:
    with on_terminal("status", "--watch", mnt) as terminal:
        terminal.wait_for("q ends this")
        assert "500/1000" in terminal.text
        assert terminal.settings() != terminal.before
        terminal.press("x")
        terminal.press(key)
        assert terminal.end() == status
        assert terminal.settings() == terminal.before
        assert terminal.drawn.rindex("\x1b[?1049l") > terminal.drawn.rindex("\x1b[?1049h")
        assert terminal.drawn.rindex("\x1b[?25h") > terminal.drawn.rindex("\x1b[?25l")


def test_sigterm_leaves_the_terminal_as_it_was_too(mnt: Path) -> None:
    with on_terminal("status", "--watch", mnt) as terminal:
        terminal.wait_for("q ends this")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 143
        assert terminal.settings() == terminal.before
        assert "Traceback" not in terminal.text


def test_a_mount_that_goes_away_ends_it_with_one_line(mnt: Path) -> None:
    with on_terminal("status", "--watch", mnt) as terminal:
        terminal.wait_for("q ends this")
        (mnt / "control").rename(mnt / "gone")
        assert terminal.end() == 1
        assert terminal.settings() == terminal.before
    said = terminal.text.strip().splitlines()[-1]
    assert said.endswith(f"clonefs: clonefs is not mounted at {mnt} any more")


def test_without_colours_there_are_none(mnt: Path) -> None:
    with on_terminal("status", "--watch", mnt, environment={"NO_COLOR": "1"}) as terminal:
        terminal.wait_for("q ends this")
        terminal.press("q")
        assert terminal.end() == 0
    assert "\x1b[32m" not in terminal.drawn


def test_a_reader_that_goes_away_ends_it_quietly(mnt: Path) -> None:
    command = [*CLONEFS, "status", "--watch", "--interval", "0.1", str(mnt)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"500/1000" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
