"""`wait` and `--wait`: they end, and they end with the truth. No test here takes any time."""

import contextlib
import os
import pty
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from clonefs.cli import waiting
from clonefs.cli.changes import Look
from clonefs.cli.waiting import STATES, Verdict, View, judge
from tests.test_cli_support import Clock, make_mount, refusal, run, show


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    return make_mount(tmp_path / "mnt")


@pytest.fixture
def nightly(mnt: Path) -> Path:
    return mnt / "payroll/nightly"


def becomes(mnt: Path, state: str, **values: str) -> partial[None]:
    """The event that the clone's control files show this."""
    return partial(show, mnt, "payroll", "nightly", state=state, **values)


def passes(monkeypatch: pytest.MonkeyPatch, *events: partial[None]) -> Clock:
    """While the command waits, these events happen one after the other."""
    clock = Clock(*events)
    monkeypatch.setattr(waiting, "time", clock)
    monkeypatch.setattr(Look, "wait", clock.wait)
    return clock


D, G, H = Verdict.DONE, Verdict.GO_ON, Verdict.HOPELESS


@pytest.mark.parametrize(
    ("state", "condition", "any_end", "for_synchronized", "for_fractured"),
    [
        ("synchronizing", "normal", G, G, G),
        ("synchronizing", "faulted", G, G, G),
        ("synchronizing", "waiting", G, G, G),
        ("restoring", "normal", G, G, G),
        ("reverse-synchronizing", "normal", G, G, G),
        ("synchronized", "normal", D, D, G),
        ("fractured", "administratively-fractured", D, G, D),
        ("out-of-sync", "system-fractured", H, H, H),
        ("out-of-sync", "faulted", H, H, H),
        ("reverse-out-of-sync", "normal", H, H, H),
    ],
)
def test_what_a_look_means(
    state: str, condition: str, any_end: Verdict, for_synchronized: Verdict, for_fractured: Verdict
) -> None:
    view = View(state, condition, done=1, total=2)
    assert judge(view, None) is any_end
    assert judge(view, "synchronized") is for_synchronized
    assert judge(view, "fractured") is for_fractured


def test_a_copy_that_waits_with_a_reason_has_stopped() -> None:
    queued = View("restoring", "waiting", done=1, total=2)
    assert judge(queued, None) is Verdict.GO_ON
    assert judge(replace(queued, trouble="a map is lost"), None) is Verdict.HOPELESS
    assert judge(replace(queued, condition="faulted", trouble="no disk"), None) is Verdict.GO_ON


@pytest.mark.parametrize("state", STATES)
def test_every_state_can_be_waited_for(state: str) -> None:
    assert judge(View(state, "waiting", done=0, total=0), state) is Verdict.DONE


