"""Shipped for tests: simulated units and a simulated volume with faults and a seed, and the oracle.

The group, the engines and the volume are the real ones; only what is under them is simulated, in
virtual time, so that a run is a function of its seed. `run_simulation` drives a run; a run that
finds something raises `Violation`, and its seed replays it.
"""

from clonefs.testing.oracle import Violation
from clonefs.testing.simulation import Plan, Report, run_simulation, sweep

__all__ = ["Plan", "Report", "Violation", "run_simulation", "sweep"]
