"""Cross-entropy of a language model's head without the logits of all tokens at once.

N tokens, D d_model, V vocabulary. Per chunk of tokens the logits are made, turned in place into the loss's
gradient with respect to them, and multiplied into the gradients of hidden states and head; the backward only
scales these.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LossConfig

IGNORE_INDEX = -100
"""The target of a token that is not scored."""

CHUNK_TOKENS = 256
CHUNK_ELEMENTS = 1 << 22
"""Logits held at once: those of 256 tokens or 4 Mi elements, whichever is more."""

VOCABULARY_SLICE = 8192
"""Rows of the weight's gradient that are added to at a time where it is wider than the logits."""


CROSS_ENTROPY = LossConfig()
"""Neither z-loss nor label smoothing."""


class Rows(NamedTuple):
    """Which rows of the head's weight are given, and how numbers of all rows come together.

    maximum and total turn (n, 1) and (n, k) tensors of these rows into those of the whole vocabulary.
    """

    start: int
    """The first of the rows given."""
    vocab_size: int
    """All rows."""
    most: int
    """Rows that the largest part has."""
    maximum: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]


def _all_rows(weight: Tensor) -> Rows:
    return Rows(0, len(weight), len(weight), lambda numbers: numbers, lambda numbers: numbers)


def mean_loss(logits: Tensor, targets: Tensor, config: LossConfig = CROSS_ENTROPY) -> Tensor:
    """The mean over scored tokens of what `token_loss_sum` sums, from logits (N, V), in fp32 (fp64 for fp64)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, label_smoothing=config.label_smoothing)
    if config.z_loss:
        loss = loss + config.z_loss * logits[targets != IGNORE_INDEX].logsumexp(dim=1).square().mean()
    return loss


def token_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    config: LossConfig = CROSS_ENTROPY,
    rows: Rows | None = None,
) -> Tensor:
    """Sum over scored tokens of -log softmax(logits)[target], logits being hidden @ weight.T.

    With label smoothing e (Szegedy et al. 2016) the target's share is 1 - e, and every word's e / V more.
    With z-loss z (PaLM, Chowdhery et al. 2022) z * logsumexp(logits) ** 2 comes on top.

    hidden (N, D), weight (V, D), targets (N,) int64, IGNORE_INDEX where not scored -> scalar, in fp32 (fp64
    for fp64). Softmax, sum and the weight's gradient are computed in that dtype. No second derivative.
    rows: weight has these rows of V alone; the gradient of hidden is then that through these rows.
    """
    return _TokenLossSum.apply(
        hidden, weight, targets, config, rows or _all_rows(weight), torch.is_grad_enabled()
    )


class _TokenLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        config: LossConfig,
        rows: Rows,
        training: bool,
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        needs_hidden, needs_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        chunk = max(1, min(len(hidden), max(CHUNK_TOKENS, CHUNK_ELEMENTS // rows.most)))
        products = hidden.new_empty(chunk, len(weight))
        narrow = products.dtype != wide
        wide_products = torch.empty_like(products, dtype=wide) if narrow else products
        for start in range(0, len(hidden), chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk, None]
            scored = target != IGNORE_INDEX
            target = target.where(scored, 0)
            slope, logits = products[: len(part)], wide_products[: len(part)]
            torch.mm(part, weight.t(), out=slope)
            if narrow:
                logits.copy_(slope)
            total += _losses_and_slopes_(logits, target, scored, config, rows)
            if hidden_grad is None and weight_grad is None:
                continue
            if narrow:
                slope.copy_(logits)
            if hidden_grad is not None:
                torch.mm(slope, weight, out=hidden_grad[start : start + chunk])
            if weight_grad is not None:
                _add_product_(weight_grad, slope, part)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        # a second V x D matrix is worth avoiding, unless the graph is kept for another backward
        scale = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        if hidden_grad is not None:
            hidden_grad = scale(hidden_grad, grad)
        if weight_grad is not None:
            weight_grad = scale(weight_grad, grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None


def _losses_and_slopes_(
    logits: Tensor, target: Tensor, scored: Tensor, config: LossConfig, rows: Rows
) -> Tensor:
    """Logits (n, V) become the loss's gradient in place, zeros in rows not scored; returns the sum of losses."""
    smoothing, z_loss = config.label_smoothing, config.z_loss
    target = target - rows.start
    here = (target >= 0) & (target < logits.shape[1])
    target = target.where(here, 0)
    expected = logits.gather(1, target) * here * (1 - smoothing)
    if smoothing:
        expected += smoothing / rows.vocab_size * logits.sum(dim=1, keepdim=True)
    peak = rows.maximum(logits.amax(dim=1, keepdim=True))
    mass = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)
    mass, expected = rows.total(torch.cat((mass, expected), dim=1)).split(1, dim=1)
    normalizer = mass.log() + peak
    losses = normalizer - expected
    growth = scored / mass
    if z_loss:
        losses += z_loss * normalizer.square()
        growth *= 1 + 2 * z_loss * normalizer
    logits.mul_(growth)
    share = scored.to(logits.dtype)
    if smoothing:
        logits.sub_(share * (smoothing / rows.vocab_size))
    logits.scatter_add_(1, target, share * here * (smoothing - 1))
    return losses.masked_fill(~scored, 0.0).sum()


def _add_product_(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """total (V, D) += slope.T (V, n) @ hidden (n, D), the sum in the total's dtype."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.t(), hidden)
        return
    # in slices of the vocabulary, or the product in the narrow dtype would be another V x D matrix
    for rows, part in zip(total.split(VOCABULARY_SLICE), slope.split(VOCABULARY_SLICE, dim=1), strict=True):
        rows += part.t() @ hidden
