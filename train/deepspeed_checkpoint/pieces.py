"""Weights that lie in pieces in several files, put together one by one when they are asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """One weight: its elements, in order, are those of the pieces, each (n,)."""

    shape: tuple[int, ...]
    pieces: tuple[Tensor, ...]

    def join(self) -> Tensor:
        """The weight in its shape; where it is one piece, without a copy."""
        whole = self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)
        return whole.view(self.shape)


class Weights(Mapping[str, Tensor]):
    """Weights by name. Each look-up reads one."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].join()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class Row:
    """Flat tensors, each (n,), as if they were one after another in one."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def cut(self, start: int, count: int) -> tuple[Tensor, ...]:
        """`count` elements from `start` on: views of the parts that they lie in."""
        found = []
        for part, at in zip(self._parts, self._starts, strict=False):
            first, last = max(start - at, 0), min(start + count - at, len(part))
            if first < last:
                found.append(part[first:last])
        return tuple(found) or (torch.empty(0),)


def whole(tensor: Tensor) -> Stored:
    """A weight that lies in one piece."""
    return Stored(tuple(tensor.shape), (tensor.flatten(),))


def elements(shape: tuple[int, ...]) -> int:
    """Their number."""
    return prod(shape)
