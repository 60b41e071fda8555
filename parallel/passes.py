"""The passes of a model over a batch, by micro-batches."""

import math
from typing import Protocol

import torch
from torch import Tensor

from parallel.batch import Batch


class Passes(Protocol):
    """How an engine runs what a rank has of a model."""

    def forward_backward(self, batch: Batch, weight: Tensor) -> Tensor:
        """Gradients of the sum of the batch's losses times a weight, ready for a step; returns the sum, ()."""

    def loss_sum(self, batch: Batch) -> Tensor:
        """The sum of a micro-batch's losses, ()."""

    def of_all_layers(self, counts: Tensor | None) -> Tensor | None:
        """What is said of each layer with experts, (L, ...), None without experts; in all ranks of all layers."""


def gradient_weight(loss: Tensor, weight: Tensor | float) -> Tensor:
    """What the gradient of a loss () is multiplied by: the weight, or NaN where the loss isn't finite.

    Then no norm is finite that the gradient enters, and the step is skipped on all ranks, without asking the host.
    """
    return torch.where(loss.detach().isfinite(), weight, math.nan)
