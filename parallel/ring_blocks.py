"""Softmax attention block by block: of some queries with some keys, with what it takes to put blocks together.

B batch, t queries and s keys of a block, H heads, K kv heads, E width of queries and keys, W width of values. A query's
log-sum is the logarithm of the sum of its scores' exponentials.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention_config import AttentionConfig
from model.masks import Sight, dense, dense_bias, sight
from model.part import Runs
from parallel.twin import is_twin

aten = torch.ops.aten


class Block(NamedTuple):
    """Some queries with some keys, of which they see any."""

    queries: range
    """Places."""
    keys: range
    sight: Sight
    of_queries: slice
    """Where they are among those at hand."""
    of_keys: slice


def blocks(config: AttentionConfig, queries: Runs, keys: Runs) -> Iterator[Block]:
    """All blocks of these places in which the configured mask shows anything."""
    for query_run, of_queries in _slices(queries):
        for key_run, of_keys in _slices(keys):
            seen = sight(config, query_run, key_run)
            if seen != "none":
                yield Block(query_run, key_run, seen, of_queries, of_keys)


def _slices(runs: Runs) -> Iterator[tuple[range, slice]]:
    start = 0
    for run in runs:
        yield run, slice(start, start + len(run))
        start += len(run)


@dataclass(frozen=True)
class Scoring:
    """What makes probabilities of queries and keys, beside these themselves."""

    config: AttentionConfig
    length: int
    """T, of whole sequences."""
    bias: Tensor | None = None
    """(H, 2T - 1), by the distance of key and query + T - 1."""
    documents: Tensor | None = None
    """(B, T) int64, as is padding in bool."""
    padding: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    """(), int64, of dropout's draws."""

    @property
    def is_plain(self) -> bool:
        """Whether kernels know all of it, but for the mask."""
        extra = self.bias, self.documents, self.padding, self.seed, self.config.logit_soft_cap
        return self.config.kernel != "naive" and all(each is None for each in extra)

    def distances(self, block: Block) -> slice:
        """The columns of the bias that a block has."""
        last = self.length - 1
        return slice(
            block.keys.start - block.queries.stop + 1 + last, block.keys.stop - block.queries.start + last
        )

    def kept(self, block: Block, like: Tensor) -> Tensor | None:
        """What dropout multiplies the probabilities (B, H, t, s) of a block by: the same whenever it is asked."""
        if self.seed is None:
            return None
        seed = 0 if is_twin(self.seed) else int(self.seed)
        number = block.queries.start * self.length + block.keys.start
        generator = torch.Generator(like.device).manual_seed((seed + number) % 2**63)
        draws = torch.rand(like.shape, generator=generator, device=like.device)
        return (draws >= self.dropout).to(like.dtype) / (1 - self.dropout)


