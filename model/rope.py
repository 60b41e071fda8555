"""Rotary positions and their scalings. B batch, T sequence, E head_dim, R dims that turn."""

import math

import torch
from torch import Tensor

from model.positional_config import PositionalConfig, RopeScaling
from model.section import known

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each (T, 1, R), the first half of sin negated, in fp32 (fp64 for fp64 activations)."""


def angles(x: Tensor, offset: int, frequencies: Tensor) -> Tensor:
    """Position times frequency, (T, F), for x (B, T, ...) at positions from offset on and frequencies (F,)."""
    places = torch.arange(offset, offset + x.shape[1], device=x.device, dtype=frequencies.dtype)
    return torch.outer(places, frequencies)


def geometric_frequencies(x: Tensor, width: int, base: float) -> Tensor:
    """base ** (-2i / width), (width / 2,), on the device of x, in at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return base ** (-torch.arange(0, width, 2, device=x.device, dtype=dtype) / width)


def make_rotation(x: Tensor, offset: int, width: int, config: PositionalConfig) -> Rotation:
    """For activations x (B, T, ...) at positions from offset on; `width` dims turn."""
    base, scaling = config.rope_base, config.rope_scaling
    if scaling is not None and scaling.type == "ntk":
        base *= scaling.factor ** (width / (width - 2))
    frequencies = geometric_frequencies(x, width, base)
    if scaling is not None:
        frequencies = _scaled(frequencies, width, base, scaling)
    turns = angles(x, offset, frequencies).unsqueeze(1)
    cos, sin = turns.cos(), turns.sin()
    if scaling is not None and scaling.type == "yarn":
        magnitude = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
        cos, sin = cos * magnitude, sin * magnitude
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _scaled(frequencies: Tensor, width: int, base: float, scaling: RopeScaling) -> Tensor:
    if scaling.type == "ntk":
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.type == "linear":
        return slow
    original = known(scaling.original_max_seq_len)
    if scaling.type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None and high is not None
        turns = original * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        assert scaling.beta_fast is not None and scaling.beta_slow is not None
        first, last = (
            width * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(base))
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        index = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
        kept = 1 - ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * kept + slow * (1 - kept)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (e, e + R/2) of the first R dims of x (B, T, heads, E).

    In the rotation's dtype, returned in x's.
    """
    cos, sin = rotation
    turning = cos.shape[-1]
    if turning < x.shape[-1]:
        return torch.cat((rotate(x[..., :turning], rotation), x[..., turning:]), dim=-1)
    wide = x.to(cos.dtype)
    swapped = wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)
