"""Whether steps are as they should be, by their loss and gradient norm; the same on all ranks, as these are."""

import math
from typing import Any

from train.faults.config import FaultsConfig


class GaveUp(Exception):
    """The run ends by itself, since going on would not help. The message is one line that says why."""


class Health:
    """What went wrong so far; a part of the training state."""

    def __init__(self, config: FaultsConfig, state: dict[str, Any]) -> None:
        """state: what `state` returned where a run goes on, or empty."""
        self.config = config
        self.load(state)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was called."""
        self.skipped_steps: int = state.get("skipped_steps", 0)
        self.skipped_in_a_row: int = state.get("skipped_in_a_row", 0)

    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}

    def skipped(self, loss: float, grad_norm: float) -> bool:
        """Whether the step had to be skipped, which is counted; called once for every step."""
        bad = not (math.isfinite(loss) and math.isfinite(grad_norm))
        self.skipped_steps += bad
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        return bad

    @property
    def hopeless(self) -> bool:
        """Whether so many steps in a row were skipped that the run is to end."""
        return self.skipped_in_a_row >= self.config.max_skipped_steps
