"""Counts worked out from the configuration against the model itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.build import build_model
from model.count import flops_per_token, parameter_count
from tests.model.variants import OPTIONS, build, config_of, random_tokens


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
    st.integers(1, 4),
    st.sampled_from([8, 24, 64]),
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


@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("ffn", ["swiglu", "mlp"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mask_type", ["causal", "sliding_window", "bidirectional"])
def test_flops(variant, ffn, tied, mask_type):
    """torch counts the whole T x T square of the naive kernel whatever the mask, so the count that it is held
    against is the bidirectional one; what a mask saves is checked by itself."""
    choice = {"attention.variant": variant, "ffn.variant": ffn, "tie_embeddings": tied}
    config = config_of(choice | {"attention.mask_type": mask_type}, d_model=32)
    tokens = random_tokens(config, 2, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build(config)(tokens, targets=tokens)[1].backward()
    whole = flops_per_token(config_of(choice | {"attention.mask_type": "bidirectional"}, d_model=32), 32)
    assert whole * tokens.numel() == pytest.approx(counter.get_total_flops(), rel=0.02)
    visible = {"causal": 16.0, "sliding_window": 5 - 25 / 64, "bidirectional": 32.0}[mask_type]
    saved = 3 * config.num_layers * 4 * 32 * (32 - visible)
    assert flops_per_token(config, 32) == pytest.approx(whole - saved)


def test_the_analytic_window_is_near_the_exact_mean():
    config = config_of({"attention.mask_type": "sliding_window"}, num_layers=1)
    causal = config_of({}, num_layers=1)
    per_key = 3 * 4 * 16
    exact = sum(min(place + 1, 5) for place in range(32)) / 32
    visible = 16 - (flops_per_token(causal, 32) - flops_per_token(config, 32)) / per_key
    assert visible == pytest.approx(exact, rel=0.05)
