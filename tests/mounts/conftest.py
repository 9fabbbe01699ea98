"""The mounts that tests get, and the watch over those that hang."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts.mount import Mount, mounted, patience


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
