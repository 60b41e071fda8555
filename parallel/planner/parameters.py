"""What a rank holds of a model's parameters, from what its components declare."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from model.build import build_model
from model.config import ModelConfig, known
from model.transformer import Trunk
from model.weights import Sharding
from parallel.collectives import share_of
from parallel.cut import DIM, declarations, expert_shard_dim
from parallel.layout import Layout


class Parameter(NamedTuple):
    """One parameter of a component."""

    shape: tuple[int, ...]
    sharding: Sharding


PART = {"norm": "exit", "head": "exit", "positions": "everywhere"}
"""Where a parameter outside of the layers belongs, by its module; the others to the entrance."""

Parameters = tuple[Parameter, ...]


@dataclass(frozen=True)
class Inventory:
    """A model's parameters, by the part that they belong to."""

    entrance: Parameters
    """The embedding, and what else is before the first layer."""
    dense_layer: Parameters
    expert_layer: Parameters
    """Of a layer with experts; empty where there is none."""
    exit: Parameters
    """What comes after the last layer, a tied head left out."""
    everywhere: Parameters
    """What every stage has: positions that are learned."""
    kv_heads: int


@dataclass(frozen=True)
class Held:
    """Elements of parameters on one rank. Of each kind what it computes with, and what of that it stores."""

    whole: int = 0
    shard: int = 0
    expert_whole: int = 0
    """Of experts that ranks share out, which have a sharding of their own."""
    expert_shard: int = 0
    partial: int = 0
    """Stored elements whose gradient is summed over tensor-parallel ranks."""

    def __add__(self, other: "Held") -> "Held":
        return Held(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    def __mul__(self, times: int) -> "Held":
        return Held(*(value * times for value in self.values))

    @property
    def values(self) -> tuple[int, ...]:
        """All fields."""
        return self.whole, self.shard, self.expert_whole, self.expert_shard, self.partial

    @property
    def computed(self) -> int:
        """Elements that the rank computes with."""
        return self.whole + self.expert_whole

    def padded(self, layout: Layout) -> int:
        """Elements of what is gathered, in which all ranks' shards are as long as the longest."""
        return self.shard * layout.shard_size + self.padded_experts(layout)

    def padded_experts(self, layout: Layout) -> int:
        """Of these, those of experts that ranks share out."""
        return self.expert_shard * (layout.shard_size // layout.ep)

    @property
    def stored(self) -> int:
        """Elements that the rank stores, and steps."""
        return self.shard + self.expert_shard


def take_inventory(config: ModelConfig) -> Inventory:
    """Build a model of one layer of each kind, on the meta device, and read its declarations."""
    update: dict[str, object] = {"num_layers": 1}
    if config.moe is not None:
        experts = {"first_layer": 1, "every_nth_layer": 1}
        update = {"num_layers": 2, "moe": config.moe.model_copy(update=experts)}
    with torch.device("meta"):
        model = build_model(config.model_copy(update=update))
    assert isinstance(model, Trunk)
    parts: dict[str, list[Parameter]] = defaultdict(list)
    for each in declarations(model):
        first, *others = each.name.split(".")
        part = f"blocks.{others[0]}" if first == "blocks" else PART.get(first, "entrance")
        parts[part].append(Parameter(each.shape, each.weight.sharding))
    return Inventory(
        entrance=tuple(parts["entrance"]),
        dense_layer=tuple(parts["blocks.0"]),
        expert_layer=tuple(parts["blocks.1"]),
        exit=tuple(parts["exit"]),
        everywhere=tuple(parts["everywhere"]),
        kv_heads=known(config.attention.num_kv_heads),
    )


def held(parameters: Iterable[Parameter], layout: Layout, kv_heads: int, *, shares_tokens: bool) -> Held:
    """What the rank with the most holds of parameters, cut over tp or ep and then sharded.

    shares_tokens: tensor-parallel ranks compute the gradient of what they all have on different tokens.
    """
    total = Held()
    for shape, sharding in parameters:
        if sharding == "experts":
            total += _held_experts(shape, layout)
            continue
        dim = DIM.get(sharding)
        if sharding == "kv_heads" and kv_heads % layout.tp:
            dim = None
        cut = list(shape)
        if dim is not None:
            cut[dim] = _most(shape[dim], layout.tp)
        shard = _shard(cut, 0, layout.shard_size)
        partial = layout.tp > 1 and dim is None and (shares_tokens or sharding != "replicated")
        total += Held(prod(cut), shard, partial=shard if partial else 0)
    return total


def _held_experts(shape: tuple[int, ...], layout: Layout) -> Held:
    cut = [shape[0] // layout.ep, *shape[1:]]
    ranks = layout.shard_size // layout.ep
    shard = _shard(cut, expert_shard_dim(cut, ranks), ranks)
    partial = shard if layout.tp > 1 else 0
    if layout.ep == 1:
        return Held(prod(cut), shard, partial=partial)
    return Held(expert_whole=prod(cut), expert_shard=shard, partial=partial)


def _most(size: int, ranks: int) -> int:
    start, stop = share_of(size, 0, ranks)
    return stop - start


def _shard(shape: list[int], dim: int, ranks: int) -> int:
    """Elements of a shard; FSDP2 pads the last ranks'."""
    return prod(shape) // shape[dim] * _most(shape[dim], ranks)
