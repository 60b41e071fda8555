"""What every model is to those who train it. B batch, T sequence, V vocabulary."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import BaseModelConfig
from model.cost import Cost
from model.loss import IGNORE_INDEX
from model.weights import Weight


def sum_over_logits(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropies of targets (B, T) that are not IGNORE_INDEX, (), in fp32 (fp64 for fp64).

    For models with `forward(tokens (B, T)) -> logits (B, T, V)`; it holds the logits of all tokens at once.
    """
    logits = model(tokens).flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


class Model(nn.Module):
    """A model is made from its configuration; `forward` and its arguments are its own affair."""

    config: BaseModelConfig
    blocks: nn.ModuleList
    """What a sequence goes through, one after another; a model may have none."""
    loss_sum: Callable[..., Tensor] = sum_over_logits
    """loss_sum(targets (B, T), and config.inputs by name) -> the sum of the losses of scored targets, ()."""
    weights: Callable[[], Mapping[str, Weight]]
    """Declarations of the parameters that belong to no component; see `model.weights`."""
    cost: Callable[..., Cost]
    """cost(config, seq_len): of the whole model, static."""

    def __init__(self, config: BaseModelConfig) -> None:
        super().__init__()
        self.config = config

    def example(self, batch: int, length: int) -> dict[str, Tensor]:
        """What loss_sum takes beside targets (batch, length), of the right shapes, for who measures a step.

        For models whose inputs are not tokens alone, to be overridden.
        """
        return {"tokens": torch.zeros(batch, length, dtype=torch.int64)}

    @property
    def stacks(self) -> list[list[nn.Module]]:
        """The blocks, in runs through each of which one sequence of tokens goes; none where a model has no `blocks`."""
        return [list(self.blocks)] if "blocks" in self._modules else []

    @property
    def layers(self) -> list[nn.Module]:
        """The units of sharding, activation checkpointing and compilation; each is called as a module."""
        return [block for stack in self.stacks for block in stack]
