"""What a component says of its own parameters, as plain data: how they may be cut and how they start.

A component with parameters has `weights() -> dict[str, Weight]`, keyed by the name relative to it.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import nn

from model.config import BaseModelConfig

Sharding = Literal[
    "replicated",
    "column",
    "row",
    "heads",
    "kv_heads",
    "heads_in",
    "per_head",
    "every_head",
    "vocabulary",
    "experts",
]
Init = Literal["normal", "residual", "embedding", "score_bias", "zeros", "ones"]
Wide = Literal["both", "in", "out"]


@dataclass(frozen=True)
class Weight:
    """Declaration of one parameter.

    sharding: which dim may be cut. column: the output features (dim 0). row: the input features (dim 1).
    heads: dim 0, H * E, by head. kv_heads: dim 0, K * E, by head. heads_in: dim 1, H * E, by head.
    per_head: dim 0, H, a row for each head. vocabulary: dim 0, V. experts: dim 0, X, by expert. replicated:
    none. every_head: none, but each head uses it alone, so that ranks with different heads have different parts
    of its gradient, to be summed.
    init: normal and residual are linear weights, residual those of projections into the residual stream;
    embedding is a look-up table of vectors, score_bias one of numbers that are added to attention's scores.
    wide: which sides of a linear weight are as wide as the model is: its inputs (the outputs being a number that
    doesn't grow with it, of words or experts), its outputs, or both.
    """

    sharding: Sharding
    init: Init
    wide: Wide = "both"

    @property
    def decays(self) -> bool:
        """Whether weight decay is meant for it: for linear weights and vectors, not for biases and norms."""
        return self.init in ("normal", "residual", "embedding")

    @property
    def wide_inputs(self) -> bool:
        """Whether it sums over a number of inputs that grows with the model's width."""
        return self.init in ("normal", "residual") and self.wide != "out"

    def rate(self, config: BaseModelConfig) -> float:
        """Its part of the learning rate, smaller the more inputs it sums over (`mup`)."""
        return 1.0 / config.width_multiplier if self.wide_inputs else 1.0


@runtime_checkable
class Declares(Protocol):
    def weights(self) -> dict[str, Weight]: ...


def linear_weights(
    name: str, layer: nn.Linear, sharding: Sharding, init: Init = "normal", wide: Wide = "both"
) -> dict[str, Weight]:
    """Declare a linear layer; its bias is cut as its output is."""
    weights = {f"{name}.weight": Weight(sharding, init, wide)}
    if layer.bias is not None:
        cuts_output = sharding not in ("row", "heads_in")
        weights[f"{name}.bias"] = Weight(sharding if cuts_output else "replicated", "zeros")
    return weights


def declared_weights(model: nn.Module) -> dict[str, Weight]:
    """All declarations of a model by full parameter name, a tied parameter once.

    Raises ValueError if a parameter is not declared or a declaration has no parameter.
    """
    declared: dict[str, Weight] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Declares):
            for name, weight in module.weights().items():
                declared[f"{prefix}.{name}" if prefix else name] = weight
    names = {name for name, _ in model.named_parameters()}
    if names != declared.keys():
        raise ValueError(
            f"weights() and parameters differ: undeclared {sorted(names - declared.keys())}, "
            f"declared without a parameter {sorted(declared.keys() - names)}"
        )
    return declared
