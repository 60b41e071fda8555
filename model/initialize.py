"""Initial weights as a function of (seed, parameter name, index) alone, so that any layout starts equal."""

import math
from hashlib import blake2b

import torch
from torch import Tensor, nn

from model.config import BaseModelConfig
from model.weights import Weight, declared_weights

ROWS_PER_BLOCK = 128


def initial_rows(
    name: str,
    weight: Weight,
    shape: tuple[int, ...],
    config: BaseModelConfig,
    seed: int,
    start: int,
    stop: int,
) -> Tensor:
    """Rows [start, stop) of the parameter `name` of `shape`, fp32 on the CPU.

    Random rows come in blocks of 128, each from a generator of its own, always filled whole: any cut
    of the rows is bit-equal to the same cut of all of them.
    """
    rest = shape[1:]
    if weight.init in ("zeros", "ones"):
        return torch.full((stop - start, *rest), float(weight.init == "ones"), device="cpu")
    std = config.init_std
    if weight.init == "residual" and config.residual_scaled_init:
        std /= math.sqrt(2 * config.num_layers)
    rows = torch.empty(stop - start, *rest, device="cpu")
    for block in range(start // ROWS_PER_BLOCK, -(-stop // ROWS_PER_BLOCK)):
        digest = blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
        values = torch.empty(ROWS_PER_BLOCK, *rest, device="cpu").normal_(0.0, std, generator=generator)
        first = block * ROWS_PER_BLOCK
        low, high = max(start, first), min(stop, first + ROWS_PER_BLOCK)
        rows[low - start : high - start] = values[low - first : high - first]
    return rows


@torch.no_grad()
def initialize(model: nn.Module, config: BaseModelConfig, seed: int) -> None:
    """Fill a one-device model in place by GPT-2's scheme (Radford et al. 2019).

    Normal weights, zero biases, unit norms, projections into the residual stream scaled down by the depth.
    """
    weights = declared_weights(model)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        for start in range(0, shape[0], ROWS_PER_BLOCK):
            stop = min(start + ROWS_PER_BLOCK, shape[0])
            parameter[start:stop] = initial_rows(name, weights[name], shape, config, seed, start, stop)
