"""Rotations and their scalings, ALiBi and relative positions, by their properties and against `transformers`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.positions import POSITIONS, Alibi, Relative, alibi_slope, places_in_documents, relative_bucket
from model.rope import rotate
from tests.model.hugging_face import (
    ROPE_INIT_FUNCTIONS,
    LlamaConfig,
    T5Attention,
    build_alibi_tensor,
    build_falcon_alibi_tensor,
)

SCALINGS = {
    "none": None,
    "number": 4.0,
    "linear": {"type": "linear", "factor": 4.0},
    "ntk": {"type": "ntk", "factor": 4.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 64},
    "llama3": {"type": "llama3", "factor": 8.0, "original_max_seq_len": 64},
}
every_scaling = pytest.mark.parametrize("scaling", SCALINGS)


def rope(scaling, **positional):
    section = {"rope_scaling": SCALINGS[scaling], **positional}
    config = ModelConfig(d_model=32, attention={"num_heads": 1}, max_seq_len=256, positional=section)
    return POSITIONS["rope"](config)


def rotation_at(positions, place):
    return positions.rotation(torch.zeros(1, 1, 32, dtype=torch.float64), place)


@every_scaling
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 300))
def test_rotated_products_depend_on_distance_alone(scaling, fraction, query_place, key_place, shift):
    positions = rope(scaling, rope_fraction=fraction)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 32, generator=generator, dtype=torch.float64)

    def product(a, b):
        rotated = rotate(query, rotation_at(positions, a)), rotate(key, rotation_at(positions, b))
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(
        product(query_place, key_place), product(query_place + shift, key_place + shift)
    )


def test_a_part_that_does_not_turn():
    x = torch.randn(1, 1, 2, 32, dtype=torch.float64)
    part = rope("none", rope_fraction=0.4)
    turned = rotate(x, rotation_at(part, 5))
    assert part.width == 12
    assert torch.equal(turned[..., 12:], x[..., 12:])
    small = POSITIONS["rope"](ModelConfig(d_model=12, attention={"num_heads": 1}))
    torch.testing.assert_close(turned[..., :12], rotate(x[..., :12], rotation_at(small, 5)))


THEIRS = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, None),
    # static scaling by 4 is what the dynamic one by 3 does at twice its length
    "ntk": ({"rope_type": "dynamic", "factor": 3.0}, 512),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, None),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        None,
    ),
}


@pytest.mark.parametrize("scaling", THEIRS)
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_scalings_are_those_of_transformers(scaling, base):
    section, length = THEIRS[scaling]
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=1,
        max_position_embeddings=256,
        rope_theta=base,
        rope_scaling=section,
    )
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[section["rope_type"]](config, torch.device("cpu"), length)
    cos, sin = rotation_at(rope(scaling, rope_base=base), 1)
    torch.testing.assert_close(cos[0, 0, :16].float(), frequencies.cos() * magnitude)
    torch.testing.assert_close(sin[0, 0, 16:].float(), frequencies.sin() * magnitude)


def test_what_a_scaling_fills_in():
    section = {"rope_scaling": {"type": "llama3", "factor": 8}}
    scaling = ModelConfig(max_seq_len=8192, positional=section).positional.rope_scaling
    assert scaling.original_max_seq_len == 1024
    assert (scaling.low_freq_factor, scaling.high_freq_factor, scaling.beta_fast) == (1.0, 4.0, None)
    assert ModelConfig(positional={"rope_scaling": 2}).positional.rope_scaling.type == "linear"


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 16, 20])
@pytest.mark.parametrize("theirs", [build_alibi_tensor, build_falcon_alibi_tensor])
def test_alibi_is_that_of_bloom_and_falcon(num_heads, theirs):
    config = ModelConfig(
        d_model=8 * num_heads,
        attention={"variant": "mha", "num_heads": num_heads},
        positional={"encoding": "alibi"},
    )
    x = torch.zeros(1, 7, 4)
    heads, places = torch.arange(num_heads).view(-1, 1, 1), torch.arange(7)
    ours = Alibi(config).bias(x)(heads, places - places.unsqueeze(1)).tril()
    # theirs leave out what is the same for all keys of a query
    every = theirs(torch.ones(1, 7, dtype=torch.long), num_heads, torch.float32)
    last = every.view(num_heads, 1, 7) - every.view(num_heads, 1, 7).transpose(1, 2)
    tolerance = {"atol": 2e-2, "rtol": 1e-2} if theirs is build_falcon_alibi_tensor else {}
    torch.testing.assert_close(ours, last.tril(), **tolerance)


def test_alibi_of_some_of_the_heads():
    config = ModelConfig(d_model=96, attention={"num_heads": 12}, positional={"encoding": "alibi"})
    alibi = Alibi(config)
    alibi.heads = range(7, 10)
    bias = alibi.bias(torch.zeros(1))(torch.tensor([7, 8, 9]), torch.tensor(-2))
    torch.testing.assert_close(bias, torch.tensor([-2 * alibi_slope(head, 12) for head in (7, 8, 9)]))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, most", [(32, 128), (16, 20), (8, 100), (64, 4096)])
def test_buckets_are_those_of_t5(bidirectional, buckets, most):
    distance = torch.arange(-3000, 3000)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, buckets, most)
    ours = relative_bucket(distance, buckets, most, bidirectional)
    assert torch.equal(ours, theirs)


def test_relative_positions_are_one_table_for_all_layers():
    config = ModelConfig(vocab_size=8, d_model=16, num_layers=3, positional={"encoding": "relative"})
    relative = Relative(config)
    assert {name: tuple(p.shape) for name, p in relative.named_parameters()} == {"weight": (8, 32)}
    torch.nn.init.normal_(relative.weight)
    bias = relative.bias(torch.zeros(1))(torch.arange(8).view(8, 1), torch.tensor([3, 0, -1, -15, -1000]))
    torch.testing.assert_close(bias, relative.weight[:, [0, 0, 1, 15, 31]])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.data())
def test_places(tokens, data):
    documents, padding = torch.tensor([[d for d, _ in tokens]]), torch.tensor([[p for _, p in tokens]])
    length = data.draw(st.integers(1, len(tokens)))
    options = data.draw(st.sampled_from([(documents, padding), (documents, None), (None, padding)]))
    places = places_in_documents(length, len(tokens) - length, *options)
    place, expected = 0, []
    for index, (document, padded) in enumerate(tokens):
        if options[0] is not None and index and tokens[index - 1][0] != document:
            place = 0
        expected.append(place)
        place += not (options[1] is not None and padded)
    assert places.tolist() == [expected[-length:]]
    assert places_in_documents(length, 0, None, None) is None


def test_slopes():
    assert [alibi_slope(head, 8) for head in range(8)] == [2.0**-k for k in range(1, 9)]
    assert alibi_slope(2, 3) == pytest.approx(2**-2.0) and math.isclose(alibi_slope(4, 6), 2**-1.0)
