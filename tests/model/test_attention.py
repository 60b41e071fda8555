"""The kinds of attention against their formulas, and the caches that generation keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from model.attention_variants import ATTENTION
from model.cache import KeyValueCache, KeyValues
from model.config import ModelConfig
from model.cross_attention import CrossAttention, MemoryCache
from model.linear_attention import LinearAttention
from model.masks import make_mask
from model.positions import POSITIONS
from model.weights import declared_weights
from tests.model.variants import build, config_of, random_tokens


def layer_and_input(length=9, encoding="none", rope_base=10000.0, **attention):
    """A layer of random weights, its configuration and an input, in fp64."""
    positional = {"encoding": encoding} | ({"rope_base": rope_base} if encoding == "rope" else {})
    config = ModelConfig(d_model=16, attention={"num_heads": 4, **attention}, positional=positional)
    layer = ATTENTION[config.attention.variant](config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer, config, torch.randn(2, length, 16, generator=generator, dtype=torch.float64)


def run(layer, config, x, **batch):
    rotation = POSITIONS[config.positional.encoding](config).rotation(x, 0)
    whole = range(x.shape[1])
    return layer(x, make_mask(config.attention, whole, whole, x, **batch), rotation)


@pytest.mark.parametrize("head_dim", [4, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("encoding", ["rope", "none"])
def test_complex_attention_is_complex_arithmetic(head_dim, kv_heads, encoding):
    layer, config, x = layer_and_input(
        variant="complex", head_dim=head_dim, num_kv_heads=kv_heads, encoding=encoding, rope_base=50.0
    )

    def numbers(projection):
        parts = projection(x).unflatten(-1, (-1, 2, head_dim))
        return torch.complex(parts[..., 0, :], parts[..., 1, :])

    query, key = numbers(layer.query), numbers(layer.key).repeat_interleave(4 // kv_heads, 2)
    value = layer.value(x).unflatten(-1, (-1, head_dim)).repeat_interleave(4 // kv_heads, 2)
    if encoding == "rope":
        frequencies = 50.0 ** (-torch.arange(head_dim, dtype=torch.float64) / head_dim)
        phases = torch.exp(1j * torch.outer(torch.arange(9, dtype=torch.float64), frequencies)).unsqueeze(1)
        query, key = query * phases, key * phases
    scores = torch.einsum("bthe,bshe->bhts", query, key.conj()).real / (2 * head_dim) ** 0.5
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = layer.output(torch.einsum("bhts,bshe->bthe", probabilities, value).flatten(2))
    torch.testing.assert_close(run(layer, config, x), expected)


@pytest.mark.parametrize("variant", ["gqa", "complex"])
def test_queries_and_keys_are_normalized(variant):
    layer, config, x = layer_and_input(variant=variant, qk_norm=True)
    query = layer.query(x).unflatten(-1, (4, -1))
    expected = query / (query.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.query_norm.weight
    torch.testing.assert_close(layer.queries(x), expected)
    key = layer.key(x).unflatten(-1, (config.attention.num_kv_heads, -1))
    expected = key / (key.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.key_norm.weight
    torch.testing.assert_close(layer.keys(x), expected)


@pytest.mark.parametrize("mask_type", ["causal", "bidirectional"])
def test_linear_attention_is_its_formula(mask_type):
    layer, config, x = layer_and_input(variant="linear", mask_type=mask_type, num_kv_heads=2)
    query, key = (torch.nn.functional.elu(part) + 1 for part in (layer.queries(x), layer.keys(x)))
    value = layer.values(x)
    attended = torch.zeros(2, 9, 4, 4, dtype=torch.float64)
    for place in range(9):
        for head in range(4):
            seen = place + 1 if mask_type == "causal" else 9
            weights = (query[:, place, head].unsqueeze(1) * key[:, :seen, head // 2]).sum(-1)
            mean = (weights.unsqueeze(-1) * value[:, :seen, head // 2]).sum(1)
            attended[:, place, head] = mean / weights.sum(1, keepdim=True)
    torch.testing.assert_close(run(layer, config, x), layer.output(attended.flatten(2)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 23),
    st.sampled_from(["rope", "none"]),
    st.sampled_from(["causal", "bidirectional"]),
    st.sampled_from([1, 4]),
    st.booleans(),
    st.data(),
)
def test_linear_in_chunks_is_quadratic(length, encoding, mask_type, kv_heads, padded, data):
    layer, config, x = layer_and_input(
        length, encoding, variant="linear", mask_type=mask_type, num_kv_heads=kv_heads
    )
    batch = {}
    if padded:
        batch["padding"] = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.3
    if mask_type == "causal" and data.draw(st.booleans(), "documents"):
        cuts = st.lists(st.booleans(), min_size=length, max_size=length)
        batch["documents"] = torch.tensor([data.draw(cuts), data.draw(cuts)]).long().cumsum(1)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.linear_attention.CHUNK", 4)
        for layer.quadratic in (False, True):
            out = run(layer, config, x, **batch)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))])
    torch.testing.assert_close(*results)


def test_linear_attention_keeps_documents_apart_causally_only():
    layer, config, x = layer_and_input(variant="linear", mask_type="bidirectional")
    with pytest.raises(ValueError, match=r"can't keep documents apart: use mask_type=causal"):
        run(layer, config, x, documents=torch.zeros(2, 9, dtype=torch.long))


def test_linear_attention_costs_the_same_for_every_token():
    config = config_of({"attention.variant": "linear"})
    assert LinearAttention.cost(config, 128).flops == LinearAttention.cost(config, 64 * 1024).flops


@pytest.mark.parametrize(
    "options", [{}, {"logit_soft_cap": 0.8}, {"kernel": "naive", "qk_norm": True}], ids=str
)
def test_cross_attention(options):
    config = ModelConfig(d_model=16, attention={"num_heads": 4, "num_kv_heads": 2, "bias": True, **options})
    cross = CrossAttention(config).double()
    x, memory = (torch.randn(2, length, 16, dtype=torch.float64) for length in (5, 7))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True
    query, key = cross.queries(x), cross.keys(memory).repeat_interleave(2, 2)
    value = cross.values(memory).repeat_interleave(2, 2)
    scores = torch.einsum("bthe,bshe->bhts", query, key) / 2
    if "logit_soft_cap" in options:
        scores = 0.8 * torch.tanh(scores / 0.8)
    probabilities = scores.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)
    expected = cross.output(torch.einsum("bhts,bshe->bthe", probabilities, value).flatten(2))
    torch.testing.assert_close(cross(x, memory, padding), expected)
    cache = MemoryCache()
    steps = [cross(x[:, :2], memory, padding, cache), cross(x[:, 2:], memory * torch.nan, padding, cache)]
    torch.testing.assert_close(torch.cat(steps, 1), expected)
    assert declared_weights(cross).keys() == dict(cross.named_parameters()).keys()


def test_cross_attention_is_counted():
    config = ModelConfig(d_model=16, attention={"num_heads": 4, "qk_norm": True, "kernel": "naive"})
    cross, cost = CrossAttention(config), CrossAttention.cost(config, 6, 10)
    assert cost.parameters == sum(p.numel() for p in cross.parameters())
    with FlopCounterMode(display=False) as counter:
        cross(torch.randn(2, 6, 16), torch.randn(2, 10, 16))
    assert cost.flops * 12 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_shardings_of_what_heads_share():
    config = config_of({"attention.qk_norm": True, "positional.encoding": "relative"}, num_layers=1)
    declared = declared_weights(build(config))
    assert declared["positions.weight"].sharding == "per_head"
    assert declared["blocks.0.attention.query_norm.weight"].sharding == "every_head"


@settings(max_examples=100, deadline=None)
@given(st.none() | st.integers(1, 6), st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_caches_return_what_may_be_seen(reach, pieces):
    total = sum(pieces)
    cache = KeyValues(total, reach)
    key, value = torch.randn(2, 1, 2, total, 3)
    end = 0
    for new in pieces:
        start, end = end, end + new
        visible = cache.visible(new)
        got = cache.append(key[:, :, start:end], value[:, :, start:end])
        first = 0 if reach is None else max(0, start - reach + 1)
        assert visible == end - first and cache.length == end
        assert torch.equal(got[0], key[:, :, first:end]) and torch.equal(got[1], value[:, :, first:end])
    if reach is not None:
        assert cache._buffers[0].shape[2] <= 2 * reach
    with pytest.raises(ValueError, match=f"{total} tokens can't hold {total + 1}"):
        cache.append(key[:, :, :1], value[:, :, :1])


MASKS = ["causal", "sliding_window", "local", "block_sparse"]
READ = [{"attention.mask_type": mask, "positional.encoding": e} for mask in MASKS for e in ("rope", "alibi")]
READ += [
    {"attention.variant": "linear"},
    {"attention.variant": "linear", "attention.kernel": "naive", "positional.encoding": "learned"},
    {"attention.variant": "complex", "attention.mask_type": "local"},
    {"positional.encoding": "relative", "attention.mask_type": "sliding_window"},
    {"attention.logit_soft_cap": 1.0, "attention.mask_type": "local"},
    {"attention.qk_norm": True, "positional.rope_scaling": {"type": "yarn", "factor": 2.0}},
]


@pytest.mark.parametrize("choice", READ, ids=str)
def test_a_prompt_may_be_read_in_pieces(choice, monkeypatch):
    monkeypatch.setattr("model.linear_attention.CHUNK", 4)
    config = config_of(choice)
    model = build(config).double()
    tokens = random_tokens(config, 2, 24)
    cache = KeyValueCache(config, 24)
    pieces = [model(piece, cache=cache) for piece in tokens.split([6, 5, 1, 2, 1, 1, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens))
    torch.testing.assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])
