"""The two ends of a model that are as wide as its vocabulary. B batch, T sequence, D d_model, V vocabulary."""

import torch.nn.functional as F
from torch import Tensor

from model.config import LossConfig
from model.loss import token_loss_sum


class Vocabulary:
    """What is done with the (V, D) weights of embedding and head, given whole.

    A model has one as an attribute: for weights of which some rows are elsewhere, another takes its place.
    """

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """tokens (B, T) int64, or distributions over the vocabulary (B, T, V) -> (B, T, D)."""
        return tokens @ weight if tokens.is_floating_point() else F.embedding(tokens, weight)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden (B, T, D) -> (B, T, V)."""
        return F.linear(hidden, weight)

    def loss_sum(self, hidden: Tensor, weight: Tensor, targets: Tensor, config: LossConfig) -> Tensor:
        """hidden (N, D), targets (N,) -> (); see `model.loss.token_loss_sum`."""
        return token_loss_sum(hidden, weight, targets, config)
