"""Falcon as in falcon-7b: attention and feed-forward side by side on one norm, one key/value head."""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.convert.architecture import Architecture, Layer
from model.errors import ConversionError

_ATTENTION = tuple(f"blocks.{{i}}.attention.{part}" for part in ("query", "key", "value"))


def _to_ours(theirs: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        "parallel_attn": True,
        "multi_query": True,
        "new_decoder_architecture": False,
        "activation": "gelu",
    }
    for key, wanted in known.items():
        if theirs.get(key, wanted) != wanted:
            raise ConversionError(f"{key}={theirs[key]} is not known here: only falcon-7b's {wanted} is")
    if theirs.get("alibi"):
        raise ConversionError(
            "alibi=true, whose slopes Falcon divides by the head's width, is not known here"
        )
    return {
        "vocab_size": theirs["vocab_size"],
        "d_model": theirs["hidden_size"],
        "num_layers": theirs["num_hidden_layers"],
        "max_seq_len": theirs.get("max_position_embeddings", 2048),
        "tie_embeddings": theirs.get("tie_word_embeddings", True),
        "parallel_layers": True,
        "attention": {
            "variant": "mqa",
            "num_heads": theirs["num_attention_heads"],
            "bias": theirs.get("bias", False),
        },
        "positional": {"encoding": "rope", "rope_base": theirs.get("rope_theta", 10000.0)},
        "ffn": {
            "variant": "mlp",
            "activation": "gelu",
            "d_ff": theirs.get("ffn_hidden_size") or 4 * theirs["hidden_size"],
            "bias": theirs.get("bias", False),
        },
        "norm": {"type": "layernorm", "eps": theirs["layer_norm_epsilon"]},
    }


def _to_theirs(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "ffn_hidden_size": config.ffn.d_ff,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.positional.rope_base,
        "layer_norm_epsilon": config.norm.eps,
        "bias": config.attention.bias,
        "activation": "gelu",
        "parallel_attn": True,
        "multi_query": True,
        "new_decoder_architecture": False,
        "alibi": False,
    }


FALCON = Architecture(
    "falcon",
    "FalconForCausalLM",
    (
        Layer("transformer.word_embeddings", ("embedding",)),
        Layer("transformer.ln_f", ("norm",)),
        Layer("lm_head", ("head",)),
        Layer("transformer.h.{i}.input_layernorm", ("blocks.{i}.attention_norm",)),
        Layer("transformer.h.{i}.self_attention.query_key_value", _ATTENTION),
        Layer("transformer.h.{i}.self_attention.dense", ("blocks.{i}.attention.output",)),
        Layer("transformer.h.{i}.mlp.dense_h_to_4h", ("blocks.{i}.feedforward.up",)),
        Layer("transformer.h.{i}.mlp.dense_4h_to_h", ("blocks.{i}.feedforward.down",)),
    ),
    _to_ours,
    _to_theirs,
)
