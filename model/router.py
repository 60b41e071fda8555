"""Which experts a token goes through. B batch, T sequence, D d_model, X experts, K experts of a token."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.cost import Cost, linear_cost
from model.weights import Weight


class Routing(NamedTuple):
    """How the tokens of one layer were routed.

    auxiliary: (B,), the weighted auxiliary losses of each sequence. counts: (2, X) int64, how often each
    expert was chosen, and how often it dropped the token.
    """

    auxiliary: Tensor
    counts: Tensor


class Router(nn.Module):
    """Scores of all experts, computed in fp32 (fp64 for fp64), and the choice of top_k.

    With balance bias, a bias on the scores that the choice alone sees evens the load (Wang et al. 2024,
    DeepSeek-V3). The auxiliary losses are means over a sequence, so that they are the same however
    sequences are cut into micro-batches and ranks:

    load balance  sum over experts of (share of choices * X) * (mean score), 1 where even: that of
                  Switch (Fedus et al. 2021) for each sequence by itself, as in DeepSeek-V2
    z-loss        mean of logsumexp(logits) ** 2 (ST-MoE, Zoph et al. 2022)

    With a capacity factor, an expert drops the last of a sequence's tokens that chose it, so that no token
    depends on a later one; outside of training it drops none.

    Padding counts for nothing of this: a sequence is as long as it has other tokens.
    """

    def __init__(self, config: ModelConfig) -> None:
        assert config.moe is not None
        super().__init__()
        self.config = config.moe
        self.weight = nn.Parameter(torch.zeros(config.moe.num_experts, config.d_model))
        self.selection_bias: Tensor | None
        biased = config.moe.balance == "bias"
        self.register_buffer("selection_bias", torch.zeros(config.moe.num_experts) if biased else None)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor, Routing]:
        """x (B, T, D) -> weights (B, T, K), 0 where dropped; chosen experts (B, T, K) int64; the routing."""
        return self.route(self.logits(x), padding)

    def logits(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, X)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))

    def route(self, logits: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor, Routing]:
        """The routing of whole sequences by their logits (B, T, X); padding (B, S): they are the last T of S."""
        scores = logits.softmax(dim=-1) if self.config.router == "softmax" else logits.sigmoid()
        ranked = scores if self.selection_bias is None else scores + self.selection_bias
        chosen = ranked.topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.config.normalize_top_k:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
        real = torch.ones_like(logits[..., :1], dtype=torch.bool)
        if padding is not None:
            real = ~padding[:, -logits.shape[1] :, None]
        picked = torch.zeros_like(logits, dtype=torch.int32).scatter_(-1, chosen, 1) * real
        auxiliary = self._auxiliary(logits, scores, picked, real)
        weights, dropped = self._drop(weights, chosen, picked, real)
        counts = picked.sum(dim=(0, 1))
        return weights, chosen, Routing(auxiliary, torch.stack((counts, dropped)))

    def _drop(self, weights: Tensor, chosen: Tensor, picked: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, T, K) without those over the capacity; how many were dropped of each expert, (X,)."""
        if self.config.capacity_factor is None or not self.training:
            return weights, torch.zeros_like(picked[0, 0], dtype=torch.int64)
        even = real.sum(dim=1, keepdim=True).double() * self.config.top_k / self.config.num_experts
        capacity = (self.config.capacity_factor * even).ceil().long()
        place = picked.cumsum(dim=1)
        dropped = (place.amax(dim=1, keepdim=True) - capacity).clamp_min(0).sum(dim=(0, 1))
        return weights.masked_fill(place.gather(-1, chosen) > capacity, 0.0), dropped

    def _auxiliary(self, logits: Tensor, scores: Tensor, picked: Tensor, real: Tensor) -> Tensor:
        """The weighted losses (B,) of logits and scores (B, T, X) of tokens that are real (B, T, 1); picked
        (B, T, X) is 1 where chosen."""
        total = logits.new_zeros(len(logits))
        length = real.sum(dim=1).clamp_min(1)
        if self.config.load_balance_loss:
            if self.config.router == "sigmoid":
                scores = scores / scores.sum(dim=-1, keepdim=True)
            share = picked.sum(dim=1) / (length * self.config.top_k)
            mean = (scores * real).sum(dim=1) / length
            balance = (share * mean).sum(dim=-1) * self.config.num_experts
            total = total + self.config.load_balance_loss * balance
        if self.config.router_z_loss:
            squared = logits.logsumexp(dim=-1, keepdim=True).square()
            total = total + self.config.router_z_loss * ((squared * real).sum(dim=1) / length).squeeze(1)
        return total

    @torch.no_grad()
    def update_bias(self, counts: Tensor, applied: Tensor | float) -> None:
        """Move the bias by the configured rate, times `applied`: up for experts chosen less than the mean
        of counts (X,), down for those chosen more."""
        if self.selection_bias is not None and self.config.bias_rate:
            error = (counts.sum() - counts * len(counts)).sign().to(self.selection_bias.dtype)
            self.selection_bias += error * applied * self.config.bias_rate

    def weights(self) -> dict[str, Weight]:
        return {"weight": Weight("replicated", "normal", wide="in")}

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        assert config.moe is not None
        return linear_cost(config.d_model, config.moe.num_experts)

    def extra_repr(self) -> str:
        return f"{self.config.router}, top {self.config.top_k} of {self.config.num_experts}"
