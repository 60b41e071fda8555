"""How large activations are by width after a few steps, and which learning rate is best: with and without mup.

python -m benchmarks.coordinate_check docs/mup.png
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn

from model.block import Block
from model.build import build_model
from model.config import ModelConfig
from model.initialize import initialize
from model.model import Model
from train.config import OptimizerConfig
from train.optimizer import make_optimizer

VOCABULARY, SEQUENCES, LENGTH, HEADS = 64, 16, 32, 4
PARAMETRIZATIONS = ("standard", "mup")
WIDTHS = (32, 64, 128, 256, 512)
"""The first is the base, where both parametrizations are the same."""
STEPS, RATE = 5, 2.0**-6
SWEEP_WIDTHS, SWEEP_STEPS = (32, 64, 128, 256), 40
SWEEP = tuple(2.0**power for power in range(-10, -2))
"""Learning rates."""

Sizes = dict[str, list[float]]
"""Mean absolute coordinate of an activation, by its name, at each step, the first with initial weights."""


def config_of(parametrization: str, width: int, base: int = WIDTHS[0]) -> ModelConfig:
    """Two layers; wider heads, not more of them."""
    mup = {"base_width": base, "base_head_dim": base // HEADS}
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": width,
        "num_layers": 2,
        "max_seq_len": LENGTH,
        "attention": {"variant": "mha", "num_heads": HEADS},
        "ffn": {"d_ff": 4 * width},
        "mup": mup if parametrization == "mup" else None,
    }
    return ModelConfig.model_validate(values)


def batches(steps: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets (B, T) of a Markov chain, whose best loss is about 2.4 where a guess has 4.2."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.randn(VOCABULARY, VOCABULARY, generator=generator).mul(2).softmax(dim=1)
    for _ in range(steps):
        tokens = [torch.randint(VOCABULARY, (SEQUENCES,), generator=generator)]
        for _ in range(LENGTH):
            tokens.append(torch.multinomial(chances[tokens[-1]], 1, generator=generator).squeeze(1))
        sequences = torch.stack(tokens, dim=1)
        yield sequences[:, :-1], sequences[:, 1:]


def train(config: ModelConfig, rate: float, steps: int, seed: int = 0) -> tuple[Sizes, list[float]]:
    """Sizes of activations, and the loss of each step."""
    model = build_model(config)
    initialize(model, config, seed)
    optimizer = make_optimizer(model, config, OptimizerConfig(lr=rate))
    sizes: Sizes = defaultdict(list)
    losses = []
    for tokens, targets in batches(steps, seed):
        with _recording(model, sizes):
            logits, loss = model(tokens, targets)
        sizes["logits"].append(logits.abs().mean().item())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return dict(sizes), losses


@contextmanager
def _recording(model: Model, sizes: Sizes) -> Iterator[None]:
    """Outputs of the last block, of its attention and of its feed-forward layer."""
    block = model.blocks[-1]
    assert isinstance(block, Block)
    modules = {"attention": block.attention, "feed-forward": block.feedforward, "residual stream": block}

    def record(name: str, output: Tensor) -> None:
        sizes[name].append(output.detach().abs().mean().item())

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: record(name, output))
        for name, module in modules.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


def growth(sizes: list[Sizes], name: str) -> float:
    """How much larger an activation is in the last of some models than in the first, at the last step."""
    return sizes[-1][name][-1] / sizes[0][name][-1]


def final_loss(config: ModelConfig, rate: float, steps: int) -> float:
    """The mean of the last tenth."""
    return mean(train(config, rate, steps)[1][-max(1, steps // 10) :])


def main(picture: Path) -> None:
    """Print and draw both."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained", sharex="col", sharey="col")
    for (left, right), parametrization in zip(axes, PARAMETRIZATIONS, strict=True):
        _check(left, parametrization)
        _sweep(right, parametrization)
    figure.savefig(picture, dpi=110)


def _check(axis: Axes, parametrization: str) -> None:
    sizes = [train(config_of(parametrization, width), RATE, STEPS)[0] for width in WIDTHS]
    for number, name in enumerate(sizes[0]):
        for step in range(STEPS):
            colour, last = f"C{number}", step == STEPS - 1
            values, strength = [size[name][step] for size in sizes], (step + 1) / STEPS
            axis.plot(WIDTHS, values, "o-", color=colour, alpha=strength, label=name if last else None)
        print(
            f"{parametrization:10} {name:16} x{growth(sizes, name):6.2f} from width {WIDTHS[0]} to {WIDTHS[-1]}"
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="d_model", ylabel="mean absolute coordinate")
    axis.set_title(f"{parametrization}: steps 1 (pale) to {STEPS}")
    axis.legend()


def _sweep(axis: Axes, parametrization: str) -> None:
    for width in SWEEP_WIDTHS:
        losses = [final_loss(config_of(parametrization, width), rate, SWEEP_STEPS) for rate in SWEEP]
        best = min(range(len(SWEEP)), key=losses.__getitem__)
        axis.plot(SWEEP, losses, "o-", label=f"d_model {width}")
        axis.plot(SWEEP[best], losses[best], "k*", markersize=12, zorder=3)
        print(
            f"{parametrization:10} d_model {width:4} best learning rate 2^{best - 10}, loss {losses[best]:.3f}"
        )
    axis.set_xscale("log", base=2)
    axis.set(xlabel="optimizer.lr", ylabel=f"loss after {SWEEP_STEPS} steps")
    axis.set_title(parametrization)
    axis.legend()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
