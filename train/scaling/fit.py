"""Fitting the law to points by Huber loss on log-loss (Hoffmann et al. 2022, appendix D.2). P points, S starts."""

from collections.abc import Iterator
from itertools import product

import numpy as np
from scipy.optimize import minimize

from data.errors import InputError
from train.scaling.law import Law
from train.scaling.points import Points

DELTA = 1e-3
"""Residuals in log-loss beyond it count by their size, not their square."""
EXPONENTS, LOG_FACTORS, LOG_ENTROPIES = np.arange(0, 2.5, 0.5), np.arange(0, 30, 5), np.arange(-1, 1.5, 0.5)
"""The grid of starts: alpha and beta; a = log A and b = log B; e = log E."""
BOUNDS = ((None, None), (None, None), (-7, None), (1e-3, 4), (1e-3, 4))
"""Of a, b, e, alpha, beta: more data or parameters never hurt, and an entropy under 0.001 is none."""
_OPTIONS = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-7}


class _Objective:
    """The Huber loss over theta = (a, b, e, alpha, beta), where logarithms of sizes are taken from their means.

    Centred, the constants are far less correlated, and L-BFGS needs a tenth of the steps. The loss is counted in
    units of DELTA squared, which puts it where L-BFGS' tolerances mean something (Besiroglu et al. 2024 on what
    becomes of it otherwise).
    """

    def __init__(self, points: Points) -> None:
        self.centre = np.log(points.params).mean(), np.log(points.tokens).mean()
        self.n, self.d = np.log(points.params) - self.centre[0], np.log(points.tokens) - self.centre[1]
        self.log_loss = np.log(points.loss)

    def terms(self, theta: np.ndarray) -> np.ndarray:
        """(..., 5) -> logarithms of the law's three terms, (3, ..., P)."""
        a, b, e, alpha, beta = np.moveaxis(theta[..., None], -2, 0)
        return np.stack(np.broadcast_arrays(a - alpha * self.n, b - beta * self.d, e))

    def values(self, theta: np.ndarray) -> np.ndarray:
        """The loss alone, of many at once: (S, 5) -> (S,)."""
        residuals = (np.logaddexp.reduce(self.terms(theta), axis=0) - self.log_loss) / DELTA
        return _huber(residuals).sum(-1)

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss and its gradient, (5,)."""
        terms = self.terms(theta)
        predicted = np.logaddexp.reduce(terms, axis=0)
        residuals = (predicted - self.log_loss) / DELTA
        shares = np.exp(terms - predicted) * np.clip(residuals, -1, 1) / DELTA
        sums = shares.sum(-1)
        return float(_huber(residuals).sum()), np.array([*sums, -shares[0] @ self.n, -shares[1] @ self.d])

    def theta(self, law: Law) -> np.ndarray:
        """A law as theta, (5,)."""
        a, b = np.log(law.A) - law.alpha * self.centre[0], np.log(law.B) - law.beta * self.centre[1]
        return np.array([a, b, np.log(law.E), law.alpha, law.beta])

    def law(self, theta: np.ndarray) -> Law:
        """And back."""
        a, b, e, alpha, beta = (float(value) for value in theta)
        factors = np.exp((a + alpha * self.centre[0], b + beta * self.centre[1]))
        return Law(float(np.exp(e)), float(factors[0]), alpha, float(factors[1]), beta)


def fit_law(points: Points, start: Law | None = None) -> Law:
    """The law with the least Huber loss: from one start, or from the grid's.

    Of the grid's 4,500 starts L-BFGS goes on from the best one of each (alpha, beta), of which most end at the same
    law, so that more of them would find no other.

    Raises:
        InputError: no start led to finite constants.
    """
    objective = _Objective(points)
    starts = _best_of_grid(objective) if start is None else [objective.theta(start)]
    found = [
        minimize(objective, s, jac=True, method="L-BFGS-B", bounds=BOUNDS, options=_OPTIONS) for s in starts
    ]
    finite = [end for end in found if np.isfinite(end.fun)]
    if not finite:
        raise InputError(
            "no law of the form E + A/N^alpha + B/D^beta fits these points: look at their losses"
        )
    return objective.law(min(finite, key=lambda end: end.fun).x)


def _best_of_grid(objective: _Objective) -> Iterator[np.ndarray]:
    others = np.array(list(product(LOG_FACTORS, LOG_FACTORS, LOG_ENTROPIES)))
    for alpha, beta in product(EXPONENTS, EXPONENTS):
        centred = others - np.array([alpha, beta, 0]) * [*objective.centre, 0]
        thetas = np.concatenate((centred, np.broadcast_to([alpha, beta], (len(others), 2))), axis=1)
        yield thetas[np.argmin(objective.values(thetas))]


def _huber(residuals: np.ndarray) -> np.ndarray:
    """In units of DELTA squared: a parabola within 1, straight lines beyond."""
    size = np.abs(residuals)
    return np.where(size <= 1, 0.5 * size**2, size - 0.5)


def resamples(points: Points, count: int, seed: int) -> Iterator[Points]:
    """The bootstrap's samples: as many points, drawn with replacement; draws that determine no law are drawn again."""
    random = np.random.default_rng(seed)
    while count:
        drawn = points.take(random.integers(len(points), size=len(points)))
        if drawn.determines_a_law:
            count -= 1
            yield drawn
