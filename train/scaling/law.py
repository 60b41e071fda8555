"""The law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2), and what it says is best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np


class Optimum(NamedTuple):
    """The best use of so many FLOPs."""

    params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Interval:
    """A value, and what 95 % of the bootstrap's samples lie between."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """Loss in nats per token over N parameters and D tokens."""

    E: float
    """What no model learns: the entropy of the text."""
    A: float
    alpha: float
    B: float
    beta: float

    @overload
    def loss(self, params: float, tokens: float) -> float: ...
    @overload
    def loss(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray: ...
    def loss(self, params: float | np.ndarray, tokens: float | np.ndarray) -> float | np.ndarray:
        """Of params and tokens, of any shape that broadcasts."""
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    @property
    def params_exponent(self) -> float:
        """a of N = G C'^a, the best size at C; that of tokens is 1 - a."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: float, flops_factor: float) -> Optimum:
        """The least loss at C FLOPs, where training takes `flops_factor` N D of them (equation 4)."""
        product = flops / flops_factor
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        params = ratio * product**self.params_exponent
        tokens = product / params
        return Optimum(params, tokens, self.loss(params, tokens))


def interval(value: float, samples: Sequence[float]) -> Interval:
    """A value with the percentiles 2.5 and 97.5 of its samples, which hold it wherever it lies."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return Interval(value, min(value, float(low)), max(value, float(high)))
