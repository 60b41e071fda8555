"""Experts against a dense loop over all of them; capacity, auxiliary losses, balance, counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.feedforward import ACTIVATIONS, FEEDFORWARD, gelu_tanh
from model.initialize import initialize
from model.loss import IGNORE_INDEX
from model.moe import MoE, expert_statistics, take_expert_counts, update_balance
from tests.model.hugging_face import DeepseekV3Config, DeepseekV3MoE
from tests.model.variants import build, config_of, random_tokens


def make(dtype=torch.float64, d_model=8, ffn=None, seed=0, **moe):
    """A layer with random weights, biases too."""
    config = ModelConfig(d_model=d_model, attention={"num_heads": 1}, ffn=ffn or {}, moe={"d_ff": 12} | moe)
    layer = MoE(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer


def random_input(batch, length, width, dtype=torch.float64, seed=0):
    x = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


def dense(layer, x):
    """Every expert on every token, weighted by its score where it is among the token's top_k."""
    moe, ffn, experts = layer.router.config, layer.experts.config, layer.experts
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ layer.router.weight.to(wide).t()
    scores = logits.softmax(-1) if moe.router == "softmax" else logits.sigmoid()
    threshold = scores.sort(dim=-1, descending=True).values[..., moe.top_k - 1, None]
    weights = scores.where(scores >= threshold, 0.0)
    if moe.normalize_top_k:
        weights = weights / weights.sum(-1, keepdim=True)

    def project(h, name, expert):
        bias = getattr(experts, f"{name}_bias")
        return F.linear(h, getattr(experts, name)[expert], None if bias is None else bias[expert])

    total = 0.0 if layer.shared is None else layer.shared(x)
    for expert in range(moe.num_experts):
        hidden = project(x, "up", expert)
        if ffn.variant == "mlp":
            hidden = ACTIVATIONS[ffn.activation](hidden)
        else:
            gate = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": gelu_tanh, "glu": torch.sigmoid}[
                ffn.variant
            ]
            hidden = gate(project(x, "gate", expert)) * hidden
        total = total + project(hidden, "down", expert) * weights[..., expert, None].to(x.dtype)
    return total


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.sampled_from([4, 6, 8, 16])),
    d_ff=st.sampled_from([3, 8, 16]),
    experts=st.integers(2, 6),
    data=st.data(),
)
def test_equals_a_dense_loop_over_the_experts(dtype, shape, d_ff, experts, data):
    layer = make(
        dtype,
        shape[-1],
        {"variant": data.draw(st.sampled_from(list(FEEDFORWARD))), "bias": data.draw(st.booleans())},
        num_experts=experts,
        top_k=(top_k := data.draw(st.integers(1, experts))),
        router=data.draw(st.sampled_from(["softmax", "sigmoid"])),
        normalize_top_k=top_k > 1 and data.draw(st.booleans()),
        num_shared_experts=data.draw(st.integers(0, 2)),
        d_ff=d_ff,
    )  # fmt: skip
    x = random_input(*shape, dtype)
    seed = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = [x, *layer.parameters()]
    results = []
    for output in (layer(x)[0], dense(layer, x)):
        gradients = torch.autograd.grad(output, inputs, seed)
        results.append([part.double() for part in (output, *gradients)])
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for mine, expected in zip(*results, strict=True):
        assert (mine - expected).norm() <= bound * (1 + expected.norm())


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_gradcheck(router):
    layer = make(
        d_model=4,
        ffn={"bias": True},
        num_experts=3,
        router=router,
        capacity_factor=1.0,
        d_ff=3,
        load_balance_loss=0.5,
        router_z_loss=0.25,
    )
    x = random_input(2, 4, 4)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        output, routing = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)
        return output, routing.auxiliary

    assert torch.autograd.gradcheck(run, (x, *parameters))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 2.5), st.integers(1, 3), st.integers(1, 10), st.integers(0, 9))
def test_an_expert_drops_what_comes_after_its_capacity(factor, top_k, length, seed):
    layer = make(num_experts=3, top_k=top_k, capacity_factor=factor, normalize_top_k=False)
    x = random_input(2, length, 8, seed=seed)
    weights, chosen, routing = layer.router(x)
    whole, _, all_kept = layer.eval().router(x)
    capacity = math.ceil(factor * length * top_k / 3)
    dropped = [0, 0, 0]
    for sequence in range(2):
        taken = [0, 0, 0]
        for place in range(length):
            for choice in range(top_k):
                expert = chosen[sequence, place, choice]
                taken[expert] += 1
                kept = taken[expert] <= capacity
                dropped[expert] += not kept
                expected = whole[sequence, place, choice] if kept else 0.0
                assert weights[sequence, place, choice] == expected
    assert routing.counts[1].tolist() == dropped
    assert (whole > 0).all() and not all_kept.counts[1].any()
    assert torch.equal(routing.counts[0], chosen.flatten().bincount(minlength=3))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_auxiliary_losses_are_those_of_each_sequence(router):
    layer = make(num_experts=4, router=router, load_balance_loss=0.5, router_z_loss=0.25)
    x = random_input(3, 7, 8)
    _, chosen, routing = layer.router(x)
    for sequence in range(3):
        logits = x[sequence] @ layer.router.weight.t()
        scores = logits.softmax(-1)
        if router == "sigmoid":
            scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        balance = sum((chosen[sequence] == e).sum() / (7 * 2) * scores[:, e].mean() * 4 for e in range(4))
        expected = 0.5 * balance + 0.25 * logits.exp().sum(-1).log().square().mean()
        torch.testing.assert_close(routing.auxiliary[sequence], expected)


