"""BLOOM: ALiBi, a norm of the embeddings, biases everywhere, one matrix for q, k and v, head by head."""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.convert.architecture import Architecture, Layer
from model.errors import ConversionError

_ATTENTION = tuple(f"blocks.{{i}}.attention.{part}" for part in ("query", "key", "value"))


def _to_ours(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if theirs.get("apply_residual_connection_post_layernorm"):
        raise ConversionError(
            "apply_residual_connection_post_layernorm=true is not known here: only false is"
        )
    return {
        "vocab_size": theirs["vocab_size"],
        "d_model": theirs["hidden_size"],
        "num_layers": theirs["n_layer"],
        "max_seq_len": theirs.get("seq_length", 2048),
        "tie_embeddings": theirs.get("tie_word_embeddings", True),
        "attention": {"variant": "mha", "num_heads": theirs["n_head"], "bias": True},
        "positional": {"encoding": "alibi"},
        "ffn": {
            "variant": "mlp",
            "activation": "gelu_tanh",
            "d_ff": 4 * theirs["hidden_size"],
            "bias": True,
        },
        "norm": {"type": "layernorm", "eps": theirs["layer_norm_epsilon"], "embedding": True},
    }


def _to_theirs(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.attention.num_heads,
        "seq_length": config.max_seq_len,
        "layer_norm_epsilon": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


BLOOM = Architecture(
    "bloom",
    "BloomForCausalLM",
    (
        Layer("transformer.word_embeddings", ("embedding",)),
        Layer("transformer.word_embeddings_layernorm", ("embedding_norm",)),
        Layer("transformer.ln_f", ("norm",)),
        Layer("lm_head", ("head",)),
        Layer("transformer.h.{i}.input_layernorm", ("blocks.{i}.attention_norm",)),
        Layer("transformer.h.{i}.post_attention_layernorm", ("blocks.{i}.feedforward_norm",)),
        Layer("transformer.h.{i}.self_attention.query_key_value", _ATTENTION, by_head=True),
        Layer("transformer.h.{i}.self_attention.dense", ("blocks.{i}.attention.output",)),
        Layer("transformer.h.{i}.mlp.dense_h_to_4h", ("blocks.{i}.feedforward.up",)),
        Layer("transformer.h.{i}.mlp.dense_4h_to_h", ("blocks.{i}.feedforward.down",)),
    ),
    _to_ours,
    _to_theirs,
)
