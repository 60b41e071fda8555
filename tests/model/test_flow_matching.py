"""Flow matching: its loss is that of the whole distributions, its refinement goes from noise to tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.build import build_model
from model.count import flops_per_token, parameter_count
from model.draws import uniform
from model.flow_matching.config import FlowMatchingConfig
from model.flow_matching.model import FlowMatching
from model.flow_matching.refine import refine
from model.initialize import initialize

SIZES = {"vocab_size": 40, "d_model": 16, "num_layers": 2, "attention": {"num_heads": 4}, "ffn": {"d_ff": 32}}


def make(**settings: Any) -> FlowMatching:
    config = FlowMatchingConfig(**SIZES | settings)
    model = build_model(config)
    assert isinstance(model, FlowMatching)
    initialize(model, config, seed=0)
    return model


def batch(sequences: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds and targets, of which two aren't scored."""
    draw = torch.Generator().manual_seed(1)
    targets = torch.randint(40, (sequences, length), generator=draw)
    targets[0, 4] = targets[2, 8] = -100
    return torch.tensor([5, -7, 2**61, 8, 9][:sequences]), targets


def test_defaults() -> None:
    config = FlowMatchingConfig(**SIZES)
    assert (config.attention.mask_type, config.positional.encoding) == ("bidirectional", "none")
    assert config.time_embed_dim == 256
    assert FlowMatchingConfig.model_validate(config.model_dump()) == config
    asked = FlowMatchingConfig(**SIZES | {"positional": {"encoding": "rope"}})
    assert asked.positional.encoding == "rope"
    with pytest.raises(ValueError, match=r"model.time_embed_dim=7 is odd.*use 8"):
        FlowMatchingConfig(**SIZES | {"time_embed_dim": 7})


@pytest.mark.parametrize("path", ["linear", "mixture"])
def test_the_loss_is_that_of_whole_distributions(path: str) -> None:
    model = make(path=path).double()
    seeds, targets = batch()
    t, noise = model.draw(seeds, 9)
    data = F.one_hot(targets.where(targets != -100, noise), 40).double()
    weight = t[:, None]
    if path == "mixture":
        weight = (uniform(seeds, 9, stream=2) < t[:, None]).double()
    xt = torch.lerp(F.one_hot(noise, 40).double(), data, weight.expand(3, 9)[..., None])
    _, mean = model(t, xt, targets=targets)
    summed = model.loss_sum(seeds=seeds, targets=targets)
    torch.testing.assert_close(summed / 25, mean)
    kept = torch.autograd.grad(summed / 25, list(model.parameters()))
    for ours, theirs in zip(kept, torch.autograd.grad(mean, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_targets_may_be_distributions() -> None:
    model = make()
    _, targets = batch()
    t, xt = torch.rand(3), torch.rand(3, 9, 40).softmax(-1)
    logits, of_tokens = model(t, xt, targets=targets.clamp(min=0))
    same, of_distributions = model(t, xt, targets=F.one_hot(targets.clamp(min=0), 40).float())
    assert logits.shape == (3, 9, 40) and torch.equal(logits, same)
    torch.testing.assert_close(of_tokens, of_distributions)


def test_a_token_sees_all_others_and_the_time_but_no_positions() -> None:
    model = make().double()
    t, xt = torch.rand(2, dtype=torch.float64), torch.rand(2, 6, 40, dtype=torch.float64).softmax(-1)
    logits = model(t, xt)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(model(t, xt[:, order]), logits[:, order])
    changed = xt.clone()
    changed[:, 5] = changed[:, 5].flip(-1)
    assert (model(t, changed)[:, 0] != logits[:, 0]).any()
    assert (model(t + 0.01, xt) != logits).any(dim=-1).all()


@pytest.mark.parametrize("encoding", ["rope", "learned", "alibi"])
def test_the_time_takes_no_position(encoding: str) -> None:
    model = make(positional={"encoding": encoding}, max_seq_len=6)
    assert model(torch.rand(2), torch.rand(2, 6, 40)).shape == (2, 6, 40)


def test_draws_belong_to_the_sequence() -> None:
    model = make().double()
    seeds, targets = batch(5)
    whole = model.loss_sum(seeds=seeds, targets=targets)
    parts = sum(model.loss_sum(seeds=seeds[i : i + 2], targets=targets[i : i + 2]) for i in range(0, 5, 2))
    torch.testing.assert_close(parts, whole)
    assert model.loss_sum(seeds=seeds + 1, targets=targets) != whole


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return result


def test_nothing_of_the_vocabulary_times_all_tokens_is_made() -> None:
    model = make(vocab_size=20_000)
    targets = torch.randint(20_000, (4, 512))
    with Largest() as largest:
        model.loss_sum(seeds=torch.arange(4), targets=targets).backward()
    assert largest.elements <= 256 * 20_000


@pytest.mark.parametrize("path", ["linear", "mixture"])
def test_learns_and_refines(path: str) -> None:
    model = make(path=path, positional={"encoding": "learned"}, max_seq_len=8)
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17, 18]])
    targets = rows.repeat(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        seeds = torch.arange(16) + 1000 * step
        loss = model.loss_sum(seeds=seeds, targets=targets) / targets.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])

    noise = torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(0))
    tokens = refine(model, noise, 16)
    assert set(tokens.flatten().tolist()) <= set(rows.flatten().tolist())
    assert torch.equal(tokens, refine(model, noise, 16)), "the noise alone decides"
    known = refine(model, noise, 16, prompt=rows[1:, :4].expand(4, 4))
    assert torch.equal(known[:, :4], rows[1:, :4].expand(4, 4))
    if path == "mixture":
        assert all(row in rows.tolist() for row in tokens.tolist()), "whole rows, not places by themselves"
        assert torch.equal(known, rows[1:].expand(4, 8))
    assert (refine(model, noise, 4, vocab_size=5) < 5).all()


def test_sample_scales_logits_without_dropout() -> None:
    model = make(dropout=0.5).train()
    t, xt = torch.rand(2), torch.rand(2, 6, 40)
    warm, plain = model.sample(t, xt, temperature=2.0), model.sample(t, xt)
    torch.testing.assert_close(2 * warm, plain)
    assert model.training and not plain.requires_grad
    with pytest.raises(ValueError, match="temperature=0: it must be above 0"):
        model.sample(t, xt, temperature=0)
    with pytest.raises(ValueError, match="steps=0: it must be 1 or more"):
        refine(model, torch.zeros(1, 3, dtype=torch.int64), 0)


@pytest.mark.parametrize("tied", [True, False])
def test_counts(tied: bool) -> None:
    model = make(tie_embeddings=tied, d_model=32, time_embed_dim=64)
    count = parameter_count(model.config)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.embedding == 40 * 32
    t, xt = torch.rand(2), torch.rand(2, 16, 40)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model._run(model.embedding(torch.zeros(2, 16, dtype=torch.int64)), prefix=model.time(t))
        model._logits(hidden, None).sum().backward()  # type: ignore[union-attr]
    assert flops_per_token(model.config, 16) * xt[..., 0].numel() == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )
