"""What every model is to those who train it."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from model.config import BaseModelConfig
from model.cost import Cost
from model.weights import Weight


class Model(nn.Module):
    """A model is made from its configuration; `forward` and its arguments are its own affair."""

    config: BaseModelConfig
    blocks: nn.ModuleList
    """What a sequence goes through, one after another."""
    loss_sum: Callable[..., Tensor]
    """loss_sum(targets (B, T), and config.inputs by name) -> the sum of the losses of scored targets, ()."""
    weights: Callable[[], Mapping[str, Weight]]
    """Declarations of the parameters that belong to no component; see `model.weights`."""
    cost: Callable[..., Cost]
    """cost(config, seq_len): of the whole model, static."""

    @property
    def stacks(self) -> list[list[nn.Module]]:
        """The blocks, in runs through each of which one sequence of tokens goes."""
        return [list(self.blocks)]

    @property
    def layers(self) -> list[nn.Module]:
        """The units of sharding, activation checkpointing and compilation; each is called as a module."""
        return [block for stack in self.stacks for block in stack]

    def __init__(self, config: BaseModelConfig) -> None:
        super().__init__()
