"""Kernels of softmax attention, and which of them runs.

B batch, T queries, S keys, H heads, K kv heads, E width of queries and keys, W width of values.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.attention_config import AttentionConfig

Kernel = Literal["flash", "flex", "naive"]

Bias = Callable[[Tensor, Tensor], Tensor]
"""(head, key's place - query's place), integers that broadcast -> what is added to the score."""

Allowed = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(row of the batch, query's place, key's place), integers that broadcast -> whether the query sees the key."""

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Mask(NamedTuple):
    """What a kernel is told of one forward, the same for all layers."""

    kernel: Kernel = "flash"
    is_causal: bool = False
    """The kernel's own causal flag says it all."""
    tensor: Tensor | None = None
    """For flash and naive, what broadcasts to (B, H, T, S): True where seen, or what is added to the scores."""
    block_mask: BlockMask | None = None
    """For flex, as is score_mod."""
    score_mod: ScoreMod | None = None
    documents: Tensor | None = None
    """For linear attention, and attention in blocks: (B, T) int64, contiguous."""
    padding: Tensor | None = None
    """For the same and experts: (B, S) bool by place, True at padding."""
    bias: Tensor | None = None
    """For attention in blocks: (H, 2T - 1), what is added to the scores, by the distance of key and query + T - 1."""


def choose_kernel(config: AttentionConfig, x: Tensor, *, needs_tensor: bool, cached: bool) -> Kernel:
    """What `config.kernel` comes to for activations x. needs_tensor: flash would need a T x T tensor.

    Raises ValueError where flex is asked for and can't train on the device.
    """
    capped = config.logit_soft_cap is not None
    if config.kernel == "flex":
        if not cached:
            _check_flex(x)
            return "flex"
        stand_in: Kernel = "naive" if capped else "flash"
        warnings.warn(
            f"kernel=flex compiles for one length: with a cache, kernel {stand_in} runs instead", stacklevel=4
        )
        return stand_in
    if config.kernel != "auto":
        return config.kernel
    width = config.head_dim or 0
    has_flex = x.device.type == "cuda" and x.dtype != torch.float64 and width >= 16 and config.dropout == 0
    if has_flex and not cached and (needs_tensor or capped):
        return "flex"
    return "naive" if capped else "flash"


def _check_flex(x: Tensor) -> None:
    if x.device.type == "cpu" and torch.is_grad_enabled():
        raise ValueError(
            "model.attention.kernel=flex can't train on a CPU, where flex_attention has no backward: use "
            "model.attention.kernel=auto"
        )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, dropout: float, soft_cap: float | None
) -> Tensor:
    """Softmax attention by the mask's kernel. A query that sees no key gets zeros.

    query (B, H, T, E), key (B, K, S, E), value (B, K, S, W) -> (B, H, T, W). Scores are divided by sqrt(E).
    """
    if mask.kernel == "flash":
        return _flash(query, key, value, mask, dropout)
    if mask.kernel == "flex":
        return _flex(query, key, value, mask)
    return _naive(query, key, value, mask, dropout, soft_cap)


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float) -> Tensor:
    width = value.shape[-1]
    if width != query.shape[-1]:
        # kernels without a T x T tensor want equal widths
        value = F.pad(value, (0, query.shape[-1] - width))
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask.tensor,
        dropout_p=dropout,
        is_causal=mask.is_causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended if width == query.shape[-1] else attended[..., :width]


def _naive(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float, soft_cap: float | None
) -> Tensor:
    """The reference: the formula, with probabilities in at least fp32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    seen = mask.tensor
    if mask.is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if seen is not None:
        if seen.is_floating_point():
            scores, seen = scores + seen, seen > -torch.inf
        scores = scores.masked_fill(~seen, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if seen is not None:
        # of a query that sees nothing the softmax is 0 / 0
        probabilities = probabilities.masked_fill(~seen, 0.0)
    return F.dropout(probabilities.to(value.dtype), dropout) @ value


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    plain = cast("Callable[..., Tensor]", flex_attention)
    function = plain if torch.compiler.is_compiling() else _compiled_flex()
    return function(
        query,
        key,
        value,
        score_mod=mask.score_mod,
        block_mask=mask.block_mask,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def flex_score_mod(bias: Bias | None, soft_cap: float | None, first_head: int) -> ScoreMod | None:
    """The cap and then the bias, as flex_attention takes them, which counts heads from 0."""
    if bias is None and soft_cap is None:
        return None

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if soft_cap is not None:
            score = soft_cap * torch.tanh(score / soft_cap)
        # compiled for CPUs, a sum of two dtypes comes out wrong
        return score if bias is None else score + bias(head + first_head, key - query).to(score.dtype)

    return score_mod


def flex_block_mask(allowed: Allowed, batch: int | None, length: int, device: torch.device) -> BlockMask:
    """Which blocks of a (length, length) square are seen, for each row of the batch, or alike for all (None)."""

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed(row, query, key)

    return create_block_mask(
        mask_mod, batch, None, length, length, device=str(device), _compile=device.type == "cuda"
    )
