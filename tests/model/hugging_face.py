"""Random tiny models of `transformers` and their weights under our names."""

import re
from typing import Any

import torch
from torch import Tensor

from benchmarks.shims import let_transformers_import

let_transformers_import()

from transformers import (  # noqa: E402
    DeepseekV3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402
from transformers.models.falcon.modeling_falcon import (  # noqa: E402
    build_alibi_tensor as build_falcon_alibi_tensor,
)
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

__all__ = [
    "ROPE_INIT_FUNCTIONS",
    "DeepseekV3Config",
    "DeepseekV3MoE",
    "GPT2Config",
    "GPT2LMHeadModel",
    "LlamaConfig",
    "LlamaForCausalLM",
    "MixtralConfig",
    "MixtralForCausalLM",
    "T5Attention",
    "build_alibi_tensor",
    "build_falcon_alibi_tensor",
    "gradients",
    "rename_gpt2",
    "rename_llama",
    "rename_mixtral",
]


def rename_llama(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Llama state dict under our names; a tied head is left out by `strict=False`."""
    table = {
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "mlp.gate_proj": "feedforward.gate",
        "mlp.up_proj": "feedforward.up",
        "mlp.down_proj": "feedforward.down",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feedforward_norm",
        "model.layers": "blocks",
        "model.embed_tokens": "embedding",
        "model.norm": "norm",
        "lm_head": "head",
    }
    return {_replaced(name, table): value for name, value in theirs.items()}


def rename_mixtral(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Mixtral state dict under our names: its experts' matrices stacked."""
    ours, stacks = {}, {}
    for name, value in rename_llama(theirs).items():
        name = name.replace("block_sparse_moe", "feedforward")
        if ".experts." in name:
            layer, number, matrix = re.fullmatch(r"(.*\.experts)\.(\d+)\.(w\d)\.weight", name).groups()
            place = {"w1": "gate", "w3": "up", "w2": "down"}[matrix]
            stacks.setdefault(f"{layer}.{place}", {})[int(number)] = value
        else:
            ours[name.replace("feedforward.gate", "feedforward.router")] = value
    return ours | {
        name: torch.stack([parts[number] for number in sorted(parts)]) for name, parts in stacks.items()
    }


def rename_gpt2(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A GPT-2 state dict under our names: its linear layers are transposed, its q, k and v one matrix."""
    table = {
        "attn.c_proj": "attention.output",
        "mlp.c_fc": "feedforward.up",
        "mlp.c_proj": "feedforward.down",
        "ln_1": "attention_norm",
        "ln_2": "feedforward_norm",
        "transformer.h": "blocks",
        "transformer.wte": "embedding",
        "transformer.wpe": "positions",
        "transformer.ln_f": "norm",
    }
    ours: dict[str, Tensor] = {}
    for name, value in theirs.items():
        if "c_" in name and value.dim() == 2:
            value = value.t()
        if "c_attn" in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                ours[_replaced(name.replace("attn.c_attn", f"attention.{part}"), table)] = piece
        elif name != "lm_head.weight":
            ours[_replaced(name, table)] = value
    return ours


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def _replaced(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name
