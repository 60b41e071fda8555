"""Blocks that recompute: what they keep, that they compute the same, and what a budget makes of them."""

import functools
import gc
import re
from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from model.block import Block
from model.build import build_model
from model.initialize import initialize
from model.model import Model
from model.models import parse_model
from model.transformer import Trunk
from parallel.activation_budget import Budgeted, choose, total
from parallel.activation_checkpoint import (
    Recompute,
    checkpoint_activations,
    named_layers,
    recompute_by_name,
)
from parallel.activation_memory import KeptBytes, measure, measure_layers
from parallel.build import Blueprint
from parallel.config import ActivationCheckpointConfig, ParallelConfig
from parallel.errors import LayoutError
from parallel.fit import check_budget
from parallel.kept_operators import ATTENTION, MATRIX_PRODUCTS, aten, keeps
from parallel.layout import Layout
from parallel.mesh import mesh_of
from parallel.pipeline import Stage
from parallel.processes import WorkerPool
from tests.parallel.parity import MODEL, make_engine, merged

SHAPE = {
    "vocab_size": 67,
    "d_model": 64,
    "num_layers": 2,
    "max_seq_len": 64,
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "ffn": {"d_ff": 160},
}
BATCH, LENGTH = 2, 64
MOE = {"num_experts": 4, "d_ff": 48, "load_balance_loss": 0.1}
MODELS: list[dict[str, Any]] = [
    {},
    {"dropout": 0.1, "ffn": {"dropout": 0.1, "bias": True}, "norm": {"type": "layernorm"}},
    {"moe": MOE, "positional": {"encoding": "alibi"}},
    {"attention": {"variant": "linear"}, "norm": {"placement": "sandwich"}},
    {"attention": {"kernel": "naive"}, "ffn": {"variant": "mlp"}, "parallel_layers": True},
    {"type": "encoder_decoder", "max_source_len": 32},
    {"type": "flow_matching"},
]


def make(settings: dict[str, Any]) -> Model:
    """A model with weights."""
    config = parse_model(merged(SHAPE, settings))
    model = build_model(config)
    initialize(model, config, seed=0)
    return model


def on_twin(settings: dict[str, Any], batch: int = BATCH) -> KeptBytes:
    """Runs in a worker: what is measured before anything is allocated."""
    blueprint = Blueprint(
        parse_model(merged(SHAPE, settings)), ParallelConfig(), mesh_of(Layout(), "cpu"), None
    )
    return measure(blueprint, torch.float32, (batch, LENGTH))


@pytest.mark.parametrize("settings", MODELS, ids=str)
def test_a_twin_keeps_what_real_tensors_do(pools: dict[int, WorkerPool], settings: dict[str, Any]) -> None:
    model = make(settings)
    targets = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    real = measure_layers(
        named_layers(model), lambda: model.loss_sum(**model.example(BATCH, LENGTH), targets=targets)
    )
    (twin,) = pools[1].run(on_twin, settings)
    assert twin == real
    for kept in twin.values():
        assert kept["none"] > kept["selective"] > kept["full"] >= BATCH * 32 * 64 * 4


