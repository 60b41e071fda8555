"""Products of rows with the matrix of the group that each is in, as two operators that the compiler does not
look into: torch's own kernel can't be traced but in bf16.

N rows, those of the first group first, X groups, I in, O out; counts (X,) int64: the rows of each group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("trireme::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows (N, I), weight (X, O, I) -> (N, O)."""
    if _has_kernel(rows, *weight.shape[1:]):
        return F.grouped_mm(rows.contiguous(), weight.transpose(1, 2), offs=_ends(counts))
    parts = zip(rows.split(counts.tolist()), weight, strict=True)
    return torch.cat([part @ matrix.t() for part, matrix in parts])


@torch.library.custom_op("trireme::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """left (N, O), right (N, I) -> (X, O, I), the sum over a group's rows of their outer products."""
    if _has_kernel(left, left.shape[1], right.shape[1]):
        return F.grouped_mm(left.contiguous().t(), right.contiguous(), offs=_ends(counts))
    sizes = counts.tolist()
    parts = zip(left.split(sizes), right.split(sizes), strict=True)
    return torch.stack([a.t() @ b for a, b in parts])


def _has_kernel(rows: Tensor, *widths: int) -> bool:
    """torch's kernel knows no fp64 and wants strides of whole 16 bytes. Without it the host must know the
    counts and loops over the groups."""
    return rows.dtype in KERNEL_DTYPES and all(width * rows.itemsize % 16 == 0 for width in widths)


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)


@grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return left.new_empty(counts.shape[0], left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, counts = ctx.saved_tensors
    return grouped_linear(grad, weight.transpose(1, 2), counts), grouped_outer(grad, rows, counts), None


grouped_linear.register_autograd(_backward, setup_context=_save)
