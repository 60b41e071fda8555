"""What a configuration fills in, and what it refuses."""

import subprocess
import sys
from itertools import product

import pytest
from pydantic import ValidationError

from model.config import ModelConfig
from tests.model.variants import REFUSED, config_of


def test_defaults_are_filled_in():
    config = ModelConfig()
    assert (config.attention.num_kv_heads, config.attention.head_dim, config.ffn.d_ff) == (2, 64, 1408)
    assert config.vocab_size is None


@pytest.mark.parametrize(
    "variant, heads, kv_heads", [("mha", 6, 6), ("gqa", 12, 3), ("gqa", 14, 2), ("gqa", 2, 1), ("mqa", 8, 1)]
)
def test_kv_heads_follow_the_variant(variant, heads, kv_heads):
    config = ModelConfig(d_model=heads * 8, attention={"variant": variant, "num_heads": heads})
    assert config.attention.num_kv_heads == kv_heads


@pytest.mark.parametrize("d_model, d_ff", [(768, 2048), (512, 1408), (4096, 10944), (16, 64)])
def test_hidden_width_is_rounded_up(d_model, d_ff):
    assert ModelConfig(d_model=d_model).ffn.d_ff == d_ff


@pytest.mark.parametrize(
    "sections",
    [
        {"attention": {"variant": "mqa"}, "ffn": {"variant": "mlp", "activation": "relu"}},
        {"attention": {"mask_type": "block_sparse", "pattern": "fixed", "block_size": 32}},
        {"positional": {"rope_scaling": 3}},
        {"positional": {"rope_scaling": {"type": "yarn", "factor": 3}, "rope_fraction": 0.5}},
        {"positional": {"encoding": "relative", "relative_buckets": 16}},
    ],
    ids=str,
)
def test_what_was_filled_in_reads_back_equal(sections):
    config = ModelConfig(d_model=128, **sections)
    assert ModelConfig(**config.model_dump()) == config
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("moe", [{}, {"balance": "bias"}, {"top_k": 1, "d_ff": 8}])
def test_experts_read_back_equal(moe):
    config = ModelConfig(moe=moe)
    assert config.moe.d_ff == moe.get("d_ff", 1408)
    assert ModelConfig(**config.model_dump()) == config


@pytest.mark.parametrize("first, every, layers", [(0, 1, [0, 1, 2, 3, 4, 5]), (1, 2, [1, 3, 5]), (5, 3, [5])])
def test_layers_with_experts(first, every, layers):
    assert list(ModelConfig(moe={"first_layer": first, "every_nth_layer": every}).moe_layers) == layers
    assert not ModelConfig().moe_layers


@pytest.mark.parametrize(
    "pair",
    [dict(zip(pair, values, strict=True)) for pair in REFUSED for values in product(*pair.values())],
    ids=str,
)
def test_pairs_that_cannot_work_are_refused(pair):
    with pytest.raises(ValidationError, match="use model|leave it out"):
        config_of(pair)


