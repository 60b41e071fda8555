"""A model of the same variants, small enough to be trained in a second, that fits the layouts that it fitted."""

from collections.abc import Collection, Mapping
from math import gcd, lcm, sqrt
from typing import Any

from model.config import BaseModelConfig, ModelConfig, known
from model.dotted import flatten, nest

VOCAB_SIZE = 67
"""A prime, so that ranks' shares of the vocabulary are uneven."""
LAYERS = 4
SEQ_LEN = 16
D_MODEL = 24
"""Of a model that is no transformer; a transformer's follows from its heads."""

AT_MOST: Mapping[str, int] = {
    "vocab_size": VOCAB_SIZE,
    "num_encoder_layers": LAYERS,
    "max_source_len": 12,
    "num_classes": 5,
    "time_embed_dim": 16,
    "attention.window_size": 5,
    "attention.block_size": 4,
    "attention.summary_size": 1,
    "moe.first_layer": 1,
    "moe.every_nth_layer": 2,
    "moe.top_k": 2,
    "moe.num_shared_experts": 2,
    "positional.rope_scaling.original_max_seq_len": SEQ_LEN // 2,
}
FROM_DATA = ("vocab_size", "max_source_len", "num_classes")
"""What is filled in from the data where it is unset."""
OFF = ("dropout", "attention.dropout", "ffn.dropout")
"""Dropout's draws are each rank's own."""

Values = dict[str, Any]


def shrink(model: BaseModelConfig, worlds: Collection[int]) -> BaseModelConfig:
    """The small model, for layouts of so many ranks; its sequences are `max_seq_len` long.

    Heads, experts and layers are as few as can be shared out among as many ranks as before.
    """
    values = _values(model)
    changed: Values = {
        key: min(values[key], most) for key, most in AT_MOST.items() if values.get(key) is not None
    }
    changed |= {key: AT_MOST[key] for key in FROM_DATA if key in values and values[key] is None}
    if not values.get("class_conditional", True):
        changed.pop("num_classes", None)
    changed["num_layers"] = min(model.num_layers, max(LAYERS, *worlds))
    every = 2 * lcm(*worlds)  # ranks of a ring have two runs of a sequence
    changed["max_seq_len"] = -(-SEQ_LEN // every) * every
    changed["d_model"] = min(model.d_model, D_MODEL)
    if isinstance(model, ModelConfig):
        changed |= _transformer(model, _sizes(worlds)) | dict.fromkeys(OFF, 0.0)
    # activations keep their scale, lest attention be even and every place alike
    changed["init_std"] = model.init_std * sqrt(model.d_model / changed["d_model"])
    return type(model).model_validate(nest({key: (value, "") for key, value in (values | changed).items()}))


def describe_changes(before: BaseModelConfig, after: BaseModelConfig) -> str:
    """What shrinking changed, in one line."""
    old, new = _values(before), _values(after)
    changes = [
        f"{key} {_short(old.get(key))} -> {_short(value)}"
        for key, value in new.items()
        if old.get(key) != value
    ]
    return ", ".join(changes) or "nothing"


def _values(model: BaseModelConfig) -> Values:
    return {key: value for key, (value, _) in flatten(model.model_dump()).items()}


def _transformer(model: ModelConfig, sizes: Collection[int]) -> Values:
    attention, width = model.attention, known(model.attention.head_dim)
    heads, kv_heads = _heads(attention.num_heads, known(attention.num_kv_heads), sizes)
    head_dim = _head_dim(width, model.positional.rope_fraction)
    # all heads together may be wider than the residual stream, or narrower
    d_model = max(8, 2 * round(heads * head_dim * model.d_model / (attention.num_heads * width) / 2))
    changed: Values = {
        "d_model": d_model,
        "attention.num_heads": heads,
        "attention.num_kv_heads": kv_heads,
        "attention.head_dim": head_dim,
        "ffn.d_ff": _hidden(known(model.ffn.d_ff), d_model / model.d_model),
    }
    if attention.kernel == "flex":
        changed["attention.kernel"] = "auto"  # flex can't train on a CPU
    if model.mup is not None:  # it stays as much wider than its base
        changed["mup.base_width"] = max(1, round(d_model / model.width_multiplier))
        if model.mup.base_head_dim is not None:
            changed["mup.base_head_dim"] = max(1, round(head_dim * model.mup.base_head_dim / width))
    if model.moe is not None:
        top_k = min(model.moe.top_k, AT_MOST["moe.top_k"])
        changed["moe.num_experts"] = _experts(model.moe.num_experts, top_k, sizes)
        changed["moe.d_ff"] = _hidden(known(model.moe.d_ff), d_model / model.d_model)
    return changed


def _heads(heads: int, kv_heads: int, sizes: Collection[int]) -> tuple[int, int]:
    """The fewest query and key/value heads that can be shared out alike."""

    def traits(q: int, kv: int) -> tuple[object, ...]:
        shared = [(q % size == 0, kv % size == 0, kv % size == 0 or size % kv == 0) for size in sizes]
        return q > 1, kv > 1, q == kv, shared

    pairs = ((q, kv) for q in range(1, heads + 1) for kv in range(1, q + 1) if q % kv == 0)
    return next(pair for pair in pairs if traits(*pair) == traits(heads, kv_heads))


def _head_dim(width: int, rope_fraction: float) -> int:
    """At least 6, of which two pairs turn, where there are so many."""
    return next((few for few in range(6, width, 2) if int(few * rope_fraction) >= 4), width)


def _hidden(width: int, factor: float) -> int:
    """A hidden width times the factor, and a multiple of what of 8 divides it."""
    unit = gcd(width, 8)
    return max(1, round(width * factor / unit)) * unit


def _experts(experts: int, top_k: int, sizes: Collection[int]) -> int:
    """The fewest that can be shared out alike, and are more than are chosen."""
    return next(
        few
        for few in (*range(max(2, top_k + 1), experts), experts)
        if all((few % size == 0) == (experts % size == 0) for size in sizes)
    )


def _sizes(worlds: Collection[int]) -> Collection[int]:
    """Of the dimensions of meshes."""
    return [size for size in range(2, max(worlds) + 1) if any(world % size == 0 for world in worlds)]


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
