"""Single components: masks, rotations, caches, norm placements, gates, declarations, the printed model."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.build import build_model
from model.cache import KeyValueCache, KeyValues
from model.config import ModelConfig
from model.feedforward import ACTIVATIONS, FEEDFORWARD, GATES, Gated, gelu_tanh
from model.masks import make_mask
from model.norms import NORMS
from model.positions import Rope
from model.rope import rotate
from model.weights import Weight, declared_weights
from tests.model.variants import build, config_of, random_tokens


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_rotated_products_depend_on_distance_alone(query_place, key_place, shift):
    config = ModelConfig(d_model=16, attention={"num_heads": 1})
    rope = Rope(config)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)

    def product(a, b):
        like = torch.zeros(1, 1, 16, dtype=torch.float64)
        return (rotate(query, rope.rotation(like, a)) * rotate(key, rope.rotation(like, b))).sum()

    torch.testing.assert_close(
        product(query_place, key_place), product(query_place + shift, key_place + shift)
    )


@pytest.mark.parametrize(
    "dtype, inside",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_rotations_are_made_in_at_least_fp32(dtype, inside):
    x = torch.randn(1, 6, 512).to(dtype)
    rotation = Rope(ModelConfig()).rotation(x, 0)
    assert {part.dtype for part in rotation} == {inside}
    assert rotate(x.unflatten(-1, (8, 64)), rotation).dtype == dtype


def test_cache_grows_in_place_and_ends():
    cache = KeyValues(5)
    first, second = torch.randn(2, 1, 2, 3, 4)
    keys, _ = cache.append(first, first)
    again, values = cache.append(second[:, :, :2], 2 * second[:, :, :2])
    assert keys.data_ptr() == again.data_ptr()
    assert torch.equal(again, torch.cat((first, second[:, :, :2]), 2))
    assert torch.equal(values, torch.cat((first, 2 * second[:, :, :2]), 2))
    with pytest.raises(ValueError, match="5 tokens can't hold 6"):
        cache.append(second[:, :, :1], second[:, :, :1])


@pytest.mark.parametrize("mask_type", ["causal", "sliding_window"])
def test_a_prompt_may_be_read_in_pieces(mask_type):
    config = config_of({"attention.mask_type": mask_type})
    model = build(config).double()
    tokens = random_tokens(config, 2, 14)
    cache = KeyValueCache(config, 14)
    pieces = [model(piece, cache=cache) for piece in tokens.split([6, 5, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens))
    torch.testing.assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("parallel", [True, False])
def test_placements(placement, parallel):
    config = config_of(
        {"norm.placement": placement, "parallel_layers": parallel, "positional.encoding": "none"}
    )
    block = Block(config).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, config.d_model, dtype=torch.float64)
    mask = make_mask(config.attention, range(6), range(6), x)

    def attend(h):
        return block.attention(h, mask)

    def step(x, layer, norm, output_norm):
        if placement == "pre":
            return x + layer(norm(x))
        if placement == "post":
            return norm(x + layer(x))
        return x + output_norm(layer(norm(x)))

    if parallel:
        expected = step(
            x, lambda h: attend(h) + block.feedforward(h), block.attention_norm, block.attention_output_norm
        )
    else:
        middle = step(x, attend, block.attention_norm, block.attention_output_norm)
        expected = step(middle, block.feedforward, block.feedforward_norm, block.feedforward_output_norm)
    torch.testing.assert_close(block(x, mask), expected)


@pytest.mark.parametrize("variant", list(GATES))
def test_gates(variant):
    gate, up = torch.randn(2, 3, 5, dtype=torch.float64)
    gate.requires_grad_(), up.requires_grad_()
    function = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": gelu_tanh, "glu": torch.sigmoid}[variant]
    assert torch.equal(Gated.apply(gate, up, variant), function(gate) * up)
    assert torch.autograd.gradcheck(lambda g, u: Gated.apply(g, u, variant), (gate, up))


def test_activations():
    x = torch.linspace(-3, 3, 13)
    expected = {
        "silu": x * torch.sigmoid(x),
        "gelu": x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu": x.clamp(min=0),
        "relu_squared": x.clamp(min=0) ** 2,
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ACTIVATIONS[name](x), value)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", ["swiglu", "geglu", "geglu_tanh", "glu", "mlp"])
def test_feedforward(variant, bias):
    ffn = {"variant": variant, "bias": bias, "d_ff": 24}
    if variant == "mlp":
        ffn["activation"] = "relu_squared"
    config = config_of({}, ffn=ffn)
    layer = FEEDFORWARD[variant](config)
    x = torch.randn(2, 3, config.d_model)
    function = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": gelu_tanh, "glu": torch.sigmoid}.get(variant)
    hidden = layer.up(x).relu() ** 2 if function is None else function(layer.gate(x)) * layer.up(x)
    torch.testing.assert_close(layer(x), layer.down(hidden))
    assert {name.split(".")[1] for name, _ in layer.named_parameters()} == {
        "weight",
        "bias" if bias else "weight",
    }


def test_scalenorm_scales_to_a_learned_length():
    norm = NORMS["scalenorm"](config_of({}, d_model=16))
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(
        norm(x).norm(dim=-1), torch.full((2, 3), 4.0, dtype=torch.float64), rtol=1e-4, atol=0
    )
    norm.weight.data.fill_(0.5)
    torch.testing.assert_close(norm(x), 2 * x / x.norm(dim=-1, keepdim=True), rtol=1e-4, atol=0)


def test_sinusoids():
    model = build(config_of({"positional.encoding": "sinusoidal"}))
    table = model.positions.embed(torch.zeros(1, 4, 16), 3)[0]
    for place in range(4):
        for pair in range(8):
            angle = torch.tensor((place + 3) / 10000 ** (2 * pair / 16))
            expected = torch.stack((angle.sin(), angle.cos()))
            torch.testing.assert_close(table[place, 2 * pair : 2 * pair + 2], expected)


@pytest.mark.parametrize("where", ["dropout", "attention.dropout", "ffn.dropout"])
def test_dropout_acts_in_training_only(where):
    model = build(config_of({where: 0.5}))
    tokens = random_tokens(model.config, 2, 12)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_declarations_must_match_the_parameters():
    model = build(config_of({}))
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"undeclared \['extra.bias', 'extra.weight'\]"):
        declared_weights(model)
    del model.extra
    model.norm.weights = lambda: {
        "weight": Weight("replicated", "ones"),
        "bias": Weight("replicated", "zeros"),
    }
    with pytest.raises(ValueError, match=r"without a parameter \['norm.bias'\]"):
        declared_weights(model)


def test_declared_shardings():
    config = config_of({"attention.bias": True, "ffn.bias": True, "tie_embeddings": False}, num_layers=1)
    declared = {name: weight.sharding for name, weight in declared_weights(build(config)).items()}
    assert declared == {
        "embedding.weight": "vocabulary",
        "blocks.0.attention_norm.weight": "replicated",
        "blocks.0.attention.query.weight": "heads",
        "blocks.0.attention.query.bias": "heads",
        "blocks.0.attention.key.weight": "kv_heads",
        "blocks.0.attention.key.bias": "kv_heads",
        "blocks.0.attention.value.weight": "kv_heads",
        "blocks.0.attention.value.bias": "kv_heads",
        "blocks.0.attention.output.weight": "heads_in",
        "blocks.0.attention.output.bias": "replicated",
        "blocks.0.feedforward_norm.weight": "replicated",
        "blocks.0.feedforward.gate.weight": "column",
        "blocks.0.feedforward.gate.bias": "column",
        "blocks.0.feedforward.up.weight": "column",
        "blocks.0.feedforward.up.bias": "column",
        "blocks.0.feedforward.down.weight": "row",
        "blocks.0.feedforward.down.bias": "replicated",
        "norm.weight": "replicated",
        "head.weight": "vocabulary",
    }


def test_declared_shardings_of_experts():
    config = config_of({"ffn.bias": True}, moe={"num_shared_experts": 1}, num_layers=1)
    feedforward = build(config).blocks[0].feedforward
    experts = ["gate", "up", "down", "gate_bias", "up_bias", "down_bias"]
    declared = {name: weight.sharding for name, weight in declared_weights(feedforward).items()}
    assert declared == {"router.weight": "replicated"} | {
        f"experts.{name}": "experts" for name in experts
    } | {
        f"shared.{name}.{kind}": sharding
        for kind in ("weight", "bias")
        for name, sharding in (("gate", "column"), ("up", "column"), ("down", "row"))
    } | {"shared.down.bias": "replicated"}


def test_print():
    with torch.device("meta"):
        model = build_model(ModelConfig(vocab_size=2048))
    first, second, *_ = repr(model).splitlines()
    assert first == (
        "Transformer(18.0 M parameters, 16.9 M non-embedding; "
        "gqa 8/2 heads, rope, swiglu d_ff 1408, rmsnorm pre, tied)"
    )
    assert second == "Transformer("
    moe = {"num_experts": 16, "num_shared_experts": 1, "d_ff": 704, "every_nth_layer": 2}
    with torch.device("meta"):
        model = build_model(ModelConfig(vocab_size=2048, moe=moe))
    assert repr(model).splitlines()[0] == (
        "Transformer(66.6 M parameters, 21.2 M active, 65.6 M non-embedding; gqa 8/2 heads, rope, "
        "swiglu d_ff 1408, top 2 of 16 experts + 1 shared d_ff 704 in 3 of 6 layers, rmsnorm pre, tied)"
    )


def test_a_vocabulary_is_needed():
    with pytest.raises(ValueError, match=r"model\.vocab_size is unset.*32000"):
        build_model(ModelConfig())


def recomputing(function):
    # a functools.partial of checkpoint would not be traced at all
    def forward(*args):
        return checkpoint(function, *args, use_reentrant=False)

    return forward


@pytest.mark.parametrize("moe", ["none", "softmax", "sigmoid"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_compile_one_by_one(checkpointed, moe):
    """Traced and differentiated as inductor would get them; the loss stays outside."""
    config = config_of({"moe": moe, "ffn.bias": moe == "sigmoid"}, num_layers=1)
    plain, compiled = build(config), build(config)
    tokens = random_tokens(config, 2, 12)
    for block in compiled.blocks:
        if checkpointed:
            block.forward = recomputing(block.forward)
        block.compile(backend="aot_eager", fullgraph=True)
    for model in (plain, compiled):
        model.loss_sum(tokens, tokens).backward()
    for mine, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
