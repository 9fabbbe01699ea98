"""Shipped for tests: simulated units and a simulated volume with faults and a seed, and the oracle.

The group, the engines and the volume are the real ones; only what is under them is simulated, in
virtual time, so that a run is a function of its seed. `run_simulation` drives a run; a run that
finds something raises `Violation`, and its plan replays it. `python -m clonefs.testing` runs for as
long as asked.
"""

from clonefs.testing.oracle import Violation
from clonefs.testing.simulation import Plan, Report, Simulation, random_plan, run_simulation
from clonefs.testing.sweeps import SCENARIOS, Blow, plan_of, sweep

__all__ = [
    "SCENARIOS",
    "Blow",
    "Plan",
    "Report",
    "Simulation",
    "Violation",
    "plan_of",
    "random_plan",
    "run_simulation",
    "sweep",
]
