"""The mounts that tests get, and the watch over those that hang."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mounts.faulty import FaultyDevice, faulty_device
from tests.mounts.mount import KILLS, Mount, mounted, patience

TURNS = 10
TAKES_TURNS = ("tests.mounts.test_crash", "tests.mounts.test_crash_file_systems")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how many daemons were killed, and what they were doing."""
    if KILLS:
        listed = ", ".join(f"{count} {what}" for what, count in sorted(KILLS.items()))
        terminalreporter.write_line(f"SIGKILL of the daemon: {KILLS.total()} times: {listed}")
        terminalreporter.write_line(f"their moments: --seed={config.getoption('--seed')}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of several hands its kills over."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["kills"] = dict(KILLS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """One of several processes has ended."""
    KILLS.update(getattr(node, "workeroutput", {}).get("kills", {}))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With --long, whatever kills at random moments does so ten times as often: each turn has random
    numbers of its own."""
    if metafunc.config.getoption("--long") and metafunc.module.__name__ in TAKES_TURNS:
        metafunc.fixturenames.append("_turn")
        metafunc.parametrize("_turn", range(TURNS))


@pytest.fixture
def _turn() -> None:
    """Which turn it is; only in the name of the test, and so in its seed."""


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """Ends a test whose request is never answered: a test must fail, and never hang."""
    with patience():
        yield


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A mount for one test."""
    with mounted(tmp_path / "work") as mount:
        yield mount


@pytest.fixture
def device(tmp_path: Path) -> Iterator[FaultyDevice]:
    """A device that fails or hangs when it is told to."""
    with faulty_device(tmp_path / "faulty") as device:
        yield device


@pytest.fixture
def mount_above(tmp_path: Path, device: FaultyDevice) -> Iterator[Mount]:
    """A mount that is put away while the device is still there, and nothing hangs any more."""
    with mounted(tmp_path / "work") as mount:
        try:
            yield mount
        finally:
            device.mend()


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with mounted(tmp_path_factory.mktemp("shared") / "work") as mount:
        yield mount


@pytest.fixture
def shared(_shared: Mount) -> Mount:
    """A mount for all tests of a module: each makes groups of its own, and ends nothing."""
    _shared.start_if_dead()
    return _shared


@pytest.fixture
def cleanup() -> Iterator[contextlib.ExitStack]:
    """What is in it is put away at the end of the test. Ask for it after the mount that it uses."""
    with contextlib.ExitStack() as stack:
        yield stack
