"""What is known of a step, and what is made of it: rates, utilization, memory."""

import resource
import sys
from dataclasses import dataclass, fields

import torch


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
    validation_loss: float | None = None

    def values(self) -> dict[str, float]:
        """Those that are known, by name."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in known.items() if value is not None}


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
