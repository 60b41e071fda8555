"""Every kernel against the naive one, forward and gradients, and which of them is chosen."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model.config import ModelConfig
from model.kernels import attend, choose_kernel, flex_score_mod
from model.masks import make_mask
from model.positions import POSITIONS
from tests.model.variants import build, config_of, random_tokens

MASKS = {
    "causal": {},
    "bidirectional": {"mask_type": "bidirectional"},
    "sliding_window": {"mask_type": "sliding_window", "window_size": 5},
    "local": {"mask_type": "local", "window_size": 4},
    "strided": {"mask_type": "block_sparse", "block_size": 4},
    "fixed": {"mask_type": "block_sparse", "pattern": "fixed", "block_size": 4},
}
LENGTH = 20
every_mask = pytest.mark.parametrize("mask_name", MASKS)
every_bias = pytest.mark.parametrize("encoding", ["none", "alibi", "relative"])


def config_with(mask_name, encoding, **attention):
    section = {"variant": "gqa", "num_heads": 4, "num_kv_heads": 2, **MASKS[mask_name], **attention}
    return ModelConfig(d_model=32, attention=section, positional={"encoding": encoding})


def inputs(width=8, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, LENGTH, 8), (batch, 2, LENGTH, 8), (batch, 2, LENGTH, width))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def run(config, kernel, parts, documents=None, padding=None, **options):
    """Output, and the gradients of the inputs and of the positions' parameters where the kernel has some."""
    attention = config.attention.model_copy(update={"kernel": kernel})
    positions = POSITIONS[config.positional.encoding](config)
    for parameter in positions.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    positions.to(parts[0].dtype)
    x = parts[0].new_zeros(len(parts[0]), LENGTH, 4)
    whole = range(LENGTH)
    mask = make_mask(
        attention,
        whole,
        whole,
        x,
        bias=positions.bias(x),
        heads=positions.heads,
        documents=documents,
        padding=padding,
    )
    assert mask.kernel == kernel
    out = attend(*parts, mask, dropout=0.0, soft_cap=attention.logit_soft_cap)
    if not torch.is_grad_enabled():
        return [out]
    weights = [*parts, *positions.parameters()]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, weights, grad)]


def documents_and_padding(wanted):
    if not wanted:
        return {}
    documents = torch.arange(LENGTH).div(7, rounding_mode="floor").repeat(2, 1)
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[0, :4] = padding[1, 13:] = True
    return {"documents": documents, "padding": padding}


@every_mask
@every_bias
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [8, 4])
def test_flash_is_naive(mask_name, encoding, packed, width):
    config, parts = config_with(mask_name, encoding), inputs(width)
    batch = documents_and_padding(packed)
    flash, naive = (run(config, kernel, parts, **batch) for kernel in ("flash", "naive"))
    torch.testing.assert_close(flash, naive)


@every_mask
@every_bias
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_flex_is_naive(mask_name, encoding, packed, monkeypatch):
    """By flex_attention's own reference; what it compiles to is below."""
    flex_attention = torch.nn.attention.flex_attention.flex_attention
    monkeypatch.setattr("model.kernels._compiled_flex", lambda: flex_attention)
    config, parts = (
        config_with(mask_name, encoding, logit_soft_cap=None if packed else 1.5),
        [p.detach() for p in inputs(4)],
    )
    batch = documents_and_padding(packed)
    flex, naive = (run(config, kernel, parts, **batch) for kernel in ("flex", "naive"))
    torch.testing.assert_close(flex, naive)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_is_naive():
    config = config_with("sliding_window", "relative", logit_soft_cap=1.5)
    parts = [part.detach().float() for part in inputs()]
    flex, naive = (run(config, kernel, parts, **documents_and_padding(True)) for kernel in ("flex", "naive"))
    torch.testing.assert_close(flex, naive)


@pytest.mark.parametrize("encoding", ["alibi", "relative"])
def test_score_mod_has_the_gradients_of_the_formula(encoding):
    """What a device's backward of flex_attention differentiates, traced through vmap as it does."""
    config = config_with("causal", encoding)
    positions = POSITIONS[encoding](config)
    x = torch.zeros(1, 6, 4)
    score_mod = flex_score_mod(positions.bias(x), 2.0, 0)
    scores = torch.randn(1, 4, 6, 6, requires_grad=True)
    places = torch.arange(6)
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        score_mod = torch.vmap(score_mod, in_dims=(0, *dims))
    got = score_mod(scores, torch.arange(1), torch.arange(4), places, places)
    distance = places - places.unsqueeze(1)
    bias = positions.bias(x)(torch.arange(4).view(4, 1, 1), distance)
    expected = 2.0 * torch.tanh(scores / 2.0) + bias
    torch.testing.assert_close(got, expected)
    weights = [scores, *positions.parameters()]
    grad = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(
        torch.autograd.grad(got, weights, grad), torch.autograd.grad(expected, weights, grad)
    )


