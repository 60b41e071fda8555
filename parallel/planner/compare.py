"""What the planner works out for a rank beside what a simulation of it measures."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.memory import memory_of_rank
from parallel.planner.rank import rank_at
from parallel.planner.simulate import Simulated
from parallel.planner.traffic import bytes_by_kind, traffic_of_rank
from parallel.planner.work import work_of_rank

Group = Literal["memory", "FLOPs", "traffic"]

FEW = 1e-4
"""Traffic below this share of all is of a few numbers, which the planner leaves out."""


@dataclass(frozen=True)
class Figure:
    """One number of a step, worked out and measured: FLOPs, or bytes."""

    group: Group
    name: str
    planned: float
    simulated: float

    @property
    def deviation(self) -> float | None:
        """Of what was planned, as a share of what was measured; None of nothing."""
        return self.planned / self.simulated - 1 if self.simulated else None


@dataclass(frozen=True)
class Comparison:
    """All figures of a rank."""

    figures: list[Figure]

    def total(self, group: Group) -> Figure:
        """The sum of a group's."""
        chosen = [figure for figure in self.figures if figure.group == group]
        planned, simulated = (sum(getattr(f, side) for f in chosen) for side in ("planned", "simulated"))
        return Figure(group, "total", planned, simulated)


def compare(run: RunFacts, arrangement: Arrangement, place: int, simulated: Simulated) -> Comparison:
    """Of the first rank at a place of the pipeline, with the CPU's operators. Peaks of memory are by the parts at
    which each side sees it, and these may be at different moments."""
    rank = rank_at(run, arrangement, place)
    memory = memory_of_rank(run, arrangement, rank, "cpu").parts
    work = work_of_rank(run, arrangement, rank).total * arrangement.micro_batches(run)
    traffic = bytes_by_kind(traffic_of_rank(run, arrangement, rank))
    moved = {key: float(each.bytes) for key, each in simulated.traffic.items()}
    least = FEW * sum(moved.values())
    keys = sorted({*traffic, *(key for key, size in moved.items() if size > least)})
    planned: dict[tuple[str, str], float] = {(kind, dim): size for (kind, dim), size in traffic.items()}
    return Comparison(
        [
            *_figures("memory", ((name, memory[name], simulated.memory.get(name, 0)) for name in memory)),
            Figure("FLOPs", "matrix products", work.matmul, simulated.matmul),
            Figure("FLOPs", "attention", work.attention, simulated.attention),
            *_figures(
                "traffic",
                (
                    (f"{kind} {dim}", planned.get((kind, dim), 0.0), moved.get((kind, dim), 0.0))
                    for kind, dim in keys
                ),
            ),
        ]
    )


def _figures(group: Group, values: Iterable[tuple[str, float, float]]) -> list[Figure]:
    return [
        Figure(group, name, planned, measured) for name, planned, measured in values if planned or measured
    ]