@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("settings", [{}, {"moe": MOE}], ids=["dense", "experts"])
def test_what_is_measured_is_what_memory_grows_by(
    pools: dict[int, WorkerPool], settings: dict[str, Any], recompute: Recompute
) -> None:
    """By the profiler's count of what the allocator hands out and takes back."""
    model = make(settings)
    assert isinstance(model, Trunk)
    x = torch.randn(16, LENGTH, 64, requires_grad=True)
    model.middle(x)
    checkpoint_activations(model, lambda _: recompute)
    gc.collect()  # lest the memory of others is handed back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        hidden = model.middle(x)
    assert profiled.profiler is not None
    grown = sum(
        event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    assert hidden.states.requires_grad
    (measured,) = pools[1].run(on_twin, settings, 16)
    # the first block's input was there before, and the last one's output is there now; what is measured leaves out
    # the rotation, and the random state with which a block begins again
    assert grown == pytest.approx(sum(kept[recompute] for kept in measured.values()), rel=0.04)


def gradients(model: Model, seed: int = 3) -> list[Tensor]:
    """Of a step with dropout, and the loss."""
    torch.manual_seed(seed)
    inputs = model.example(BATCH, LENGTH)
    if "tokens" in inputs:
        inputs["tokens"] = torch.randint(0, 67, inputs["tokens"].shape)
    loss = model.loss_sum(**inputs, targets=torch.randint(0, 67, (BATCH, LENGTH)))
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("settings", MODELS, ids=str)
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_equal_to_the_bit(settings: dict[str, Any], mode: Recompute) -> None:
    dropped = merged({"dropout": 0.2, "ffn": {"dropout": 0.2}}, settings)
    plain, recomputed = make(dropped), make(dropped)
    checkpoint_activations(recomputed, lambda _: mode)
    for ours, theirs in zip(gradients(recomputed), gradients(plain), strict=True):
        assert torch.equal(ours, theirs)


class Products(TorchDispatchMode):
    """Counts what is dear."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator in (*MATRIX_PRODUCTS, *ATTENTION)
        return operator(*args, **(kwargs or {}))


def test_selective_makes_no_product_again() -> None:
    counts = {}
    for mode in get_args(Recompute):
        model = make({})
        checkpoint_activations(model, functools.partial(lambda how, _: how, mode))
        with Products() as products:
            gradients(model)
        counts[mode] = products.count
    assert counts["selective"] == counts["none"] < counts["full"]


def test_attention_that_draws_is_made_again() -> None:
    operator, x = aten._scaled_dot_product_efficient_attention.default, torch.empty(0)
    assert keeps(operator, (x, x, x, None, True), {})
    assert keeps(operator, (x, x, x, None, True, 0.0), {})
    assert not keeps(operator, (x, x, x, None, True, 0.1), {})
    assert not keeps(aten._scaled_dot_product_flash_attention.default, (x, x, x), {"dropout_p": 0.1})
    assert not keeps(aten.native_dropout.default, (x, 0.1, True), {})


def test_every_nth_counts_the_layers_of_the_whole_model() -> None:
    model = make({"num_layers": 6})
    assert isinstance(model, Trunk)
    Stage(model, 1, range(3, 6), is_last=True, context=None)
    checkpoint_activations(model, recompute_by_name(ActivationCheckpointConfig(mode="every_nth", n=2)))
    changed = [
        name for name, layer in named_layers(model).items() if layer.forward != Block.forward.__get__(layer)
    ]
    assert changed == ["blocks.4"]


def sizes() -> st.SearchStrategy[dict[Recompute, int]]:
    """What a layer keeps."""
    amounts = st.lists(st.integers(1, 50), min_size=3, max_size=3).map(lambda few: sorted(few, reverse=True))
    return amounts.map(lambda few: dict(zip(get_args(Recompute), few, strict=True)))


@given(st.lists(sizes(), min_size=1, max_size=5), st.integers(1, 260))
def test_as_few_recompute_as_a_budget_allows(layers: list[dict[Recompute, int]], budget: int) -> None:
    kept = {f"blocks.{number}": layer for number, layer in enumerate(layers)}
    fits = [plan for plan in _plans(kept) if total(kept, plan) <= budget]
    if not fits:
        with pytest.raises(LayoutError, match=f"at least {sum(layer['full'] for layer in layers)}B, or"):
            choose(kept, budget)
        return
    chosen = choose(kept, budget)
    assert total(kept, chosen) <= budget
    assert _number(chosen, "full") == min(_number(plan, "full") for plan in fits)
    # of the plans with the same layers in full
    alike = [plan for plan in fits if all((plan[n] == "full") == (chosen[n] == "full") for n in kept)]
    assert _number(chosen, "none") == max(_number(plan, "none") for plan in alike)


def _plans(kept: KeptBytes) -> Iterator[dict[str, Recompute]]:
    for plan in product(get_args(Recompute), repeat=len(kept)):
        yield dict(zip(kept, plan, strict=True))


def _number(plan: dict[str, Recompute], recompute: Recompute) -> int:
    return sum(how == recompute for how in plan.values())


def test_early_layers_recompute_first() -> None:
    layer: dict[Recompute, int] = {"none": 100, "selective": 50, "full": 10}
    chosen = choose({f"blocks.{number}": layer for number in range(12)}, 700)
    described = "blocks.0-9 selective, blocks.10-11 none; 700B kept of a micro-batch"
    assert str(Budgeted(chosen, 700)) == described
    assert list(choose({"blocks.0": layer, "blocks.1": layer}, 60).values()) == ["full", "selective"]


@pytest.mark.parametrize("layout", [{"tp": 2}, {"cp": 2}, {"pp": 2}])
def test_what_no_recomputation_saves_is_known_beforehand(
    pools: dict[int, WorkerPool], layout: dict[str, int]
) -> None:
    (said, _) = pools[2].run(what_it_comes_to, layout, 1, {})
    with pytest.raises(LayoutError, match=re.escape(said)):
        check_budget(Layout(**layout), ParallelConfig(**layout), "fp64", parse_model(MODEL), 1, (2, 12))


def what_it_comes_to(layout: dict[str, int], budget: int, model: dict[str, Any]) -> str:
    """Runs in every worker."""
    settings = {"activation_checkpoint": {"mode": "auto", "memory_budget": budget}}
    try:
        return str(make_engine(layout, 2, "fp64", settings, model).budgeted)
    except LayoutError as error:
        return str(error)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"cp": 2}, {"dp_shard": 2, "ep": 2}, {"pp": 2}])
def test_all_ranks_choose_alike(pools: dict[int, WorkerPool], layout: dict[str, int]) -> None:
    # odd widths, so that ranks have different shares
    model = {"num_layers": 5, "ffn": {"d_ff": 41}, "moe": {"num_experts": 4, "d_ff": 21, "first_layer": 3}}
    first, second = pools[2].run(what_it_comes_to, layout, 80_000, model)
    assert first == second
    assert re.match(r"blocks.0.* blocks.(3-)?4 \w+; [\d.]+KB kept", first)


def test_a_budget_below_the_least_is_refused(pools: dict[int, WorkerPool]) -> None:
    # a block keeps its input: 2 sequences of 12 tokens, 24 wide, in 8 bytes
    (message,) = pools[1].run(what_it_comes_to, {}, 9_000, {})
    assert (
        message.startswith("activation_checkpoint.memory_budget=9KB is less than")
        and "at least 9.22KB" in message
    )
    with pytest.raises(LayoutError, match=re.escape(message)):  # before any process is started
        check_budget(Layout(), ParallelConfig(), "fp64", parse_model(MODEL), 9_000, (2, 12))
    check_budget(Layout(), ParallelConfig(), "fp64", parse_model(MODEL), 9_216, (2, 12))
    (fits,) = pools[1].run(what_it_comes_to, {}, 9_220, {})
    assert fits == "blocks.0-1 full; 9.22KB kept of a micro-batch"


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("1.5GiB", 3 * 2**29), ("64 kb", 64_000), (4096.0, 4096), ("1e9", 10**9)],
)
def test_budgets_as_people_write_them(text: Any, size: int) -> None:
    assert ActivationCheckpointConfig(mode="auto", memory_budget=text).memory_budget == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "auto"}, "set activation_checkpoint.memory_budget, 20GB for example"),
        ({"mode": "full", "memory_budget": "1GB"}, "has no effect with activation_checkpoint.mode=full"),
        ({"mode": "auto", "memory_budget": "lots"}, "'lots' is not a size: write 20GB"),
        ({"mode": "auto", "memory_budget": "5iB"}, "'5iB' is not a size"),
        ({"mode": "auto", "memory_budget": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationCheckpointConfig(**settings)
