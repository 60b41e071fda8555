"""The chunked loss against the plain one."""

import pytest
import torch
import torch.nn.functional as F

import model.loss
from model.loss import IGNORE_INDEX, token_loss_sum


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_plain_cross_entropy(dtype, chunk):
    hidden, weight, targets = inputs(dtype)
    plain = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    expected = torch.autograd.grad(plain / 7, (hidden, weight))
    loss = token_loss_sum(hidden, weight, targets)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss / 7, (hidden, weight)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_sums_in_fp32(dtype, chunk):
    hidden, weight, targets = inputs(dtype, tokens=600)
    plain = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum")
    expected = torch.autograd.grad(plain, (hidden, weight))
    loss = token_loss_sum(hidden, weight, targets)
    got = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert [g.dtype for g in got] == [dtype, dtype]
    torch.testing.assert_close(loss.double(), plain, rtol=1e-2, atol=0)
    for mine, exact in zip(got, expected, strict=True):
        assert (mine.double() - exact.double()).norm() < 1e-2 * exact.double().norm()


def test_gradcheck(chunk):
    hidden, weight, targets = inputs(torch.float64, tokens=7, width=3, vocabulary=5)
    assert torch.autograd.gradcheck(lambda h, w: token_loss_sum(h, w, targets), (hidden, weight))


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
    loss = token_loss_sum(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_a_row_not_scored_may_hold_anything_finite_or_large():
    hidden, weight, targets = inputs(torch.float32)
    hidden = hidden.detach().clone()
    expected = token_loss_sum(hidden, weight.detach(), targets)
    hidden[3] = 1e30
    assert torch.equal(token_loss_sum(hidden, weight.detach(), targets), expected)


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
        token_loss_sum(hidden, weight, targets).backward()
    assert max(sizes) == max(weight.numel(), hidden.numel(), 4 * 64)
