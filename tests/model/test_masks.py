"""Masks against their definitions, written once more as double loops over places."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cache import KeyValueCache
from model.config import AttentionConfig
from model.kernels import Mask
from model.masks import make_mask, mean_visible_keys
from tests.model.variants import build, config_of, random_tokens

sizes = st.integers(1, 7)
masks = st.one_of(
    st.just(AttentionConfig()),
    st.just(AttentionConfig(mask_type="bidirectional")),
    st.builds(lambda w: AttentionConfig(mask_type="sliding_window", window_size=w), sizes),
    st.builds(lambda w: AttentionConfig(mask_type="local", window_size=w), sizes),
    st.builds(lambda s: AttentionConfig(mask_type="block_sparse", block_size=s), sizes),
    st.builds(
        lambda s, c: AttentionConfig(
            mask_type="block_sparse", pattern="fixed", block_size=s, summary_size=min(s, c)
        ),
        sizes,
        sizes,
    ),
)


def sees(config, query, key):
    """The configuration's words, for one query and one key."""
    if config.mask_type == "bidirectional":
        return True
    if key > query:
        return False
    if config.mask_type == "sliding_window":
        return key in range(query - config.window_size + 1, query + 1)
    if config.mask_type == "local":
        start = query - query % config.window_size
        return key >= start - config.window_size
    if config.pattern == "strided":
        every = {query - stride for stride in range(0, query + 1, config.block_size)}
        return query - key < config.block_size or key in every
    if config.pattern == "fixed":
        block = [key - key % config.block_size + i for i in range(config.block_size)]
        return query in block or key in block[-config.summary_size :]
    return True


def made(config, queries, keys, **options):
    batch = max((len(part) for part in options.values()), default=1)
    return make_mask(config, queries, keys, torch.zeros(batch, len(queries), 4), **options)


def as_table(mask, queries, keys, batch):
    table = torch.ones(batch, len(queries), len(keys), dtype=torch.bool)
    if mask.is_causal:
        assert queries == keys
        return table.tril()
    return table if mask.tensor is None else mask.tensor.expand(batch, 1, -1, -1).squeeze(1)


@settings(max_examples=300, deadline=None)
@given(masks, st.integers(1, 20), st.data())
def test_every_mask_is_its_double_loop(config, length, data):
    documents = padding = None
    if data.draw(st.booleans(), "documents"):
        documents = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=length, max_size=length)))
        documents = torch.stack((documents, documents.flip(0)))
    if data.draw(st.booleans(), "padding"):
        padding = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        padding = torch.stack((padding, ~padding))
    queries = range(data.draw(st.integers(0, length - 1), "first query"), length)
    keys = range(length)
    options = {"documents": documents, "padding": padding}
    mask = made(config, queries, keys, **{k: v for k, v in options.items() if v is not None})
    table = as_table(mask, queries, keys, 2)
    for row in range(2):
        first = 0 if padding is None else [*padding[row].tolist(), False].index(False) % length
        for query in queries:
            for key in keys:
                expected = sees(config, query - first, key - first)
                if documents is not None:
                    expected &= bool(documents[row, query] == documents[row, key])
                if padding is not None:
                    expected &= not padding[row, key]
                assert table[row, query - queries.start, key] == expected


@settings(max_examples=50, deadline=None)
@given(masks, st.integers(1, 40))
def test_flex_blocks_cover_what_is_seen(config, length):
    config = config.model_copy(update={"kernel": "flex"})
    with torch.no_grad():
        mask = made(config, range(length), range(length))
    assert mask.kernel == "flex" and mask.tensor is None and mask.score_mod is None
    if config.mask_type == "bidirectional" or mask.block_mask is None:
        assert all(sees(config, q, k) for q in range(length) for k in range(length))
        return
    zero = torch.tensor(0)
    for query in range(length):
        for key in range(length):
            seen = mask.block_mask.mask_mod(zero, zero, torch.tensor(query), torch.tensor(key))
            assert seen == sees(config, query, key)


