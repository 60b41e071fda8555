"""Small models of every kind: a list of configurations in which every pair of options meets."""

import random
from itertools import combinations
from typing import Any

import torch

from model.build import build_model
from model.config import ModelConfig
from model.initialize import initialize
from model.transformer import Transformer

OPTIONS: dict[str, list[Any]] = {
    "attention.variant": ["mha", "gqa", "mqa", "complex", "linear"],
    "attention.mask_type": ["causal", "sliding_window", "local", "block_sparse", "bidirectional"],
    "attention.bias": [False, True],
    "attention.qk_norm": [False, True],
    "attention.logit_soft_cap": [None, 2.0],
    "positional.encoding": ["rope", "alibi", "relative", "sinusoidal", "learned", "none"],
    "positional.rope_scaling": [None, 2.0, "ntk", "yarn", "llama3"],
    "ffn.variant": ["swiglu", "geglu", "geglu_tanh", "glu", "mlp"],
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

# pairs that the configuration refuses, with its reason
REFUSED: list[dict[str, list[Any]]] = [
    {"attention.variant": ["linear"], "attention.mask_type": ["sliding_window", "local", "block_sparse"]},
    {"attention.variant": ["linear"], "attention.logit_soft_cap": [2.0]},
    {"attention.variant": ["linear"], "positional.encoding": ["alibi", "relative"]},
    {
        "positional.encoding": ["alibi", "relative", "sinusoidal", "learned", "none"],
        "positional.rope_scaling": [2.0, "ntk", "yarn", "llama3"],
    },
]


def refused(choice: dict[str, Any]) -> bool:
    """Whether a choice, of some or all options, has a refused pair in it."""
    return any(all(choice.get(name) in values for name, values in pair.items()) for pair in REFUSED)


def config_of(chosen: dict[str, Any], **top: Any) -> ModelConfig:
    """A tiny model with the chosen options, dotted names; `top` overrides sizes."""
    sections: dict[str, Any] = {"attention": {"num_heads": 4}, "ffn": {"d_ff": 24}}
    for name, value in chosen.items():
        *section, key = name.split(".")
        (sections.setdefault(section[0], {}) if section else sections)[key] = value
    for name, kinds in (("moe", MOE), ("loss", LOSS)):
        if isinstance(sections.get(name), str):
            sections[name] = kinds[sections[name]]
    if chosen.get("attention.mask_type") in ("sliding_window", "local"):
        sections["attention"]["window_size"] = 5
    if chosen.get("attention.mask_type") == "block_sparse":
        sections["attention"]["block_size"] = 4
    if isinstance(chosen.get("positional.rope_scaling"), str):
        sections["positional"]["rope_scaling"] = {"type": chosen["positional.rope_scaling"], "factor": 2.0}
    return ModelConfig(
        **{"vocab_size": 48, "d_model": 16, "num_layers": 2, "max_seq_len": 32, **sections, **top}
    )


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    model = build_model(config)
    assert isinstance(model, Transformer)
    initialize(model, config, seed)
    return model


def lively(config: ModelConfig) -> Transformer:
    """In fp64, with weights so large that what is generated depends on all that came before."""
    model = build(config, seed=1).double()
    for parameter in model.parameters():
        parameter.data *= 3
    return model


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    assert config.vocab_size is not None
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def pairwise() -> list[dict[str, Any]]:
    """Choices until every pair of values of two options that may meet is in one of them.

    Each choice starts from a pair that is missing, and is the best of some random ones around it.
    """
    draw = random.Random(0)
    pairs = [{a: x, b: y} for a, b in combinations(OPTIONS, 2) for x in OPTIONS[a] for y in OPTIONS[b]]
    missing = {_pair(pair) for pair in pairs if not refused(pair)}
    chosen = []
    for pair in pairs:
        if _pair(pair) in missing:
            candidates = [_around(pair, draw) for _ in range(60)]
            best = max(candidates, key=lambda candidate: len(_pairs(candidate) & missing))
            missing -= _pairs(best)
            chosen.append(best)
    return chosen


def _around(pair: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A random choice of all options that has the pair in it and no refused one."""
    while True:
        candidate = {name: draw.choice(values) for name, values in OPTIONS.items()} | pair
        if not refused(candidate):
            return candidate


def _pair(pair: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(pair.items())


def _pairs(candidate: dict[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in combinations(candidate.items(), 2)}
