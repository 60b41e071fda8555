"""Two checkpoints, tensor by tensor, at whatever layouts they were written."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from train.stored import Stored


@dataclass(frozen=True)
class Difference:
    """How a tensor differs between two checkpoints."""

    name: str
    what: str
    """In words where it can't be compared, else empty."""
    elements: int = 0
    """That are unequal."""
    of: int = 0
    largest: float = 0.0
    """The largest difference of an element; NaN where only one of the two is a number."""
    relative: float = 0.0
    """That, by the first one's largest element."""


def compare(first: Path, second: Path) -> tuple[int, list[Difference]]:
    """How many tensors two checkpoints have in all, and how those differ that do; two tensors are in memory at a time.

    Raises:
        RunError: one can't be read.
    """
    one, other = Stored(first), Stored(second)
    ours, theirs = one.facts, other.facts
    names = sorted(ours.keys() | theirs.keys())
    found = []
    for name in names:
        if name not in ours or name not in theirs:
            found.append(Difference(name, f"only in {first if name in ours else second}"))
        elif ours[name] != theirs[name]:
            (shape, dtype), (other_shape, other_dtype) = ours[name], theirs[name]
            found.append(Difference(name, f"{dtype} of {shape} and {other_dtype} of {other_shape}"))
        elif difference := _compare(name, one.read(name), other.read(name)):
            found.append(difference)
    return len(names), found


def _compare(name: str, one: Tensor, other: Tensor) -> Difference | None:
    unequal = ~((one == other) | (one.isnan() & other.isnan()))
    count = int(unequal.sum())
    if not count:
        return None
    largest = (one.double() - other.double())[unequal].abs().max().item()
    scale = one.double().abs().max().item()
    return Difference(name, "", count, one.numel(), largest, largest / scale if scale else float("inf"))
