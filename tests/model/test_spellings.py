"""The reference systems' spellings: keys, values and types, their defaults, and what contradicts itself."""

import subprocess
import sys
from typing import Any

import pytest

from model.aliases import CHOICES, NAMES, TYPES
from model.config import ModelConfig
from model.dotted import Values
from model.flow_matching.config import FlowMatchingConfig
from model.image_codes.config import ImageCodesConfig
from model.models import parse_model
from model.spellings import Settings, in_our_words

MODULAR = {
    "n_embd": 256,
    "num_heads": 8,
    "n_layers": 6,
    "vocab_size": 64,
    "block_size": 256,
    "dropout": 0.1,
    "attention_type": "flash_attention",
    "attention_class": "FlashAttention",
    "ffn_type": "ff_swiglu",
    "ffn_class": "GatedFeedForward",
    "norm_type": "rmsnorm",
    "norm_class": "RMSNorm",
    "pos_type": "sinusoidal",
}
"""The flat configuration of the modular GPT's document."""


def test_a_flat_configuration() -> None:
    config = parse_model(MODULAR)
    assert type(config) is ModelConfig
    assert (config.d_model, config.num_layers, config.vocab_size, config.max_seq_len) == (256, 6, 64, 256)
    assert (config.attention.variant, config.attention.num_heads, config.attention.kernel) == (
        "mha",
        8,
        "flash",
    )
    assert (config.ffn.variant, config.norm.type, config.norm.placement) == ("swiglu", "rmsnorm", "pre")
    assert (config.positional.encoding, config.dropout, config.attention.dropout) == ("sinusoidal", 0.1, 0.0)
    assert parse_model(config.model_dump()) == config


def test_types_bring_their_documents_defaults() -> None:
    causal = parse_model({"type": "GPTCausal", "vocab_size": 50304})
    assert type(causal) is ModelConfig and causal.type == "transformer"
    sizes = (
        causal.d_model,
        causal.num_layers,
        causal.attention.num_heads,
        causal.max_seq_len,
        causal.dropout,
    )
    assert sizes == (768, 12, 12, 2048, 0.0)
    assert (causal.positional.encoding, causal.attention.mask_type) == ("rope", "causal")
    assert (causal.ffn.variant, causal.ffn.activation, causal.ffn.d_ff) == ("mlp", "relu_squared", 3072)
    assert (causal.norm.type, causal.attention.num_kv_heads) == ("rmsnorm", 12)

    flow = parse_model({"type": "FlowMatchingTransformer", "n_embd": 24})
    assert type(flow) is FlowMatchingConfig and flow.type == "flow_matching"
    assert (flow.d_model, flow.num_layers, flow.time_embed_dim) == (24, 12, 256)
    assert (flow.positional.encoding, flow.attention.mask_type) == ("none", "bidirectional")
    assert (flow.ffn.activation, flow.norm.type) == ("relu_squared", "rmsnorm")

    pictures = parse_model({"type": "GPT", "embed_dim": 256, "seq_len": 1024, "num_layers": 8})
    assert type(pictures) is ImageCodesConfig and not pictures.class_conditional
    assert (pictures.d_model, pictures.max_seq_len, pictures.positional.encoding) == (256, 1024, "learned")
    assert (pictures.norm.type, pictures.ffn.variant, pictures.attention.mask_type) == (
        "layernorm",
        "mlp",
        "causal",
    )

    assert parse_model({"type": "GPTModel"}).positional.encoding == "learned"
    assert parse_model({"type": "Transformer"}) == ModelConfig()


@pytest.mark.parametrize("name", TYPES)
def test_defaults_are_keys_of_the_type(name: str) -> None:
    parse_model(in_our_words({"type": name}))


def test_what_is_said_replaces_a_types_defaults() -> None:
    config = parse_model({"type": "GPTCausal", "ffn": {"variant": "swiglu"}, "attention": {"num_heads": 4}})
    assert (config.ffn.variant, config.ffn.activation, config.ffn.expansion_factor) == (
        "swiglu",
        "silu",
        2.6667,
    )
    assert (config.attention.variant, config.attention.num_heads) == ("mha", 4)
    assert parse_model({"type": "GPTCausal", "ffn": {}}).ffn.activation == "relu_squared"
    assert parse_model({"type": "GPTCausal", "ffn": {"d_ff": 5}}).ffn.d_ff == 5
    assert parse_model({"type": "GPTCausal", "ffn_type": "standard"}).ffn.activation == "gelu"
    assert parse_model({"ffn_type": "standard", "ffn": {"activation": "relu"}}).ffn.activation == "relu"


