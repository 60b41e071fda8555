"""Context parallelism: each rank has a part of every sequence's tokens. Where these meet, by one of two methods:

heads: all tokens of some heads are exchanged for all heads of some tokens (DeepSpeed-Ulysses, Jacobs et al. 2023), so
that every mask and every kind of attention is computed as on one device, and all ranks have equal work.
ring: keys and values go from rank to rank (`parallel.ring`), of which there may then be more than heads.

B batch, T sequence, H heads, E head_dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from model.attention import Attention
from model.kernels import Bias, Mask
from model.masks import bias_by_distance
from model.model import Model
from model.part import Part
from model.projections import Projections
from model.router import Router
from model.transformer import Stack
from parallel.collectives import heads_to_tokens, join, share, split, tokens_to_heads
from parallel.config import ContextMethod, ParallelConfig
from parallel.mesh import Mesh
from parallel.ring import ring_attention
from parallel.router import route_whole_sequences
from parallel.zigzag import fold, runs_of, unfold


class Context:
    """How a context-parallel group shares sequences out while it is at work on them."""

    def __init__(self, group: dist.ProcessGroup, method: ContextMethod) -> None:
        self.group = group
        self.method = method
        self.part: Part | None = None

    @contextmanager
    def at_work(self, length: int) -> Iterator[Part]:
        """In here, forward and backward, the model is given the part that is yielded of sequences of `length`."""
        if self.method == "ring":
            self.part = Part(runs_of(length, self.group.rank(), self.group.size()), length)
        else:
            self.part = Part((range(*share(length, self.group)),), length)
        try:
            yield self.part
        finally:
            self.part = None

    def split(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> this rank's tokens."""
        if self.part is None:
            return x
        return split(fold(x, self.group.size()) if self.method == "ring" else x, self.group)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.part is None:
            return x
        whole = join(x, self.part.length, self.group)
        return unfold(whole, self.group.size()) if self.method == "ring" else whole


def context_of(parallel: ParallelConfig, mesh: Mesh) -> Context | None:
    """What shares sequences out in a layout, if anything does."""
    return Context(mesh.cp, parallel.cp_method) if mesh.layout.cp > 1 else None


@contextmanager
def at_work(context: Context | None, length: int) -> Iterator[dict[str, Part]]:
    """What the model is told, forward and backward, of its part of sequences of `length`, if it has one."""
    if context is None:
        yield {}
    else:
        with context.at_work(length) as part:
            yield {"part": part}


def share_sequences(model: Model, context: Context) -> None:
    """Let the model work on parts of sequences."""
    for module in model.modules():
        if isinstance(module, Router):
            route_whole_sequences(module, context)
        if context.method == "ring" and isinstance(module, Stack):
            _pass_around(module, context)
        elif context.method == "heads" and isinstance(module, Projections) and hasattr(module, "mix"):
            _exchange(module, context)


def _exchange(attention: nn.Module, context: Context) -> None:
    mix: Callable[..., Tensor] = attention.mix  # type: ignore[assignment]

    def exchanging(mask: object, cache: object, *parts: Tensor) -> Tensor:
        if context.part is None:
            return mix(mask, cache, *parts)
        group = context.group
        whole = [tokens_to_heads(_enough_heads(part, group.size()), group) for part in parts]
        return heads_to_tokens(mix(mask, cache, *whole), group)

    attention.mix = exchanging  # type: ignore[assignment]


def _enough_heads(part: Tensor, ranks: int) -> Tensor:
    """(B, T, heads, E) with heads repeated where there are fewer than ranks."""
    heads = part.shape[2]
    return part if heads % ranks == 0 else part.repeat_interleave(ranks // heads, dim=2)


def _pass_around(stack: Stack, context: Context) -> None:
    make = stack.mask

    def unmade(config: Any, queries: range, keys: range, x: Tensor, **told: Any) -> Mask:
        """What a mask is made of: each block of queries and keys makes its own."""
        if context.part is None:
            return make(config, queries, keys, x, **told)
        bias: Bias | None = told["bias"]
        table = None if bias is None else bias_by_distance(bias, told["heads"], queries, keys, x)
        return Mask(documents=told["documents"], padding=told["padding"], bias=table)

    stack.mask = unmade
    section = stack.config.attention.model_dump_json()
    for module in stack.modules():
        if isinstance(module, Attention):
            _send_round(module, context, section)


def _send_round(attention: Attention, context: Context, section: str) -> None:
    mix = attention.mix

    def going_round(mask: Mask, cache: None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if context.part is None:
            return mix(mask, cache, query, key, value)
        dropout = attention.dropout if attention.training else 0.0
        return ring_attention(query, key, value, mask, section, dropout, context.group)

    attention.mix = going_round  # type: ignore[method-assign,assignment]
