"""transformers' Llama of the same shape and weights as ours."""

import torch
from torch import nn

from benchmarks.shims import let_transformers_import
from model.build import build_model
from model.config import ModelConfig
from model.initialize import initialize

_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "blocks.": "model.layers.",
    "attention_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}


def make_llama(config: ModelConfig) -> nn.Module:
    """A LlamaForCausalLM with the initial weights of seed 0, SDPA attention."""
    let_transformers_import()
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.ffn.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.attention.num_heads,
            num_key_value_heads=config.attention.num_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm.eps,
            rope_theta=config.positional.rope_base,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    ours = build_model(config)
    initialize(ours, config, seed=0)
    theirs = dict(llama.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            theirs[_their_name(name)].copy_(parameter)
    return llama


def _their_name(name: str) -> str:
    if name == "norm.weight":
        return "model.norm.weight"
    for own, other in _NAMES.items():
        name = name.replace(own, other)
    return name