@pytest.mark.parametrize(
    ("section", "meant"),
    [
        ({"attention_type": "linear"}, {"attention": {"variant": "linear"}}),
        ({"attention_class": "LinearAttention"}, {"attention": {"variant": "linear"}}),
        (
            {"attention_type": "Local Window Attention", "window_size": 8},
            {"attention": {"variant": "mha", "mask_type": "sliding_window", "window_size": 8}},
        ),
        ({"attention": {"use_flash_attn": True}}, {"attention": {"kernel": "flash"}}),
        ({"attention": {"use_flash_attn": False}}, {}),
        (
            {"ffn_class": "FeedForward"},
            {"ffn": {"variant": "mlp", "activation": "gelu", "expansion_factor": 4.0}},
        ),
        ({"ffn_type": "MoE"}, {"moe": {}}),
        ({"ffn_type": "MoE", "moe": {"num_experts": 4}}, {"moe": {"num_experts": 4}}),
        ({"norm_class": "ScaleNorm"}, {"norm": {"type": "scalenorm"}}),
        ({"norm_type": "LayerNorm"}, {"norm": {"type": "layernorm"}}),
        ({"pos_type": "learned"}, {"positional": {"encoding": "learned"}}),
        ({"n_head": 4, "n_layer": 2}, {"attention": {"num_heads": 4}, "num_layers": 2}),
        ({"d_model": 64, "n_embd": 64}, {"d_model": 64}),
    ],
    ids=str,
)
def test_what_spellings_mean(section: dict[str, Any], meant: dict[str, Any]) -> None:
    assert parse_model(section) == ModelConfig(**meant)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"d_model": 64, "n_embd": 32}, "d_model=64 and n_embd=32 contradict each other: keep one of them"),
        ({"n_embd": 64, "embed_dim": 32}, "n_embd=64 and embed_dim=32 contradict"),
        (
            {"attention_type": "flash_attention", "attention_class": "LinearAttention"},
            "attention_type='flash_attention' and attention_class='LinearAttention' contradict",
        ),
        (
            {"norm_type": "rmsnorm", "norm_class": "LayerNorm"},
            "norm_type='rmsnorm' and norm_class='LayerNorm'",
        ),
        ({"ffn_type": "ff_swiglu", "ffn_class": "MoE"}, "ffn_type='ff_swiglu' and ffn_class='MoE'"),
        ({"ffn_type": "ff_swiglu", "ffn": {"variant": "mlp"}}, "ffn_type='ff_swiglu' and ffn.variant='mlp'"),
        ({"n_head": 2, "attention": {"num_heads": 4}}, "n_head=2 and attention.num_heads=4"),
        ({"ffn_type": "ff_swigloo"}, "ffn_type='ff_swigloo' is not known: did you mean 'ff_swiglu'?"),
        ({"norm_type": ["x"]}, "norm_type=['x'] is not known: known are layernorm, rmsnorm, scalenorm"),
        ({"type": "GPTCasual"}, "model.type='GPTCasual' is no model: did you mean 'GPTCausal'?"),
    ],
)
def test_contradictions_are_told_in_one_line(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_model(section)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_later_layers_win_whatever_they_are_spelled_in() -> None:
    settings = Settings()
    layers: list[Values] = [
        {"d_model": (256, "preset"), "ffn.variant": ("mlp", "preset"), "ffn.activation": ("relu", "preset")},
        {"n_embd": (64, "mine"), "type": ("GPTCausal", "mine"), "moe.num_experts": (4, "mine")},
        {"ffn_type": ("moe", "command line"), "attention_type": ("linear", "command line")},
    ]
    for layer in layers:
        settings.add(layer)
    settled = settings.settled()
    assert settled["d_model"] == (64, "mine")
    assert settled["type"] == ("transformer", "mine (GPTCausal)")
    assert settled["ffn.activation"] == ("relu", "preset")
    assert settled["ffn.expansion_factor"] == (4.0, "mine (GPTCausal)")
    assert settled["attention.variant"] == ("linear", "command line")
    assert settled["moe.num_experts"] == (4, "mine") and "moe" not in settled


def test_no_alias_is_a_key_of_ours() -> None:
    ours = set(ModelConfig.model_fields)
    assert not ours & {*NAMES, *CHOICES}


def test_aliases_need_no_torch() -> None:
    code = "import sys, model.models; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
