"""The collectives of a step, by kind and by dimension of the mesh."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

from parallel.mesh import Mesh

c10d, functional = torch.ops.c10d, torch.ops._c10d_functional

KINDS: dict[Any, tuple[str, int]] = {
    c10d._allgather_base_.default: ("all_gather", 0),
    c10d._reduce_scatter_base_.default: ("reduce_scatter", 1),
    c10d.allreduce_.default: ("all_reduce", 0),
    c10d.alltoall_base_.default: ("all_to_all", 1),
    c10d.send.default: ("send", 0),
    functional.all_gather_into_tensor.default: ("all_gather", -1),
    functional.reduce_scatter_tensor.default: ("reduce_scatter", 0),
    functional.all_reduce.default: ("all_reduce", 0),
    functional.all_to_all_single.default: ("all_to_all", 0),
}
"""Of each operator the kind, and which argument is the larger side; -1: its output."""

OTHER_NAMES = {"fsdp": "dp_shard", "data": "dp_shard"}
"""Dimensions of meshes that are another, or several, of the layout's."""


@dataclass
class Traffic:
    """Collectives of one kind over one dimension. bytes: of the larger side of each, all together."""

    count: int = 0
    bytes: int = 0


class TrafficLog:
    """Adds up collectives."""

    def __init__(self, mesh: Mesh) -> None:
        self._dimensions: dict[str, str] = {}
        for each in (mesh.sequences, mesh.experts, mesh.dense):
            for name in each.mesh_dim_names or ():
                self._dimensions[each.get_group(name).group_name] = OTHER_NAMES.get(name, name)
        self.total: defaultdict[tuple[str, str], Traffic] = defaultdict(Traffic)

    def note(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """An operator, which may be a collective."""
        if operator not in KINDS:
            return
        kind, place = KINDS[operator]
        tensors = output if place < 0 else args[place]
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        traffic = self.total[kind, self._dimension(args)]
        traffic.count += 1
        traffic.bytes += sum(tensor.nbytes for tensor in tensors)

    def _dimension(self, args: tuple[Any, ...]) -> str:
        name = next((arg for arg in reversed(args) if isinstance(arg, str)), None)
        if name is None:
            name = next(
                ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)
            ).group_name
        return self._dimensions.get(name, "pp")
