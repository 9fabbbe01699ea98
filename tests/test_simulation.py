"""Seeded runs of the real group, engines and volume over simulated units (clonefs.testing).

A run that fails names its seed: `run_simulation(Plan(seed=...))` replays it.
"""

import pytest

from clonefs.testing import Plan, run_simulation


def seeds(config: pytest.Config) -> int:
    return 3000 if config.getoption("--long") else 60


@pytest.mark.parametrize("fault_rate", [0.0, 0.02], ids=["no faults", "faults"])
def test_random_hosts_commands_and_deaths(fault_rate: float, pytestconfig: pytest.Config) -> None:
    restores = deaths = power_cuts = 0
    for seed in range(seeds(pytestconfig)):
        try:
            report = run_simulation(Plan(seed, clones=1 + seed % 3, fault_rate=fault_rate))
        except BaseException as error:
            error.add_note(f"replay it: Plan({seed}, clones={1 + seed % 3}, {fault_rate=})")
            raise
        restores += report.restores
        deaths += report.deaths
        power_cuts += report.power_cuts
    # A simulation in which nothing happens would pass too.
    assert restores > seeds(pytestconfig)
    assert deaths > seeds(pytestconfig)
    assert 0.3 * deaths < power_cuts < 0.7 * deaths


def test_a_seed_replays_its_run() -> None:
    plan = Plan(7, fault_rate=0.02)
    assert run_simulation(plan) == run_simulation(plan)
