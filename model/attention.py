"""Softmax attention: multi-head, grouped-query (Ainslie et al. 2023) and multi-query (Shazeer 2019).

B batch, T queries, S keys, D d_model, H heads, K kv heads, E head_dim.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import LayerCache
from model.config import ModelConfig, known
from model.cost import Cost, linear_cost
from model.masks import Mask, mean_visible_keys
from model.positions import Rotation, rotate
from model.weights import Weight, linear_weights


class Attention(nn.Module):
    """Heads are counted from the projections' widths, so that a rank may hold some of the heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        attention = config.attention
        self.head_dim = known(attention.head_dim)
        self.dropout = attention.dropout
        self.window_size = attention.window_size
        heads, kv_heads = attention.num_heads * self.head_dim, known(attention.num_kv_heads) * self.head_dim
        self.query = nn.Linear(config.d_model, heads, bias=attention.bias)
        self.key = nn.Linear(config.d_model, kv_heads, bias=attention.bias)
        self.value = nn.Linear(config.d_model, kv_heads, bias=attention.bias)
        self.output = nn.Linear(heads, config.d_model, bias=attention.bias)

    def forward(
        self, x: Tensor, mask: Mask, rotation: Rotation | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). With a cache, x also sees the tokens that the cache holds."""
        query = self.query(x).unflatten(-1, (-1, self.head_dim))
        key = self.key(x).unflatten(-1, (-1, self.head_dim))
        value = self.value(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if cache is not None:
            key, value = cache.append(key, value)
            if self.window_size is not None and x.shape[1] == 1:
                key, value = key[:, :, -self.window_size :], value[:, :, -self.window_size :]
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask.allowed,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask.is_causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return self.output(attended.transpose(1, 2).flatten(-2))

    def weights(self) -> dict[str, Weight]:
        return (
            linear_weights("query", self.query, "heads")
            | linear_weights("key", self.key, "kv_heads")
            | linear_weights("value", self.value, "kv_heads")
            | linear_weights("output", self.output, "heads_in", init="residual")
        )

    @staticmethod
    def cost(config: ModelConfig, seq_len: int) -> Cost:
        attention = config.attention
        heads = attention.num_heads * known(attention.head_dim)
        kv_heads = known(attention.num_kv_heads) * known(attention.head_dim)
        return (
            linear_cost(config.d_model, heads, attention.bias)
            + linear_cost(config.d_model, kv_heads, attention.bias) * 2
            + linear_cost(heads, config.d_model, attention.bias)
            + Cost(flops=2 * 2.0 * heads * mean_visible_keys(attention, seq_len))
        )


ATTENTION: dict[str, type[Attention]] = {"mha": Attention, "gqa": Attention, "mqa": Attention}
