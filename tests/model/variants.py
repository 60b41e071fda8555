"""Small models of every kind: a list of configurations in which every pair of options meets."""

from itertools import combinations, product
from typing import Any

import torch

from model.build import build_model
from model.config import ModelConfig
from model.initialize import initialize
from model.transformer import Transformer

OPTIONS: dict[str, list[Any]] = {
    "attention.variant": ["mha", "gqa", "mqa"],
    "attention.mask_type": ["causal", "sliding_window", "bidirectional"],
    "attention.bias": [False, True],
    "positional.encoding": ["rope", "sinusoidal", "learned", "none"],
    "ffn.variant": ["swiglu", "geglu", "glu", "mlp"],
    "ffn.bias": [False, True],
    "norm.type": ["rmsnorm", "layernorm"],
    "norm.placement": ["pre", "post", "sandwich"],
    "parallel_layers": [False, True],
    "tie_embeddings": [True, False],
}


def config_of(chosen: dict[str, Any], **top: Any) -> ModelConfig:
    """A tiny model with the chosen options, dotted names; `top` overrides sizes."""
    sections: dict[str, Any] = {"attention": {"num_heads": 4}, "ffn": {"d_ff": 24}}
    for name, value in chosen.items():
        *section, key = name.split(".")
        (sections.setdefault(section[0], {}) if section else sections)[key] = value
    if chosen.get("attention.mask_type") == "sliding_window":
        sections["attention"]["window_size"] = 5
    return ModelConfig(
        **{"vocab_size": 48, "d_model": 16, "num_layers": 2, "max_seq_len": 32, **sections, **top}
    )


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    model = build_model(config)
    assert isinstance(model, Transformer)
    initialize(model, config, seed)
    return model


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    assert config.vocab_size is not None
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def pairwise() -> list[dict[str, Any]]:
    """Choices, greedily, until every pair of values of two options is in one of them."""
    names = list(OPTIONS)
    candidates = [dict(zip(names, values, strict=True)) for values in product(*OPTIONS.values())][::7]
    missing = {
        frozenset({(a, x), (b, y)}) for a, b in combinations(names, 2) for x in OPTIONS[a] for y in OPTIONS[b]
    }
    chosen = []
    while missing:
        best = max(candidates, key=lambda candidate: len(_pairs(candidate) & missing))
        if not _pairs(best) & missing:
            raise AssertionError(f"no candidate has {missing}")
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(candidate: dict[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in combinations(candidate.items(), 2)}
