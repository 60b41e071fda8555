"""Faults that are planted in worker processes, each of which a layout could have."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import parallel.tensor
from model.part import Part, Runs
from parallel.cut import Cut
from parallel.mesh import Mesh
from parallel.pipeline import SharedParameters
from train.verify.batches import Batches


def wrong_gradient_scale() -> Any:
    """Gradients are averaged over the ranks, though the loss is divided by the global count already."""
    divide = FSDPModule.set_gradient_divide_factor

    def by_the_ranks(self: FSDPModule, factor: float) -> None:
        divide(self, factor * torch.distributed.get_world_size())

    return patch.object(FSDPModule, "set_gradient_divide_factor", by_the_ranks)


def lost_tie() -> Any:
    """The first and the last stage each have an embedding of their own."""
    return patch.object(SharedParameters, "add", lambda self, gradients: None)


def mean_of_means() -> Any:
    """Every rank divides by its own count of targets."""

    def sum_over_data(self: Mesh, numbers: Tensor) -> Tensor:
        return numbers * self.layout.data_size

    return patch.object(Mesh, "sum_over_data", sum_over_data)


def unsynchronized_norm() -> Any:
    """Under sequence parallelism a norm's gradient is of a rank's own tokens alone."""
    cut = parallel.tensor._cut

    def without_norms(declared: Any, *args: Any, **kwargs: Any) -> Cut:
        made = cut(declared, *args, **kwargs)
        return replace(made, partial=False) if "norm" in declared.name else made

    return patch.object(parallel.tensor, "_cut", without_norms)


def skipped_all_reduce() -> Any:
    """Each rank goes on with what its own heads and features made."""
    return patch.object(parallel.tensor, "add", lambda x, group: x)


def wrong_rope_offset() -> Any:
    """Each rank's tokens are counted from 0."""

    def from_zero(length: int, part: Part | None = None, cache: Any = None) -> Runs:
        return (range(length),)

    return patch("model.transformer._runs", from_zero)


def unscaled_sums() -> Any:
    """What a ring's blocks make is added up as it is, not by the blocks' shares of all scores."""
    return patch("parallel.ring_blocks._share", lambda log_sums, of: torch.ones_like(log_sums).unsqueeze(-1))


def swapped_batch() -> Any:
    """The last data rank is given two batches in the other order."""
    share = Batches.share

    def swapped(self: Batches, step: int, rank: int, ranks: int) -> Any:
        return share(self, {1: 2, 2: 1}.get(step, step) if rank == ranks - 1 else step, rank, ranks)

    return patch.object(Batches, "share", swapped)


def zero_averages() -> Any:
    """DeepSpeed takes the mean over the ranks, where the sum is meant."""
    from parallel.zero.engine import DeepSpeedEngine

    return patch.object(DeepSpeedEngine, "_loss_weight", lambda self: torch.ones((), dtype=torch.float64))


def zero_takes_shares_for_copies() -> Any:
    """DeepSpeed isn't told that tensor-parallel ranks hold different parts, and counts one rank's in the norm."""
    from parallel.zero import engine

    mark = engine.mark

    def unmarked(parameters: Any, cuts: Any, mesh: Mesh) -> None:
        mark(parameters, cuts, mesh)
        for parameter in parameters.values():
            parameter.__dict__.pop("tensor_model_parallel", None)

    return patch.object(engine, "mark", unmarked)


def dying_rank() -> Any:
    """One rank stops with an error, and the others wait for it."""
    share = Batches.share

    def dying(self: Batches, step: int, rank: int, ranks: int) -> Any:
        if rank == ranks - 1:
            raise ValueError("planted")
        return share(self, step, rank, ranks)

    return patch.object(Batches, "share", dying)


_planted = ExitStack()


def plant(fault: Callable[[], Any]) -> None:
    """Plant a fault in this process."""
    _planted.enter_context(fault())


def pull_out() -> None:
    """Undo all that was planted in this process."""
    _planted.close()