def attend_block(
    query: Tensor, key: Tensor, value: Tensor, block: Block, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """query (B, H, t, E), key (B, K, s, E), value (B, K, s, W) -> (B, H, t, W), log-sums (B, H, t), of these keys."""
    if _has_kernel(query, key, block, scoring):
        return _kernel(query, key, value, is_causal=block.sight == "causal")
    scores, _ = _scores(query, key, block, scoring)
    log_sums = scores.logsumexp(dim=-1)
    probabilities = _probabilities(scores, log_sums)
    kept = scoring.kept(block, probabilities)
    if kept is not None:
        probabilities = probabilities * kept
    return probabilities.to(value.dtype) @ _for_queries(value, query), log_sums


class BlockGradients(NamedTuple):
    """Of what a block was given."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    """(H, t + s - 1), of the block's distances."""


class Attended(NamedTuple):
    """Of queries, over all keys."""

    out: Tensor
    """(B, H, t, W)"""
    log_sums: Tensor
    """(B, H, t)"""
    grad: Tensor
    """(B, H, t, W), of out."""

    def of(self, queries: slice) -> "Attended":
        """Some of them."""
        return Attended(*(part[:, :, queries].contiguous() for part in self))


def block_gradients(
    query: Tensor, key: Tensor, value: Tensor, attended: Attended, block: Block, scoring: Scoring
) -> BlockGradients:
    """What a block adds to the gradients, shapes as in `attend_block`."""
    if _has_kernel(query, key, block, scoring):
        return BlockGradients(*_kernel_backward(query, key, value, attended, block.sight == "causal"), None)
    out, log_sums, grad = attended
    scores, slope = _scores(query, key, block, scoring)
    wide = scores.dtype
    probabilities = _probabilities(scores, log_sums)
    kept = scoring.kept(block, probabilities)
    used = probabilities if kept is None else probabilities * kept
    of_value = used.to(grad.dtype).transpose(-1, -2) @ grad
    of_used = (grad @ _for_queries(value, query).transpose(-1, -2)).to(wide)
    of_probabilities = of_used if kept is None else of_used * kept
    along = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    of_scores = probabilities * (of_probabilities - along)
    of_bias = None if scoring.bias is None else _by_distance(of_scores.sum(0))
    of_scores = of_scores if slope is None else of_scores * slope
    of_scores = (of_scores / query.shape[-1] ** 0.5).to(query.dtype)
    return BlockGradients(
        of_scores @ _for_queries(key, query),
        _for_keys(of_scores.transpose(-1, -2) @ query, key),
        _for_keys(of_value, value),
        of_bias,
    )


class Merged:
    """What queries (B, H, t, E) have of the blocks so far, in at least fp32."""

    def __init__(self, query: Tensor, width: int) -> None:
        wide = torch.promote_types(query.dtype, torch.float32)
        batch, heads, length, _ = query.shape
        # in the order in which heads are put together again
        self.out = query.new_zeros((batch, length, heads, width), dtype=wide).transpose(1, 2)
        self.log_sums = query.new_full(query.shape[:-1], -torch.inf, dtype=wide)

    def add(self, queries: slice, out: Tensor, log_sums: Tensor) -> None:
        """What `attend_block` made for some of the queries with keys that are new to them."""
        before = self.log_sums[:, :, queries]
        after = before.logaddexp(log_sums)
        mine = self.out[:, :, queries]
        self.out[:, :, queries] = mine * _share(before, after) + out * _share(log_sums, after)
        self.log_sums[:, :, queries] = after


def _share(log_sums: Tensor, of: Tensor) -> Tensor:
    return (log_sums - _finite(of)).exp().unsqueeze(-1)


def _finite(log_sums: Tensor) -> Tensor:
    """A query that sees no key has a sum of 0, of which all shares are to be 0."""
    return log_sums.masked_fill(log_sums == -torch.inf, 0.0)


def _probabilities(scores: Tensor, log_sums: Tensor) -> Tensor:
    return (scores - _finite(log_sums).unsqueeze(-1)).exp()


def _scores(query: Tensor, key: Tensor, block: Block, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """(B, H, t, s) in at least fp32, and the slope of the cap on them, if there is one."""
    scores = query @ _for_queries(key, query).transpose(-1, -2) / query.shape[-1] ** 0.5
    scores, slope = scores.to(torch.promote_types(scores.dtype, torch.float32)), None
    cap = scoring.config.logit_soft_cap
    if cap is not None:
        bent = (scores / cap).tanh()
        scores, slope = cap * bent, 1 - bent * bent
    if scoring.bias is not None:
        scores = scores + dense_bias(scoring.bias[:, scoring.distances(block)], len(block.keys))
    rows = scoring.documents, scoring.padding
    if block.sight == "all" and all(each is None for each in rows):
        return scores, slope
    seen = dense(scoring.config, block.queries, block.keys, query, *rows)
    return scores.masked_fill(~seen, -torch.inf), slope


def _for_queries(heads: Tensor, query: Tensor) -> Tensor:
    """(B, K, s, E) -> (B, H, s, E)."""
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1)


def _for_keys(gradient: Tensor, heads: Tensor) -> Tensor:
    """The gradient (B, H, s, E) of what `_for_queries` made of heads (B, K, s, E) -> that of the heads."""
    return gradient.unflatten(1, (heads.shape[1], -1)).sum(2)


def _by_distance(of_scores: Tensor) -> Tensor:
    """(H, t, s) -> (H, t + s - 1), the sums of the diagonals: the gradient of `dense_bias`."""
    heads, queries, keys = of_scores.shape
    # rows that are one longer than the result start one place further each
    slanted = F.pad(of_scores.flip(1), (0, queries)).flatten(1)[:, :-queries]
    return slanted.view(heads, queries, queries + keys - 1).sum(1)


def _has_kernel(query: Tensor, key: Tensor, block: Block, scoring: Scoring) -> bool:
    if block.sight == "some" or not scoring.is_plain:
        return False
    if query.device.type == "cpu":
        return True
    is_even = query.shape[-1] % 8 == 0  # what kernels on GPUs don't pad by themselves
    grouped = query.shape[1] != key.shape[1]
    sizes = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, False, grouped)
    return is_even and torch.backends.cuda.can_use_flash_attention(sizes)


def _kernel(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    operator = (
        aten._scaled_dot_product_flash_attention_for_cpu
        if query.device.type == "cpu"
        else aten._scaled_dot_product_flash_attention
    )
    out, log_sums, *_ = operator(query, key, _widened(value, query), 0.0, is_causal)
    return out[..., : value.shape[-1]], log_sums


def _kernel_backward(
    query: Tensor, key: Tensor, value: Tensor, attended: Attended, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out, grad = _widened(attended.out, query), _widened(attended.grad, query)
    inputs = grad, query, key, _widened(value, query), out, attended.log_sums
    if query.device.type == "cpu":
        made = aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, is_causal)
    else:
        # None: no lengths by row, and no random state
        lengths = None, None, query.shape[2], key.shape[2]
        made = aten._scaled_dot_product_flash_attention_backward(
            *inputs, *lengths, 0.0, is_causal, None, None
        )
    of_query, of_key, of_value = made
    return of_query, of_key, of_value[..., : value.shape[-1]]


def _widened(values: Tensor, query: Tensor) -> Tensor:
    """Kernels want equal widths."""
    missing = query.shape[-1] - values.shape[-1]
    return F.pad(values, (0, missing)) if missing else values
