"""FSDP2: weights, gradients and optimizer state sharded over the data-parallel ranks."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from model.experts import Experts
from parallel.config import ParallelConfig, Precision
from parallel.cut import expert_shard_dim
from parallel.mesh import Mesh

COMPUTE_DTYPE: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "fp8": torch.bfloat16,  # of all but the blocks' linear layers
}

_SELECTIVE = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
"""What selective checkpointing sees operators by."""


class ShardedModel(FSDPModule, nn.Module):
    """What `fully_shard` turns a model into: both at once, for the type checker."""

    loss_sum: Callable[..., Tensor]


def master_dtype(precision: Precision) -> torch.dtype:
    """The dtype of stored weights, reduced gradients and optimizer state."""
    return torch.float64 if precision == "fp64" else torch.float32


def shard(
    layers: Sequence[nn.Module], root: nn.Module, mesh: Mesh, config: ParallelConfig, precision: Precision
) -> ShardedModel:
    """Shard every layer, then what else is in the root (embedding, last norm, head), in place.

    Experts that ranks share out are sharded over those that have the same ones; see `expert_shard_dim` for how.
    Gradients are summed over the ranks, not averaged: the loss is already divided by the global number of targets.
    Inputs are not cast: embeddings come out in the compute dtype, rotations stay in fp32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=COMPUTE_DTYPE[precision], reduce_dtype=master_dtype(precision), cast_forward_inputs=False
    )
    offload = OffloadPolicy()
    if config.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")

    modules = [module for layer in layers for module in layer.modules()]
    of_experts = {p for module in modules if isinstance(module, Experts) for p in module.parameters()}

    def shard_over(over: DeviceMesh, module: nn.Module, reshard: bool | None = None) -> FSDPModule:
        def placement(parameter: nn.Parameter) -> Shard | None:
            return (
                Shard(expert_shard_dim(parameter.shape, over.shape[-1])) if parameter in of_experts else None
            )

        return fully_shard(
            module,
            mesh=over,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=reshard,
            shard_placement_fn=placement,
        )

    # in a pipeline every micro-batch would gather them anew
    reshard = config.reshard_after_forward and mesh.layout.pp == 1
    dense = mesh.shards(mesh.dense)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, Experts) and mesh.layout.ep > 1:
                shard_over(mesh.shards(mesh.experts), module, reshard)
                _hide_hooks(module)
        shard_over(dense, layer, reshard)
    sharded = cast(ShardedModel, shard_over(dense, root))
    if hasattr(root, "loss_sum"):
        register_fsdp_forward_method(sharded, "loss_sum")
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, by which FSDP2 would otherwise divide by 1
            module.set_force_sum_reduction_for_comms(True)
    return sharded


def _hide_hooks(module: nn.Module) -> None:
    """Don't let the block around a sharded module see its weights being gathered.

    They are gathered otherwise when the block is recomputed, which selective checkpointing takes for a block that
    computes something else than before.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in hooks.items():
            hooks[number] = _unseen(hook)


def _unseen(hook: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes() as modes, ExitStack() as others:
            for mode in reversed(modes):
                if not isinstance(mode, _SELECTIVE):
                    others.enter_context(mode)
            return hook(*args, **kwargs)

    return run
