"""A mixture of experts in place of a feed-forward layer (Shazeer et al. 2017), and what a whole model's
experts have in common: counts, balance, statistics.

B batch, T sequence, N = B * T tokens, D d_model, X experts, K experts of a token, L layers with experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import ModelConfig, known
from model.cost import Cost
from model.experts import Experts, with_width
from model.feedforward import FEEDFORWARD
from model.router import Router, Routing


class MoE(nn.Module):
    """The weighted sum of the experts that a token is routed to, and of shared experts (DeepSeekMoE, Dai et
    al. 2024) that every token goes through, which are one feed-forward layer of their widths together.

    Tokens are sorted by expert, so that each expert works on its own rows and none on padding. Dropped
    tokens are not cut out but weighted 0, for shapes that do not depend on the data.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.router = Router(config)
        self.experts = Experts(config)
        width = config.moe.num_shared_experts * known(config.moe.d_ff)
        self.shared = FEEDFORWARD[config.ffn.variant](with_width(config, width)) if width else None
        self.counts: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x (B, T, D) -> (B, T, D), and how it was routed."""
        weights, chosen, routing = self.router(x)
        copies = chosen.shape[-1]
        # of these tokens; the routing's counts may be of longer sequences
        counts = torch.zeros_like(routing.counts[0]).scatter_add_(
            0, chosen.flatten(), torch.ones_like(chosen).flatten()
        )
        order = chosen.flatten().argsort(stable=True)
        back = inverse(order)
        rows = take_rows(x.flatten(0, 1), order, back, copies)
        rows = take_rows(self.experts(rows, counts), back, order)
        mixed = (rows.view(*chosen.shape, -1) * weights.to(rows.dtype).unsqueeze(-1)).sum(dim=2)
        return mixed if self.shared is None else mixed + self.shared(x), routing

    def record(self, routing: Routing) -> None:
        """Add to the counts since they were last taken. Called outside of what is recomputed or compiled."""
        self.counts = routing.counts if self.counts is None else self.counts + routing.counts

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        assert config.moe is not None
        cost = Router.cost(config) + Experts.cost(config)
        width = config.moe.num_shared_experts * known(config.moe.d_ff)
        return cost + FEEDFORWARD[config.ffn.variant].cost(with_width(config, width)) if width else cost


def inverse(order: Tensor) -> Tensor:
    """The permutation (N,) that undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def take_rows(rows: Tensor, order: Tensor, back: Tensor, copies: int = 1) -> Tensor:
    """rows[order // copies]: each row `copies` times, in an order whose inverse is `back`."""
    return _TakeRows.apply(rows, order, back, copies)


class _TakeRows(torch.autograd.Function):
    """The backward gathers by `back` and sums the copies, where indexing's own would scatter into the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return rows[order if copies == 1 else order // copies]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        rows = grad[back]
        return (rows if ctx.copies == 1 else rows.unflatten(0, (-1, ctx.copies)).sum(1)), None, None, None


def auxiliary_sum(routings: list[Routing], scored: Tensor) -> Tensor:
    """The auxiliary losses of all layers: those of each sequence times its number of scored targets, (B,).

    So weighted, their sum over a batch, divided by the global number of targets as the cross-entropy is,
    does not depend on how the batch is cut.
    """
    return (torch.stack([routing.auxiliary for routing in routings]).sum(dim=0) * scored).sum()


def add_gradient_of(loss: Tensor, auxiliary: Tensor) -> Tensor:
    """The value of the loss, with the gradient of both: what is reported stays the cross-entropy."""
    return loss + (auxiliary - auxiliary.detach())


class ExpertStatistics(NamedTuple):
    """load: (L, X), the share of a layer's choices that fell on each expert, 1 / X where even.

    dropped: (L,), the share of a layer's choices that went over an expert's capacity.
    """

    load: Tensor
    dropped: Tensor


def expert_statistics(counts: Tensor) -> ExpertStatistics:
    """counts (L, 2, X) as `take_expert_counts` returns them."""
    chosen, dropped = counts.unbind(1)
    total = chosen.sum(dim=1, keepdim=True)
    return ExpertStatistics(chosen / total, dropped.sum(dim=1) / total.squeeze(1))


def moe_layers(model: nn.Module) -> list[MoE]:
    """The L layers with experts, in order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def take_expert_counts(model: nn.Module) -> Tensor | None:
    """(L, 2, X) int64: how often experts were chosen, and dropped a token, in training since the last call.

    None without experts, or if no training forward was run.
    """
    counts = [layer.counts for layer in moe_layers(model) if layer.counts is not None]
    for layer in moe_layers(model):
        layer.counts = None
    return torch.stack(counts) if counts else None


def update_balance(model: nn.Module, counts: Tensor, applied: Tensor | float = 1.0) -> None:
    """Even the load by the biases on the experts' scores, where configured, after a step.

    counts (L, 2, X): those of the whole step, over all micro-batches and ranks. applied: 0 for a step that is
    skipped.
    """
    for layer, (chosen, _) in zip(moe_layers(model), counts, strict=True):
        layer.router.update_bias(chosen, applied)
