"""Context parallelism: each rank has a part of every sequence's tokens, and where tokens meet, a part of the heads.

Around attention, all tokens of some heads are exchanged for all heads of some tokens (DeepSpeed-Ulysses, Jacobs et al.
2023), so that every mask and every kind of attention is computed as on one device, and all ranks have equal work.
B batch, T sequence, H heads, E head_dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from model.model import Model
from model.part import Part
from model.projections import Projections
from model.router import Router
from parallel.collectives import heads_to_tokens, join, share, split, tokens_to_heads
from parallel.router import route_whole_sequences


class Context:
    """How a context-parallel group shares sequences out while it is at work on them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.part: Part | None = None

    @contextmanager
    def at_work(self, length: int) -> Iterator[Part]:
        """In here, forward and backward, the model is given the part that is yielded of sequences of `length`."""
        start, stop = share(length, self.group)
        self.part = Part(start, stop, length)
        try:
            yield self.part
        finally:
            self.part = None

    def split(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> this rank's tokens."""
        return x if self.part is None else split(x, self.group)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x if self.part is None else join(x, self.part.length, self.group)


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
        if isinstance(module, Projections) and hasattr(module, "mix"):
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
