"""Sweeps: a written scenario, broken off or made to fail at each of its points, one after the other.

A sweep ends when a run no longer comes as far as the point. The life after the broken one may end
early too, so that recovery is cut off as well; the one after that brings everything to its end.
"""

from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum

from clonefs.testing.scenarios import SCENARIOS
from clonefs.testing.simulation import Plan, Report, run_simulation


class Blow(StrEnum):
    """What happens at point, or to I/O, number n."""

    KILL = "kill"
    POWER_CUT = "power cut"
    ERROR_ONCE = "error once"
    ERROR_FOR_EVER = "error for ever"


def plan_of(scenario: str, blow: Blow, number: int, seed: int = 0) -> Plan:
    """The run of `scenario` that meets `blow` at point, or in I/O, `number`: up to there it is the
    same for every number. After an error the daemon ends in order, and half of the times the power
    goes then."""
    plan = Plan(seed, groups=2, extents=4, lives=3, points_a_life=400, scenario=scenario)
    match blow:
        case Blow.KILL:
            return replace(plan, death=number, power_cuts=0.0)
        case Blow.POWER_CUT:
            return replace(plan, death=number, power_cuts=1.0)
        case Blow.ERROR_ONCE:
            return replace(plan, fault=number)
        case Blow.ERROR_FOR_EVER:
            return replace(plan, fault=number, lasting=True)


def sweep(
    scenario: str, blow: Blow, *, seed: int = 0, first: int = 1, step: int = 1
) -> Iterator[tuple[Plan, Report]]:
    """Every `step`th run of that scenario and blow, from `first` on, with what it did. Raises
    Violation."""
    number = first
    while True:
        plan = plan_of(scenario, blow, number, seed)
        report = run_simulation(plan)
        if not report.hit:
            return
        yield plan, report
        number += step


__all__ = ["SCENARIOS", "Blow", "plan_of", "sweep"]
