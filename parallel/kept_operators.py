"""What selective activation checkpointing keeps: the outputs that are dear to compute again.

Operators as they come below autograd. Everything else (norms, activations, rotations, dropout) is made again.
"""

from typing import Any

import torch

import model.grouped  # noqa: F401  it makes trireme::grouped_linear
import parallel.ring  # noqa: F401  it makes trireme::ring_attention

aten, collectives = torch.ops.aten, torch.ops._c10d_functional

MATRIX_PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._grouped_mm.default,
    aten._scaled_mm.default,
    aten._scaled_grouped_mm.default,
    torch.ops.trireme.grouped_linear.default,
)

ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.trireme.ring_attention.default,
)

COLLECTIVES = (
    collectives.all_reduce.default,
    collectives.all_gather_into_tensor.default,
    collectives.reduce_scatter_tensor.default,
    collectives.all_to_all_single.default,
)
"""Waiting for a collective makes nothing new, and is done again."""

KEPT = frozenset((*MATRIX_PRODUCTS, *ATTENTION, *COLLECTIVES))


def keeps(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what an operator made is kept.

    Not that of attention with dropout: left out of the recomputation, its draws would be made by what comes next.
    """
    if operator not in ATTENTION or not isinstance(operator, torch._ops.OpOverload):
        return operator in KEPT
    names = (argument.name for argument in operator._schema.arguments)
    return not (dict(zip(names, args, strict=False)) | kwargs).get("dropout_p")
