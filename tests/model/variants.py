"""Small models of every kind: a list of configurations in which every pair of options meets."""

from itertools import combinations
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
    "moe": ["none", "softmax", "sigmoid"],
    "norm.type": ["rmsnorm", "layernorm", "scalenorm"],
    "norm.placement": ["pre", "post", "sandwich"],
    "parallel_layers": [False, True],
    "tie_embeddings": [True, False],
    "init": ["gpt2", "xavier"],
    "loss": ["plain", "smoothed"],
}
MOE: dict[str, dict[str, Any] | None] = {
    "none": None,
    "softmax": {"num_experts": 6, "d_ff": 12, "router_z_loss": 0.001, "every_nth_layer": 2},
    "sigmoid": {
        "router": "sigmoid",
        "num_experts": 4,
        "top_k": 1,
        "num_shared_experts": 2,
        "capacity_factor": 1.5,
        "balance": "bias",
    },
}
LOSS = {"plain": {}, "smoothed": {"z_loss": 0.001, "label_smoothing": 0.1}}


def config_of(chosen: dict[str, Any], **top: Any) -> ModelConfig:
    """A tiny model with the chosen options, dotted names; `top` overrides sizes."""
    sections: dict[str, Any] = {"attention": {"num_heads": 4}, "ffn": {"d_ff": 24}}
    for name, value in chosen.items():
        *section, key = name.split(".")
        (sections.setdefault(section[0], {}) if section else sections)[key] = value
    for name, kinds in (("moe", MOE), ("loss", LOSS)):
        if isinstance(sections.get(name), str):
            sections[name] = kinds[sections[name]]
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
    """Choices until every pair of values of two options is in one of them: each starts from a missing pair
    and takes for every other option the value that completes the most missing pairs."""
    missing = {
        frozenset({(a, x), (b, y)}): None
        for a, b in combinations(OPTIONS, 2)
        for x in OPTIONS[a]
        for y in OPTIONS[b]
    }
    chosen = []
    while missing:
        choice = dict(next(iter(missing)))
        for name in [name for name in OPTIONS if name not in choice]:
            completed = [
                sum(frozenset({(name, value), pair}) in missing for pair in choice.items())
                for value in OPTIONS[name]
            ]
            choice[name] = OPTIONS[name][completed.index(max(completed))]
        for pair in combinations(choice.items(), 2):
            missing.pop(frozenset(pair), None)
        chosen.append({name: choice[name] for name in OPTIONS})
    return chosen
