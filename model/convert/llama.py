"""Llama and those that differ from it by a line: Mistral (sliding window), Qwen3 (QK-norm), Mixtral (experts)."""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.convert.architecture import Architecture, Layer
from model.errors import ConversionError

_FRAME = (
    Layer("model.embed_tokens", ("embedding",)),
    Layer("model.norm", ("norm",)),
    Layer("lm_head", ("head",)),
    Layer("model.layers.{i}.input_layernorm", ("blocks.{i}.attention_norm",)),
    Layer("model.layers.{i}.post_attention_layernorm", ("blocks.{i}.feedforward_norm",)),
    Layer("model.layers.{i}.self_attn.q_proj", ("blocks.{i}.attention.query",)),
    Layer("model.layers.{i}.self_attn.k_proj", ("blocks.{i}.attention.key",)),
    Layer("model.layers.{i}.self_attn.v_proj", ("blocks.{i}.attention.value",)),
    Layer("model.layers.{i}.self_attn.o_proj", ("blocks.{i}.attention.output",)),
)
_FEEDFORWARD = (
    Layer("model.layers.{i}.mlp.gate_proj", ("blocks.{i}.feedforward.gate",)),
    Layer("model.layers.{i}.mlp.up_proj", ("blocks.{i}.feedforward.up",)),
    Layer("model.layers.{i}.mlp.down_proj", ("blocks.{i}.feedforward.down",)),
)
_QK_NORM = (
    Layer("model.layers.{i}.self_attn.q_norm", ("blocks.{i}.attention.query_norm",)),
    Layer("model.layers.{i}.self_attn.k_norm", ("blocks.{i}.attention.key_norm",)),
)
_SCALING_NAMES = {"original_max_seq_len": "original_max_position_embeddings"}


def _llama_to_ours(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if theirs.get("hidden_act", "silu") != "silu":
        raise ConversionError(f"hidden_act={theirs['hidden_act']}: only silu is known here")
    heads = theirs["num_attention_heads"]
    kv_heads = theirs.get("num_key_value_heads") or heads
    return {
        "vocab_size": theirs["vocab_size"],
        "d_model": theirs["hidden_size"],
        "num_layers": theirs["num_hidden_layers"],
        "max_seq_len": theirs["max_position_embeddings"],
        "tie_embeddings": theirs.get("tie_word_embeddings", False),
        "attention": {
            "variant": "mha" if kv_heads == heads else "gqa",
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // heads,
            "bias": theirs.get("attention_bias", False),
        },
        "positional": {
            "encoding": "rope",
            "rope_base": theirs.get("rope_theta", 10000.0),
            "rope_scaling": _scaling_to_ours(theirs.get("rope_scaling")),
        },
        "ffn": {
            "variant": "swiglu",
            "d_ff": theirs["intermediate_size"],
            "bias": theirs.get("mlp_bias", False),
        },
        "norm": {"type": "rmsnorm", "eps": theirs["rms_norm_eps"], "placement": "pre"},
    }


def _llama_to_theirs(config: ModelConfig) -> dict[str, Any]:
    scaling = config.positional.rope_scaling
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads,
        "head_dim": config.attention.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention.bias,
        "mlp_bias": config.ffn.bias,
        "rope_theta": config.positional.rope_base,
        "rope_scaling": None
        if scaling is None
        else _scaling_to_theirs(scaling.model_dump(exclude_none=True)),
        "rms_norm_eps": config.norm.eps,
        "hidden_act": "silu",
    }


def _scaling_to_ours(theirs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if theirs is None:
        return None
    names = {value: key for key, value in _SCALING_NAMES.items()}
    ours = {names.get(key, key): value for key, value in theirs.items() if key not in ("rope_type", "type")}
    kind = theirs.get("rope_type", theirs.get("type"))
    if kind == "default":
        return None
    if kind not in ("linear", "yarn", "llama3"):
        raise ConversionError(
            f"rope_scaling of type {kind} is not known here: only linear, yarn and llama3 are"
        )
    return {"type": kind} | ours


def _scaling_to_theirs(ours: dict[str, Any]) -> dict[str, Any]:
    kind = ours.pop("type")
    return {"rope_type": kind} | {_SCALING_NAMES.get(key, key): value for key, value in ours.items()}


def _mistral_to_ours(theirs: Mapping[str, Any]) -> dict[str, Any]:
    ours = _llama_to_ours(theirs)
    window = theirs.get("sliding_window")
    if window is not None:
        ours["attention"] |= {"mask_type": "sliding_window", "window_size": window}
    return ours


def _mistral_to_theirs(config: ModelConfig) -> dict[str, Any]:
    return _llama_to_theirs(config) | {"sliding_window": config.attention.window_size}


def _qwen3_to_ours(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if theirs.get("use_sliding_window"):
        raise ConversionError("use_sliding_window=true, in some layers only, is not known here")
    ours = _llama_to_ours(theirs)
    ours["attention"]["qk_norm"] = True
    return ours


def _mixtral_to_ours(theirs: Mapping[str, Any]) -> dict[str, Any]:
    ours = _mistral_to_ours(theirs)
    ours["moe"] = {"num_experts": theirs["num_local_experts"], "top_k": theirs["num_experts_per_tok"]}
    return ours


def _mixtral_to_theirs(config: ModelConfig) -> dict[str, Any]:
    if config.moe is None:
        raise ConversionError("it has no experts (model.moe)")
    return _mistral_to_theirs(config) | {
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
    }


LLAMA = Architecture("llama", "LlamaForCausalLM", _FRAME + _FEEDFORWARD, _llama_to_ours, _llama_to_theirs)
MISTRAL = Architecture(
    "mistral", "MistralForCausalLM", _FRAME + _FEEDFORWARD, _mistral_to_ours, _mistral_to_theirs
)
QWEN3 = Architecture(
    "qwen3", "Qwen3ForCausalLM", _FRAME + _FEEDFORWARD + _QK_NORM, _qwen3_to_ours, _llama_to_theirs
)
MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    (
        *_FRAME,
        Layer("model.layers.{i}.block_sparse_moe.gate", ("blocks.{i}.feedforward.router",)),
        Layer("model.layers.{i}.block_sparse_moe.experts.{x}.w1", ("blocks.{i}.feedforward.experts.gate",)),
        Layer("model.layers.{i}.block_sparse_moe.experts.{x}.w3", ("blocks.{i}.feedforward.experts.up",)),
        Layer("model.layers.{i}.block_sparse_moe.experts.{x}.w2", ("blocks.{i}.feedforward.experts.down",)),
    ),
    _mixtral_to_ours,
    _mixtral_to_theirs,
)
