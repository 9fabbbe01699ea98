"""Seeded runs of the real group, engines and volume over simulated units (clonefs.testing).

A run that fails names its seed: `run_simulation(Plan(seed=...))` replays it.
"""

import errno
import sys

import pytest

from clonefs.engines import StorageSystem
from clonefs.errors import ClonefsError
from clonefs.testing import Plan, run_simulation, sweep
from clonefs.volume import MapSlot, MetadataVolume


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


@pytest.mark.parametrize("power_cuts", [0.0, 1.0], ids=["kills", "power cuts"])
def test_a_death_at_every_point(power_cuts: float, pytestconfig: pytest.Config) -> None:
    """One small run, broken off at each I/O and each change of a map; the step is longer in the
    short mode."""
    long = pytestconfig.getoption("--long")
    for seed in range(4 if long else 1):
        plan = Plan(seed, clones=2, power_cuts=power_cuts, hosts=3, requests=12, commands=10)
        try:
            deaths = sum(report.deaths for report in sweep(plan, 1 if long else 17))
        except BaseException as error:
            error.add_note(f"of a sweep of {plan}")
            raise
        assert deaths > (500 if long else 20)


def test_restores_that_begin_again_on_a_full_volume(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """There is no slot for another Protected Restore Map, so that it is emptied in its place."""
    original, refused = MetadataVolume.new_map_slot, []

    def full_when_restarted(
        self: MetadataVolume, extents: int, *, beside: tuple[MapSlot, ...] = ()
    ) -> MapSlot:
        if sys._getframe(1).f_code is StorageSystem._empty_protected.__code__:
            refused.append(extents)
            raise ClonefsError(errno.ENOSPC, "the metadata volume is full")
        return original(self, extents, beside=beside)

    monkeypatch.setattr(MetadataVolume, "new_map_slot", full_when_restarted)
    for seed in range(seeds(pytestconfig)):
        run_simulation(Plan(seed, clones=1 + seed % 3, fault_rate=0.02 * (seed % 2)))
    assert len(refused) > seeds(pytestconfig) / 10


def test_a_seed_replays_its_run() -> None:
    plan = Plan(7, fault_rate=0.02)
    assert run_simulation(plan) == run_simulation(plan)
