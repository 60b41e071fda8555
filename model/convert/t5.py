"""T5 (Raffel et al. 2020): v1.0 with ReLU and a tied head, v1.1 with gated GELU and a head of its own.

T5 doesn't divide scores by the root of the head's width, so queries take it in; a tied T5 divides what goes into the
head by the root of d_model, so the last norm does. Its table of relative positions is (buckets, heads).
"""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig, known
from model.convert.architecture import Architecture, Layer
from model.encoder_decoder.config import EncoderDecoderConfig
from model.errors import ConversionError

_FEEDFORWARDS = {
    "relu": {"variant": "mlp", "activation": "relu"},
    "gated-gelu": {"variant": "geglu_tanh"},
    "gated-silu": {"variant": "swiglu"},
}


def _to_ours(theirs: Mapping[str, Any]) -> dict[str, Any]:
    feedforward = theirs.get("feed_forward_proj", "relu")
    if feedforward not in _FEEDFORWARDS:
        raise ConversionError(
            f"feed_forward_proj={feedforward} is not known here: {', '.join(_FEEDFORWARDS)} are"
        )
    length = theirs.get("n_positions", 512)  # of its training; its positions know no end
    return {
        "type": "encoder_decoder",
        "vocab_size": theirs["vocab_size"],
        "d_model": theirs["d_model"],
        "num_encoder_layers": theirs["num_layers"],
        "num_layers": theirs.get("num_decoder_layers") or theirs["num_layers"],
        "max_seq_len": length,
        "max_source_len": length,
        "tie_embeddings": theirs.get("tie_word_embeddings", True),
        "attention": {"variant": "mha", "num_heads": theirs["num_heads"], "head_dim": theirs["d_kv"]},
        "positional": {
            "encoding": "relative",
            "relative_buckets": theirs.get("relative_attention_num_buckets", 32),
            "relative_max_distance": theirs.get("relative_attention_max_distance", 128),
        },
        "ffn": {"d_ff": theirs["d_ff"]} | _FEEDFORWARDS[feedforward],
        "norm": {"type": "rmsnorm", "eps": theirs["layer_norm_epsilon"]},
    }


def _to_theirs(config: ModelConfig) -> dict[str, Any]:
    if not isinstance(config, EncoderDecoderConfig):
        raise ConversionError(f"model.type={config.type} has no encoder")
    ours: dict[str, str] = {"variant": config.ffn.variant}
    if config.ffn.variant == "mlp":
        ours["activation"] = config.ffn.activation
    names = [name for name, feedforward in _FEEDFORWARDS.items() if feedforward == ours]
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.attention.head_dim,
        "d_ff": config.ffn.d_ff,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.attention.num_heads,
        "n_positions": config.max_seq_len,
        "relative_attention_num_buckets": config.positional.relative_buckets,
        "relative_attention_max_distance": config.positional.relative_max_distance,
        "feed_forward_proj": names[0] if names else "gated-gelu",
        "layer_norm_epsilon": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
    }


def _head_width(config: ModelConfig) -> float:
    return known(config.attention.head_dim) ** 0.5


def _into_head(config: ModelConfig) -> float:
    return config.d_model**-0.5 if config.tie_embeddings else 1.0


def _attention(theirs: str, ours: str) -> tuple[Layer, ...]:
    return (
        Layer(f"{theirs}.q", (f"{ours}.query",), scale=_head_width),
        Layer(f"{theirs}.k", (f"{ours}.key",)),
        Layer(f"{theirs}.v", (f"{ours}.value",)),
        Layer(f"{theirs}.o", (f"{ours}.output",)),
    )


def _is_gated(config: ModelConfig) -> bool:
    return config.ffn.variant != "mlp"


def _is_plain(config: ModelConfig) -> bool:
    return config.ffn.variant == "mlp"


def _feedforward(theirs: str, ours: str) -> tuple[Layer, ...]:
    return (
        Layer(f"{theirs}.layer_norm", (f"{ours}.feedforward_norm",)),
        Layer(f"{theirs}.DenseReluDense.wi_0", (f"{ours}.feedforward.gate",), holds=_is_gated),
        Layer(f"{theirs}.DenseReluDense.wi_1", (f"{ours}.feedforward.up",), holds=_is_gated),
        Layer(f"{theirs}.DenseReluDense.wi", (f"{ours}.feedforward.up",), holds=_is_plain),
        Layer(f"{theirs}.DenseReluDense.wo", (f"{ours}.feedforward.down",)),
    )


def _self_attention(theirs: str, ours: str) -> tuple[Layer, ...]:
    """With the table of positions, which stands in the first block."""
    first = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias"
    return (
        Layer(f"{theirs}.block.{{i}}.layer.0.layer_norm", (f"{ours}blocks.{{i}}.attention_norm",)),
        *_attention(f"{theirs}.block.{{i}}.layer.0.SelfAttention", f"{ours}blocks.{{i}}.attention"),
        Layer(first, (f"{ours}positions",), transposed=True),
    )


T5 = Architecture(
    "t5",
    "T5ForConditionalGeneration",
    (
        Layer("shared", ("embedding",)),
        *_self_attention("encoder", "encoder."),
        *_feedforward("encoder.block.{i}.layer.1", "encoder.blocks.{i}"),
        Layer("encoder.final_layer_norm", ("encoder.norm",)),
        *_self_attention("decoder", ""),
        Layer("decoder.block.{i}.layer.1.layer_norm", ("blocks.{i}.cross_norm",)),
        *_attention("decoder.block.{i}.layer.1.EncDecAttention", "blocks.{i}.cross_attention"),
        *_feedforward("decoder.block.{i}.layer.2", "blocks.{i}"),
        Layer("decoder.final_layer_norm", ("norm",), scale=_into_head),
        Layer("lm_head", ("head",)),
    ),
    _to_ours,
    _to_theirs,
)
