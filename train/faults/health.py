"""Whether steps are as they should be, by their loss and gradient norm; the same on all ranks, as these are."""

import math
from collections import deque
from collections.abc import Collection
from statistics import median
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
        self.rollbacks: int = state.get("rollbacks", 0)
        window = self.config.spike_window
        self._past: deque[tuple[float, float]] = deque(map(tuple, state.get("past", ())), window)

    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rollbacks": self.rollbacks,
            "past": list(self._past),
        }

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

    def spike(self, loss: float, grad_norm: float) -> float | None:
        """The larger robust z-score of the two, where it makes the step a spike.

        Called once for each step that isn't skipped.
        """
        values = loss, grad_norm
        score = 0.0
        if len(self._past) == self.config.spike_window:
            score = max(robust_z(*pair) for pair in zip(values, zip(*self._past, strict=True), strict=True))
        self._past.append(values)
        return score if score > self.config.spike_threshold else None

    @property
    def may_roll_back(self) -> bool:
        """Whether a spike is answered by going back."""
        return self.config.on_spike == "rollback" and self.rollbacks < self.config.max_rollbacks

    def rolled_back(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, but for the number of rollbacks, which is now one more."""
        self.load(state | {"rollbacks": self.rollbacks + 1})


def robust_z(value: float, past: Collection[float]) -> float:
    """The modified z-score (Iglewicz & Hoaglin 1993): how many deviations above the median, estimated without outliers.

    A deviation is taken to be at least a millionth of the median, for values that stay the same.
    """
    middle = median(past)
    deviation = 1.4826 * median(abs(seen - middle) for seen in past)  # a normal distribution's
    return (value - middle) / max(deviation, 1e-6 * abs(middle), 1e-30)
