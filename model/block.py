"""One layer: attention, cross-attention and feed-forward around the residual stream. B batch, T sequence, D d_model."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention_variants import ATTENTION
from model.cache import LayerCache
from model.config import ModelConfig
from model.cost import Cost
from model.cross_attention import CrossAttention, Memory
from model.feedforward import FEEDFORWARD
from model.kernels import Mask
from model.moe import MoE
from model.norms import NORMS
from model.rope import Rotation
from model.router import Routing


class Block(nn.Module):
    """Placements of the norms, f being attention, cross-attention (of a decoder with a memory) or feed-forward:

    pre       x + f(norm(x))
    post      norm(x + f(x))
    sandwich  x + output_norm(f(norm(x)))

    With parallel_layers there is one such step, f being the sum of all on the same input.
    """

    def __init__(self, config: ModelConfig, moe: bool = False) -> None:
        super().__init__()
        norm = NORMS[config.norm.type]
        self.placement = config.norm.placement
        self.parallel = config.parallel_layers
        self.dropout = config.dropout
        self.attention_norm = norm(config)
        self.attention = ATTENTION[config.attention.variant](config)
        self.attention_output_norm = norm(config) if self.placement == "sandwich" else None
        has_memory = config.memory_len is not None
        has_own_step = has_memory and not self.parallel
        self.cross_attention = CrossAttention(config) if has_memory else None
        self.cross_norm = norm(config) if has_own_step else None
        self.cross_output_norm = norm(config) if has_own_step and self.placement == "sandwich" else None
        self.feedforward_norm = None if self.parallel else norm(config)
        self.feedforward = MoE(config) if moe else FEEDFORWARD[config.ffn.variant](config)
        has_output_norm = self.placement == "sandwich" and not self.parallel
        self.feedforward_output_norm = norm(config) if has_output_norm else None

    def forward(
        self,
        x: Tensor,
        mask: Mask,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        memory: Memory | None = None,
    ) -> Tensor | tuple[Tensor, Routing]:
        """x (B, T, D) -> (B, T, D); with experts also how the tokens were routed."""
        routing: Routing | None = None

        def attention(h: Tensor) -> Tensor:
            return self.attention(h, mask, rotation, cache)

        def cross_attention(h: Tensor) -> Tensor:
            assert self.cross_attention is not None and memory is not None
            return self.cross_attention(h, *memory)

        def feedforward(h: Tensor) -> Tensor:
            nonlocal routing
            if not isinstance(self.feedforward, MoE):
                return self.feedforward(h)
            h, routing = self.feedforward(h)
            return h

        def all_at_once(h: Tensor) -> Tensor:
            change = attention(h) + feedforward(h)
            return change if self.cross_attention is None else change + cross_attention(h)

        if self.feedforward_norm is None:
            x = self._residual(x, all_at_once, self.attention_norm, self.attention_output_norm)
        else:
            x = self._residual(x, attention, self.attention_norm, self.attention_output_norm)
            if self.cross_norm is not None:
                x = self._residual(x, cross_attention, self.cross_norm, self.cross_output_norm)
            x = self._residual(x, feedforward, self.feedforward_norm, self.feedforward_output_norm)
        return x if routing is None else (x, routing)

    def _residual(
        self, x: Tensor, layer: Callable[[Tensor], Tensor], norm: nn.Module, output_norm: nn.Module | None
    ) -> Tensor:
        if self.placement == "post":
            return norm(x + F.dropout(layer(x), self.dropout, self.training))
        change = layer(norm(x))
        if output_norm is not None:
            change = output_norm(change)
        return x + F.dropout(change, self.dropout, self.training)

    @staticmethod
    def cost(config: ModelConfig, seq_len: int, moe: bool = False) -> Cost:
        steps = 1 if config.parallel_layers else 2 if config.memory_len is None else 3
        norms = steps * (2 if config.norm.placement == "sandwich" else 1)
        cost = (
            NORMS[config.norm.type].cost(config) * norms
            + ATTENTION[config.attention.variant].cost(config, seq_len)
            + (MoE.cost(config) if moe else FEEDFORWARD[config.ffn.variant].cost(config))
        )
        if config.memory_len is None:
            return cost
        return cost + CrossAttention.cost(config, seq_len, config.memory_len)
