"""Which places of a sequence each rank of a ring has: an early run and the late one that makes causal work even.

A sequence is cut into 2n equal runs for n ranks, of which rank r has the r-th and the r-th from the end, as in
striped attention (Brandon et al. 2023) and the training of Llama 3. B batch, T sequence.
"""

import torch
from torch import Tensor

from model.part import Runs


def runs_of(length: int, rank: int, ranks: int) -> Runs:
    """The places of sequences of `length` that a rank has."""
    each = length // (2 * ranks)
    assert each * 2 * ranks == length
    return tuple(range(each * number, each * (number + 1)) for number in _numbers(rank, ranks))


def fold(x: Tensor, ranks: int) -> Tensor:
    """(B, T, ...) -> the same tokens in the order of the ranks that have them."""
    runs = x.chunk(2 * ranks, dim=1)
    return torch.cat([runs[number] for number in _order(ranks)], dim=1)


def unfold(x: Tensor, ranks: int) -> Tensor:
    """The inverse of `fold`."""
    runs, order = x.chunk(2 * ranks, dim=1), _order(ranks)
    return torch.cat([runs[order.index(number)] for number in range(2 * ranks)], dim=1)


def _numbers(rank: int, ranks: int) -> tuple[int, int]:
    return rank, 2 * ranks - 1 - rank


def _order(ranks: int) -> list[int]:
    return [number for rank in range(ranks) for number in _numbers(rank, ranks)]
