"""Feed-forward layers. B batch, T sequence, D d_model, F d_ff."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import ModelConfig, known
from model.cost import Cost, linear_cost
from model.weights import Weight, linear_weights


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0) ** 2 (So et al. 2021)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as in GPT-2."""
    return F.gelu(x, approximate="tanh")


class Gate(NamedTuple):
    """function(x) and its backward: (gradient of the function's value, x) -> gradient of x."""

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _sigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(x))


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


GATES: dict[str, Gate] = {
    "swiglu": Gate(F.silu, torch.ops.aten.silu_backward),
    "geglu": Gate(F.gelu, torch.ops.aten.gelu_backward),
    "geglu_tanh": Gate(gelu_tanh, _gelu_tanh_backward),
    "glu": Gate(torch.sigmoid, _sigmoid_backward),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu_squared": relu_squared,
}


class Gated(torch.autograd.Function):
    """gate_function(gate) * up, (..., F) each. The function's value is made again in the backward, not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, variant: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.variant = variant
        return GATES[variant].function(gate) * up  # in place, torch 2.11 would compile a wrong gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        function, backward = GATES[ctx.variant]
        return backward(grad * up, gate), function(gate).mul_(grad), None


class GatedFeedForward(nn.Module):
    """down(gate_function(gate(x)) * up(x)) (Dauphin et al. 2017, Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_ff, bias = known(config.ffn.d_ff), config.ffn.bias
        self.variant = config.ffn.variant
        self.dropout = config.ffn.dropout
        self.gate = nn.Linear(config.d_model, d_ff, bias=bias)
        self.up = nn.Linear(config.d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        hidden = Gated.apply(self.gate(x), self.up(x), self.variant)
        return self.down(F.dropout(hidden, self.dropout, self.training))

    def weights(self) -> dict[str, Weight]:
        return (
            linear_weights("gate", self.gate, "column")
            | linear_weights("up", self.up, "column")
            | linear_weights("down", self.down, "row", init="residual")
        )

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        d_ff, bias = known(config.ffn.d_ff), config.ffn.bias
        return linear_cost(config.d_model, d_ff, bias) * 2 + linear_cost(d_ff, config.d_model, bias)

    def extra_repr(self) -> str:
        return self.variant


class MLP(nn.Module):
    """down(activation(up(x))) (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_ff, bias = known(config.ffn.d_ff), config.ffn.bias
        self.activation = config.ffn.activation
        self.dropout = config.ffn.dropout
        self.up = nn.Linear(config.d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        hidden = ACTIVATIONS[self.activation](self.up(x))
        return self.down(F.dropout(hidden, self.dropout, self.training))

    def weights(self) -> dict[str, Weight]:
        return linear_weights("up", self.up, "column") | linear_weights(
            "down", self.down, "row", init="residual"
        )

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        d_ff, bias = known(config.ffn.d_ff), config.ffn.bias
        return linear_cost(config.d_model, d_ff, bias) + linear_cost(d_ff, config.d_model, bias)

    def extra_repr(self) -> str:
        return self.activation


FEEDFORWARD: dict[str, type[GatedFeedForward] | type[MLP]] = {
    "swiglu": GatedFeedForward,
    "geglu": GatedFeedForward,
    "geglu_tanh": GatedFeedForward,
    "glu": GatedFeedForward,
    "mlp": MLP,
}
