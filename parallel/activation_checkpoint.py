"""Activation checkpointing: recompute a block's activations in the backward (Chen et al. 2016).

`selective` keeps what is dear to compute again and recomputes the rest (Korthikanti et al. 2022).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.model import Model
from parallel.config import ActivationCheckpointConfig
from parallel.kept_operators import keeps

Recompute = Literal["none", "selective", "full"]
"""What of a block is computed again in the backward."""


def named_layers(model: Model) -> dict[str, nn.Module]:
    """The layers in the order of computation, by names that say their numbers in the whole model."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: layer for layer in model.layers}


def recompute_by_name(config: ActivationCheckpointConfig) -> Callable[[str], Recompute]:
    """What a layer recomputes, in the modes that need to know no more than its name."""
    mode = config.mode
    assert mode != "auto"
    if mode == "every_nth":
        return lambda name: "none" if int(name.rpartition(".")[2]) % config.n else "full"
    return lambda _: mode


def checkpoint_activations(model: Model, recompute: Callable[[str], Recompute]) -> None:
    """Make layers recompute what is said of their names, in place. Parameter names stay as they are."""
    for name, layer in named_layers(model).items():
        layer.forward = recomputing(layer.forward, recompute(name))


def recomputing(forward: Callable[..., Any], recompute: Recompute) -> Callable[..., Any]:
    """The same function, which keeps less for its backward."""
    if recompute == "none":
        return forward
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        options["context_fn"] = _contexts

    # a function, since torch.compile passes over a functools.partial without a word
    def recomputed(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    return recomputed


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = keeps(operator, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
