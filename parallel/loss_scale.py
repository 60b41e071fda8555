"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018), without a host synchronization."""

import torch
from torch import Tensor

GROWTH_INTERVAL = 2000
"""Finite steps in a row after which the scale doubles."""


class LossScale:
    """A factor on the loss that keeps fp16 gradients in range: halved on overflow, doubled after a quiet while.

    Both state tensors live on the device and are saved with the optimizer.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), 2.0**16 if enabled else 1.0, device=device)
        self.finite_steps = torch.zeros((), device=device)

    def update(self, overflow: Tensor) -> None:
        """Adapt after a step; `overflow` is 1.0 where the gradient was not finite, else 0.0."""
        if not self.enabled:
            return
        self.finite_steps.add_(1.0).mul_(1.0 - overflow)
        grow = self.finite_steps >= GROWTH_INTERVAL
        self.finite_steps.masked_fill_(grow, 0.0)
        self.scale.mul_(1.0 - 0.5 * overflow).mul_(1.0 + grow.float())

    def state(self) -> dict[str, Tensor]:
        """Tensors to save and to load in place; none where scaling is off."""
        return {"scale": self.scale, "finite_steps": self.finite_steps} if self.enabled else {}