def test_an_even_load_has_a_balance_loss_of_one():
    layer = make(num_experts=4, load_balance_loss=1.0)
    torch.nn.init.zeros_(layer.router.weight)
    assert layer.router(random_input(2, 5, 8))[2].auxiliary.tolist() == pytest.approx([1.0, 1.0])


EXPERTS = {"num_experts": 4, "d_ff": 12, "load_balance_loss": 0.5, "router_z_loss": 0.1}


def model_and_batch(**moe):
    config = config_of({}, moe=EXPERTS | moe)
    tokens = random_tokens(config, 4, 12)
    targets = tokens.roll(-1, 1)
    for sequence in range(4):
        targets[sequence, 12 - 3 * sequence :] = IGNORE_INDEX
    return build(config).double(), tokens, targets


def test_the_loss_of_a_batch_is_the_sum_over_its_parts():
    model, tokens, targets = model_and_batch(capacity_factor=1.0)
    parameters = list(model.parameters())
    whole = model.loss_sum(tokens, targets)
    parts = [model.loss_sum(tokens[cut], targets[cut]) for cut in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), whole)
    expected = torch.autograd.grad(whole, parameters)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), parameters), expected)


def test_auxiliary_losses_are_learned_from_but_not_reported():
    model, tokens, targets = model_and_batch()
    routers = [block.feedforward.router for block in model.blocks]
    weights = [router.weight for router in routers]
    loss = model.loss_sum(tokens, targets)
    with_auxiliary = torch.autograd.grad(loss, weights)
    for router in routers:
        router.config = router.config.model_copy(update={"load_balance_loss": 0.0, "router_z_loss": 0.0})
    plain = model.loss_sum(tokens, targets)
    without = torch.autograd.grad(plain, weights)
    torch.testing.assert_close(loss, plain, rtol=1e-15, atol=0)
    assert all((a - b).norm() > 0.1 * b.norm() for a, b in zip(with_auxiliary, without, strict=True))


def skewed(batch):
    """Tokens that have much in common, so that a router prefers few experts."""
    x = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
    return x + 2.0


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_the_bias_evens_the_load(router):
    layer = make(num_experts=6, router=router, balance="bias", bias_rate=0.005)
    layer.router.weight.data *= 0.2
    loads = []
    for step in range(120):
        layer.record(layer(skewed(step))[1])
        counts = take_expert_counts(layer)
        loads.append(expert_statistics(counts).load.max().item())
        update_balance(layer, counts)
    assert loads[0] > 0.4
    assert sum(loads[-10:]) / 10 < 1.3 / 6


def test_the_bias_moves_by_its_rate_and_not_in_a_skipped_step():
    layer = make(num_experts=4, balance="bias", bias_rate=0.5)
    counts = torch.tensor([[[9, 1, 5, 5], [0, 0, 0, 0]]])
    update_balance(layer, counts, torch.tensor(0.0))
    assert layer.router.selection_bias.tolist() == [0, 0, 0, 0]
    update_balance(layer, counts)
    assert layer.router.selection_bias.tolist() == [-0.5, 0.5, 0, 0]
    assert "router.selection_bias" in layer.state_dict()
    initialize(model := build(config_of({}, moe=EXPERTS | {"balance": "bias"})), model.config, seed=0)
    assert not any(buffer.any() for buffer in model.buffers())


@pytest.mark.parametrize("recompute", [False, True])
def test_counts_of_training_alone_each_token_once(recompute):
    model, tokens, targets = model_and_batch(num_shared_experts=1, capacity_factor=0.5)
    if recompute:
        for block in model.blocks:
            forward = block.forward
            block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    for _ in range(2):
        model.loss_sum(tokens, targets).backward()
    counts = take_expert_counts(model)
    assert counts.shape == (2, 2, 4)
    assert counts[:, 0].sum(dim=1).tolist() == [2 * 4 * 12 * 2] * 2
    load, dropped = expert_statistics(counts)
    torch.testing.assert_close(load.sum(dim=1), torch.ones(2))
    assert (dropped > 0.3).all() and (dropped < 0.6).all()
    with torch.no_grad():
        model(tokens)
    model.eval().loss_sum(tokens, targets)
    assert take_expert_counts(model) is None


def test_routes_as_deepseek_v3_does():
    config = DeepseekV3Config(
        hidden_size=8,
        moe_intermediate_size=12,
        n_routed_experts=6,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        n_shared_experts=2,
        routed_scaling_factor=1.0,
    )
    theirs = DeepseekV3MoE(config).eval()
    ours = make(torch.float32, num_experts=6, top_k=3, router="sigmoid", num_shared_experts=2, balance="bias")
    bias = torch.linspace(-0.3, 0.3, 6)
    ours.router.selection_bias.copy_(bias)
    theirs.gate.e_score_correction_bias = bias
    theirs.gate.weight.data = ours.router.weight.data
    for name in ("gate", "up", "down"):
        getattr(theirs.shared_experts, f"{name}_proj").weight.data = getattr(ours.shared, name).weight.data
        for number, expert in enumerate(theirs.experts):
            getattr(expert, f"{name}_proj").weight.data = getattr(ours.experts, name).data[number]
    x = random_input(2, 9, 8, torch.float32)
    torch.testing.assert_close(ours(x)[0], theirs(x), atol=1e-5, rtol=1e-5)
