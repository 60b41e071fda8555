"""GPT-2: learned positions, biases everywhere, linear layers stored (in, out), one matrix for q, k and v."""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.convert.architecture import Architecture, Layer
from model.errors import ConversionError

_ATTENTION = tuple(f"blocks.{{i}}.attention.{part}" for part in ("query", "key", "value"))


def _to_ours(theirs: Mapping[str, Any]) -> dict[str, Any]:
    activation = {"gelu_new": "gelu_tanh", "relu": "relu", "gelu": "gelu"}.get(theirs["activation_function"])
    if activation is None:
        raise ConversionError(f"activation_function={theirs['activation_function']} is not known here")
    return {
        "vocab_size": theirs["vocab_size"],
        "d_model": theirs["n_embd"],
        "num_layers": theirs["n_layer"],
        "max_seq_len": theirs["n_positions"],
        "tie_embeddings": theirs.get("tie_word_embeddings", True),
        "attention": {"variant": "mha", "num_heads": theirs["n_head"], "bias": True},
        "positional": {"encoding": "learned"},
        "ffn": {
            "variant": "mlp",
            "activation": activation,
            "d_ff": theirs.get("n_inner") or 4 * theirs["n_embd"],
            "bias": True,
        },
        "norm": {"type": "layernorm", "eps": theirs["layer_norm_epsilon"]},
    }


def _to_theirs(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.attention.num_heads,
        "n_inner": config.ffn.d_ff,
        "n_positions": config.max_seq_len,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.ffn.activation, config.ffn.activation),
        "layer_norm_epsilon": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


GPT2 = Architecture(
    "gpt2",
    "GPT2LMHeadModel",
    (
        Layer("transformer.wte", ("embedding",)),
        Layer("transformer.wpe", ("positions",)),
        Layer("transformer.ln_f", ("norm",)),
        Layer("lm_head", ("head",)),
        Layer("transformer.h.{i}.ln_1", ("blocks.{i}.attention_norm",)),
        Layer("transformer.h.{i}.ln_2", ("blocks.{i}.feedforward_norm",)),
        Layer("transformer.h.{i}.attn.c_attn", _ATTENTION, transposed=True),
        Layer("transformer.h.{i}.attn.c_proj", ("blocks.{i}.attention.output",), transposed=True),
        Layer("transformer.h.{i}.mlp.c_fc", ("blocks.{i}.feedforward.up",), transposed=True),
        Layer("transformer.h.{i}.mlp.c_proj", ("blocks.{i}.feedforward.down",), transposed=True),
    ),
    _to_ours,
    _to_theirs,
)
