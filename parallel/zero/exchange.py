"""Pieces of a flattened tensor, moved between the ranks that have them and the ranks that need them."""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import share_of


def move(piece: Tensor, held: Sequence[range], needed: Sequence[range], group: dist.ProcessGroup) -> Tensor:
    """What this rank needs of a flat tensor, (n,), of which each rank has a piece; no rank ever has more.

    piece: (m,), what this rank has. held, needed: which elements each rank of the group has and needs. Ranks hold
    them in their order, and each element once; so do they need them.
    """
    rank = group.rank()
    send = [_overlap(held[rank], other) for other in needed]
    receive = [_overlap(other, needed[rank]) for other in held]
    if group.size() == 1:
        return piece.clone()
    moved = torch.empty(sum(receive), dtype=piece.dtype, device=piece.device)
    dist.all_to_all_single(moved, piece.contiguous(), receive, send, group=group)
    return moved


def rows(shape: Sequence[int], ranks: int) -> list[range]:
    """Which elements of a flattened tensor of `shape` each rank has that has its share of the rows."""
    size = prod(shape[1:])
    shares = (share_of(shape[0], rank, ranks) for rank in range(ranks))
    return [range(start * size, stop * size) for start, stop in shares]


def _overlap(a: range, b: range) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))
