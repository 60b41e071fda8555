"""The global gradient norm and clipping, over shards of any meshes."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all elements of all gradients, each counted once; (), fp64, equal on all ranks.

    One collective for each mesh dimension that shards, however many gradients there are.
    """
    groups: dict[tuple[DeviceMesh | None, tuple[Placement, ...]], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        cut = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else (None, ())
        groups[cut].append(local(gradient))
    total = torch.zeros((), dtype=torch.float64, device=local(gradients[0]).device)
    for (mesh, placements), shards in groups.items():
        squares = torch.stack(torch._foreach_norm(shards)).double().square().sum()
        for dim, placement in enumerate(placements):
            if mesh is not None and placement.is_shard():
                dist.all_reduce(squares, group=mesh.get_group(dim))
        total += squares
    return total.sqrt()


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all gradients by a scalar on their device, in place."""
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
