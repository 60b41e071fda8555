"""A fit as a file: the constants, how sure they are, and the bootstrap's samples, from which predictions are made."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from data.errors import InputError
from train.scaling.fit import fit_law, resamples
from train.scaling.frontier import METHODS, Frontier
from train.scaling.law import Interval, Law, interval
from train.scaling.points import Points

SAMPLES = 500
CONSTANTS = ("E", "A", "alpha", "B", "beta")


class Growth(BaseModel):
    """How the best size and the best number of tokens grow with FLOPs, by one method: the exponents."""

    params: Interval
    tokens: Interval


class Report(BaseModel):
    """What `trireme scaling fit` finds. Intervals hold 95 % of the bootstrap's samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    points: str
    """The file."""
    count: int
    flops_range: tuple[PositiveFloat, PositiveFloat]
    """Of the smallest and the largest run."""
    flops_factor: PositiveFloat
    """FLOPs for each parameter and token."""
    law: Law
    constants: dict[str, Interval]
    residual: float
    """Root mean square of the residuals of log-loss."""
    growth: dict[str, Growth | str]
    """By the law and by the methods beside it; or why a method finds nothing."""
    samples: list[Law] = Field(min_length=1)

    def predict(self, flops: float) -> dict[str, Interval]:
        """The best params and tokens at so many FLOPs, and their loss."""
        best = self.law.optimum(flops, self.flops_factor)
        others = np.array([sample.optimum(flops, self.flops_factor) for sample in self.samples]).T
        return {n: interval(v, s) for n, v, s in zip(best._fields, best, others, strict=True)}

    def predict_loss(self, params: float, tokens: float) -> Interval:
        """The loss of one run."""
        return interval(self.law.loss(params, tokens), [s.loss(params, tokens) for s in self.samples])


def make_report(name: str, points: Points, count: int = SAMPLES, seed: int = 0) -> Report:
    """Fit the law and the methods beside it, and both again to `count` samples of the points.

    Raises:
        InputError: no law fits.
    """
    law = fit_law(points)
    drawn = list(resamples(points, count, seed))
    samples = [fit_law(sample, start=law) for sample in drawn]
    growth: dict[str, Growth | str] = {"law": _growth(_exponents(law), [_exponents(s) for s in samples])}
    growth |= {method: _growth_without_law(points, drawn, find) for method, find in METHODS.items()}
    residuals = np.log(law.loss(points.params, points.tokens) / points.loss)
    return Report(
        points=name,
        count=len(points),
        flops_range=(float(points.flops.min()), float(points.flops.max())),
        flops_factor=points.flops_factor,
        law=law,
        constants={c: interval(getattr(law, c), [getattr(s, c) for s in samples]) for c in CONSTANTS},
        residual=float(np.sqrt(np.mean(residuals**2))),
        growth=growth,
        samples=samples,
    )


def save_report(report: Report, path: Path) -> None:
    """Write it as JSON."""
    path.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_report(path: Path) -> Report:
    """Read what `save_report` wrote.

    Raises:
        InputError: it isn't that.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        raise InputError(f"{path} is no fit: make one by `trireme scaling fit POINTS.csv`") from None


def _exponents(law: Law) -> tuple[float, float]:
    return law.params_exponent, 1 - law.params_exponent


def _growth(best: tuple[float, float], samples: Sequence[tuple[float, float]]) -> Growth:
    params, tokens = (interval(value, s) for value, s in zip(best, zip(*samples, strict=True), strict=True))
    return Growth(params=params, tokens=tokens)


def _growth_without_law(
    points: Points, drawn: list[Points], find: Callable[[Points], Frontier]
) -> Growth | str:
    """Of the samples those count in which the method finds something."""
    try:
        best = find(points).exponents
    except InputError as error:
        return str(error)
    found = [best]
    for sample in drawn:
        with suppress(InputError):
            found.append(find(sample).exponents)
    return _growth(best, found)
