"""The nodes together: whether they reach each other, how fast, and whether their clocks agree."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

_BYTES = 16 * 2**20
_TIMES = 3


def meet(node: str, timeout_seconds: float, clock_skew_seconds: float) -> tuple[float, dict[str, float]]:
    """Join one process of each node, as RANK and the like say, and exchange data.

    Returns the bandwidth of an all-reduce in bytes/s (of the bus: what each node sends), and `skewed`.
    """
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=timeout_seconds)
    )
    found = _bandwidth(device), skewed(node, clock_skew_seconds)
    dist.destroy_process_group()
    return found


def skewed(node: str, limit_seconds: float) -> dict[str, float]:
    """By their names, the nodes whose clock is off the median by more than the limit, with the seconds."""
    clocks: list[tuple[str, float]] = [("", 0.0)] * dist.get_world_size()
    dist.barrier()
    dist.all_gather_object(clocks, (node, time.time()))
    median = sorted(clock for _, clock in clocks)[len(clocks) // 2]
    return {name: clock - median for name, clock in clocks if abs(clock - median) > limit_seconds}


def _bandwidth(device: torch.device) -> float:
    data = torch.ones(_BYTES // 4, device=device)
    dist.all_reduce(data)
    began = time.perf_counter()
    for _ in range(_TIMES):
        dist.all_reduce(data)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    size = dist.get_world_size()
    return _TIMES * _BYTES * 2 * (size - 1) / size / (time.perf_counter() - began)
