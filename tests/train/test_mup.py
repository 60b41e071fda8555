"""Maximal update parametrization: what is wider learns alike, in every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from benchmarks.coordinate_check import (
    LENGTH,
    PARAMETRIZATIONS,
    VOCABULARY,
    config_of,
    final_loss,
    growth,
    train,
)
from model.build import build_model
from model.config import ModelConfig
from model.convert.choose import choose
from model.errors import ConversionError
from model.initialize import initialize
from model.model import Model
from model.models import parse_model
from parallel.engine import set_learning_rate
from parallel.processes import WorkerPool
from tests.train.running import losses, train_here
from train.config import OptimizerConfig
from train.config_file import load_config
from train.errors import ConfigError
from train.optimizer import make_optimizer
from train.verify.shrink import shrink

BASE = 16
NAMES = ("attention", "feed-forward", "residual stream", "logits")


def test_activations_grow_with_the_width_in_the_standard_parametrization_alone() -> None:
    grown = {}
    for parametrization in PARAMETRIZATIONS:
        configs = [config_of(parametrization, width, BASE) for width in (BASE, 4 * BASE, 8 * BASE)]
        sizes = [train(config, rate=0.02, steps=4)[0] for config in configs]
        grown[parametrization] = {name: growth(sizes, name) for name in NAMES}
    assert all(0.5 < factor < 2 for factor in grown["mup"].values()), grown
    assert all(grown["standard"][name] > 2 for name in NAMES), grown
    assert grown["standard"]["residual stream"] > 10, grown


def test_the_best_learning_rate_carries_over() -> None:
    base = {
        rate: final_loss(config_of("mup", BASE, BASE), rate, steps=25) for rate in (1 / 64, 1 / 16, 1 / 4)
    }
    best = min(base, key=base.__getitem__)
    assert best == 1 / 16
    wider = {name: final_loss(config_of(name, 4 * BASE, BASE), best, steps=25) for name in PARAMETRIZATIONS}
    assert wider["mup"] < base[best] < wider["standard"], "wider is better, at a rate that suits it"


def model_of(**settings: Any) -> tuple[ModelConfig, Model]:
    """Four times as wide as its base, with initial weights."""
    values: dict[str, Any] = {
        "vocab_size": 512,
        "d_model": 256,
        "num_layers": 1,
        "residual_scaled_init": False,
        "mup": {"base_width": 64},
    }
    config = parse_model(values | settings)
    assert isinstance(config, ModelConfig)
    model = build_model(config)
    initialize(model, config, seed=0)
    return config, model


@pytest.mark.parametrize(
    ("settings", "wide_in"),
    [
        ({"tie_embeddings": False}, {"head.weight"}),
        ({"moe": {"num_experts": 8}}, {"blocks.0.feedforward.router.weight"}),
        ({"type": "flow_matching", "time_embed_dim": 64}, set()),
        ({"type": "image_codes", "num_classes": 64}, set()),
        ({"positional": {"encoding": "learned"}, "attention": {"bias": True}}, set()),
    ],
)
def test_the_parametrization(settings: dict[str, Any], wide_in: set[str]) -> None:
    """Tensor Programs V, table 8, with the multiplier of a head moved into its weights and rate."""
    config, model = model_of(**settings)
    optimizer = make_optimizer(model, config, OptimizerConfig(lr=1.0, weight_decay=0.1))
    set_learning_rate(optimizer, 0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    narrow = {"embedding.weight", "positions.weight", "time.up.weight", "classes.weight"}
    for name, parameter in model.named_parameters():
        group = groups[id(parameter)]
        is_vector = parameter.dim() == 1
        std, scale = (0.02, 1.0) if name in narrow else (0.005, 0.25) if name in wide_in else (0.01, 0.25)
        assert group["lr"] == 0.5 * (1.0 if is_vector else scale), name
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.0 if is_vector else 0.05), name
        if not is_vector:
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name


def test_a_model_as_wide_as_its_base_is_a_standard_one() -> None:
    standard, base = (config_of(parametrization, 64, base=64) for parametrization in PARAMETRIZATIONS)
    assert base.mup is not None and standard.mup is None
    assert train(base, 0.01, steps=3) == train(standard, 0.01, steps=3)


def test_logits_and_losses_have_the_same_multiplier() -> None:
    config = config_of("mup", 64, BASE)
    model = build_model(config).double()
    initialize(model, config, seed=0)
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH) % VOCABULARY
    logits, loss = model(tokens, tokens.flip(1))
    assert model.loss_sum(tokens, tokens.flip(1)).item() == pytest.approx(loss.item() * tokens.numel())
    hidden = model._run(model.embed(tokens)).states
    assert torch.allclose(logits, hidden @ model.embedding.weight.t() / 4)


def test_scores_are_divided_by_the_width_of_a_head() -> None:
    config, plain = config_of("mup", 64, BASE), config_of("standard", 64)
    attention, other = (build_model(c).blocks[0].attention for c in (config, plain))
    other.load_state_dict(attention.state_dict())
    x = torch.randn(1, 3, 64)
    assert torch.allclose(attention.queries(x) / 16**0.5, other.queries(x) * 4**0.5 / 16)


LAYOUTS = [
    (2, ["parallel.dp_shard=2", "model.tie_embeddings=false"]),
    (2, ["parallel.tp=2"]),
    (2, ["parallel.pp=2"]),
    (2, ["parallel.cp=2", "parallel.ep=2", "model.moe.num_experts=4"]),
    (4, ["parallel.dp_replicate=2", "parallel.tp=2", "model.moe.num_experts=4"]),
]


@pytest.mark.parametrize(("world", "settings"), LAYOUTS, ids=lambda value: " ".join(map(str, [value])))
def test_layouts(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, world: int, settings: list[str]
) -> None:
    common = [f"run.dir={tmp_path}", "precision=fp64", "model.mup.base_width=8", "model.mup.base_head_dim=2"]
    model = [setting for setting in settings if setting.startswith("model.")]
    pools[1].run(train_here, tiny_config, [*common, *model, "run.name=one"])
    pools[world].run(train_here, tiny_config, [*common, *settings, "run.name=many"])
    for one, many in zip(losses(tmp_path / "one"), losses(tmp_path / "many"), strict=True):
        assert many == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_deepspeed(pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, stage: int) -> None:
    common = [f"run.dir={tmp_path}", "model.mup.base_width=8", "model.tie_embeddings=false"]
    engine = ["parallel.engine=deepspeed", f"parallel.deepspeed.stage={stage}", "parallel.dp_shard=2"]
    pools[1].run(train_here, tiny_config, [*common, "run.name=torch"])
    pools[2].run(train_here, tiny_config, [*common, *engine, "run.name=deepspeed"])
    for one, other in zip(losses(tmp_path / "torch"), losses(tmp_path / "deepspeed"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "xavier"}, "model.init=xavier has no scale .* use model.init=gpt2"),
        (
            {"attention": {"variant": "linear"}, "mup": {"base_width": 64, "base_head_dim": 16}},
            "model.mup.base_head_dim=16 has no effect with model.attention.variant=linear",
        ),
    ],
)
def test_what_it_is_not_defined_for_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model_of(**settings)


def test_the_dial_leaves_the_rate_to_the_base(tiny_config: str) -> None:
    dialled = ["model.mup.base_width=64", "dial.depth=2", "model.vocab_size=64"]
    with pytest.raises(ConfigError, match="set optimizer.lr to that along with the dial"):
        load_config(tiny_config, dialled)
    assert load_config(tiny_config, [*dialled, "optimizer.lr=0.01"]).config.optimizer.lr == 0.01


def test_export_takes_what_has_no_multiplier_in_its_forward() -> None:
    architecture, _ = choose(model_of(tie_embeddings=False)[0])
    assert architecture.model_type == "llama"
    with pytest.raises(ConversionError, match=r"model\.mup\.base_width=64"):
        choose(model_of()[0])


def test_a_shrunk_model_stays_as_much_wider_than_its_base() -> None:
    config, _ = model_of(mup={"base_width": 64, "base_head_dim": 16})
    small = shrink(config, [1, 2])
    assert small.d_model < 64
    assert small.width_multiplier == pytest.approx(4, rel=0.2)
