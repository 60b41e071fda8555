"""The global gradient norm and clipping, over shards of any meshes."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(gradients: Mapping[tuple[dist.ProcessGroup, ...], Sequence[Tensor]]) -> Tensor:
    """The 2-norm over all elements of all gradients, each counted once; (), fp64, equal on all ranks.

    gradients: by the groups whose ranks hold different parts of them, outermost last; one collective for each.
    """
    total: Tensor | float = 0.0
    for groups, parts in gradients.items():
        squares = torch.stack(torch._foreach_norm([local(part) for part in parts])).double().square().sum()
        for group in groups:
            dist.all_reduce(squares, group=group)
        total = total + squares
    assert isinstance(total, Tensor)
    return total.sqrt()


def add_partial(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum, in place and at once, gradients of which the ranks have different parts."""
    if group.size() == 1 or not gradients:
        return
    locals_ = [local(gradient) for gradient in gradients]
    flat = torch.cat([gradient.flatten() for gradient in locals_])
    dist.all_reduce(flat, group=group)
    sums = flat.split([gradient.numel() for gradient in locals_])
    torch._foreach_copy_([g.view(-1) for g in locals_], list(sums))


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all gradients by a scalar on their device, in place."""
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
