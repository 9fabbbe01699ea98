"""Seeded runs of the real group, engines and volume over simulated units (clonefs.testing).

A run that fails names its plan; docs/testing.md says how to replay it.
"""

import errno
import sys
from collections import Counter

import pytest

from clonefs.engines import StorageSystem
from clonefs.errors import ClonefsError
from clonefs.testing import (
    SCENARIOS,
    Blow,
    Report,
    Simulation,
    plan_of,
    random_plan,
    run_simulation,
)
from clonefs.volume import MapSlot, MetadataVolume


def run_it(simulation: Simulation) -> Report:
    """Run it. A run that fails names its plan."""
    try:
        return simulation.run()
    except BaseException as error:
        error.add_note(f"of {simulation.plan}")
        raise


def test_random_hosts_commands_faults_and_deaths(pytestconfig: pytest.Config) -> None:
    seeds = 4000 if pytestconfig.getoption("--long") else 160
    done: Counter[str] = Counter()
    for seed in range(seeds):
        done += run_it(Simulation(random_plan(seed))).figures()
    # A simulation in which nothing happens would pass too.
    assert done["deaths"] > seeds
    assert done["unmounts"] > seeds / 2
    assert done["power_cuts"] > seeds
    assert done["restores"] > seeds
    assert done["verifications"] > seeds / 2
    assert done["faults"] > seeds
    assert done["rotten"] > seeds / 20


@pytest.mark.parametrize("blow", Blow)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_blow_at_every_point(scenario: str, blow: Blow, pytestconfig: pytest.Config) -> None:
    """A written scenario is killed, loses its power, or meets an error, at each of its points; in the
    short mode at every 23rd."""
    step = 1 if pytestconfig.getoption("--long") else 23
    runs = 0
    for number in range(1, 100_000, step):
        if not run_it(Simulation(plan_of(scenario, blow, number))).hit:
            break
        runs += 1
    assert runs * step > 100


@pytest.mark.parametrize("blow", Blow)
def test_restores_that_begin_again_on_a_full_volume(
    blow: Blow, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
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
    step = 1 if pytestconfig.getoption("--long") else 7
    for number in range(1, 100_000, step):
        if not run_it(Simulation(plan_of("restore_begun_again", blow, number))).hit:
            break
    assert refused


def test_a_seed_replays_its_run() -> None:
    plan = random_plan(7)
    assert run_simulation(plan) == run_simulation(plan)
