"""What an engine asks of a batch."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """One rank's share of a global batch."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model takes beside the targets, (B, ...) each, by the names of its arguments."""

    @property
    def targets(self) -> Tensor:
        """(B, T) int64, `IGNORE_INDEX` where not scored."""

    def micro_batches(self, size: int) -> Iterator["Batch"]:
        """Successive cuts of `size` sequences."""

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`."""
