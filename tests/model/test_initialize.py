"""Initial weights: a function of seed, name and index, with GPT-2's scales."""

import math

import pytest
import torch

from model.config import ModelConfig
from model.initialize import initial_rows
from model.weights import Weight, declared_weights
from tests.model.variants import build, config_of

CONFIG = ModelConfig(vocab_size=1000, d_model=128, num_layers=3, attention={"bias": True})


def rows(start, stop, name="embedding.weight", seed=0, shape=(1000, 16), init="normal"):
    return initial_rows(name, Weight("vocabulary", init), shape, CONFIG, seed, start, stop)


@pytest.mark.parametrize(
    "start, stop", [(0, 1), (0, 128), (127, 129), (300, 301), (5, 640), (990, 1000), (7, 7)]
)
def test_any_cut_is_bit_equal(start, stop):
    assert torch.equal(rows(start, stop), rows(0, 1000)[start:stop])


def test_seed_name_and_block_all_matter():
    base = rows(0, 128)
    for other in (rows(0, 128, seed=1), rows(0, 128, name="head.weight"), rows(128, 256)):
        assert not torch.equal(base, other)
    assert torch.equal(base, rows(0, 128, shape=(128, 16)))


def test_the_device_and_dtype_in_force_do_not_matter():
    with torch.device("meta"):
        assert torch.equal(rows(0, 4), rows(0, 1000)[:4])
    assert rows(0, 4).dtype == torch.float32


def test_scales():
    model = build(CONFIG)
    weights = declared_weights(model)
    for name, parameter in model.named_parameters():
        init = weights[name].init
        if init in ("zeros", "ones"):
            assert (parameter == (init == "ones")).all()
            continue
        std = 0.02 / math.sqrt(2 * 3) if init == "residual" else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.05)
        assert abs(parameter.mean().item()) < 0.05 * std
    residual = {name.split(".", 2)[2] for name, weight in weights.items() if weight.init == "residual"}
    assert residual == {"attention.output.weight", "feedforward.down.weight"}


@pytest.mark.parametrize("start, stop", [(0, 1), (100, 180), (127, 420), (360, 420), (300, 300)])
@pytest.mark.parametrize("init", ["gpt2", "xavier"])
def test_experts_are_cut_bit_equal_too(start, stop, init):
    """Between them, and in the midst of one's rows."""
    config = CONFIG.model_copy(update={"init": init})
    weight = Weight("experts", "residual")
    cut, whole = (initial_rows("down", weight, (7, 60, 4), config, 0, *r) for r in ((start, stop), (0, 420)))
    assert torch.equal(cut, whole[start:stop])
    assert len(whole.unique(dim=0)) == 420


@pytest.mark.parametrize("tied", [True, False])
def test_xavier(tied):
    options = {"init": "xavier", "tie_embeddings": tied, "residual_scaled_init": False}
    config = ModelConfig.model_validate(CONFIG.model_dump() | options | {"moe": {"num_experts": 3}})
    model = build(config)
    weights = declared_weights(model)
    assert weights["embedding.weight"].init == "embedding"
    for name, parameter in model.named_parameters():
        init = weights[name].init
        if init == "embedding":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        elif init in ("normal", "residual"):
            bound = math.sqrt(6 / (parameter.shape[-1] + parameter.shape[-2]))
            assert parameter.abs().max().item() == pytest.approx(bound, rel=0.05)
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not model.blocks[0].attention.query.bias.any()
    assert ("head.weight" in weights) != tied


def test_unscaled_where_asked():
    config = CONFIG.model_copy(update={"residual_scaled_init": False})
    assert build(config).blocks[0].attention.output.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_learned_positions_are_filled():
    model = build(config_of({"positional.encoding": "learned"}))
    assert model.positions.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_first_loss_is_that_of_a_guess():
    model = build(CONFIG)
    tokens = torch.arange(64).reshape(2, 32)
    _, loss = model(tokens, targets=tokens.flip(1))
    assert loss.item() == pytest.approx(math.log(1000), rel=0.02)
