"""Which ranks hold the others up.

In a step all wait for the slowest, so that its time is the same on all of them. Compared is what each does alone: its
wait for its batches, and two pieces of work, always the same, on its device and its processor.
"""

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from statistics import median_low

import torch
import torch.distributed as dist

_SLOWER = 1.5
"""A device or processor that takes so many times as long as the median one is slow."""
_DATA_SHARE = 0.1
"""A rank whose batches make a step longer by so much of it is slow."""
_TRIES = 5
"""Of which the fastest counts: what disturbs for a moment is none of it."""
_WIDTH = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class Alone:
    """What a rank does without the others, in seconds."""

    host: str
    """The name of its machine."""
    data: float
    """A step's wait for the batch, the mean of many."""
    device: float
    """The piece of work on the device."""
    processor: float
    """The one on the processor."""


def slow_ranks(device: torch.device, data_seconds: float, step_seconds: float) -> dict[int, str]:
    """Those that are slow, each with where it is and at what; called by all ranks together, between steps.

    data_seconds, step_seconds: the mean of this rank's last steps.
    """
    own = Alone(socket.gethostname(), data_seconds, _fastest(_device_work(device)), _fastest(_processor_work))
    everyones: list[tuple[str, float, float, float]] = [("", 0, 0, 0)] * dist.get_world_size()
    dist.all_gather_object(everyones, astuple(own))
    return find_slow([Alone(*row) for row in everyones], step_seconds)


def find_slow(ranks: Sequence[Alone], step_seconds: float) -> dict[int, str]:
    """By what each rank does alone, which of them are slow; see `slow_ranks`."""
    data, device, processor = (
        median_low([getattr(alone, name) for alone in ranks]) for name in ("data", "device", "processor")
    )
    found = {}
    for rank, alone in enumerate(ranks):
        what = []
        if (longer := alone.data - data) > _DATA_SHARE * step_seconds:
            what.append(
                f"its batches come {longer:.3f} s later than others', of a step of {step_seconds:.3f} s"
            )
        if (factor := alone.device / device) > _SLOWER:
            what.append(f"its device takes {factor:.1f} times as long as others")
        if (factor := alone.processor / processor) > _SLOWER:
            what.append(f"its processor takes {factor:.1f} times as long as others")
        if what:
            found[rank] = f"rank {rank} on {alone.host} is slow: {'; '.join(what)}"
    return found


def _fastest(work: Callable[[], None]) -> float:
    """Seconds."""
    taken = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _device_work(device: torch.device) -> Callable[[], None]:
    x = torch.ones(_WIDTH[device.type], _WIDTH[device.type], device=device, dtype=torch.bfloat16)

    def work() -> None:
        for _ in range(4):
            torch.mm(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return work


def _processor_work() -> None:
    sum(range(50_000))
