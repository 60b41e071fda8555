"""Random numbers as a function of a sequence's own seed: the same in any batch, layout and device.

B sequences. A counter goes through the mixing function of SplitMix64 (Steele et al. 2014), which takes nothing
but 64-bit integer arithmetic.
"""

import torch
from torch import Tensor

_STEP = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number, and likewise below
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def uniform(seeds: Tensor, count: int, stream: int = 0) -> Tensor:
    """seeds (B,) int64 -> (B, count) fp64 in [0, 1). Other numbers for each `stream`, from 0."""
    return _shifted(_bits(seeds, count, stream), 11).double() * 2.0**-53


def integers(seeds: Tensor, count: int, limit: int, stream: int = 0) -> Tensor:
    """seeds (B,) int64 -> (B, count) int64 in [0, limit). Other numbers for each `stream`, from 0."""
    return _shifted(_bits(seeds, count, stream), 1) % limit


def _bits(seeds: Tensor, count: int, stream: int) -> Tensor:
    counter = torch.arange(1, count + 1, device=seeds.device) + (stream << 40)
    x = seeds.unsqueeze(1) + counter * _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits as of an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
