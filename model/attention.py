"""Softmax attention: multi-head, grouped-query (Ainslie et al. 2023) and multi-query (Shazeer 2019).

B batch, T sequence, D d_model.
"""

from torch import Tensor

from model.cache import KeyValues, LayerCache
from model.config import ModelConfig, known
from model.cost import Cost
from model.kernels import Mask, attend
from model.masks import mean_visible_keys
from model.projections import Projections
from model.rope import Rotation, rotate


class Attention(Projections):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.dropout = config.attention.dropout
        self.soft_cap = config.attention.logit_soft_cap

    def forward(
        self, x: Tensor, mask: Mask, rotation: Rotation | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). With a cache, x also sees the tokens that the cache holds."""
        query, key, value = self.queries(x), self.keys(x), self.values(x)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return self.output(self.mix(mask, cache, query, key, value).flatten(-2))

    def mix(self, mask: Mask, cache: LayerCache | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Where tokens meet: query (B, T, H, Q), key (B, T, K, Q), value (B, T, K, E) -> (B, T, H, E)."""
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if cache is not None:
            assert isinstance(cache, KeyValues)
            key, value = cache.append(key, value)
        dropout = self.dropout if self.training else 0.0
        return attend(query, key, value, mask, dropout=dropout, soft_cap=self.soft_cap).transpose(1, 2)

    @classmethod
    def cost(cls, config: ModelConfig, seq_len: int) -> Cost:
        attention = config.attention
        width = attention.num_heads * known(attention.head_dim)
        scores_and_values = (cls.query_parts + 1) * 2.0 * width * mean_visible_keys(attention, seq_len)
        return cls.query_cost(config) + cls.key_value_cost(config) + Cost(flops=scores_and_values)
