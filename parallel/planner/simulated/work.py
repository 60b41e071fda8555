"""FLOPs of the operators that run, 2 for a multiply-add."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from model import grouped  # noqa: F401  (registers its operators)

aten = torch.ops.aten


class WorkLog:
    """Adds up matrix products and attention."""

    def __init__(self) -> None:
        self.matmul = 0.0
        self.attention = 0.0

    def note(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """An operator, which may be a product."""
        packet = operator._overloadpacket
        if packet in ATTENTION:
            self.attention += ATTENTION[packet](*args, **kwargs)
        elif packet in OWN:
            self.matmul += OWN[packet](*args)
        elif packet in flop_registry:
            self.matmul += flop_registry[packet](*args, **kwargs, out_val=output)


def _product(left: Tensor, right: Tensor, *_: Tensor) -> int:
    """Of rows with matrices that each takes part of: (N, I) with (X, O, I), or (N, O) with (N, I)."""
    return 2 * left.numel() * right.shape[1]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any
) -> float:
    """Scores (B, H, T, S), of which those that a causal mask hides are not computed, and values of their widths."""
    queries, keys = query.shape[2], key.shape[2]
    seen = keys * (keys + 1) / 2 if causal else queries * keys
    return 2.0 * prod(query.shape[:2]) * seen * (query.shape[3] + value.shape[3])


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log: Tensor,
    dropout: float,
    causal: bool,
    **_: Any,
) -> float:
    """Gradients of all three and of the scores; the scores are made once more."""
    return 2.5 * _attention(query, key, value, dropout, causal)


ATTENTION: dict[Any, Callable[..., float]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
OWN: dict[Any, Callable[..., int]] = {
    aten.addmm_: lambda total, left, right: 2 * left.numel() * right.shape[1],
    torch.ops.trireme.grouped_linear: _product,
    torch.ops.trireme.grouped_outer: _product,
}
