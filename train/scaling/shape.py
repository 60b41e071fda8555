"""A model made larger or smaller: the same parts in the same proportions, of another width and depth."""

from bisect import bisect_left
from collections.abc import Callable
from math import log

from model.config import ModelConfig, known
from model.count import flops_per_token, parameter_count
from model.dotted import flatten, nest, put
from model.models import parse_model
from model.section import largest_divisor

SHALLOWEST, DEEPEST = 2, 256
STEPS = ((2048, 512), (1024, 256), (256, 64), (128, 32), (0, 16))
"""From a width on, what it is a multiple of, so that tensor parallelism can share out the heads."""
HEAD_DIMS = ((2048, 128), (256, 64), (128, 32), (0, 16))
"""From a width on, the width of a head."""
TOLERANCE = 0.2
"""How far a model may be from what was asked for."""
SHAPE_MATTERS = 0.2
"""How much being out of proportion counts against being off the target, both as logarithms."""

Shape = dict[str, int]
"""Keys of the `model` section that decide its size, dotted."""
Measure = Callable[[ModelConfig], float]


def params_of(config: ModelConfig) -> float:
    """Parameters that a token meets."""
    return parameter_count(config).active


def flops_of(config: ModelConfig, tokens_per_param: float) -> float:
    """FLOPs of training on so many tokens for each parameter."""
    return flops_per_token(config, config.max_seq_len) * tokens_per_param * params_of(config)


def shape_of_depth(base: ModelConfig, num_layers: int) -> Shape:
    """The shape of so many layers."""
    return _shape(base, _usual_width(num_layers), num_layers)


def shape_of(base: ModelConfig, target: float, measure: Measure) -> Shape:
    """The shape whose measure is nearest to the target, and whose width is in proportion to its depth.

    Raises:
        ValueError: there is none within a fifth; the message says what the nearest has.
    """

    def measured(shape: Shape) -> float:
        return measure(resized(base, shape))

    def width_for(num_layers: int) -> list[Shape]:
        """The two widths around the target."""
        usual = _usual_width(num_layers)
        widths = range(_at(usual, STEPS), 4 * usual, _at(usual, STEPS))
        at = bisect_left(widths, target, key=lambda width: measured(_shape(base, width, num_layers)))
        return [_shape(base, width, num_layers) for width in widths[max(0, at - 1) : at + 1]]

    def off(shape: Shape) -> float:
        return abs(log(measured(shape) / target))

    def penalty(shape: Shape) -> float:
        return off(shape) + SHAPE_MATTERS * abs(log(shape["d_model"] / _usual_width(shape["num_layers"])))

    least = SHALLOWEST if base.moe is None else max(SHALLOWEST, base.moe.first_layer + 1)
    depth = least + bisect_left(
        range(least, DEEPEST), target, key=lambda n: measured(shape_of_depth(base, n))
    )
    shapes = [shape for n in range(max(least, depth - 3), depth + 3) for shape in width_for(n)]
    near = [shape for shape in shapes if off(shape) < log(1 + TOLERANCE)]
    if not near:
        nearest = measured(min(shapes, key=off))
        raise ValueError(f"the nearest that such a model can have is {nearest:.3g}")
    return min(near, key=penalty)


def resized(base: ModelConfig, shape: Shape) -> ModelConfig:
    """A model in another shape."""
    values = flatten(base.model_dump())
    for key, value in shape.items():
        put(values, key, value, "")
    return parse_model(nest(values))


def _usual_width(num_layers: int) -> int:
    """64 for each layer up to 16 of them, 128 from 32 on: near to GPT-3's shapes (Brown et al. 2020) and Llama's."""
    width = num_layers * min(max(4 * num_layers, 64), 128)
    return _rounded(width, _at(width, STEPS))


def _at(width: int, table: tuple[tuple[int, int], ...]) -> int:
    return next(value for least, value in table if width >= least)


def _shape(base: ModelConfig, d_model: int, num_layers: int) -> Shape:
    """Heads as wide as usual; key heads, hidden widths and experts in proportion."""
    attention, ratio = base.attention, d_model / base.d_model
    dim = _at(d_model, HEAD_DIMS)
    heads = d_model // dim
    kv_heads = heads * known(attention.num_kv_heads) / attention.num_heads
    shape = {
        "d_model": d_model,
        "num_layers": num_layers,
        "attention.num_heads": heads,
        "attention.head_dim": dim,
        "attention.num_kv_heads": 1
        if attention.variant == "mqa"
        else largest_divisor(heads, max(1, round(kv_heads))),
        "ffn.d_ff": _rounded(known(base.ffn.d_ff) * ratio, base.ffn.multiple_of),
    }
    if base.moe is not None:
        shape["moe.d_ff"] = _rounded(known(base.moe.d_ff) * ratio, base.ffn.multiple_of)
    return shape


def _rounded(width: float, multiple: int) -> int:
    return max(1, round(width / multiple)) * multiple
