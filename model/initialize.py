"""Initial weights as a function of (seed, parameter name, index) alone, so that any layout starts equal."""

import math
from hashlib import blake2b
from math import prod

import torch
from torch import Tensor, nn

from model.config import BaseModelConfig
from model.weights import Init, Weight, declared_weights

ROWS_PER_BLOCK = 128


def as_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter as one matrix, in which an expert's rows follow those of the one before."""
    return (prod(shape[:-1]), shape[-1]) if len(shape) > 1 else shape


def initial_rows(
    name: str,
    weight: Weight,
    shape: tuple[int, ...],
    config: BaseModelConfig,
    seed: int,
    start: int,
    stop: int,
) -> Tensor:
    """Rows [start, stop), of those of `as_rows`, of the parameter `name` of `shape`, fp32 on the CPU.

    Random rows come in blocks of 128, each from a generator of its own, always filled whole: any cut
    of the rows is bit-equal to the same cut of all of them.
    """
    _, *rest = as_rows(shape)
    if weight.init in ("zeros", "ones"):
        return torch.full((stop - start, *rest), float(weight.init == "ones"), device="cpu")
    rows = torch.empty(stop - start, *rest, device="cpu")
    scaled = weight.init == "residual" and config.residual_scaled_init
    shrink = math.sqrt(config.residual_sums(name)) if scaled else 1.0
    if weight.wide_inputs:
        shrink *= config.width_multiplier ** (1.0 if weight.wide == "in" else 0.5)
    for block in range(start // ROWS_PER_BLOCK, -(-stop // ROWS_PER_BLOCK)):
        digest = blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
        values = torch.empty(ROWS_PER_BLOCK, *rest, device="cpu")
        _fill(values, weight.init, shape, config, shrink, generator)
        first = block * ROWS_PER_BLOCK
        low, high = max(start, first), min(stop, first + ROWS_PER_BLOCK)
        rows[low - start : high - start] = values[low - first : high - first]
    return rows


def _fill(
    values: Tensor,
    init: Init,
    shape: tuple[int, ...],
    config: BaseModelConfig,
    shrink: float,
    generator: torch.Generator,
) -> None:
    """Draw some rows of a random parameter of `shape`.

    gpt2 is normal (Radford et al. 2019). xavier is uniform for linear weights, with the variance
    2 / (in + out) (Glorot and Bengio 2010). Either is made smaller by `shrink`, for depth and for width (`mup`).
    """
    if config.init == "xavier" and init in ("normal", "residual") and len(shape) > 1:
        bound = math.sqrt(6 / (shape[-1] + shape[-2])) / shrink
        values.uniform_(-bound, bound, generator=generator)
    else:
        values.normal_(0.0, config.init_std / shrink, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, config: BaseModelConfig, seed: int) -> None:
    """Fill a one-device model in place: weights by the scheme of config.init, biases and buffers zero, norms one."""
    weights = declared_weights(model)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        rows = parameter.view(as_rows(shape))
        for start in range(0, len(rows), ROWS_PER_BLOCK):
            stop = min(start + ROWS_PER_BLOCK, len(rows))
            rows[start:stop] = initial_rows(name, weights[name], shape, config, seed, start, stop)
    for buffer in model.buffers():
        buffer.zero_()
