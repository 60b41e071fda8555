"""Recipes, and the large preset, have the sizes that their documents state; those of the reference systems learn."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from model.build import build_model
from model.count import parameter_count
from model.initialize import initialize
from model.models import parse_model
from train.config_file import load_config

# In millions, as published (PaLM 8.63 B; the others from the counts of the released weights).
PUBLISHED = {
    "gpt2": "124",
    "llama3": "8030",
    "70b": "70554",
    "qwen3": "596",
    "mistral": "7242",
    "mixtral": "46703",
    "deepseek_moe": "16376",
    "palm": "8632",
    "gemma": "2614",
    "t5": "61",
}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_parameters_are_as_published(name: str, millions: str) -> None:
    model = load_config(name, ["run.steps=1", "data.path=unused"]).config.model
    assert f"{parameter_count(model).total / 1e6:.0f}" == millions


# Of the reference systems: overrides for what their data decide, and the formula of their sizes.
SYSTEMS: dict[str, tuple[list[str], int]] = {
    "gpt_causal": ([], 2 * 50304 * 768 + 12 * (12 * 768 * 768 + 2 * 768) + 768),
    "flow_matching": (
        [],
        2 * 50304 * 768 + 12 * (12 * 768 * 768 + 2 * 768) + 768 + (256 + 1) * 768 + (768 + 1) * 768,
    ),
    "gpt_modular": (["vocab_size=64"], 64 * 256 + 6 * (4 * 256 * 256 + 3 * 256 * 704 + 2 * 256) + 256),
    "modern": ([], 50257 * 512 + 6 * (2.5 * 512 * 512 + 3 * 512 * 1408 + 2 * 512) + 512),
    "image_codes": (
        ["vocab_size=1000", "num_classes=10"],
        (1000 + 1024 + 10) * 256 + 8 * (12 * 256 * 256 + (4 + 4 + 1) * 256 + 4 * 256) + 2 * 256,
    ),
    "classic": ([], 50257 * 768 + 12 * (12 * 768 * 768 + (4 + 1) * 768 + 4 * 768) + 2 * 768),
}
SHRUNK = ["d_model=32", "num_layers=2", "max_seq_len=16", "attention.num_heads=4", "vocab_size=40"]


def of_system(name: str, overrides: list[str]) -> Any:
    given = [f"model.{override}" for override in overrides]
    return load_config(name, ["run.steps=1", "data.path=unused", *given]).config.model


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_have_the_sizes_of_their_formulas(name: str) -> None:
    overrides, count = SYSTEMS[name]
    assert parameter_count(of_system(name, overrides)).total == count


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_learn(name: str) -> None:
    config = of_system(name, [*SHRUNK, *(["num_classes=3"] if name == "image_codes" else [])])
    torch.manual_seed(0)
    model = build_model(config)
    initialize(model, config, seed=0)
    tokens = torch.randint(40, (4, 16))
    known = {"tokens": tokens, "seeds": torch.arange(4), "classes": torch.tensor([0, 1, 2, 0])}
    inputs = {key: known[key] for key in config.inputs}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model.loss_sum(targets=tokens.roll(-1, 1), **inputs) / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(40), rel=0.1) and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("name", "constructor"),
    {"gpt_causal": "GPTCausal", "flow_matching": "FlowMatchingTransformer", "modern": "Transformer"}.items(),
)
def test_recipes_are_what_the_constructors_have_as_defaults(name: str, constructor: str) -> None:
    assert of_system(name, []) == parse_model(
        {"type": constructor, "vocab_size": of_system(name, []).vocab_size}
    )


@pytest.mark.parametrize(
    ("size", "vocab_size", "millions"), [("tiny", 32000, 11), ("small", 50257, 124), ("medium", 50257, 354)]
)
def test_the_original_transformer_has_its_sizes(
    size: str, vocab_size: int, millions: int, tmp_path: Path
) -> None:
    """Documented as about 10, 125 and 350 million."""
    path = tmp_path / "sized.yaml"
    path.write_text(f"extends: [classic, {size}]\nmodel: {{vocab_size: {vocab_size}}}\n")
    assert round(parameter_count(of_system(str(path), [])).total / 1e6) == millions


def test_the_original_transformer_is_documented_so() -> None:
    config = of_system("classic", [])
    assert (config.attention.variant, config.ffn.activation, config.ffn.bias) == ("mha", "relu", True)
    assert (config.norm.type, config.norm.placement) == ("layernorm", "pre")
    assert (config.positional.encoding, config.init, config.tie_embeddings) == ("sinusoidal", "xavier", True)
