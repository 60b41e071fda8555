"""The device mesh: which rank stands where in each dimension of the layout."""

from functools import cache, cached_property

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from parallel.layout import SIZES, Layout


class Mesh:
    """All groups of ranks of a layout; made by all ranks together.

    Consecutive ranks are those of a tensor-parallel group, then those of a context-parallel one, and so on
    outwards. The dimensions of a DeviceMesh stand in the order in which tensors are cut: a weight over `tp` first,
    and what is left of it over `fsdp`.
    """

    def __init__(self, layout: Layout, device_type: str) -> None:
        self.layout = layout
        self.device_type = device_type
        self._parts: dict[tuple[DeviceMesh, tuple[str, ...]], DeviceMesh] = {}
        self._ranks = torch.arange(layout.world_size).view([getattr(layout, name) for name in SIZES])
        (place,) = (self._ranks == dist.get_rank()).nonzero().tolist()
        self._place = dict(zip(SIZES, place, strict=True))
        fsdp = self._ranks.flatten(2, 3)  # pp, dp_replicate, fsdp, tp
        self.dense = self._make(fsdp.permute(0, 3, 1, 2), "pp", "tp", "dp_replicate", "fsdp")
        self.experts = self.dense
        if layout.ep > 1:
            shares = fsdp.unflatten(2, (-1, layout.ep))  # pp, dp_replicate, fsdp, ep, tp
            self.experts = self._make(shares.permute(0, 4, 3, 1, 2), "pp", "tp", "ep", "dp_replicate", "fsdp")
        self.sequences = self.dense
        if layout.cp > 1:
            order = self._ranks.flatten(1, 2).permute(0, 3, 1, 2)
            self.sequences = self._make(order, "pp", "tp", "data", "cp")

    def _make(self, ranks: torch.Tensor, *names: str) -> DeviceMesh:
        """A mesh of the dimensions that have several ranks, and `fsdp`, over which FSDP2 may shard by one."""
        kept = [
            (name, size) for name, size in zip(names, ranks.shape, strict=True) if size > 1 or name == "fsdp"
        ]
        shape = [size for _, size in kept]
        mesh = ranks.reshape(shape).contiguous()
        return DeviceMesh(self.device_type, mesh, mesh_dim_names=tuple(name for name, _ in kept))

    def _group(self, mesh: DeviceMesh, name: str) -> dist.ProcessGroup:
        return mesh.get_group(name) if name in (mesh.mesh_dim_names or ()) else self._alone

    @cached_property
    def _alone(self) -> dist.ProcessGroup:
        """This rank by itself, for dimensions of one."""
        return dist.new_group([dist.get_rank()], use_local_synchronization=True)

    def over(self, mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
        """The part of a mesh that has these of its dimensions, and this rank.

        `mesh[names]`, which torch 2.11 refuses where ranks aren't in ascending order.
        """
        if names == mesh.mesh_dim_names:
            return mesh
        if (mesh, names) not in self._parts:
            place = zip(mesh.mesh_dim_names or (), mesh.get_coordinate() or (), strict=True)
            groups = [mesh.get_group(name) for name in names]
            with unset_fake_temporarily():  # ranks are numbers in a simulation, too
                ranks = mesh.mesh[tuple(slice(None) if name in names else at for name, at in place)]
                made = DeviceMesh.from_group(groups, self.device_type, ranks, mesh_dim_names=names)
            self._parts[mesh, names] = made
        return self._parts[mesh, names]

    @property
    def tp(self) -> dist.ProcessGroup:
        """Ranks that hold different parts of the same weights, for the same tokens."""
        return self._group(self.dense, "tp")

    @property
    def pp(self) -> dist.ProcessGroup:
        """Ranks that hold different layers."""
        return self._group(self.dense, "pp")

    @property
    def cp(self) -> dist.ProcessGroup:
        """Ranks that hold different parts of the same sequences."""
        return self._group(self.sequences, "cp")

    @property
    def ep(self) -> dist.ProcessGroup:
        """Ranks that hold different experts."""
        return self._group(self.experts, "ep")

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank reads."""
        return self._place["dp_replicate"] * self.layout.dp_shard + self._place["dp_shard"]

    @property
    def cp_rank(self) -> int:
        """Which part of the sequences this rank works on."""
        return self._place["cp"]

    @property
    def pp_rank(self) -> int:
        """Which stage this rank works on."""
        return self._place["pp"]

    def shards(self, mesh: DeviceMesh) -> DeviceMesh:
        """The part of a mesh over which FSDP2 shards; with replicas, it is HSDP."""
        return mesh["fsdp"] if self.layout.dp_replicate == 1 else mesh["dp_replicate", "fsdp"]

    def sum_over_tokens(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum, in place, over all ranks that work on different tokens."""
        for name in ("dp_replicate", "fsdp"):
            self._add(numbers, self.dense, name)
        return numbers

    def sum_over_losses(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum, in place, over all ranks that work on different tokens, and stages of which one has the losses."""
        self._add(numbers, self.dense, "pp")
        return self.sum_over_tokens(numbers)

    def sum_over_data(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum, in place, over all ranks that read different data."""
        if self.layout.cp > 1:
            self._add(numbers, self.sequences, "data")
            return numbers
        return self.sum_over_tokens(numbers)

    def _add(self, numbers: torch.Tensor, mesh: DeviceMesh, name: str) -> None:
        group = self._group(mesh, name)
        if group.size() > 1:
            dist.all_reduce(numbers, group=group)


def mesh_of(layout: Layout, device_type: str) -> Mesh:
    """The mesh of a layout, made once in a process for as long as its group lives: every group has threads."""
    return _made(dist.group.WORLD, layout, device_type)


@cache
def _made(world: dist.ProcessGroup, layout: Layout, device_type: str) -> Mesh:
    return Mesh(layout, device_type)
