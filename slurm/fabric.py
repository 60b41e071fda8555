"""The nodes together: whether they reach each other, how fast, and whether their clocks agree."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

_BYTES = 16 * 2**20
_TIMES = 3


class Met(NamedTuple):
    """What a node finds among the others. Bandwidths are in bytes/s."""

    together: float
    """Of an all-reduce: what each node sends meanwhile."""
    to_neighbour: float
    """Of this node's better exchange with one other, both ways at once: what it sends."""
    skewed: dict[str, float]


def meet(node: str, timeout_seconds: float, clock_skew_seconds: float) -> Met:
    """Join one process of each node, as RANK and the like say, and exchange data."""
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=timeout_seconds)
    )
    found = Met(together(device), to_neighbour(device), skewed(node, clock_skew_seconds))
    dist.destroy_process_group()
    return found


def skewed(node: str, limit_seconds: float) -> dict[str, float]:
    """By their names, the nodes whose clock is off the median by more than the limit, with the seconds."""
    clocks: list[tuple[str, float]] = [("", 0.0)] * dist.get_world_size()
    dist.barrier()
    dist.all_gather_object(clocks, (node, time.time()))
    median = sorted(clock for _, clock in clocks)[len(clocks) // 2]
    return {name: clock - median for name, clock in clocks if abs(clock - median) > limit_seconds}


def together(device: torch.device) -> float:
    """As `Met` says; all ranks call it."""
    data = torch.ones(_BYTES // 4, device=device)
    seconds = _time(device, lambda: dist.all_reduce(data))
    size = dist.get_world_size()
    return _BYTES * 2 * (size - 1) / size / seconds


def to_neighbour(device: torch.device) -> float:
    """As `Met` says; all ranks call it. Of two neighbours in a ring, one slow link or node spoils but one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sent, received = torch.ones(2, _BYTES // 4, device=device)
    best = 0.0
    for pairs in rounds(size):
        dist.barrier()
        other = pairs.get(rank)
        if other is not None:
            operations = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
            best = max(best, _BYTES / _time(device, lambda: _exchange(operations)))  # noqa: B023 - at once
    return best


def rounds(size: int) -> list[dict[int, int]]:
    """Which ranks, neighbours in a ring, exchange data at a time: in two rounds, or three where the size is odd."""
    edges = [(rank, (rank + 1) % size) for rank in range(size if size > 2 else size - 1)]
    last = [edges.pop()] if len(edges) % 2 and size > 2 else []
    taken = [edges[0::2], edges[1::2], last]
    return [dict([*pairs, *((b, a) for a, b in pairs)]) for pairs in taken if pairs]


def _exchange(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _time(device: torch.device, exchange: Callable[[], object]) -> float:
    """Seconds, after a first time that makes connections."""
    exchange()
    began = time.perf_counter()
    for _ in range(_TIMES):
        exchange()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / _TIMES
