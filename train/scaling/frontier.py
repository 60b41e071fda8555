"""The best size at each compute budget, read off the points without a law. P points, K kept of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.errors import InputError
from train.scaling.points import Points

SAME_BUDGET = 1.1
"""Points whose FLOPs differ by less than this factor were given the same budget."""


@dataclass(frozen=True)
class Frontier:
    """Best sizes at some budgets, each (K,), and the line through their logarithms: N = coefficient C^exponent."""

    flops: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    def __post_init__(self) -> None:
        if len(self.flops) < 2:
            raise InputError(f"it takes two budgets or more, and there are {len(self.flops)}")

    @property
    def exponents(self) -> tuple[float, float]:
        """How the best size and the best number of tokens grow with FLOPs."""
        grow = [np.polyfit(np.log(self.flops), np.log(values), 1)[0] for values in (self.params, self.tokens)]
        return float(grow[0]), float(grow[1])

    def params_at(self, flops: np.ndarray) -> np.ndarray:
        """The best size at any FLOPs, by the line."""
        slope, start = np.polyfit(np.log(self.flops), np.log(self.params), 1)
        return np.exp(start + slope * np.log(flops))


def budgets(points: Points) -> list[np.ndarray]:
    """Indices of the points of each budget, from the smallest budget."""
    groups: list[list[int]] = []
    for index in np.argsort(points.flops):
        if not groups or points.flops[index] >= SAME_BUDGET * points.flops[groups[-1][0]]:
            groups.append([])
        groups[-1].append(int(index))
    return [np.array(group) for group in groups]


def isoflop(points: Points) -> Frontier:
    """The lowest points of parabolas of loss over log N at each budget (Hoffmann et al. 2022, approach 2).

    A budget counts where the lowest point is among its sizes, which are three or more.

    Raises:
        InputError: fewer than two budgets count.
    """
    found = [best for best in (_lowest(points.take(group)) for group in budgets(points)) if best is not None]
    return Frontier(*np.array(found).reshape(-1, 4).T)


def parabola(points: Points) -> np.ndarray | None:
    """Coefficients of loss over log N, highest power first; None for fewer than three sizes."""
    if len(np.unique(points.params)) < 3:
        return None
    return np.polyfit(np.log(points.params), points.loss, 2)


def _lowest(points: Points) -> tuple[float, float, float, float] | None:
    """(flops, params, tokens, loss)"""
    coefficients = parabola(points)
    if coefficients is None or coefficients[0] <= 0:
        return None
    place = float(-coefficients[1] / (2 * coefficients[0]))
    params, flops = math.exp(place), math.exp(np.log(points.flops).mean())
    if not points.params.min() <= params <= points.params.max():
        return None
    factor = math.exp(np.log(points.flops / (points.params * points.tokens)).mean())
    return flops, params, flops / (factor * params), float(np.polyval(coefficients, place))


def envelope(points: Points) -> Frontier:
    """The best point of each budget that is better than all of smaller ones (Hoffmann et al. 2022, approach 1).

    Raises:
        InputError: there are fewer than two such points.
    """
    kept: list[int] = []
    for group in budgets(points):
        best = int(group[np.argmin(points.loss[group])])
        if not kept or points.loss[best] < points.loss[kept[-1]]:
            kept.append(best)
    on = points.take(np.array(kept))
    return Frontier(on.flops, on.params, on.tokens, on.loss)


METHODS: dict[str, Callable[[Points], Frontier]] = {"isoflop": isoflop, "envelope": envelope}
