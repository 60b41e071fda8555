"""Attention from one sequence to another, as of a decoder to its encoder's output (Vaswani et al. 2017).

B batch, T queries, S tokens of the memory, D d_model, K kv heads, E head_dim.
"""

from typing import NamedTuple

from torch import Tensor

from model.config import ModelConfig, known
from model.cost import Cost
from model.kernels import Kernel, Mask, attend
from model.projections import Projections


class MemoryCache:
    """One layer's keys and values (B, K, S, E) of the memory, made at the first call."""

    def __init__(self) -> None:
        self.key_value: tuple[Tensor, Tensor] | None = None

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, (N,) int64."""
        if self.key_value is not None:
            key, value = self.key_value
            self.key_value = key[rows], value[rows]


class Memory(NamedTuple):
    """What a block's cross-attention looks at."""

    states: Tensor
    """(B, S, D)"""
    padding: Tensor | None = None
    """(B, S) bool, True where padded."""
    cache: MemoryCache | None = None
    """Of this block."""


class CrossAttention(Projections):
    """Softmax attention with the heads of `config.attention`; its mask and positions play no part."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.dropout = config.attention.dropout
        self.soft_cap = config.attention.logit_soft_cap
        is_naive = self.soft_cap is not None or config.attention.kernel == "naive"
        self.kernel: Kernel = "naive" if is_naive else "flash"

    def forward(
        self, x: Tensor, memory: Tensor, padding: Tensor | None = None, cache: MemoryCache | None = None
    ) -> Tensor:
        """x (B, T, D), memory (B, S, D), its padding (B, S) bool, True where padded -> (B, T, D).

        With a cache that was filled before, memory is not read.
        """
        if cache is None or cache.key_value is None:
            key, value = self.keys(memory).transpose(1, 2), self.values(memory).transpose(1, 2)
            if cache is not None:
                cache.key_value = key, value
        else:
            key, value = cache.key_value
        query = self.queries(x).transpose(1, 2)
        mask = Mask(self.kernel, tensor=None if padding is None else ~padding[:, None, None, :])
        dropout = self.dropout if self.training else 0.0
        attended = attend(query, key, value, mask, dropout=dropout, soft_cap=self.soft_cap)
        return self.output(attended.transpose(1, 2).flatten(-2))

    @classmethod
    def cost(cls, config: ModelConfig, seq_len: int, memory_len: int) -> Cost:
        """For one of seq_len tokens, its share of the memory's keys and values included."""
        attention = config.attention
        keys = cls.key_value_cost(config)
        keys_flops = keys.flops * memory_len / seq_len
        scores_and_values = 2 * 2.0 * attention.num_heads * known(attention.head_dim) * memory_len
        return cls.query_cost(config) + Cost(keys.parameters, flops=keys_flops + scores_and_values)
