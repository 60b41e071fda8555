"""The global gradient norm and clipping, over shards of any meshes."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, from the shards of all ranks of its mesh.

    `full_tensor` of torch 2.11 can't gather what stands over two dimensions whose ranks aren't in ascending order, as
    `tp` and `fsdp` of `parallel.mesh`; one after another it can.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for dim in reversed(range(tensor.device_mesh.ndim)):
        placements[dim] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def global_norm(
    gradients: Mapping[tuple[dist.ProcessGroup, ...], Sequence[Tensor]], stages: dist.ProcessGroup
) -> Tensor:
    """The 2-norm over all elements of all gradients, each counted once; (), fp64, equal on all ranks.

    gradients: by the groups whose ranks hold different parts of them; one collective for each. stages: the group
    whose ranks have different gradients.
    """
    total: Tensor | float = 0.0
    for groups, parts in gradients.items():
        squares = torch.stack(torch._foreach_norm([local(part) for part in parts])).double().square().sum()
        for group in groups:
            dist.all_reduce(squares, group=group)
        total = total + squares
    assert isinstance(total, Tensor)
    if stages.size() > 1:
        dist.all_reduce(total, group=stages)
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


def clip(
    gradients: Sequence[Tensor], norm: Tensor, max_norm: float, loss_scale: Tensor | float = 1.0
) -> None:
    """Make gradients of a loss times `loss_scale`, in place, those of the loss, and their norm at most `max_norm`.

    norm: (), of the loss's gradients. The host doesn't wait for it.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / loss_scale
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor.to(gradients[0].dtype))


def skip_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> Tensor:
    """Have a fused optimizer's next step change nothing if the norm isn't finite; returns 1 where it isn't, else 0, ().

    It reads two attributes on the device, as under torch.amp.GradScaler.
    """
    overflow = (~norm.isfinite()).float()
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = overflow  # type: ignore[attr-defined]
    return overflow
