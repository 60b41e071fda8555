"""Maximal update parametrization: what is wider learns alike, in every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.coordinate_check import PARAMETRIZATIONS, config_of, final_loss, growth, train
from model.build import build_model
from model.config import ModelConfig
from model.convert.choose import choose
from model.errors import ConversionError
from model.initialize import initialize
from model.weights import declared_weights
from parallel.processes import WorkerPool
from tests.train.running import losses, train_here
from train.config import OptimizerConfig
from train.config_file import load_config
from train.errors import ConfigError
from train.optimizer import make_optimizer
from train.verify.shrink import shrink

WIDTHS = (16, 64, 256)
NAMES = ("attention", "feed-forward", "residual stream", "logits")


def test_activations_grow_with_the_width_in_the_standard_parametrization_alone() -> None:
    grown = {}
    for parametrization in PARAMETRIZATIONS:
        configs = [config_of(parametrization, width, base=WIDTHS[0]) for width in WIDTHS]
        sizes = [train(config, rate=0.02, steps=4)[0] for config in configs]
        grown[parametrization] = {name: growth(sizes, name) for name in NAMES}
    assert all(0.5 < factor < 2 for factor in grown["mup"].values()), grown
    assert all(grown["standard"][name] > 2 * grown["mup"][name] for name in NAMES), grown
    assert grown["standard"]["residual stream"] > 10, grown


def test_the_best_learning_rate_carries_over() -> None:
    rates = [2.0**power for power in range(-9, -2)]
    best = {}
    for parametrization in PARAMETRIZATIONS:
        for width in (16, 128):
            config = config_of(parametrization, width, base=16)
            found = [final_loss(config, rate, steps=25) for rate in rates]
            best[parametrization, width] = found.index(min(found))
    assert best["mup", 16] == best["standard", 16]
    assert abs(best["mup", 128] - best["mup", 16]) <= 1, best
    assert best["standard", 16] - best["standard", 128] >= 2, best
