"""What is known of a step, and what is made of it: rates, utilization, memory."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from model.moe import ExpertStatistics


@dataclass(frozen=True)
class ExpertLoad:
    """How evenly the experts of each layer that has any were used in a step, by layer in their order."""

    load: list[list[float]]
    """The share of the layer's choices that fell on each expert."""
    dropped: list[float]
    """The share of the layer's choices that went over an expert's capacity."""

    @classmethod
    def of(cls, statistics: ExpertStatistics) -> "ExpertLoad":
        """Read from the device, which is waited for."""
        return cls(statistics.load.tolist(), statistics.dropped.tolist())

    @property
    def imbalance(self) -> list[float]:
        """The largest load over the mean one: 1 where even, the number of experts where one takes all."""
        return [max(shares) * len(shares) for shares in self.load]

    def values(self) -> dict[str, list[float]]:
        """As in metrics.jsonl."""
        return {"imbalance": _rounded(self.imbalance), "dropped": _rounded(self.dropped)}


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


@dataclass(frozen=True)
class Metrics:
    """One optimizer step, as a line of metrics.jsonl."""

    step: int
    tokens: int
    """Tokens trained on since the run began."""
    loss: float
    """Sum over the global batch's targets, divided by their number."""
    grad_norm: float
    """Global, before clipping."""
    lr: float
    tokens_per_second: float
    """Of all ranks together, over `step_seconds`."""
    mfu: float
    """Model FLOPs utilization: FLOPs of the model's mathematics by the peak of all ranks' devices."""
    memory_bytes: int
    """Peak so far of rank 0: allocated on the GPU, or resident of the process."""
    step_seconds: float
    """From the end of the step before to the end of this one, without evaluation and saving."""
    data_seconds: float
    """Waiting for the batch, part of `step_seconds`."""
    data_order_digest: str
    """Of all global batches so far; see `train.order_digest`."""
    sequences: dict[str, int]
    """Trained on so far, of each source of the data."""
    epochs: dict[str, float]
    """How often each source was gone through so far."""
    skipped_steps: int = 0
    """So far, since their loss or gradient was not finite."""
    left_out_batches: int = 0
    """Global batches so far that were left out by going back to a checkpoint."""
    spike: float | None = None
    """How far loss or gradient norm are above those of the steps before, where that is too far; see `train.faults`."""
    missed_saves: int = 0
    """In a row, up to the newest save, since the disk was full."""
    skipped_sequences: int | None = None
    """In bad shards, which are left out; None where there are none."""
    validation_loss: float | None = None
    experts: ExpertLoad | None = None

    def numbers(self) -> dict[str, float]:
        """Those that are known, by name, of the whole model."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in known.items() if isinstance(value, int | float)}

    def values(self) -> dict[str, Any]:
        """All that is known, as in metrics.jsonl."""
        return (
            self.numbers()
            | {
                "data_order_digest": self.data_order_digest,
                "sequences": self.sequences,
                "epochs": {name: round(count, 6) for name, count in self.epochs.items()},
            }
            | ({} if self.experts is None else {"experts": self.experts.values()})
        )


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
