"""Feed-forward layers. B batch, T sequence, D d_model, F d_ff."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, known
from model.cost import Cost, linear_cost
from model.weights import Weight, linear_weights


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0) ** 2 (So et al. 2021)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as in GPT-2."""
    return F.gelu(x, approximate="tanh")


GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "glu": torch.sigmoid}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu_squared": relu_squared,
}


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
        hidden = GATES[self.variant](self.gate(x)) * self.up(x)
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
    "glu": GatedFeedForward,
    "mlp": MLP,
}
