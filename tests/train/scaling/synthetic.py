"""Points of a law that is known."""

import numpy as np

from train.scaling.law import Law
from train.scaling.points import Points, make_points

CHINCHILLA = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
"""As published (Hoffmann et al. 2022, equation 10)."""


def isoflop_points(law: Law, noise: float = 0.0, outliers: int = 0, seed: int = 0) -> Points:
    """54 runs around the best sizes of 6 budgets; log-loss is off by `noise`, that of outliers by a tenth."""
    random = np.random.default_rng(seed)
    budgets = np.geomspace(1e18, 3e21, 6).repeat(9)
    best = np.array([law.optimum(flops, 6.0).params for flops in budgets])
    params = best * np.tile(np.geomspace(0.15, 7, 9), 6)
    tokens = budgets / (6 * params)
    off = noise * random.standard_normal(len(params))
    off[random.permutation(len(params))[:outliers]] += 0.1
    return make_points(params, tokens, law.loss(params, tokens) * np.exp(off), budgets)
