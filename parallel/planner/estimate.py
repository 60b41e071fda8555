"""A run in one layout on one kind of device: memory, time, and what follows from them."""

from dataclasses import dataclass

from model.count import flops_per_token
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import Device
from parallel.planner.memory import predict_memory
from parallel.planner.moments import Memory
from parallel.planner.step_time import StepTime, predict_step_time

ROOM = 0.95
"""Share of a device's memory that a plan may fill: predictions were up to 6 % short of what was measured."""


@dataclass(frozen=True)
class Estimate:
    """What a plan says of one layout."""

    run: RunFacts
    arrangement: Arrangement
    device: Device
    memory: Memory
    """Of the rank that needs most."""
    time: StepTime
    """Of the slowest rank."""

    @property
    def fits(self) -> bool:
        """As the function says."""
        return fits(self.memory, self.device)

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.run.tokens_per_step / self.time.total

    @property
    def tokens_per_second_per_device(self) -> float:
        """Of one."""
        return self.tokens_per_second / self.arrangement.layout.world_size

    @property
    def utilization(self) -> float:
        """Model FLOPs, recomputation not counted, over what the device's data sheet says (MFU); with fp8 of bf16."""
        flops = flops_per_token(self.run.model, self.run.seq_len) * self.tokens_per_second_per_device
        return flops / self.device.peak_flops(self.run.wide_precision)


def fits(memory: Memory, device: Device) -> bool:
    """Whether a device has as much memory, and some to spare for what the prediction misses."""
    return memory.total <= device.memory_bytes * ROOM


def estimate(run: RunFacts, arrangement: Arrangement, device: Device) -> Estimate:
    """Memory and time; whether the layout is possible and fits is for the caller to ask."""
    memory = predict_memory(run, arrangement, device)
    return Estimate(run, arrangement, device, memory, predict_step_time(run, arrangement, device))
