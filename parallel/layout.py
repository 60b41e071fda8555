"""The layout: how many ranks each dimension of the mesh has. Light to import, so that it is checked at once."""

from dataclasses import dataclass

from parallel.config import ParallelConfig
from parallel.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """The sizes of the mesh's dimensions, outermost first. Their product is the number of ranks."""

    dp_replicate: int
    dp_shard: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.dp_replicate * self.dp_shard

    @property
    def data_size(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard}"


def resolve_layout(config: ParallelConfig, world_size: int) -> Layout:
    """The layout of `world_size` ranks, with -1 replaced by what is left.

    Raises:
        LayoutError: the sizes don't multiply to `world_size`.
    """
    if config.dp_shard == -1:
        dp_shard, left_over = divmod(world_size, config.dp_replicate)
        if left_over or dp_shard == 0:
            raise LayoutError(
                f"parallel.dp_replicate={config.dp_replicate} doesn't divide {world_size} process(es): "
                f"use a divisor of {world_size}, or start a multiple of {config.dp_replicate}"
            )
        return Layout(config.dp_replicate, dp_shard)
    layout = Layout(config.dp_replicate, config.dp_shard)
    if layout.world_size != world_size:
        raise LayoutError(
            f"the layout needs dp_replicate x dp_shard = {config.dp_replicate} x {config.dp_shard} = "
            f"{layout.world_size} process(es), but there are {world_size}: "
            f"start {layout.world_size}, or set parallel.dp_shard=-1 for what is left"
        )
    return layout
