"""What recomputing activations saves and costs, as ratios to keeping them all.

python -m benchmarks.recompute

Kept: what the blocks keep of a micro-batch for the backward, by the layout's own measurement. Time: of forward and
backward, in turn with the others, the median over the rounds. `auto` has half of the memory.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.quick import batch_of, config_of, our_model
from model.model import Model
from parallel.activation_budget import choose, total
from parallel.activation_checkpoint import Recompute, checkpoint_activations, named_layers
from parallel.activation_memory import KeptBytes, measure_layers
from train.config import Config

LAYERS, WARM_UP, ROUNDS = 6, 2, 7


def main() -> None:
    """Print the table."""
    config = config_of("fp32", compiled=False)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": LAYERS})})
    batch = batch_of(0)

    def step(model: Model) -> Tensor:
        return model.loss_sum(**batch.inputs, targets=batch.targets)

    model = _model(config)
    kept = measure_layers(named_layers(model), lambda: step(model))
    budget = total(kept, dict.fromkeys(kept, "none")) // 2
    plans: dict[str, dict[str, Recompute]] = {
        "none": dict.fromkeys(kept, "none"),
        "selective": dict.fromkeys(kept, "selective"),
        "full": dict.fromkeys(kept, "full"),
        "auto": choose(kept, budget),
    }
    _print(plans, kept, _seconds(config, plans, step))


def _model(config: Config) -> Model:
    model = our_model(config)
    assert isinstance(model, Model)
    return model


def _seconds(
    config: Config, plans: dict[str, dict[str, Recompute]], step: Callable[[Model], Tensor]
) -> dict[str, float]:
    """Of a step of each, in units of the first one's beside it."""
    models = {name: _model(config) for name in plans}
    for name, model in models.items():
        checkpoint_activations(model, plans[name].__getitem__)
    taken: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(WARM_UP + ROUNDS):
        for name, model in models.items():
            began = time.perf_counter()
            step(model).backward()
            taken[name].append(time.perf_counter() - began)
    rounds = {name: seconds[WARM_UP:] for name, seconds in taken.items()}
    first = next(iter(rounds.values()))
    return {
        name: statistics.median(ours / base for ours, base in zip(seconds, first, strict=True))
        for name, seconds in rounds.items()
    }


def _print(plans: dict[str, dict[str, Recompute]], kept: KeptBytes, ratios: dict[str, float]) -> None:
    whole = total(kept, plans["none"])
    print(f"{LAYERS} blocks, {torch.get_num_threads()} threads; none keeps {whole / 1e6:,.0f} MB")
    print("mode        kept   time")
    for name, plan in plans.items():
        print(f"{name:10} {total(kept, plan) / whole:5.2f}  {ratios[name]:5.2f}")


if __name__ == "__main__":
    main()
