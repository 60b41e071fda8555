"""The chunked loss against the plain one."""

import pytest
import torch
import torch.nn.functional as F

import model.loss
from benchmarks.loss_memory import peak_bytes
from model.config import LossConfig
from model.loss import IGNORE_INDEX, mean_loss, token_loss_sum
from tests.model.variants import build, config_of, random_tokens

CONFIGS = [
    LossConfig(),
    LossConfig(z_loss=0.01),
    LossConfig(label_smoothing=0.2),
    LossConfig(z_loss=0.01, label_smoothing=0.2),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=["plain", "z", "smoothed", "both"])


@pytest.fixture(params=[1, 5, 256], ids=["rows of 1", "rows of 5", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", request.param)
    monkeypatch.setattr(model.loss, "CHUNK_ELEMENTS", 1)


def inputs(dtype, tokens=13, width=8, vocabulary=21):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[3::4] = IGNORE_INDEX
    return hidden, weight, targets


def plain_loss_sum(hidden, weight, targets, config):
    """The definition, token by token."""
    total = torch.zeros((), dtype=hidden.dtype)
    for logits, target in zip(hidden @ weight.t(), targets, strict=True):
        if target != IGNORE_INDEX:
            normalizer = logits.logsumexp(0)
            expected = (1 - config.label_smoothing) * logits[target] + config.label_smoothing * logits.mean()
            total = total + normalizer - expected + config.z_loss * normalizer**2
    return total


@every_config
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_plain_formula(dtype, config, chunk):
    hidden, weight, targets = inputs(dtype)
    plain = plain_loss_sum(hidden, weight, targets, config)
    expected = torch.autograd.grad(plain / 7, (hidden, weight))
    loss = token_loss_sum(hidden, weight, targets, config)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss / 7, (hidden, weight)), expected)
    scored = (targets != IGNORE_INDEX).sum()
    torch.testing.assert_close(mean_loss(hidden @ weight.t(), targets, config), plain / scored)


def test_equals_torchs_cross_entropy(chunk):
    hidden, weight, targets = inputs(torch.float64)
    plain = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    torch.testing.assert_close(token_loss_sum(hidden, weight, targets), plain)


@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_sums_in_fp32(dtype, config, chunk):
    hidden, weight, targets = inputs(dtype, tokens=300)
    plain = plain_loss_sum(hidden.double(), weight.double(), targets, config)
    expected = torch.autograd.grad(plain, (hidden, weight))
    loss = token_loss_sum(hidden, weight, targets, config)
    got = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert [g.dtype for g in got] == [dtype, dtype]
    torch.testing.assert_close(loss.double(), plain, rtol=1e-2, atol=0)
    for mine, exact in zip(got, expected, strict=True):
        assert (mine.double() - exact.double()).norm() < 1e-2 * exact.double().norm()


@every_config
def test_gradcheck(config, chunk):
    hidden, weight, targets = inputs(torch.float64, tokens=7, width=3, vocabulary=5)
    assert torch.autograd.gradcheck(lambda h, w: token_loss_sum(h, w, targets, config), (hidden, weight))


def test_a_kept_graph_can_go_backward_twice():
    hidden, weight, targets = inputs(torch.float64)
    loss = token_loss_sum(hidden, weight, targets)
    first = [g.clone() for g in torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)]
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(second, tuple(first))


def test_only_the_gradients_that_are_asked_for():
    hidden, weight, targets = inputs(torch.float64)
    token_loss_sum(hidden.detach(), weight, targets).backward()
    alone, weight.grad = weight.grad, None
    token_loss_sum(hidden, weight, targets).backward()
    torch.testing.assert_close(weight.grad, alone)
    frozen = token_loss_sum(hidden, weight.detach(), targets)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden)[0], hidden.grad)


def test_without_gradients_only_the_loss():
    hidden, weight, targets = inputs(torch.float64)
    with torch.no_grad():
        loss = token_loss_sum(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, token_loss_sum(hidden, weight, targets).detach())


def test_nothing_scored_is_zero():
    hidden, weight, targets = inputs(torch.float32)
    loss = token_loss_sum(hidden, weight, torch.full_like(targets, IGNORE_INDEX), CONFIGS[-1])
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


@every_config
def test_a_row_not_scored_may_hold_anything_finite_or_large(config):
    hidden, weight, targets = inputs(torch.float32)
    expected = token_loss_sum(hidden, weight, targets, config)
    large = hidden.detach().clone()
    large[3] = 1e30
    loss = token_loss_sum(large, weight, targets, config)
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(each, weight)[0] for each in (loss, expected)))


def test_evaluation_reports_the_cross_entropy_alone():
    plain, regularized = (build(config_of({"loss": kind})).double() for kind in ("plain", "smoothed"))
    tokens = random_tokens(plain.config, 2, 12)
    targets = tokens.roll(-1, 1)
    assert regularized.loss_sum(tokens, targets) > plain.loss_sum(tokens, targets) * 1.001
    regularized.eval()
    torch.testing.assert_close(regularized.loss_sum(tokens, targets), plain.loss_sum(tokens, targets))
    torch.testing.assert_close(regularized(tokens, targets)[1], plain(tokens, targets)[1])


def test_a_loss_of_ones_own():
    model = build(config_of({}))
    tokens = random_tokens(model.config, 2, 12)
    targets = tokens.roll(-1, 1)
    logits, loss = model(tokens, targets, loss_func=F.cross_entropy)
    torch.testing.assert_close(loss, model(tokens, targets=targets)[1])
    words = F.one_hot(targets, model.config.vocab_size).float()
    _, loss = model(tokens, words, loss_func=F.mse_loss)
    torch.testing.assert_close(loss, (logits - words).square().mean())


def test_never_more_logits_than_a_chunk(monkeypatch):
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(model.loss, "CHUNK_ELEMENTS", 1)
    hidden, weight, targets = inputs(torch.float32, tokens=100, vocabulary=64)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    with Watch():
        token_loss_sum(hidden, weight, targets, CONFIGS[-1]).backward()
    assert max(sizes) == max(weight.numel(), hidden.numel(), 4 * 64)


def test_memory_is_less_than_a_quarter_of_that_of_whole_logits():
    size = {"vocabulary": 16_384, "tokens": 2048, "width": 64}
    assert peak_bytes("chunks", **size) < peak_bytes("plain", **size) / 4
