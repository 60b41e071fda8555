"""Activation checkpointing: recompute a block's activations in the backward (Chen et al. 2016)."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

from model.model import Model
from parallel.config import ActivationCheckpointConfig


def checkpoint_activations(model: Model, config: ActivationCheckpointConfig) -> None:
    """Make the chosen blocks recompute, in place. Parameter names stay as they are."""
    if config.mode == "none":
        return
    every = 1 if config.mode == "full" else config.n
    for layer in model.layers[::every]:
        layer.forward = _recomputing(layer.forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    # a function, since torch.compile passes over a functools.partial without a word
    def recomputing(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False)

    return recomputing
