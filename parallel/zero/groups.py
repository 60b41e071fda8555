"""What DeepSpeed is told of the mesh."""

from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from parallel.cut import Cuts
from parallel.mesh import Mesh


class ModelParallelUnit:
    """The mesh in DeepSpeed's words: `data` are the ranks over which it partitions, `model` the tensor-parallel ones.

    Context-parallel ranks hold the same weights, and count as data-parallel ones.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._data, self._model = mesh.dense.get_group("fsdp"), mesh.tp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return self._model.size()

    def get_model_parallel_rank(self) -> int:
        return self._model.rank()


class ExpertLayer(MoE):
    """Tells DeepSpeed that there are experts, which it looks for by this class; it takes part in no forward."""

    def __init__(self, num_experts: int, ep_size: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.ep_size = ep_size
        self.expert_group_name = group_name(ep_size)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are the mesh's; see `announce_experts`."""


def group_name(ep_size: int) -> str:
    """Under what DeepSpeed finds the groups of expert-parallel ranks."""
    return f"ep_size_{ep_size}"


def announce_experts(mesh: Mesh) -> None:
    """Give DeepSpeed the mesh's groups of experts; with none, forget those of an engine before."""
    expert_groups: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS, "ep"),
        (groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, "fsdp"),
    ]
    for by_name, ranks_by_name, dimension in expert_groups:
        by_name.clear()
        ranks_by_name.clear()
        if mesh.layout.ep > 1:
            group = mesh.experts.get_group(dimension)
            by_name[group_name(mesh.layout.ep)] = group
            ranks_by_name[group_name(mesh.layout.ep)] = dist.get_process_group_ranks(group)


def mark(parameters: dict[str, nn.Parameter], cuts: Cuts, mesh: Mesh) -> None:
    """Say of each parameter which ranks hold other parts of it than this one, for gradient sums and norms.

    Gradients of which tensor-parallel ranks have parts are summed over them as they are made.
    """
    for name, parameter in parameters.items():
        cut = cuts[name]
        if cut.expert and mesh.layout.ep > 1:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name(mesh.layout.ep)  # type: ignore[attr-defined]
        elif cut.dim is not None:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        if cut.partial and mesh.tp.size() > 1:
            parameter.register_hook(lambda gradient: _sum(gradient, mesh.tp))


def _sum(gradient: Any, group: dist.ProcessGroup) -> Any:
    gradient = gradient.contiguous().clone()
    dist.all_reduce(gradient, group=group)
    return gradient
