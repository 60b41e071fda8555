"""Linear layers whose products are of 8-bit floats, each tensor with one scale (Micikevicius et al. 2022).

What goes in and out, and what is stored, has the compute dtype. E4M3 holds activations and weights, E5M2 gradients,
whose range is wider. A scale is found from the tensor at hand, on the device. N features out, K features in.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.errors import LayoutError
from parallel.fit import FP8_MULTIPLE

OLDEST_CAPABILITY = (8, 9)
"""Of the GPUs that have such products: Ada, Hopper and later."""


class Fp8Linear(nn.Linear):
    """A linear layer of a block, after its conversion."""

    def forward(self, x: Tensor) -> Tensor:
        return product(self, x, self.weight, self.bias)


def use_fp8(layers: Iterable[nn.Module]) -> None:
    """Convert the linear layers of blocks, in place. Routers and experts are none.

    Raises:
        LayoutError: features that don't come in sixteens.
    """
    for name, module in (named for layer in layers for named in layer.named_modules()):
        if type(module) is nn.Linear:
            features_out, features_in = module.weight.shape  # of the rank's share
            if features_in % FP8_MULTIPLE or features_out % FP8_MULTIPLE:
                raise LayoutError(
                    f"precision=fp8: layer {name} has {features_in} features in and {features_out} out on a rank, and "
                    f"8-bit products want multiples of {FP8_MULTIPLE}: change the widths, use a smaller parallel.tp, "
                    f"or precision=bf16"
                )
            module.__class__ = Fp8Linear


def check_device(device: torch.device) -> None:
    """Raises LayoutError where a device has no 8-bit products. A CPU has them, slowly: good for proofs."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        raise LayoutError(
            f"precision=fp8: {torch.cuda.get_device_name(device)} has no products of 8-bit floats, which came with "
            f"compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ada, Hopper): use precision=bf16"
        )


def product(linear: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) by a layer's weight, or some of its rows, (N, K) -> (..., N), with their bias, (N,)."""
    if not isinstance(linear, Fp8Linear):
        return F.linear(x, weight, bias)
    output: Tensor = _Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return output if bias is None else output + bias


class _Product(torch.autograd.Function):
    """x (M, K) by weight (N, K) -> (M, N). Kept for the backward: x in 8 bits, and the weight as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, unscale_rows = _quantize(_pad(x), torch.float8_e4m3fn)
        columns, unscale_columns = _quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(rows, unscale_rows, weight)
        output = torch._scaled_mm(
            rows, columns.t(), unscale_rows, unscale_columns, out_dtype=x.dtype, use_fast_accum=True
        )
        return output[: len(x)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, unscale_rows, weight = ctx.saved_tensors
        columns, unscale_columns = _quantize(weight, torch.float8_e4m3fn)
        wide, unscale = _quantize(_pad(gradient), torch.float8_e5m2)
        # the second factor is column-major: its transpose's copy, transposed
        of_x = torch._scaled_mm(
            wide, columns.t().contiguous().t(), unscale, unscale_columns, out_dtype=gradient.dtype
        )
        of_weight = torch._scaled_mm(
            wide.t().contiguous(),
            rows.t().contiguous().t(),
            unscale,
            unscale_rows,
            out_dtype=gradient.dtype,
        )
        return of_x[: len(gradient)], of_weight


def _pad(x: Tensor) -> Tensor:
    """With rows of zeros, up to a multiple of what a product wants."""
    return F.pad(x, (0, 0, 0, -len(x) % FP8_MULTIPLE))


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits, its largest element at the end of their range; and the factor, (), that makes it x again."""
    most = torch.finfo(dtype).max
    scale = most / x.abs().amax().float().clamp(min=1e-12)
    return (x.float() * scale).clamp(-most, most).to(dtype), scale.reciprocal()