@pytest.mark.parametrize(
    "section, words",
    [
        ({"attention": {"num_kv_heads": 3}}, ["model.attention.num_kv_heads=3", "num_heads=8", "use 2"]),
        ({"attention": {"variant": "mha", "num_kv_heads": 2}}, ["num_kv_heads=2", "variant=gqa"]),
        ({"attention": {"variant": "mqa", "num_kv_heads": 2}}, ["num_kv_heads=2", "variant=gqa"]),
        ({"attention": {"num_heads": 7}}, ["num_heads=7", "model.d_model=512", "use 4 heads", "head_dim"]),
        ({"attention": {"mask_type": "sliding_window"}}, ["model.attention.window_size, 256"]),
        (
            {"attention": {"window_size": 8}},
            ["window_size=8", "mask_type=causal", "mask_type=sliding_window"],
        ),
        ({"attention": {"mask_type": "local"}}, ["mask_type=local needs", "window_size, 256"]),
        ({"attention": {"mask_type": "block_sparse"}}, ["model.attention.block_size, 128"]),
        ({"attention": {"pattern": "fixed"}}, ["pattern=fixed", "mask_type=block_sparse", "leave it out"]),
        (
            {"attention": {"mask_type": "block_sparse", "block_size": 4, "summary_size": 2}},
            ["summary_size=2", "pattern=fixed"],
        ),
        (
            {
                "attention": {
                    "mask_type": "block_sparse",
                    "pattern": "fixed",
                    "block_size": 4,
                    "summary_size": 5,
                }
            },
            ["summary_size=5", "4 tokens of a block"],
        ),
        (
            {"attention": {"variant": "linear", "mask_type": "block_sparse", "block_size": 4}},
            ["variant=linear", "mask_type=block_sparse", "mask_type=causal", "variant=gqa"],
        ),
        ({"attention": {"variant": "linear", "dropout": 0.1}}, ["dropout=0.1", "probabilities"]),
        ({"attention": {"variant": "linear", "logit_soft_cap": 1}}, ["logit_soft_cap unset"]),
        ({"attention": {"variant": "linear", "kernel": "flash"}}, ["no softmax", "kernel=auto"]),
        ({"attention": {"kernel": "flash", "logit_soft_cap": 1}}, ["kernel=flash", "flex or naive"]),
        ({"attention": {"kernel": "flex", "dropout": 0.1}}, ["flex has no dropout", "kernel=auto"]),
        (
            {"attention": {"variant": "linear"}, "positional": {"encoding": "alibi"}},
            ["encoding=alibi", "variant=linear", "encoding=rope", "variant=gqa"],
        ),
        (
            {"attention": {"variant": "linear"}, "positional": {"encoding": "relative"}},
            ["encoding=relative", "variant=linear"],
        ),
        (
            {"attention": {"variant": "complex"}, "positional": {"rope_fraction": 0.5}},
            ["rope_fraction", "variant=complex", "variant=gqa"],
        ),
        ({"positional": {"rope_fraction": 0.01}}, ["rope_fraction=0.01", "less than a pair", "0.03125"]),
        (
            {"positional": {"encoding": "alibi", "rope_scaling": 2}},
            ["rope_scaling", "encoding=alibi", "encoding=rope"],
        ),
        ({"positional": {"relative_buckets": 16}}, ["relative_buckets", "encoding=relative"]),
        (
            {"positional": {"encoding": "relative", "relative_buckets": 32, "relative_max_distance": 8}},
            ["relative_buckets=32", "relative_max_distance=8", "32 and 128"],
        ),
        ({"positional": {"rope_scaling": 0.5}}, ["greater than 1"]),
        (
            {"positional": {"rope_scaling": {"type": "yarn", "factor": 2, "high_freq_factor": 2}}},
            ["high_freq_factor", "type=yarn", "leave it out"],
        ),
        (
            {"positional": {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 5}}},
            ["low_freq_factor=5", "high_freq_factor=4"],
        ),
        (
            {"d_model": 16, "positional": {"rope_scaling": {"type": "ntk", "factor": 2}}},
            ["type=ntk", "there is one", "type=linear"],
        ),
        ({"attention": {"head_dim": 33}}, ["encoding=rope", "head_dim=33", "head_dim=34"]),
        (
            {"d_model": 33, "attention": {"num_heads": 3}, "positional": {"encoding": "sinusoidal"}},
            ["use 34"],
        ),
        ({"ffn": {"activation": "relu"}}, ["ffn.activation=relu", "ffn.variant=swiglu", "variant=mlp"]),
        ({"moe": {"num_experts": 4, "top_k": 5}}, ["moe.top_k=5", "moe.num_experts=4", "top_k=2"]),
        ({"moe": {"num_experts": 1}}, ["moe.num_experts", "greater than or equal to 2"]),
        ({"moe": {"top_k": 1, "normalize_top_k": True}}, ["normalize_top_k=true", "top_k=1", "top_k=2"]),
        ({"moe": {"bias_rate": 0.1}}, ["bias_rate=0.1", "moe.balance=loss", "moe.balance=bias"]),
        ({"moe": {"first_layer": 6}}, ["first_layer=6", "model.num_layers=6", "at most 5"]),
        ({"loss": {"label_smoothing": 1.0}}, ["label_smoothing", "less than 1"]),
        ({"dropout": 1.0}, ["dropout", "less than 1"]),
        ({"attention": {"heads": 8}}, ["heads", "not permitted"]),
    ],
)
def test_refusals_name_the_keys_and_a_way_out(section, words):
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**section)
    for word in words:
        assert word in str(caught.value)


def test_reading_a_config_does_not_load_torch():
    code = "import sys, model.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
