"""The linear layers around every kind of attention.

B batch, T sequence, D d_model, H heads, K kv heads, E head_dim, Q width of a head's queries and keys.
"""

from typing import ClassVar

from torch import Tensor, nn

from model.config import ModelConfig, known
from model.cost import Cost, linear_cost
from model.weights import Weight, linear_weights


class Projections(nn.Module):
    """Heads are counted from the projections' widths, so that a rank may hold some of the heads."""

    query_parts: ClassVar[int] = 1
    """Q over E."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        attention = config.attention
        self.head_dim = known(attention.head_dim)
        self.query_dim = self.head_dim * self.query_parts
        num_heads, num_kv_heads = attention.num_heads, known(attention.num_kv_heads)
        self.query = nn.Linear(config.d_model, num_heads * self.query_dim, bias=attention.bias)
        self.key = nn.Linear(config.d_model, num_kv_heads * self.query_dim, bias=attention.bias)
        self.value = nn.Linear(config.d_model, num_kv_heads * self.head_dim, bias=attention.bias)
        self.output = nn.Linear(num_heads * self.head_dim, config.d_model, bias=attention.bias)
        eps = config.norm.eps
        self.query_scale = config.query_scale
        self.query_norm = nn.RMSNorm(self.query_dim, eps) if attention.qk_norm else None
        self.key_norm = nn.RMSNorm(self.query_dim, eps) if attention.qk_norm else None

    def queries(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, H, Q)."""
        query = self.query(x).unflatten(-1, (-1, self.query_dim))
        if self.query_norm is not None:
            query = self.query_norm(query)
        return query if self.query_scale == 1.0 else query * self.query_scale

    def keys(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, K, Q)."""
        key = self.key(x).unflatten(-1, (-1, self.query_dim))
        return key if self.key_norm is None else self.key_norm(key)

    def values(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, K, E)."""
        return self.value(x).unflatten(-1, (-1, self.head_dim))

    def weights(self) -> dict[str, Weight]:
        weights = (
            linear_weights("query", self.query, "heads")
            | linear_weights("key", self.key, "kv_heads")
            | linear_weights("value", self.value, "kv_heads")
            | linear_weights("output", self.output, "heads_in", init="residual")
        )
        if self.query_norm is not None:
            weights |= dict.fromkeys(("query_norm.weight", "key_norm.weight"), Weight("every_head", "ones"))
        return weights

    @classmethod
    def query_cost(cls, config: ModelConfig) -> Cost:
        """Of the query and output projections, for one token of the queries' sequence."""
        attention = config.attention
        heads = attention.num_heads * known(attention.head_dim)
        cost = linear_cost(config.d_model, heads * cls.query_parts, attention.bias)
        return cost + linear_cost(heads, config.d_model, attention.bias) + cls._norm_cost(config)

    @classmethod
    def key_value_cost(cls, config: ModelConfig) -> Cost:
        """Of the key and value projections, for one token of the keys' sequence."""
        attention = config.attention
        kv_heads = known(attention.num_kv_heads) * known(attention.head_dim)
        cost = linear_cost(config.d_model, kv_heads * cls.query_parts, attention.bias)
        return cost + linear_cost(config.d_model, kv_heads, attention.bias) + cls._norm_cost(config)

    @classmethod
    def _norm_cost(cls, config: ModelConfig) -> Cost:
        width = known(config.attention.head_dim) * cls.query_parts
        return Cost(parameters=width if config.attention.qk_norm else 0)
