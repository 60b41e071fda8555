"""What the planner works out is what a simulated rank of the real job does: memory, FLOPs, bytes per collective."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from model.count import flops_per_token
from parallel.errors import LayoutError
from parallel.layout import resolve_layout
from parallel.planner.compare import Comparison, compare
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.simulate import Simulated, simulate
from tests.parallel.planner.cases import GPT, LLAMA, MOE, arranged, run_of
from tests.parallel.planner.measured import measured_peak
from train.config_file import load_config
from train.optimizer import make_optimizer

SHALLOW = {
    "model.num_layers": 4,
    "model.max_seq_len": 1024,
    "model.vocab_size": 32000,
    "data.global_batch_size": 64,
    "run.steps": 1,
    "data.path": "unused",
}
"""A preset's own widths, in few layers and short sequences, so that a step takes seconds."""

LAYOUTS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("1b", 64, 0, {}),
    ("1b", 64, 0, {"model.tie_embeddings": False, "activation_checkpoint.mode": "none", "parallel.dp_replicate": 8}),
    ("1b", 64, 0, {"parallel.dp_replicate": 64, "parallel.dp_shard": 1}),
    ("1b", 1024, 0, {"parallel.tp": 16, "activation_checkpoint.mode": "selective"}),
    ("1b", 256, 0, {"parallel.tp": 4, "parallel.sequence_parallel": False}),
    ("1b", 256, 0, {"parallel.cp": 8, "activation_checkpoint.mode": "none"}),
    ("1b", 512, 0, {"parallel.tp": 4, "parallel.cp": 2, "activation_checkpoint.mode": "every_nth"}),
    ("1b", 64, 0, {"parallel.pp": 4, "parallel.tp": 2}),
    ("1b", 64, 3, {"parallel.pp": 4, "parallel.tp": 2}),
    ("1b", 64, 1, {"parallel.pp": 2, "parallel.pp_schedule": "interleaved_1f1b", "model.tie_embeddings": False}),
    ("7b", 256, 0, {"parallel.reshard_after_forward": False, "data.global_batch_size": 256}),
    ("moe-8x1b", 64, 0, {"parallel.ep": 8, "activation_checkpoint.mode": "none"}),
    ("moe-8x1b", 256, 0, {"parallel.ep": 4, "parallel.tp": 2, "parallel.cp": 2, "data.global_batch_size": 64}),
]


def of_preset(name: str, ranks: int, overrides: dict[str, Any]) -> tuple[RunFacts, Arrangement]:
    config = load_config(name, [f"{key}={value}" for key, value in overrides.items()]).config
    parallel = config.parallel.model_copy(
        update={"dp_shard": resolve_layout(config.parallel, ranks).dp_shard}
    )
    run = RunFacts(config.model, config.model.max_seq_len, config.data.global_batch_size, config.precision)  # type: ignore[arg-type]
    return run, Arrangement(parallel, config.data.micro_batch_size, config.activation_checkpoint)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, load_config("1b", ["run.steps=1", "data.path=unused"]).config.optimizer)


def simulated(run: RunFacts, arrangement: Arrangement, place: int = 0) -> Simulated:
    return simulate(run, arrangement, place, optimizer)


def check(comparison: Comparison) -> None:
    """Within a tenth for memory, and a twentieth for FLOPs and bytes, of which each kind by itself."""
    assert comparison.total("memory").planned == pytest.approx(comparison.total("memory").simulated, rel=0.1)
    by_name = {figure.name: figure for figure in comparison.figures}
    for part in ("weights", "optimizer"):
        assert by_name[part].planned == pytest.approx(by_name[part].simulated, rel=0.01), part
    counted = [figure for figure in comparison.figures if figure.group != "memory"]
    assert len(counted) > 2
    for figure in counted:
        assert figure.planned == pytest.approx(figure.simulated, rel=0.05), figure.name


@pytest.mark.parametrize(("name", "ranks", "place", "overrides"), LAYOUTS, ids=str)
def test_a_plan_is_what_a_rank_does(name: str, ranks: int, place: int, overrides: dict[str, Any]) -> None:
    run, arrangement = of_preset(name, ranks, SHALLOW | overrides)
    check(compare(run, arrangement, place, simulated(run, arrangement, place)))
