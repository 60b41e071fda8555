"""Collectives on activations, with their backward. B batch, T sequence, H heads.

A sequence of T tokens is cut as `torch.chunk` cuts: ceil(T / n) tokens for each rank but the last ones, which may
have fewer, or none.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

ops = torch.ops._c10d_functional


def share(size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """Start and stop of this rank's share of so many."""
    return share_of(size, group.rank(), group.size())


def share_of(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Start and stop of one rank's share of so many."""
    each = -(-size // ranks)
    return min(rank * each, size), min((rank + 1) * each, size)


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x as it is, which each rank uses for a part of what is made of it: its gradient is the sum of theirs."""
    return _Copy.apply(x, group)


def add(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' x, which all go on with."""
    return _Add.apply(x, group)


def split(x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """This rank's share of an x that all have."""
    return _Split.apply(x, group, dim)


def gather(x: Tensor, length: int, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """All shares, of `length` in all; what is made of them is each rank's own part, so gradients are summed."""
    return _Gather.apply(x, length, group, dim, True)


def join(x: Tensor, length: int, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """All shares, of `length` in all, with which all ranks go on alike: the inverse of `split`."""
    return _Gather.apply(x, length, group, dim, False)


def add_and_split(x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """This rank's share of the sum of all ranks' x."""
    return _AddAndSplit.apply(x, group, dim)


def tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T / n, H, E), all heads of a share of the tokens -> (B, T, H / n, E), all tokens of a share of heads."""
    ranks = group.size()
    if ranks == 1:
        return x
    parts = x.unflatten(2, (ranks, -1)).movedim(2, 0).contiguous()
    received = _exchange(parts, group)
    return received.movedim(0, 1).flatten(1, 2)


def heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T, H / n, E) -> (B, T / n, H, E), the inverse of `tokens_to_heads`."""
    ranks = group.size()
    if ranks == 1:
        return x
    parts = x.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()
    received = _exchange(parts, group)
    return received.movedim(0, 2).flatten(2, 3)


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    return exchange_rows(parts.flatten(0, 1), None, None, group).view_as(parts)


def exchange_rows(
    rows: Tensor, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup
) -> Tensor:
    """Send so many rows to each rank, in order, and receive so many from each; None: as many to each."""
    if sent is None:
        even = [len(rows) // group.size()] * group.size()
        received, sent = even, even
    return funcol.all_to_all_single_autograd(rows, received, sent, group)


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return x
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group.group_name))


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim % x.dim()) + (0, missing)) if missing else x


def _own(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    start, stop = share(x.shape[dim], group)
    return x.narrow(dim, start, stop - start)


def _all_gather(x: Tensor, length: int, group: dist.ProcessGroup, dim: int) -> Tensor:
    if group.size() == 1:
        return x
    each = -(-length // group.size())
    padded = _padded(x, dim, each).contiguous()
    parts = ops.wait_tensor(ops.all_gather_into_tensor(padded, group.size(), group.group_name))
    whole = torch.cat(parts.chunk(group.size()), dim=dim)
    return whole if whole.shape[dim] == length else whole.narrow(dim, 0, length).contiguous()


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    if group.size() == 1:
        return x
    length = x.shape[dim]
    start, stop = share(length, group)
    padded = _padded(x, dim, -(-length // group.size()) * group.size())
    parts = torch.cat(padded.chunk(group.size(), dim=dim))
    own = ops.wait_tensor(ops.reduce_scatter_tensor(parts, "sum", group.size(), group.group_name))
    return own if own.shape[dim] == stop - start else own.narrow(dim, 0, stop - start).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.length, ctx.group, ctx.dim = x.shape[dim], group, dim
        return _own(x, group, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.length, ctx.group, ctx.dim), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int, group: dist.ProcessGroup, dim: int, sums: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.sums = group, dim, sums
        return _all_gather(x, length, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        reverse = _reduce_scatter if ctx.sums else _own
        return reverse(grad, ctx.group, ctx.dim), None, None, None, None


class _AddAndSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.length, ctx.group, ctx.dim = x.shape[dim], group, dim
        return _reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.length, ctx.group, ctx.dim), None, None
