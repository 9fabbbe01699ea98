"""What all tests have in common: the options of the test run, and the seed of what is random.

`--long` runs the tests that are marked `long` too. A test that does something at random takes it
from the fixture `rng`, so that a run that failed can be had again with the seed in its first lines.
"""

import random
import signal
from typing import Any

import pytest

# What these check for tests is to be explained like what tests check themselves.
pytest.register_assert_rewrite("tests.mounts.mount", "tests.mounts.load")


# A shell lets its jobs in the background ignore SIGINT, and what they start ignores it too: tests that
# interrupt a program would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--long` and `--seed`."""
    parser.addoption("--long", action="store_true", help="run the long tests too")
    parser.addoption("--seed", type=int, help="the seed of everything that is random")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, and choose the seed."""
    config.addinivalue_line("markers", "long: takes minutes; run with --long only")
    seed = config.getoption("--seed")
    seed = getattr(config, "workerinput", {}).get("seed", seed)  # all processes have the same
    config.option.seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    if config.pluginmanager.hasplugin("dsession"):
        config.pluginmanager.register(_Workers(config.option.seed))


class _Workers:
    """Tells the processes that run tests the seed (pytest-xdist)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def pytest_configure_node(self, node: Any) -> None:
        """A process is about to begin."""
        node.workerinput["seed"] = self._seed


def pytest_report_header(config: pytest.Config) -> str:
    """Say how to run the same again."""
    seed = config.getoption("--seed")
    return f"seed: {seed} (--seed={seed} runs the same again)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the long tests, unless they are asked for."""
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker(pytest.mark.skip(reason="long: run with --long"))


@pytest.fixture
def rng_seed(request: pytest.FixtureRequest) -> str:
    """A seed that follows from the seed of the run and the name of the test."""
    run = request.config.getoption("--seed")
    seed = f"{run} {request.node.name}"
    print(f"random numbers from the seed {seed!r}; the run has --seed={run}")
    return seed


@pytest.fixture
def rng(rng_seed: str) -> random.Random:
    """Random numbers from `rng_seed`."""
    return random.Random(rng_seed)