@pytest.mark.parametrize(
    "choice",
    [
        {"attention.kernel": "flex", "positional.encoding": "alibi", "attention.logit_soft_cap": 2.0},
        {"attention.kernel": "flex", "positional.encoding": "relative", "attention.mask_type": "local"},
        {"attention.variant": "linear"},
    ],
    ids=str,
)
@torch.no_grad()
def test_compiled_blocks_take_every_kind_of_mask(choice, monkeypatch):
    """Each is compiled once for plain and once for packed sequences, whatever the documents."""
    flex_attention = torch.nn.attention.flex_attention.flex_attention
    monkeypatch.setattr("model.kernels._compiled_flex", lambda: flex_attention)
    config = config_of(choice)
    plain, compiled = build(config), build(config)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for block in compiled.blocks:
        block.compile(backend=counter, fullgraph=True)
    ids = torch.arange(12).div(5, rounding_mode="floor").repeat(2, 1)
    for batch in ({}, {"document_ids": ids}, {"document_ids": ids.flip(1).contiguous()}):
        tokens = random_tokens(config, 2, 12, len(batch))
        torch.testing.assert_close(compiled(tokens, **batch), plain(tokens, **batch))
    assert counter.frame_count == 2


def test_naive_is_the_formula():
    query, key, value = inputs()
    config = config_with("sliding_window", "alibi", logit_soft_cap=0.7)
    got = run(config, "naive", [query, key, value])[0]
    for head in range(4):
        for place in range(LENGTH):
            seen = range(max(0, place - 4), place + 1)
            scores = []
            for other in seen:
                score = (query[1, head, place] @ key[1, head // 2, other]) / 8**0.5
                scores.append(0.7 * torch.tanh(score / 0.7) - 2.0 ** (-2 * (head + 1)) * (place - other))
            mean = torch.stack(scores).softmax(0) @ value[1, head // 2, list(seen)]
            torch.testing.assert_close(got[1, head, place], mean)


@pytest.mark.parametrize("kernel", ["flash", "naive"])
def test_what_sees_nothing_gets_zeros(kernel):
    for encoding in ("none", "relative"):
        batch = {"padding": torch.ones(2, LENGTH, dtype=torch.bool)}
        for part in run(config_with("causal", encoding), kernel, inputs(), **batch):
            assert (part == 0).all()


def test_naive_drops_out():
    parts, config = [part.float() for part in inputs()], config_with("causal", "none", kernel="naive")
    whole = range(LENGTH)
    mask = make_mask(config.attention, whole, whole, torch.zeros(2, LENGTH, 4))
    torch.manual_seed(0)
    many = torch.stack([attend(*parts, mask, dropout=0.3, soft_cap=None) for _ in range(2000)]).mean(0)
    exact = attend(*parts, mask, dropout=0.0, soft_cap=None)
    assert (many - exact).abs().max() < 0.2 and not torch.equal(many, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("encoding", ["rope", "alibi", "relative"])
def test_models_agree_whatever_the_kernel(encoding, dtype):
    tokens, losses = None, []
    for kernel in ("naive", "flash", "auto"):
        config = config_of({"attention.kernel": kernel, "positional.encoding": encoding})
        model = build(config).to(dtype)
        tokens = random_tokens(config, 2, 12)
        loss = model.loss_sum(tokens, tokens)
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in model.parameters())])
    tolerance = {"atol": 0.1, "rtol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(losses[1], losses[0], **tolerance)
    assert all(torch.equal(a, b) for a, b in zip(losses[1], losses[2], strict=True))


def chosen(device, needs_tensor=False, cached=False, dtype=torch.bfloat16, **attention):
    x = SimpleNamespace(device=torch.device(device), dtype=dtype)
    config = ModelConfig(d_model=512, attention=attention).attention
    return choose_kernel(config, x, needs_tensor=needs_tensor, cached=cached)


def test_what_auto_takes():
    assert chosen("cpu") == chosen("cuda") == "flash"
    assert chosen("cpu", needs_tensor=True) == "flash"
    assert chosen("cuda", needs_tensor=True) == "flex"
    assert chosen("cuda", needs_tensor=True, cached=True) == "flash"
    assert chosen("cuda", needs_tensor=True, dropout=0.1) == "flash"
    assert chosen("cuda", needs_tensor=True, dtype=torch.float64) == "flash"
    assert chosen("cuda", needs_tensor=True, head_dim=8) == "flash"
    assert chosen("cuda", logit_soft_cap=30.0) == "flex"
    assert chosen("cuda", logit_soft_cap=30.0, dropout=0.1) == "naive"
    assert chosen("cpu", logit_soft_cap=30.0) == "naive"


def test_what_is_asked_for_is_taken_or_refused():
    assert chosen("cuda", kernel="flex") == "flex"
    assert chosen("cpu", kernel="naive") == "naive"
    with pytest.raises(ValueError, match=r"kernel=flex can't train on a CPU.*kernel=auto"):
        chosen("cpu", kernel="flex")
    with torch.no_grad():
        assert chosen("cpu", kernel="flex") == "flex"
    with pytest.warns(UserWarning, match="kernel naive runs instead"):
        assert chosen("cuda", kernel="flex", cached=True, logit_soft_cap=5.0) == "naive"


def test_flex_is_refused_by_a_model_that_trains_on_a_cpu():
    config = config_of({"attention.kernel": "flex"})
    tokens = random_tokens(config, 1, 4)
    with pytest.raises(ValueError, match=r"kernel=flex can't train on a CPU"):
        build(config).loss_sum(tokens, tokens)
