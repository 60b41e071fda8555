"""The table of `trireme plan --simulate`."""

import time
import warnings
from functools import partial

from rich.table import Table

from parallel.planner.compare import Comparison, Figure, Group, compare
from parallel.planner.estimate import Estimate
from parallel.planner.memory import memory_of_rank
from parallel.planner.rank import ranks_of
from parallel.planner.simulate import simulate
from train.cli.console import console
from train.config import OptimizerConfig
from train.optimizer import make_optimizer

UNITS: dict[Group, tuple[float, str]] = {
    "memory": (1e9, "GB"),
    "FLOPs": (1e12, "TFLOP"),
    "traffic": (1e9, "GB"),
}


def show_simulated(best: Estimate, optimizer: OptimizerConfig) -> None:
    """Take a step as the rank that needs most memory, and print what it took beside what is planned.

    Raises LayoutError where what is asked for can't be simulated.
    """
    run, arrangement = best.run, best.arrangement
    rank = max(
        ranks_of(run, arrangement), key=lambda each: memory_of_rank(run, arrangement, each, "cpu").total
    )
    began = time.perf_counter()
    with warnings.catch_warnings():
        # torch's, of things that matter to those who change activations in place
        warnings.simplefilter("ignore", UserWarning)
        step = simulate(run, arrangement, rank.place, partial(make_optimizer, config=optimizer))
    seconds = time.perf_counter() - began
    number = rank.place * (arrangement.layout.world_size // arrangement.layout.pp)
    print(
        f"\nA step as rank {number} of {arrangement.layout.world_size}, with the CPU's operators, simulated here in "
        f"{seconds:.0f} s"
    )
    console().print(_table(compare(run, arrangement, rank.place, step)))


def _table(comparison: Comparison) -> Table:
    """A row for each part, and a total of each group."""
    table = Table()
    for name in ("", "", "planned", "simulated", "deviation"):
        table.add_column(name, justify="left" if not name else "right")
    for group, (size, unit) in UNITS.items():
        chosen = [figure for figure in comparison.figures if figure.group == group]
        for figure in (*chosen, comparison.total(group)):
            table.add_row(
                group, figure.name, *_numbers(figure, size, unit), end_section=figure.name == "total"
            )
    return table


def _numbers(figure: Figure, size: float, unit: str) -> tuple[str, str, str]:
    # without a minus before 0.0
    deviation = "" if figure.deviation is None else f"{round(figure.deviation, 3) + 0.0:+.1%}"
    planned, simulated = (f"{value / size:,.3f} {unit}" for value in (figure.planned, figure.simulated))
    # parts of a peak are of the moment at which each side sees it
    passing = figure.group == "memory" and figure.name not in ("weights", "optimizer", "total")
    return planned, simulated, "" if passing else deviation
