"""The reference systems' own spellings of a `model` section, as data: their keys and values -> ours.

Keys are dotted, below `model`. Values are compared by their letters and digits: ff_swiglu, FFSwiGLU.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NAMES: dict[str, str] = {
    "n_embd": "d_model",
    "embed_dim": "d_model",
    "n_layer": "num_layers",
    "n_layers": "num_layers",
    "n_head": "attention.num_heads",
    "num_heads": "attention.num_heads",
    "block_size": "max_seq_len",
    "seq_len": "max_seq_len",
    "window_size": "attention.window_size",
    "pos_type": "positional.encoding",
}
"""Keys with the values that ours have."""


class Choice(NamedTuple):
    """What a value says, by our dotted keys."""

    sets: Mapping[str, Any]
    suggests: Mapping[str, Any] = MappingProxyType({})
    """Unless something else is said; what is of the feed-forward, only with its variant."""


FLASH = Choice({"attention.kernel": "flash"}, {"attention.variant": "mha"})
LINEAR = Choice({"attention.variant": "linear"})
WINDOW = Choice({"attention.mask_type": "sliding_window"}, {"attention.variant": "mha"})
ATTENTION = {
    "flash": FLASH,
    "flash_attention": FLASH,
    "linear": LINEAR,
    "linear_attention": LINEAR,
    "local_window": WINDOW,
    "local_window_attention": WINDOW,
}

MLP = {"ffn.variant": "mlp"}
STANDARD = Choice(MLP, {**MLP, "ffn.activation": "gelu", "ffn.expansion_factor": 4.0})
SWIGLU = Choice({"ffn.variant": "swiglu"})
EXPERTS = Choice({"moe": {}})
FEEDFORWARD = {
    "standard": STANDARD,
    "ff_standard": STANDARD,
    "feed_forward": STANDARD,
    "mlp": STANDARD,
    "swiglu": SWIGLU,
    "ff_swiglu": SWIGLU,
    "gated_feed_forward": SWIGLU,
    "moe": EXPERTS,
    "ff_moe": EXPERTS,
    "mixture_of_experts": EXPERTS,
}

NORM = {name: Choice({"norm.type": name}) for name in ("layernorm", "rmsnorm", "scalenorm")}
KERNEL = {"true": Choice({"attention.kernel": "flash"}), "false": Choice({"attention.kernel": "auto"})}

CHOICES: dict[str, dict[str, Choice]] = {
    "attention_type": ATTENTION,
    "attention_class": ATTENTION,
    "ffn_type": FEEDFORWARD,
    "ffn_class": FEEDFORWARD,
    "norm_type": NORM,
    "norm_class": NORM,
    "attention.use_flash_attn": KERNEL,
}
"""Keys whose values we say otherwise. Two keys of one table must say the same."""


class Type(NamedTuple):
    """A class of a reference system: ours, and its documented defaults, by our dotted keys."""

    type: str
    defaults: Mapping[str, Any]


STANDARD_BLOCK = {
    "attention.variant": "mha",
    "norm.type": "layernorm",
    "ffn.variant": "mlp",
    "ffn.activation": "gelu",
    "ffn.expansion_factor": 4.0,
    "positional.encoding": "learned",
}
RELU_SQUARED_BLOCK = {
    "d_model": 768,
    "num_layers": 12,
    "max_seq_len": 2048,
    "dropout": 0.0,
    "tie_embeddings": False,
    "attention.variant": "mha",
    "attention.num_heads": 12,
    "ffn.variant": "mlp",
    "ffn.activation": "relu_squared",
    "ffn.expansion_factor": 4.0,
    "norm.type": "rmsnorm",
}

TYPES: dict[str, Type] = {
    "GPTCausal": Type("transformer", {**RELU_SQUARED_BLOCK, "positional.encoding": "rope"}),
    "FlowMatchingTransformer": Type(
        "flow_matching", {**RELU_SQUARED_BLOCK, "positional.encoding": "none", "time_embed_dim": 256}
    ),
    "GPTModel": Type("transformer", STANDARD_BLOCK),
    "Transformer": Type("transformer", {}),
    "GPT": Type(
        "image_codes",
        {**STANDARD_BLOCK, "attention.bias": True, "ffn.bias": True, "class_conditional": False},
    ),
}
"""By `model.type`. What their documents leave open is as in GPT-2."""
