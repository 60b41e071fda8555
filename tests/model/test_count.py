"""Counts worked out from the configuration against the model itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.build import build_model
from model.count import flops_per_token, parameter_count
from model.moe import moe_layers
from tests.model.variants import OPTIONS, build, config_of, random_tokens, refused


def outer_flops(left, right, counts, *args, **kwargs):
    return 2 * left[0] * left[1] * right[1]


def linear_flops(rows, weight, counts, *args, **kwargs):
    return 2 * rows[0] * rows[1] * weight[1]


GROUPED = {torch.ops.trireme.grouped_linear: linear_flops, torch.ops.trireme.grouped_outer: outer_flops}


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}).filter(
        lambda choice: not refused(choice)
    ),
    st.integers(1, 4),
    st.sampled_from([16, 24, 64]),
    st.integers(1, 99),
)
def test_parameters(choice, num_layers, d_model, vocab_size):
    config = config_of(choice, num_layers=num_layers, d_model=d_model, vocab_size=vocab_size)
    with torch.device("meta"):
        model = build_model(config)
    count = parameter_count(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    tables = [p for name, p in model.named_parameters() if name in ("embedding.weight", "positions.weight")]
    assert count.embedding == sum(p.numel() for p in tables)
    idle = 0
    for layer in moe_layers(model):
        one = sum(p[0].numel() for p in layer.experts.parameters())
        idle += one * (config.moe.num_experts - config.moe.top_k)
    assert count.active == count.total - idle


VISIBLE = {
    "causal": 16.0,
    "sliding_window": 5 - 25 / 64,
    "local": (15 + sum(5 + place % 5 + 1 for place in range(5, 32))) / 32,
    "block_sparse": sum(min(place + 1, 4) + place // 4 for place in range(32)) / 32,
    "bidirectional": 32.0,
}


@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa", "complex"])
@pytest.mark.parametrize("ffn", ["swiglu", "mlp"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mask_type", VISIBLE)
def test_flops(variant, ffn, tied, mask_type):
    """torch counts the whole T x T square of the naive kernel whatever the mask, so the count that it is held
    against is the bidirectional one; what a mask saves is checked by itself."""
    choice = {"attention.variant": variant, "ffn.variant": ffn, "tie_embeddings": tied}
    if variant == "complex":
        # the other kernel pads the values to the width of the keys
        choice |= {"attention.kernel": "naive"}
    config = config_of(choice | {"attention.mask_type": mask_type}, d_model=32)
    tokens = random_tokens(config, 2, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build(config)(tokens, targets=tokens)[1].backward()
    whole = flops_per_token(config_of(choice | {"attention.mask_type": "bidirectional"}, d_model=32), 32)
    assert whole * tokens.numel() == pytest.approx(counter.get_total_flops(), rel=0.02)
    per_key = 6 if variant == "complex" else 4
    saved = 3 * config.num_layers * per_key * 32 * (32 - VISIBLE[mask_type])
    assert flops_per_token(config, 32) == pytest.approx(whole - saved)


@pytest.mark.parametrize("moe", ["softmax", "sigmoid"])
@pytest.mark.parametrize("variant", ["swiglu", "mlp"])
def test_flops_of_the_experts_that_a_token_goes_through(moe, variant):
    choice = {"moe": moe, "ffn.variant": variant, "ffn.bias": True}
    config = config_of(choice | {"attention.mask_type": "bidirectional"}, d_model=32)
    tokens = random_tokens(config, 2, 32)
    model = build(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
        model(tokens, targets=tokens)[1].backward()
    counted = flops_per_token(config, 32) * tokens.numel()
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("mask_type", ["causal", "bidirectional"])
@pytest.mark.parametrize("length", [32, 128])
def test_flops_of_linear_attention(mask_type, length):
    choice = {"attention.variant": "linear", "attention.mask_type": mask_type}
    config = config_of(choice, d_model=32)
    tokens = random_tokens(config, 2, length)
    with FlopCounterMode(display=False) as counter:
        build(config)(tokens, targets=tokens)[1].backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert flops_per_token(config, length) == pytest.approx(counted, rel=0.02)


def test_the_analytic_window_is_near_the_exact_mean():
    config = config_of({"attention.mask_type": "sliding_window"}, num_layers=1)
    causal = config_of({}, num_layers=1)
    per_key = 3 * 4 * 16
    exact = sum(min(place + 1, 5) for place in range(32)) / 32
    visible = 16 - (flops_per_token(causal, 32) - flops_per_token(config, 32)) / per_key
    assert visible == pytest.approx(exact, rel=0.05)
