"""What the tests of the stream run in several processes."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.config import DataConfig
from data.errors import InputError
from data.stream import TrainingStream, validation_batches

Read = tuple[list[list[int]], dict[str, Any]]


def read(
    config: DataConfig, batches: int, state: dict[str, Any] | None = None, share_rank: bool = False
) -> Read:
    """The sample ids of this rank's share of `batches` global batches, and the state after them.

    With `share_rank` all processes are the one data rank.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # a pool's process is unlike torchrun's: it may have no children, and would spawn them
    multiprocessing.current_process().daemon = False
    multiprocessing.set_start_method("fork", force=True)
    stream = TrainingStream(config, 7, *((0, 1) if share_rank else (rank, size)))
    if state is not None:
        stream.load_state_dict(state)
    ids = [next(stream).sample_ids.tolist() for _ in range(batches)]
    state = stream.state_dict()
    stream.close()
    return ids, state


def validate(path: str, limit: int | None) -> list[list[int]]:
    """The sample ids of this rank's validation batches."""
    batches = validation_batches(path, 3, dist.get_rank(), dist.get_world_size(), limit)
    return [batch.sample_ids.tolist() for batch in batches]


def prefixes(config: DataConfig, waits_for: str | None = None) -> list[int]:
    """The numbers by which two new streams' shared memory is called, one after the other.

    waits_for: a file that the second rank waits for before it begins; it fails if it isn't there in ten seconds.
    """
    waits = waits_for is not None and dist.get_rank() == 1
    deadline = time.monotonic() + 10
    while waits and not Path(str(waits_for)).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    in_time = time.monotonic() < deadline
    numbers = []
    for _ in range(2):
        stream = TrainingStream(config, 7, dist.get_rank(), dist.get_world_size())
        numbers.append(stream._sequences._shm_prefix_int)
        stream.close()
    assert in_time, f"there is no {waits_for}"
    return numbers


def refused(config: DataConfig) -> str:
    """What is said of data that can't be used."""
    try:
        TrainingStream(config, 7, dist.get_rank(), dist.get_world_size()).close()
    except InputError as error:
        return str(error)
    return ""
