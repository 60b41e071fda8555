"""Runs as points: parameters, tokens, loss. P points."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import InputError

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""Forward and backward of a matrix product; attention's square, mostly small, is left out (Kaplan et al. 2020)."""
COLUMNS = ("params", "tokens", "loss")
OPTIONAL = ("flops",)
MIN_POINTS, MIN_SIZES = 6, 3
"""Five constants are fitted, three of them along each of sizes and tokens."""


@dataclass(frozen=True)
class Points:
    """What runs ended with, each (P,) float64."""

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    """Nats per token."""
    flops: np.ndarray
    """Of the whole training."""

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, indices: np.ndarray) -> "Points":
        """Some of the points, in this order, perhaps several times."""
        return Points(self.params[indices], self.tokens[indices], self.loss[indices], self.flops[indices])

    @property
    def flops_factor(self) -> float:
        """FLOPs for each parameter and token: of the points the median."""
        return float(np.median(self.flops / (self.params * self.tokens)))

    @property
    def determines_a_law(self) -> bool:
        """Whether five constants can be told from these."""
        distinct = len(set(zip(self.params, self.tokens, self.loss, strict=True)))
        sizes, amounts = len(np.unique(self.params)), len(np.unique(self.tokens))
        return distinct >= MIN_POINTS - 1 and min(sizes, amounts) >= MIN_SIZES


def make_points(
    params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, flops: np.ndarray | None = None
) -> Points:
    """Points with 6 FLOPs for each parameter and token, where FLOPs aren't known better."""
    estimated = FLOPS_PER_PARAMETER_AND_TOKEN * params * tokens
    return Points(params, tokens, loss, estimated if flops is None else flops)


def read_points(path: Path) -> Points:
    """Read a CSV with the columns `params,tokens,loss` and perhaps `flops`, in any order.

    Raises:
        InputError: the file, a column or a value is not so, or there are too few points for a fit.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} can't be read: {reason}") from None
    names = [name.strip() for name in rows[0]] if rows else []
    _check_header(path, names)
    values = [_numbers(f"{path}:{line}", names, row) for line, row in enumerate(rows[1:], 2) if row]
    columns = dict(zip(names, np.array(values, dtype=np.float64).T, strict=True)) if values else {}
    points = make_points(**columns) if columns else None
    if points is None or len(points) < MIN_POINTS or not points.determines_a_law:
        raise InputError(
            f"{path} has {len(values)} point(s): a fit needs {MIN_POINTS} or more, of at least {MIN_SIZES} "
            f"different params and {MIN_SIZES} different tokens; `trireme ladder` makes such"
        )
    return points


def make_folder(path: Path) -> None:
    """Make a folder for results, where there is none yet.

    Raises:
        InputError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} can't be made: {error.strerror}: give a folder that can by --out") from None


def write_points(path: Path, points: Points) -> None:
    """Write what `read_points` reads, all at once."""
    aside = path.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS + OPTIONAL)
        writer.writerows(zip(points.params, points.tokens, points.loss, points.flops, strict=True))
    aside.replace(path)


def _check_header(path: Path, names: list[str]) -> None:
    wanted = f"the first line names {','.join(COLUMNS)}, and may name {','.join(OPTIONAL)}"
    unknown = [name for name in names if name not in COLUMNS + OPTIONAL]
    missing = [name for name in COLUMNS if name not in names]
    if unknown:
        raise InputError(f"{path}: unknown column {unknown[0]!r}: {wanted}")
    if missing:
        raise InputError(f"{path}: there is no column {missing[0]!r}: {wanted}")
    if len(set(names)) < len(names):
        raise InputError(f"{path}: a column comes twice: {wanted}")


def _numbers(place: str, names: list[str], row: list[str]) -> list[float]:
    if len(row) != len(names):
        raise InputError(f"{place}: {len(row)} values for {len(names)} columns ({','.join(names)})")
    numbers = []
    for name, text in zip(names, row, strict=True):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise InputError(
                f"{place}: {name}={text.strip()!r} is not a positive number: correct or drop the line"
            )
        numbers.append(number)
    return numbers
