"""The experts of one layer. N rows, D d_model, F d_ff of an expert, X experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, known
from model.cost import Cost
from model.feedforward import ACTIVATIONS, FEEDFORWARD, GATES, Gated
from model.grouped import grouped_linear
from model.weights import Weight


class Experts(nn.Module):
    """Feed-forward layers of the kind that model.ffn says, each on the rows that are routed to it.

    gate and up (X, F, D), down (X, D, F); biases (X, F) and (X, D).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        experts, d_ff, d_model = config.moe.num_experts, known(config.moe.d_ff), config.d_model
        self.config = config.ffn
        gated, bias = config.ffn.variant in GATES, config.ffn.bias
        self.gate = nn.Parameter(torch.zeros(experts, d_ff, d_model)) if gated else None
        self.up = nn.Parameter(torch.zeros(experts, d_ff, d_model))
        self.down = nn.Parameter(torch.zeros(experts, d_model, d_ff))
        self.gate_bias = nn.Parameter(torch.zeros(experts, d_ff)) if gated and bias else None
        self.up_bias = nn.Parameter(torch.zeros(experts, d_ff)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(experts, d_model)) if bias else None

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows (N, D), those of the first expert first; counts (X,) int64, rows of each -> (N, D)."""
        hidden = _project(rows, self.up, self.up_bias, counts)
        if self.gate is not None:
            gate = _project(rows, self.gate, self.gate_bias, counts)
            hidden = Gated.apply(gate, hidden, self.config.variant)
        else:
            hidden = ACTIVATIONS[self.config.activation](hidden)
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        return _project(hidden, self.down, self.down_bias, counts)

    def weights(self) -> dict[str, Weight]:
        weights = {}
        for name, _ in self.named_parameters():
            weight = Weight("experts", "residual" if name == "down" else "normal")
            weights[name] = Weight("experts", "zeros") if name.endswith("_bias") else weight
        return weights

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        assert config.moe is not None
        one = FEEDFORWARD[config.ffn.variant].cost(with_width(config, known(config.moe.d_ff)))
        idle = one.parameters * (config.moe.num_experts - config.moe.top_k)
        return Cost(
            parameters=one.parameters * config.moe.num_experts, idle=idle, flops=one.flops * config.moe.top_k
        )

    def extra_repr(self) -> str:
        shapes = (f"{name} {tuple(parameter.shape)}" for name, parameter in self.named_parameters())
        return f"{self.config.variant}, {', '.join(shapes)}"


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """rows (N, I), weight (X, O, I), bias (X, O) -> (N, O)."""
    product = grouped_linear(rows, weight, counts)
    if bias is None:
        return product
    return product + bias.repeat_interleave(counts, dim=0, output_size=len(rows))


def with_width(config: ModelConfig, d_ff: int) -> ModelConfig:
    """The configuration with feed-forward layers of another hidden width."""
    return config.model_copy(update={"ffn": config.ffn.model_copy(update={"d_ff": d_ff})})
