"""`faults.jsonl`: a line for every fault that a run noticed, with the sequences of the step's global batch."""

from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from train.lines import Lines


class FaultRecord:
    """Appends to the file, on rank 0."""

    def __init__(self, path: Path, data_rank: int) -> None:
        self.lines, self.data_rank = Lines(path), data_rank

    def write(self, fault: str, step: int, sample_ids: Tensor, **facts: float | list[int]) -> None:
        """Append a fault, called by all ranks together; sample_ids: (B,) int64, this rank's, on the host."""
        shares: list[tuple[int, list[int]]] = [(0, [])] * dist.get_world_size()
        dist.all_gather_object(shares, (self.data_rank, sample_ids.tolist()))
        if dist.get_rank() == 0:
            ids = [number for _, share in sorted(dict(shares).items()) for number in share]
            self.lines.append({"fault": fault, "step": step, **facts, "sample_ids": ids})
