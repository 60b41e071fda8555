"""Activation checkpointing: recompute a block's activations in the backward (Chen et al. 2016)."""

from functools import partial
from typing import cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel.config import ActivationCheckpointConfig


def checkpoint_activations(model: nn.Module, config: ActivationCheckpointConfig) -> None:
    """Make the chosen blocks recompute, in place. Parameter names stay as they are."""
    if config.mode == "none":
        return
    every = 1 if config.mode == "full" else config.n
    for block in list(cast(nn.ModuleList, model.blocks))[::every]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
