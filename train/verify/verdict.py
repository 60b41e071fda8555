"""What was found of a layout, and whether that is right."""

from dataclasses import dataclass, fields

from parallel.config import Precision
from train.verify.trial import Trial


@dataclass(frozen=True)
class Differences:
    """Relative ones, the largest of all ranks and steps; or the most that they may be."""

    loss: float
    grad_norm: float
    """Before clipping."""
    weights: float
    """After the last step: of a tensor's largest element."""
    resumed: float
    """Of all these, in a run that went on at another layout."""


BOUNDS: dict[Precision, Differences] = {
    "fp64": Differences(1e-9, 1e-9, 1e-9, 1e-9),
    "fp32": Differences(3e-6, 2e-5, 2e-4, 2e-4),
    "bf16": Differences(0.12, 0.3, 0.5, 0.5),
}
"""Of right layouts. fp32: ten times the largest that were measured, bf16: twice; docs/verify.md says in what."""


@dataclass(frozen=True)
class Finding:
    """Of a layout that was refused, that ended in an error, or that ran."""

    name: str
    """The layout as it is written."""
    refused: str | None = None
    """Why."""
    error: str | None = None
    """The traceback."""
    initial: bool = False
    """Whether all weights were the reference's at first, to the last bit."""
    order: bool = False
    """Whether the ranks were given the reference's batches, in their order, and none of it twice."""
    differences: Differences | None = None

    def wrong(self, precision: Precision) -> list[str]:
        """What is not right, by name."""
        if self.refused is not None:
            return []
        if self.differences is None:
            return ["error"]
        found, most = vars(self.differences), vars(BOUNDS[precision])
        checks = {"initial": self.initial, "order": self.order}
        checks |= {name: found[name] <= most[name] for name in found}
        return [name for name, right in checks.items() if not right]


def judge(name: str, trials: list[Trial], weights: frozenset[str], order: list[list[int]]) -> Finding:
    """Put together what the ranks saw. weights: the names of all; order: the ids of every step's sequences."""
    everywhere = frozenset[str]().union(*(trial.names for trial in trials))
    worst = {field.name: max(getattr(trial, field.name) for trial in trials) for field in fields(Differences)}
    return Finding(
        name,
        initial=everywhere == weights and all(trial.initial_equal for trial in trials),
        order=_order_equal(trials, order),
        differences=Differences(**worst),
    )


def _order_equal(trials: list[Trial], order: list[list[int]]) -> bool:
    """Whether the data ranks' shares make up each step's batch, and ranks that share one have the same."""
    by_rank = {trial.data_rank: trial.ids for trial in trials}
    alike = all(by_rank[trial.data_rank] == trial.ids for trial in trials)
    steps = zip(*(by_rank[rank] for rank in sorted(by_rank)), strict=True)
    return alike and [[at for share in shares for at in share] for shares in steps] == order
