"""Simulations for as long as asked: `python -m clonefs.testing`.

Random runs and the sweeps of the written scenarios, in turn, each with a seed of its own that is one
more than the one before. What is found is printed with the command that replays it.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterator

import click

from clonefs.testing.scenarios import SCENARIOS
from clonefs.testing.simulation import Plan, Simulation, random_plan
from clonefs.testing.sweeps import Blow, plan_of

A_SWEEP_EVERY = 200  # random runs
PROGRESS_S = 10.0


def _sweeps() -> Iterator[tuple[str, Blow, int]]:
    for seed in itertools.count():
        for scenario in SCENARIOS:
            for blow in Blow:
                yield scenario, blow, seed


class _Search:
    """What was tried, and what was found."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.began = time.monotonic()
        self._told = self.began

    def run(self, plan: Plan, replay: str) -> bool:
        """Run `plan`. Returns whether its blow was met, or it had none."""
        simulation = Simulation(plan)
        hit = True
        try:
            hit = simulation.run().hit
        except Exception as error:
            self.done["found"] += 1
            click.echo(f"FOUND {type(error).__name__}: {error}\n  {replay}")
        self.done += simulation.report.figures()
        return hit

    def sweep(self, scenario: str, blow: Blow, seed: int, until: float) -> None:
        """Every point of a scenario, as far as the time goes."""
        for number in itertools.count(1):
            replay = f"python -m clonefs.testing --scenario {scenario} --blow '{blow}' "
            plan = plan_of(scenario, blow, number, seed)
            if not self.run(plan, f"{replay}--number {number} --seed {seed}"):
                break
            self.done["crash points swept"] += 1
            self.tell_now_and_then()
            if time.monotonic() > until:
                break

    def tell_now_and_then(self) -> None:
        """A line every PROGRESS_S seconds."""
        if time.monotonic() > self._told + PROGRESS_S:
            self._told = time.monotonic()
            self.tell()

    def tell(self) -> None:
        """What was done so far."""
        seconds = time.monotonic() - self.began
        figures = ", ".join(
            f"{count} {what.replace('_', ' ')}" for what, count in self.done.items()
        )
        click.echo(
            f"{seconds:.0f} s, {self.done['operations'] / seconds:.0f} operations/s: {figures}"
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seconds", type=float, default=60.0, show_default=True, help="How long.")
@click.option("--seed", type=int, default=None, help="The first seed; a new one if not given.")
@click.option("--replay", type=int, metavar="SEED", help="Only the random run with this seed.")
@click.option("--scenario", type=click.Choice(list(SCENARIOS)), help="Only this run of a sweep ...")
@click.option("--blow", type=click.Choice([str(blow) for blow in Blow]), help="... with this blow")
@click.option("--number", type=int, default=1, help="... at this point.")
def main(
    seconds: float,
    seed: int | None,
    replay: int | None,
    scenario: str | None,
    blow: str | None,
    number: int,
) -> None:
    """Simulate deaths, power cuts and failing devices, and look for broken promises."""
    search = _Search()
    if replay is not None:
        search.run(random_plan(replay), "the same again")
    elif scenario is not None:
        which = Blow(blow or Blow.KILL)
        search.run(plan_of(scenario, which, number, seed or 0), "the same again")
    else:
        _explore(search, seconds, seed)
    search.tell()
    if search.done["found"]:
        raise SystemExit(1)


def _explore(search: _Search, seconds: float, seed: int | None) -> None:
    first = time.time_ns() % (1 << 31) if seed is None else seed
    click.echo(f"seeds from {first} on (--seed {first} runs the same again)")
    until, sweeps = time.monotonic() + seconds, _sweeps()
    for count, each in enumerate(itertools.count(first), 1):
        if time.monotonic() > until:
            return
        search.run(random_plan(each), f"python -m clonefs.testing --replay {each}")
        search.tell_now_and_then()
        if count % A_SWEEP_EVERY == 0:
            name, which, offset = next(sweeps)
            search.sweep(name, which, first + offset, until)


if __name__ == "__main__":
    main()