def test_wait_returns_when_the_copy_is_done(
    mnt: Path, nightly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    becomes(mnt, "synchronizing")()
    clock = passes(
        monkeypatch, becomes(mnt, "synchronizing", progress="8/8"), becomes(mnt, "synchronized")
    )
    result = run("wait", nightly)
    assert (result.exit_code, result.output) == (0, "")
    assert len(clock.pauses_s) == 2


def test_wait_returns_at_once_when_nothing_is_copied(
    nightly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = passes(monkeypatch)
    assert run("wait", nightly).exit_code == 0
    assert clock.pauses_s == []


def test_wait_for_a_state_goes_on_past_others(
    mnt: Path, nightly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    becomes(mnt, "synchronizing")()
    clock = passes(monkeypatch, becomes(mnt, "synchronized"), becomes(mnt, "fractured"))
    assert run("wait", "--state", "fractured", nightly).exit_code == 0
    assert len(clock.pauses_s) == 2


def test_it_looks_again_by_itself_twice_a_second(
    mnt: Path, nightly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = becomes(mnt, "synchronizing")
    still()
    clock = passes(monkeypatch, *[still] * 2, becomes(mnt, "synchronized"))
    assert run("wait", nightly).exit_code == 0
    assert clock.pauses_s == [0.5] * 3


def test_a_timeout_ends_the_wait_on_time(
    mnt: Path, nightly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = becomes(mnt, "synchronizing", progress="3/8")
    still()
    clock = passes(monkeypatch, *[still] * 5)
    sentence = refusal(run("wait", "--timeout", "0.2", nightly))
    assert (
        sentence
        == f"{nightly} is still synchronizing, 3 of 8 extents copied: the time is up: wait longer"
    )
    assert sum(clock.pauses_s) == pytest.approx(0.2)


def test_a_timeout_of_nothing_is_one_look(
    mnt: Path, nightly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = passes(monkeypatch)
    assert run("wait", "--timeout", "0", nightly).exit_code == 0
    becomes(mnt, "restoring")()
    assert "is still restoring" in refusal(run("wait", "--timeout", "0", nightly))
    assert clock.pauses_s == []


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ({"state": "out-of-sync", "error": "sector 5 failed"}, "is out-of-sync: sector 5 failed"),
        ({"state": "out-of-sync"}, "is out-of-sync"),
        ({"state": "reverse-out-of-sync"}, "is reverse-out-of-sync"),
        (
            {"state": "restoring", "condition": "waiting", "error": "a map is lost"},
            "is restoring, and waits for somebody to act: a map is lost",
        ),
    ],
)
def test_a_copy_that_cannot_be_completed_ends_the_wait(
    mnt: Path,
    nightly: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: dict[str, str],
    sentence: str,
) -> None:
    becomes(mnt, "restoring")()
    passes(monkeypatch, partial(show, mnt, "payroll", "nightly", **end))
    assert refusal(run("wait", nightly)) == f"{nightly} {sentence}"


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        (
            "control/payroll/nightly",
            "there is no clone nightly in the group payroll: see clonefs status",
        ),
        (
            "control/payroll",
            "there is no group payroll in the mount at MNT: see clonefs status",
        ),
        ("control", "clonefs is not mounted at MNT any more"),
    ],
)
def test_what_is_waited_for_may_go_away(
    mnt: Path, nightly: Path, monkeypatch: pytest.MonkeyPatch, gone: str, sentence: str
) -> None:
    becomes(mnt, "synchronizing")()
    passes(monkeypatch, partial(_move_away, mnt / gone))
    assert refusal(run("wait", nightly)) == sentence.replace("MNT", str(mnt))


def test_the_reason_is_the_clones_and_not_that_of_a_refused_command(
    mnt: Path, nightly: Path
) -> None:
    becomes(mnt, "out-of-sync", error="sector 5 failed")()
    (mnt / "control/payroll/nightly/error").write_text("restore is refused: sync it first\n")
    assert refusal(run("wait", nightly)) == f"{nightly} is out-of-sync: sector 5 failed"


def _move_away(path: Path) -> None:
    path.rename(path.with_name("moved-away"))


def test_a_fault_is_said_once_and_waited_out(
    mnt: Path, nightly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulted = becomes(mnt, "restoring", condition="faulted", error="a read failed")
    becomes(mnt, "restoring")()
    passes(
        monkeypatch, faulted, faulted, becomes(mnt, "restoring"), faulted, becomes(mnt, "fractured")
    )
    result = run("wait", nightly)
    assert result.exit_code == 0
    assert result.stderr == f"clonefs: {nightly} is faulted, and is tried again: a read failed\n"
    assert result.stdout == ""


def test_restore_with_wait_starts_and_waits(
    mnt: Path, nightly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    becomes(mnt, "restoring")()
    clock = passes(monkeypatch, becomes(mnt, "fractured"))
    assert run("restore", "--wait", nightly).exit_code == 0
    assert (mnt / "control/payroll/nightly/protected_restore").read_text() == "1\n"
    assert len(clock.pauses_s) == 1


def test_sync_then_fracture_with_wait_ends_at_fractured_and_not_before(
    mnt: Path, nightly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    becomes(mnt, "synchronizing")()
    clock = passes(monkeypatch, becomes(mnt, "synchronized"), becomes(mnt, "fractured"))
    assert run("sync", "--then-fracture", "--wait", nightly).exit_code == 0
    assert len(clock.pauses_s) == 2


def test_sync_with_wait_ends_at_synchronized(
    mnt: Path, nightly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    becomes(mnt, "synchronizing")()
    passes(monkeypatch, becomes(mnt, "synchronized"))
    assert run("sync", "--wait", nightly).exit_code == 0


def test_a_terminal_gets_a_bar(mnt: Path, nightly: Path) -> None:
    becomes(mnt, "synchronized", progress="8/8")()
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, "-m", "clonefs", "wait", str(nightly)]
    done = subprocess.run(
        command, stderr=slave, stdout=subprocess.PIPE, env=environment, check=True
    )
    os.close(slave)
    data = b""
    with os.fdopen(master, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while piece := terminal.read(65536):  # EIO: all has been read
            data += piece
    drawn = data.decode()
    assert "8/8" in drawn
    assert "synchronized" in drawn
    assert done.stdout == b""


def test_a_pipe_gets_none(nightly: Path) -> None:
    command = [sys.executable, "-m", "clonefs", "wait", str(nightly)]
    done = subprocess.run(command, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
