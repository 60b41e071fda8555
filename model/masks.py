"""Which keys a query sees. B batch, T queries, S keys.

Every mask is one predicate over the places of a query and a key; what each kernel gets is made from it.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.attention_config import AttentionConfig
from model.kernels import Allowed, Bias, Mask, choose_kernel, flex_block_mask, flex_score_mod
from model.section import known

Predicate = Callable[[Any, Any], Any]
"""(query's place, key's place), integers or tensors of them that broadcast -> whether the query sees the key."""

Sight = Literal["none", "all", "causal", "some"]
"""causal: each query sees the keys up to its own; some: only the predicate says which."""


def _causal(query: Any, key: Any) -> Any:
    return key <= query


def _everything(query: Any, key: Any) -> Any:
    return (key >= 0) & (query >= 0)


def _sliding_window(window: int) -> Predicate:
    return lambda query, key: (key <= query) & (query - key < window)


def _local(block: int) -> Predicate:
    return lambda query, key: (key <= query) & (query // block - key // block <= 1)


def _strided(stride: int) -> Predicate:
    """Both of the strided heads of Child et al. 2019 in one."""
    return lambda query, key: (key <= query) & ((query - key < stride) | ((query - key) % stride == 0))


def _fixed(block: int, summary: int) -> Predicate:
    """Both of the fixed heads of Child et al. 2019 in one."""
    return lambda query, key: (
        (key <= query) & ((query // block == key // block) | (key % block >= block - summary))
    )


def predicate(config: AttentionConfig) -> Predicate:
    """The definition of the configured mask."""
    if config.mask_type == "sliding_window":
        return _sliding_window(known(config.window_size))
    if config.mask_type == "local":
        return _local(known(config.window_size))
    if config.mask_type == "block_sparse":
        if config.pattern == "strided":
            return _strided(known(config.block_size))
        return _fixed(known(config.block_size), known(config.summary_size))
    return _causal if config.mask_type == "causal" else _everything


def reach(config: AttentionConfig) -> int | None:
    """Keys from which on no query sees any further back, the query itself included; None: no such bound."""
    if config.mask_type == "sliding_window":
        return config.window_size
    return 2 * known(config.window_size) if config.mask_type == "local" else None


def allowed_pairs(config: AttentionConfig, documents: Tensor | None, padding: Tensor | None) -> Allowed:
    """The configured mask, within documents (B, S) and without padding (B, S) where these are given.

    Blocks are counted from a row's first token, padding before it left out.
    """
    seen = predicate(config)
    in_blocks = config.mask_type == "local" or config.pattern == "fixed"
    first = (~padding).long().argmax(dim=1) if padding is not None and in_blocks else None

    def allowed(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        pairs = seen(query, key) if first is None else seen(query - first[row], key - first[row])
        if documents is not None:
            pairs = pairs & (documents[row, query] == documents[row, key])
        return pairs if padding is None else pairs & ~padding[row, key]

    return allowed


def make_mask(
    config: AttentionConfig,
    queries: range,
    keys: range,
    x: Tensor,
    *,
    bias: Bias | None = None,
    heads: range | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
    cached: bool = False,
) -> Mask:
    """The mask of one forward, for activations x (B, T, D) and queries and keys at these places.

    bias: added to the scores of `heads`. documents: (B, S) int64; pairs within one document are seen.
    padding: (B, S) bool, by place; True is seen by none. A (T, S) tensor is made only where the kernel's own
    flag does not do.
    Raises ValueError where the kernel asked for can't do it.
    """
    if config.variant == "linear":
        return Mask(documents=documents, padding=padding)
    plain = bias is None and documents is None and padding is None
    is_causal = plain and queries == keys and _is_causal(config, len(keys))
    sees_all = plain and (config.mask_type == "bidirectional" or _sees_all(config, queries, keys))
    flagged = is_causal or sees_all
    kernel = choose_kernel(config, x, needs_tensor=not flagged, cached=cached)
    if kernel == "flex":
        assert queries == keys
        if documents is None and padding is None:
            block_mask = None if sees_all else _fixed_block_mask(config, len(keys), x.device)
        else:
            allowed = allowed_pairs(config, documents, padding)
            block_mask = flex_block_mask(allowed, len(x), len(keys), x.device)
        score_mod = flex_score_mod(bias, config.logit_soft_cap, 0 if heads is None else heads.start)
        return Mask("flex", block_mask=block_mask, score_mod=score_mod)
    if flagged:
        return Mask(kernel, is_causal=is_causal and not sees_all)
    seen = dense(config, queries, keys, x, documents, padding)
    if bias is None:
        return Mask(kernel, tensor=seen)
    assert heads is not None
    added = dense_bias(bias_by_distance(bias, heads, queries, keys, x), len(keys)).unsqueeze(0)
    return Mask(kernel, tensor=added.masked_fill(~seen, -torch.inf))


def _is_causal(config: AttentionConfig, length: int) -> bool:
    bound = reach(config)
    return config.mask_type == "causal" or (bound is not None and bound >= length)


def _sees_all(config: AttentionConfig, queries: range, keys: range) -> bool:
    """One query at the end, that sees an unbroken run of keys, and so all if it sees the first."""
    if len(queries) > 1 or config.mask_type == "block_sparse":
        return False
    return bool(predicate(config)(queries[0], keys[0]))


@functools.lru_cache(maxsize=8)
def _fixed_block_mask(config: AttentionConfig, length: int, device: torch.device) -> BlockMask:
    return flex_block_mask(allowed_pairs(config, None, None), None, length, device)


def dense(
    config: AttentionConfig,
    queries: range,
    keys: range,
    x: Tensor,
    documents: Tensor | None,
    padding: Tensor | None,
) -> Tensor:
    """(T, S) bool on the device of x (B, ...), or (B, 1, T, S) where the rows of the batch differ: True where seen."""
    allowed = allowed_pairs(config, documents, padding)
    query = torch.arange(queries.start, queries.stop, device=x.device).unsqueeze(1)
    key = torch.arange(keys.start, keys.stop, device=x.device)
    if documents is None and padding is None:
        return allowed(query, query, key)
    row = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    return allowed(row, query, key).unsqueeze(1)


def bias_by_distance(bias: Bias, heads: range, queries: range, keys: range, x: Tensor) -> Tensor:
    """(H, T + S - 1) in the dtype of x: what is added to scores, from the first key less the last query on."""
    head = torch.arange(heads.start, heads.stop, device=x.device).unsqueeze(1)
    distance = torch.arange(keys.start - queries.stop + 1, keys.stop - queries.start, device=x.device)
    return bias(head, distance).to(x.dtype)


def dense_bias(by_distance: Tensor, keys: int) -> Tensor:
    """(H, T + S - 1), by distance, -> (H, T, S), each value repeated along its diagonal."""
    # the window that starts at s belongs to the query T - 1 - s
    return by_distance.unfold(1, keys, 1).flip(1)


def sight(config: AttentionConfig, queries: range, keys: range) -> Sight:
    """How much of a block of queries and keys the configured mask shows."""
    if config.mask_type == "bidirectional":
        return "all"
    bound = reach(config)
    if keys.start >= queries.stop or (bound is not None and queries.start - keys.stop + 1 >= bound):
        return "none"
    if config.mask_type not in ("causal", "sliding_window"):
        return "some"
    window = config.window_size or queries.stop
    if queries == keys and len(keys) <= window:
        return "causal"
    is_whole = keys.stop <= queries.start + 1 and queries.stop - keys.start <= window
    return "all" if is_whole else "some"


@functools.lru_cache(maxsize=64)
def mean_visible_keys(config: AttentionConfig, seq_len: int) -> float:
    """Keys that a query sees on average over a sequence; causal counted as half."""
    if config.mask_type == "bidirectional":
        return float(seq_len)
    if config.mask_type in ("causal", "sliding_window"):
        window = min(config.window_size or seq_len, seq_len)
        return window - window * window / (2 * seq_len)
    size = known(config.window_size if config.mask_type == "local" else config.block_size)
    total = 0
    for place in range(seq_len):
        blocks = place // size
        if config.mask_type == "local":
            total += place % size + 1 + min(blocks, 1) * size
        elif config.pattern == "strided":
            total += min(place + 1, size) + blocks
        else:
            total += place % size + 1 + blocks * known(config.summary_size)
    return total / seq_len
