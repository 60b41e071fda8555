"""Initial weights of a sharded model: each rank generates the rows that it owns, and no others."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.config import BaseModelConfig
from model.initialize import initial_rows
from model.weights import declared_weights
from parallel.cut import Cuts, view
from parallel.mesh import Mesh


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Put buffers where the model computes, since they stay there when weights are offloaded."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@torch.no_grad()
def initialize_shards(model: nn.Module, config: BaseModelConfig, cuts: Cuts, mesh: Mesh, seed: int) -> None:
    """Fill the local shard of every parameter in place, bit-equal to the same cut of the whole parameter.

    The values are a function of (seed, parameter name, index) alone; see `model.initialize`. Buffers, which
    every rank has whole, are zeros.
    """
    weights = declared_weights(model)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        whole = view(parameter, cuts[name], mesh)
        shape, offset = compute_local_shape_and_global_offset(
            whole.shape, whole.device_mesh, whole.placements
        )
        if 0 in shape:
            continue
        (first, *column), (count, *width) = offset[-2:], shape[-2:]
        for above, matrix in _matrices(whole, offset[0]):
            start = above + first
            rows = initial_rows(name, weights[name], tuple(whole.shape), config, seed, start, start + count)
            matrix.copy_(rows.narrow(1, *column, *width) if column else rows)
    for buffer in model.buffers():
        buffer.zero_()


def _matrices(whole: DTensor, expert: int) -> list[tuple[int, Tensor]]:
    """The local shard, or of experts, the first of which is told, each by itself; and how many rows are above it."""
    local = whole.to_local()
    if whole.dim() < 3:
        return [(0, local)]
    return [((expert + index) * whole.shape[1], matrix) for index, matrix in enumerate(local)]
