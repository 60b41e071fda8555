"""One rank of a job of any size, in this process alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def simulated_rank(rank: int, ranks: int) -> Iterator[None]:
    """In here, this process stands at `rank` of so many. Collectives return at once and move nothing."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
