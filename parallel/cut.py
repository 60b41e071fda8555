"""What of each parameter a rank holds, and how the whole is put together again.

A parameter is cut over tensor- or expert-parallel ranks first, which leaves each a smaller but ordinary parameter;
FSDP2 then shards that. A `DTensor` view of the local shard says both, for initialization, norms and checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from model.weights import Sharding, Weight, declared_weights
from parallel.collectives import share_of
from parallel.mesh import Mesh

DIM: dict[Sharding, int] = {
    "column": 0,
    "heads": 0,
    "kv_heads": 0,
    "per_head": 0,
    "vocabulary": 0,
    "row": 1,
    "heads_in": 1,
    "experts": 0,
}
"""The dimension that is cut; the other kinds of weights are whole on every rank."""


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut before FSDP2 shards it."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int | None = None
    """The dimension that is cut; None: every rank has all of it."""
    expert: bool = False
    """Cut over expert-parallel ranks, and sharded by FSDP2 over those that hold the same experts."""
    partial: bool = False
    """Tensor-parallel ranks have different parts of the gradient, to be summed."""


Cuts = Mapping[str, Cut]
"""By parameter's name."""


class Declared(NamedTuple):
    """A parameter and what its component says of it."""

    name: str
    owner: nn.Module
    attribute: str
    weight: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return tuple(self.owner.get_parameter(self.attribute).shape)


def declarations(model: nn.Module) -> list[Declared]:
    """Every parameter, by its full name."""
    found = []
    for name, weight in declared_weights(model).items():
        path, _, attribute = name.rpartition(".")
        found.append(Declared(name, model.get_submodule(path), attribute, weight))
    return found


def expert_shard_dim(shape: Sequence[int], ranks: int) -> int:
    """The dimension in which FSDP2 shards experts' parameters over so many ranks; shape (X, ...), X those of a rank.

    Whole experts where each rank gets as many. Some would have none else, and gathers as much padding, so each gets
    a part of every expert, if the parts are equal: FSDP2 takes no others in any dimension but the first.
    """
    return 1 if shape[0] % ranks and shape[1] % ranks == 0 else 0


def keep_share(owner: nn.Module, name: str, dim: int, rank: int, ranks: int) -> None:
    """Replace a parameter on the meta device by one of the rank's share of it."""
    whole = owner.get_parameter(name)
    start, stop = share_of(whole.shape[dim], rank, ranks)
    setattr(owner, name, nn.Parameter(whole.narrow(dim, 0, stop - start).clone()))


def view(shard: DTensor, cut: Cut, mesh: Mesh) -> DTensor:
    """The whole tensor as a DTensor, of a parameter, its gradient or its optimizer state as FSDP2 has it.

    It shares the local shard's memory, so that loading into it fills the shard.
    """
    cut_over = {"ep" if cut.expert else "tp": Replicate() if cut.dim is None else Shard(cut.dim)}
    whole = mesh.experts if cut.expert else mesh.dense
    names = tuple(name for name in whole.mesh_dim_names or () if name in (*cut_over, "dp_replicate", "fsdp"))
    cuts = [cut_over[name] for name in names if name in cut_over]
    return DTensor.from_local(
        shard.to_local(),
        mesh.over(whole, names),
        (*cuts, *shard.placements),
        run_check=False,
        shape=torch.Size(cut.shape),
        stride=strides(cut.shape),
    )


def holders(shard: DTensor, cut: Cut, mesh: Mesh) -> tuple[dist.ProcessGroup, ...]:
    """The groups whose ranks hold different parts of a parameter."""
    whole = view(shard, cut, mesh)
    groups = [
        whole.device_mesh.get_group(dim)
        for dim, placement in enumerate(whole.placements)
        if placement.is_shard()
    ]
    return tuple(group for group in groups if group.size() > 1)


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
