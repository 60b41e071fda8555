"""The decoder over pictures' codes."""

from typing import Any

import pytest
import torch

from model.build import build_model
from model.count import parameter_count
from model.generate import generate
from model.image_codes.config import ImageCodesConfig
from model.image_codes.model import ImageCodes
from model.initialize import initialize

SIZES = {
    "vocab_size": 20,
    "d_model": 16,
    "num_layers": 2,
    "max_seq_len": 12,
    "num_classes": 4,
    "attention": {"num_heads": 4, "bias": True},
    "ffn": {"d_ff": 32},
}
START = torch.full((4, 1), 19)
CLASSES = torch.arange(4)


def make(**settings: Any) -> ImageCodes:
    config = ImageCodesConfig(**SIZES | settings)
    model = build_model(config)
    assert isinstance(model, ImageCodes)
    initialize(model, config, seed=0)
    for parameter in model.parameters():  # so that a class makes a difference that shows
        parameter.data *= 5
    return model


def test_defaults() -> None:
    config = ImageCodesConfig(**SIZES)
    assert (config.positional.encoding, config.attention.mask_type) == ("learned", "causal")
    assert config.inputs == ("tokens", "classes")
    assert ImageCodesConfig.model_validate(config.model_dump()) == config
    free = ImageCodesConfig(**SIZES | {"class_conditional": False, "num_classes": None})
    assert free.inputs == ("tokens",)
    with pytest.raises(
        ValueError, match=r"model.num_classes=4 has no effect with model.class_conditional=false"
    ):
        ImageCodesConfig(**SIZES | {"class_conditional": False})
    with pytest.raises(ValueError, match="model.num_classes is unset"):
        build_model(ImageCodesConfig(**SIZES | {"num_classes": None}))


def test_the_class_is_added_to_every_token() -> None:
    model = make().double()
    tokens = torch.randint(20, (1, 6))
    logits = model(tokens.expand(4, 6), classes=CLASSES)
    assert logits.shape == (4, 6, 20)
    assert ((logits[1:] - logits[0]).abs().amax(dim=-1) > 1e-3).all()
    with pytest.raises(ValueError, match="needs classes"):
        model(tokens)


def test_both_losses_agree() -> None:
    model = make().double()
    tokens, targets = torch.randint(19, (4, 6)), torch.randint(19, (4, 6))
    targets[1, :3] = -100
    logits, mean = model(tokens, targets, classes=CLASSES)
    torch.testing.assert_close(logits, model(tokens, classes=CLASSES))
    torch.testing.assert_close(model.loss_sum(tokens=tokens, targets=targets, classes=CLASSES) / 21, mean)


@pytest.mark.parametrize("conditional", [True, False])
def test_generates_codes_only_with_or_without_cache(conditional: bool) -> None:
    model = make() if conditional else make(class_conditional=False, num_classes=None)
    classes = CLASSES if conditional else None
    draw = torch.Generator().manual_seed(0)
    made = model.generate(START, 12, 3.0, 18, 0.99, classes, num_codes=19, generator=draw)
    assert made.shape == (4, 13) and (made[:, 1:] < 19).all()
    greedy = model.generate(START, 12, temperature=0, classes=classes, num_codes=19)
    inputs = {} if classes is None else {"classes": classes}
    again = generate(model, START, 12, temperature=0, vocab_size=19, inputs=inputs, use_cache=False)
    assert torch.equal(greedy, again)
    assert (len(greedy.unique(dim=0)) > 1) == conditional
    if not conditional:
        with pytest.raises(ValueError, match="takes no classes"):
            model.generate(START, 2, classes=CLASSES)


@pytest.mark.parametrize("conditional", [True, False])
def test_counts(conditional: bool) -> None:
    model = make() if conditional else make(class_conditional=False, num_classes=None)
    count = parameter_count(model.config)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.embedding == (20 + 12 + (4 if conditional else 0)) * 16
