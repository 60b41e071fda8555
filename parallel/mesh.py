"""The device mesh: which rank stands where in each dimension of the layout."""

import torch
import torch.distributed as dist
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
        self._ranks = torch.arange(layout.world_size).view([getattr(layout, name) for name in SIZES])
        fsdp = self._ranks.flatten(2, 3)  # pp, dp_replicate, fsdp, tp
        self.dense = self._make(fsdp.permute(0, 3, 1, 2), "pp", "tp", "dp_replicate", "fsdp")
        shares = fsdp.unflatten(2, (-1, layout.ep))  # pp, dp_replicate, fsdp, ep, tp
        self.experts = self.dense
        if layout.ep > 1:
            order = shares.permute(0, 4, 3, 1, 2)
            self.experts = self._make(order, "pp", "tp", "ep", "dp_replicate", "fsdp")
        self.sequences = self.dense
        if layout.cp > 1:
            order = self._ranks.flatten(1, 2).permute(0, 3, 1, 2)
            self.sequences = self._make(order, "pp", "tp", "data", "cp")

    def _make(self, ranks: torch.Tensor, *names: str) -> DeviceMesh:
        return DeviceMesh(self.device_type, ranks.contiguous(), mesh_dim_names=names)

    @property
    def tp(self) -> dist.ProcessGroup:
        """Ranks that hold different parts of the same weights, for the same tokens."""
        return self.dense.get_group("tp")

    @property
    def pp(self) -> dist.ProcessGroup:
        """Ranks that hold different layers."""
        return self.dense.get_group("pp")

    @property
    def cp(self) -> dist.ProcessGroup:
        """Ranks that hold different parts of the same sequences."""
        return self.sequences.get_group("cp")

    @property
    def ep(self) -> dist.ProcessGroup:
        """Ranks that hold different experts."""
        return self.experts.get_group("ep")

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank reads."""
        return self._place("dp_replicate") * self.layout.dp_shard + self._place("dp_shard")

    @property
    def cp_rank(self) -> int:
        """Which part of the sequences this rank works on."""
        return self._place("cp")

    @property
    def pp_rank(self) -> int:
        """Which stage this rank works on."""
        return self._place("pp")

    def _place(self, name: str) -> int:
        (place,) = (self._ranks == dist.get_rank()).nonzero().tolist()
        return place[SIZES.index(name)]

    def shards(self, mesh: DeviceMesh) -> DeviceMesh:
        """The part of a mesh over which FSDP2 shards; with replicas, it is HSDP."""
        return mesh["fsdp"] if self.layout.dp_replicate == 1 else mesh["dp_replicate", "fsdp"]

    def sum_over_tokens(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum, in place, over all ranks that work on different tokens."""
        for name in ("dp_replicate", "fsdp"):
            self._add(numbers, self.dense, name)
        return numbers

    def sum_over_data(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum, in place, over all ranks that read different data."""
        if self.layout.cp > 1:
            self._add(numbers, self.sequences, "data")
            return numbers
        return self.sum_over_tokens(numbers)

    def _add(self, numbers: torch.Tensor, mesh: DeviceMesh, name: str) -> None:
        group = mesh.get_group(name)
        if group.size() > 1:
            dist.all_reduce(numbers, group=group)
