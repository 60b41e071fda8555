"""The table of models: each entry leads to a configuration and a model that fit together."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from model.build import build_model
from model.config import BaseModelConfig, ModelConfig
from model.model import Model
from model.models import MODELS, config_class, model_class, parse_model
from model.weights import declared_weights
from tests.model.bigram import PLACE

SMALL = {"vocab_size": 40, "d_model": 16, "num_layers": 2, "max_seq_len": 16}


@pytest.mark.parametrize("model_type", MODELS)
def test_every_model_is_what_those_who_train_it_expect(model_type: str) -> None:
    config = parse_model(SMALL | {"type": model_type})
    assert type(config) is config_class(model_type) and config.type == model_type
    assert isinstance(config, BaseModelConfig) and config.inputs
    if model_type == "image_codes":
        config = config.model_copy(update={"num_classes": 3})
    with torch.device("meta"):
        model = build_model(config)
    assert type(model) is model_class(model_type) and isinstance(model, Model)
    assert len(model.blocks) == 2
    assert declared_weights(model).keys() == {name for name, _ in model.named_parameters()}
    assert model.cost(config, 16).parameters == sum(p.numel() for p in model.parameters())


def test_a_section_without_a_type_is_a_transformer() -> None:
    assert type(parse_model(SMALL)) is ModelConfig
    assert parse_model(7) == 7


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "flow_maching"}, "model.type='flow_maching' is no model: did you mean 'flow_matching'?"),
        ({"type": "rnn"}, "known are transformer, flow_matching"),
        ({"type": None}, "model.type=None is no model"),
        ({"type": ["x"]}, "is no model"),
        ({"type": "transformer", "time_embed_dim": 8}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_no_model(section: dict, message: str) -> None:
    with pytest.raises((ValueError, ValidationError)) as caught:
        parse_model(section)
    assert message in str(caught.value)


def test_a_model_of_forward_alone_has_a_loss_and_no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "bigram", PLACE)
    model = build_model(parse_model({"type": "bigram", "vocab_size": 7}))
    assert model.layers == [] and model.config.type == "bigram"
    tokens, targets = torch.randint(7, (2, 5)), torch.randint(7, (2, 5))
    targets[0, 2] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) * 9
    torch.testing.assert_close(model.loss_sum(tokens=tokens, targets=targets), expected)
    assert model.bfloat16().loss_sum(tokens=tokens, targets=targets).dtype == torch.float32
