"""Linear attention (Katharopoulos et al. 2020): softmax's exp(q k) replaced by a product of positive features.

B batch, T sequence, D d_model, H heads, E features (head_dim), W width of values, N chunks of C tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import LayerCache, RunningState
from model.config import ModelConfig, known
from model.cost import Cost
from model.kernels import Mask
from model.projections import Projections
from model.rope import Rotation, rotate

CHUNK = 64
"""Tokens that see each other by their scores; what is before a chunk is seen through a sum."""


class LinearAttention(Projections):
    """out = f(q) S / f(q) z with f = elu + 1, S the sum of f(k) v and z the sum of f(k) over the keys seen.

    Rotary positions turn the features of S, and not those of z, which keeps the denominator positive (Su et
    al. 2021). Documents must be contiguous.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.causal = config.attention.mask_type == "causal"
        self.quadratic = config.attention.kernel == "naive"

    def forward(
        self, x: Tensor, mask: Mask, rotation: Rotation | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). With a cache, x also sees the tokens summed up in the cache."""
        query, key, value = F.elu(self.queries(x)) + 1, F.elu(self.keys(x)) + 1, self.values(x)
        turned = (query, key) if rotation is None else (rotate(query, rotation), rotate(key, rotation))
        return self.output(self.mix(mask, cache, query, key, value, *turned).flatten(-2))

    def mix(
        self,
        mask: Mask,
        cache: LayerCache | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        turned_query: Tensor,
        turned_key: Tensor,
    ) -> Tensor:
        """Where tokens meet: queries (B, T, H, E), keys and values (B, T, K, E) -> (B, T, H, E)."""
        keys = [key, turned_key]
        if mask.padding is not None:
            keys = [part * ~mask.padding[:, -key.shape[1] :, None, None] for part in keys]
        groups = query.shape[2] // key.shape[2]
        key, turned_key = (part.repeat_interleave(groups, dim=2) for part in keys)
        value = value.repeat_interleave(groups, dim=2).transpose(1, 2)
        ones = value.new_ones(*value.shape[:-1], 1)
        assert cache is None or isinstance(cache, RunningState)
        before = (None, None) if cache is None or cache.sums is None else cache.sums
        above, above_sum = self._sum(turned_query, turned_key, value, mask.documents, before[0])
        below, below_sum = self._sum(query, key, ones, mask.documents, before[1])
        if cache is not None:
            cache.replace((above_sum, below_sum), value.shape[2])
        return (above / below.masked_fill(below == 0, 1.0)).transpose(1, 2)

    def _sum(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sum over the keys seen of (query . key) value, and what the next tokens start from.

        query, key (B, T, H, E), value (B, H, T, W), before (B, H, E, W) -> (B, H, T, W), (B, H, E, W).
        """
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.causal and not self.quadratic:
            return causal_scan(query, key, value, documents, before)
        if not self.causal and documents is not None:
            raise ValueError(
                "linear attention with model.attention.mask_type=bidirectional can't keep documents apart: use "
                "mask_type=causal, or model.attention.variant=gqa"
            )
        total = _products(key, value)
        if not self.quadratic:
            return query @ total.to(query.dtype), total
        scores = query @ key.transpose(-1, -2)
        if self.causal:
            scores = scores.tril()
        if documents is not None:
            scores = scores * (documents.unsqueeze(-1) == documents.unsqueeze(-2)).unsqueeze(1)
        summed = scores @ value
        if before is not None:
            summed, total = summed + query @ before.to(query.dtype), total + before
        return summed, total

    @classmethod
    def cost(cls, config: ModelConfig, seq_len: int) -> Cost:
        """Of the scan over whole chunks; the quadratic form costs more."""
        width = known(config.attention.head_dim)
        chunk = min(CHUNK, seq_len) if config.attention.mask_type == "causal" else 0
        computed = -(-seq_len // chunk) * chunk / seq_len if chunk else 1.0
        # scores, their product with values, the sum of a chunk, and its use: for values and for ones
        products = sum(chunk * (width + w) + 2 * width * w for w in (width, 1))
        flops = 2.0 * computed * config.attention.num_heads * products
        return cls.query_cost(config) + cls.key_value_cost(config) + Cost(flops=flops)


def _products(key: Tensor, value: Tensor) -> Tensor:
    """Sum of the outer products of keys (..., T, E) and values (..., T, W), in at least fp32."""
    products = key.transpose(-1, -2) @ value
    return products.to(torch.promote_types(products.dtype, torch.float32))


def causal_scan(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For each query the sum of (query . key) value over keys up to its own, in O(T).

    query, key (B, H, T, E), value (B, H, T, W), documents (B, T), before (B, H, E, W), what earlier tokens
    sum up to -> (B, H, T, W), and what the next tokens start from, (B, H, E, W).
    """
    length = query.shape[2]
    size = min(CHUNK, length)
    rest = -length % size
    query, key, value = (
        F.pad(part, (0, 0, 0, rest)).unflatten(2, (-1, size)) for part in (query, key, value)
    )
    scores = (query @ key.transpose(-1, -2)).tril()
    if before is None:
        before = _products(key[:, :, 0, :0], value[:, :, 0, :0])
    if documents is None:
        within = scores @ value
        totals = torch.cat((before.unsqueeze(2), _products(key, value)), dim=2).cumsum(2)
    else:
        ids = F.pad(documents, (0, rest)).unflatten(1, (-1, size))
        within = scores * (ids.unsqueeze(-1) == ids.unsqueeze(-2)).unsqueeze(1) @ value
        totals, query = _document_totals(query, key, value, ids, before)
    summed = within + query @ totals[:, :, :-1].to(query.dtype)
    return summed.flatten(2, 3)[:, :, :length], totals[:, :, -1]


def _document_totals(
    query: Tensor, key: Tensor, value: Tensor, ids: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """The sums before each chunk, (B, H, N + 1, E, W), over the document that the token before belongs to.

    And the queries, zero where they belong to another. ids (B, N, C).
    """
    last = ids[..., -1]
    products = _products(key * (ids == last.unsqueeze(-1))[:, None, :, :, None], value)
    goes_on = last == F.pad(last[:, :-1], (1, 0), value=-1)
    totals = [before]
    for chunk in range(ids.shape[1]):
        totals.append(totals[-1] * goes_on[:, chunk, None, None, None] + products[:, :, chunk])
    previous = torch.cat((ids[:, :1, 0], last[:, :-1]), dim=1)
    return torch.stack(totals, dim=2), query * (ids == previous.unsqueeze(-1))[:, None, :, :, None]
