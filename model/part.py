"""A part of all sequences of a batch, where one process works on it and others on the rest."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Runs = tuple[range, ...]
"""Places of a sequence, as unbroken runs in order."""


class Part(NamedTuple):
    """Some places of sequences of `length` tokens."""

    runs: Runs
    length: int

    @property
    def size(self) -> int:
        """How many places."""
        return sum(map(len, self.runs))

    def of(self, sequences: Tensor) -> Tensor:
        """(B, length, ...) -> (B, size, ...)."""
        return joined([sequences[:, run.start : run.stop] for run in self.runs], dim=1)


def pieces(x: Tensor, runs: Runs) -> tuple[Tensor, ...]:
    """Tokens (B, T, ...) at the places of runs -> those of each run."""
    return (x,) if len(runs) == 1 else x.split([len(run) for run in runs], dim=1)


def joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Put together along a dimension; one alone is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)