def test_no_mask_tensor_where_the_kernel_needs_none():
    causal, free = Mask("flash", is_causal=True), Mask("flash")
    whole, last = range(8), range(7, 8)
    assert made(AttentionConfig(), whole, whole) == causal
    assert made(AttentionConfig(mask_type="bidirectional"), whole, whole) == free
    assert made(AttentionConfig(mask_type="sliding_window", window_size=8), whole, whole) == causal
    assert made(AttentionConfig(mask_type="local", window_size=4), whole, whole) == causal
    assert made(AttentionConfig(), last, whole) == free
    assert made(AttentionConfig(mask_type="sliding_window", window_size=5), last, range(3, 8)) == free
    assert made(AttentionConfig(mask_type="local", window_size=3), last, range(3, 8)) == free
    assert made(AttentionConfig(variant="linear"), whole, whole) == free


@settings(max_examples=100, deadline=None)
@given(masks, st.integers(1, 30))
def test_the_mean_of_visible_keys(config, length):
    exact = sum(sees(config, q, k) for q in range(length) for k in range(length)) / length
    # causal squares count as half, without the half of the diagonal
    loose = 0.5 if config.mask_type in ("causal", "sliding_window") else 0.0
    assert mean_visible_keys(config, length) == pytest.approx(exact, abs=loose + 1e-9)


PACKED = [
    {},
    {"positional.encoding": "learned"},
    {"positional.encoding": "sinusoidal"},
    {"positional.encoding": "alibi"},
    {"positional.encoding": "relative"},
    {"attention.variant": "linear"},
    {"attention.variant": "linear", "attention.kernel": "naive", "positional.encoding": "none"},
    {"attention.mask_type": "sliding_window"},
    {"attention.mask_type": "bidirectional"},
]
BLOCKS: list[dict[str, object]] = [
    {"attention.mask_type": "local"},
    {"attention.mask_type": "block_sparse"},
    {"attention.mask_type": "block_sparse", "attention.pattern": "fixed"},
]


@pytest.mark.parametrize("choice", PACKED, ids=str)
def test_packed_documents_are_as_if_alone(choice, monkeypatch):
    monkeypatch.setattr("model.linear_attention.CHUNK", 4)
    config = config_of(choice)
    model = build(config).double()
    tokens = random_tokens(config, 2, 15)
    lengths = [[6, 1, 8], [2, 11, 2]]
    ids = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    packed = model(tokens, document_ids=ids)
    for row in range(2):
        alone = [model(part.unsqueeze(0))[0] for part in tokens[row].split(lengths[row])]
        torch.testing.assert_close(packed[row], torch.cat(alone))
    targets = tokens.roll(-1, 1)
    _, mean = model(tokens, targets, document_ids=ids)
    torch.testing.assert_close(model.loss_sum(tokens, targets, document_ids=ids) / 30, mean)


@pytest.mark.parametrize("choice", PACKED + BLOCKS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(choice, side):
    config = config_of(choice)
    model = build(config).double()
    tokens = random_tokens(config, 1, 9)
    at = (3, 0) if side == "left" else (0, 3)
    padded = torch.nn.functional.pad(tokens, at, value=7)
    padding = torch.nn.functional.pad(torch.zeros_like(tokens, dtype=torch.bool), at, value=True)
    got = model(torch.cat((padded, padded.flip(1))), padding=torch.cat((padding, torch.zeros_like(padding))))
    torch.testing.assert_close(got[0, at[0] : at[0] + 9], model(tokens)[0])
    torch.testing.assert_close(got[1], model(padded.flip(1))[0])
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("choice", PACKED[:-1] + BLOCKS, ids=str)
def test_a_padded_prompt_is_continued(choice):
    config = config_of(choice)
    model = build(config).double()
    tokens = random_tokens(config, 1, 10)
    padded = torch.nn.functional.pad(tokens, (3, 0), value=7)
    both = torch.cat((padded, padded.flip(1)))
    padding = torch.zeros(2, 13, dtype=torch.bool)
    padding[0, :3] = True

    cache = KeyValueCache(config, 13)
    pieces = [model(both[:, :6], padding=padding[:, :6], cache=cache)]
    pieces += [model(piece, cache=cache) for piece in both[:, 6:].split([1, 4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1)[0, 3:], model(tokens)[0])
    torch.testing.assert_close(torch.cat(pieces, 1)[1], model(both[1:])[0])


def test_documents_and_caches_do_not_mix():

    config = config_of({})
    tokens = random_tokens(config, 1, 4)
    with pytest.raises(ValueError, match=r"document_ids can't go with a cache"):
        build(config)(tokens, document_ids=tokens, cache=KeyValueCache(config, 4))
