"""The optimizer's groups."""

from typing import Any

import pytest
import torch

from model.build import build_model
from model.config import ModelConfig
from model.model import Model
from train.config import OptimizerConfig
from train.optimizer import make_optimizer


def tiny_model(**settings: Any) -> Model:
    """One layer, with biases wherever there may be any."""
    biased: dict[str, Any] = {
        "attention": {"num_heads": 2, "bias": True, "qk_norm": True},
        "ffn": {"d_ff": 6, "bias": True},
        "norm": {"type": "layernorm"},
    }
    return build_model(ModelConfig(vocab_size=8, d_model=4, num_layers=1, **biased | settings))


def decaying(model: Model) -> set[str]:
    """The names of the parameters that decay by the configured rate; the others must not decay at all."""
    optimizer = make_optimizer(model, model.config, OptimizerConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: decay.pop(id(parameter)) for name, parameter in model.named_parameters()}
    assert not decay and set(rates.values()) <= {0.0, 0.3}
    return {name for name, rate in rates.items() if rate}


def test_linear_weights_and_embeddings_decay() -> None:
    attention = {f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value", "output")}
    feedforward = {f"blocks.0.feedforward.{part}.weight" for part in ("gate", "up", "down")}
    assert decaying(tiny_model()) == {"embedding.weight"} | attention | feedforward
    learned = tiny_model(positional={"encoding": "learned"}, tie_embeddings=False)
    assert decaying(learned) - decaying(tiny_model()) == {"positions.weight", "head.weight"}


@pytest.mark.parametrize(
    ("settings", "matrices"),
    [
        ({"positional": {"encoding": "relative"}}, {"positions.weight"}),
        (
            {"moe": {"num_experts": 2, "top_k": 1, "d_ff": 6}},
            {f"blocks.0.feedforward.experts.{part}_bias" for part in ("gate", "up", "down")},
        ),
    ],
)
def test_biases_of_two_dimensions_do_not_decay(settings: dict[str, Any], matrices: set[str]) -> None:
    model = tiny_model(**settings)
    parameters = dict(model.named_parameters())
    assert {parameters[name].dim() for name in matrices} == {2}
    assert not matrices & decaying(model)
    assert {name for name, parameter in parameters.items() if parameter.dim() > 1} - matrices == decaying(
        model
    )


def test_without_a_gradient_only_what_decays_shrinks() -> None:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    shrinking = decaying(model)
    optimizer = make_optimizer(model, model.config, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = torch.tensor(0.95 if name in shrinking else 1.0).item()
        assert parameter.unique().tolist() == [expected], name
