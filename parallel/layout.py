"""The layout: how many ranks each dimension of the mesh has. Light to import, so that it is checked at once."""

from dataclasses import dataclass
from math import prod

from parallel.config import ParallelConfig
from parallel.errors import LayoutError

SIZES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The dimensions, outermost first: ranks next to each other differ in the last."""


@dataclass(frozen=True)
class Layout:
    """The sizes of the mesh's dimensions. Their product, ep left out, is the number of ranks."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    """Ranks that share the experts out among them; these are some of dp_shard x cp."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return prod(getattr(self, name) for name in SIZES)

    @property
    def data_size(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard_size(self) -> int:
        """Ranks over which FSDP shards the weights."""
        return self.dp_shard * self.cp

    def __str__(self) -> str:
        sizes = [f"{name} {getattr(self, name)}" for name in SIZES if getattr(self, name) > 1]
        return " x ".join(sizes or ["1 rank"]) + (f", ep {self.ep}" if self.ep > 1 else "")


def resolve_layout(config: ParallelConfig, world_size: int) -> Layout:
    """The layout of `world_size` ranks, with -1 replaced by what is left.

    Raises:
        LayoutError: the sizes don't multiply to `world_size`.
    """
    sizes = {name: getattr(config, name) for name in SIZES}
    given = prod(size for name, size in sizes.items() if name != "dp_shard")
    if config.dp_shard == -1:
        left, left_over = divmod(world_size, given)
        if left_over or left == 0:
            named = " x ".join(f"parallel.{n}={s}" for n, s in sizes.items() if n != "dp_shard" and s > 1)
            raise LayoutError(
                f"{named} = {given} doesn't divide {world_size} process(es): "
                f"use sizes whose product divides {world_size}, or start a multiple of {given}"
            )
        sizes["dp_shard"] = left
    layout = Layout(**sizes, ep=config.ep)
    if layout.world_size != world_size:
        shown = {n: s for n, s in sizes.items() if s > 1 or n.startswith("dp_")}
        raise LayoutError(
            f"the layout needs {' x '.join(shown)} = {' x '.join(str(s) for s in shown.values())} = "
            f"{layout.world_size} process(es), but there are {world_size}: "
            f"start {layout.world_size}, or set parallel.dp_shard=-1 for what is left"
        )
    if layout.shard_size % layout.ep:
        raise LayoutError(
            f"parallel.ep={layout.ep} doesn't divide dp_shard x cp = {layout.dp_shard} x {layout.cp} = "
            f"{layout.shard_size} ranks, among which experts are shared out: use a divisor of {layout.shard_size}"
        )
    return layout
