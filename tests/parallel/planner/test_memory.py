"""The predicted peak of memory is the one that real steps have, as a CPU's allocator counts it."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.activation_budget import choose
from parallel.activation_memory import measure
from parallel.build import Blueprint
from parallel.config import ActivationCheckpointConfig, Precision
from parallel.context import context_of
from parallel.errors import LayoutError
from parallel.mesh import Mesh
from parallel.planner.activations import kept_of_layer, recomputed_layers, resolve
from parallel.planner.estimate import estimate
from parallel.planner.hardware import load_device
from parallel.planner.memory import memory_of_rank, predict_memory
from parallel.planner.rank import rank_at, ranks_of, under_way
from parallel.processes import WorkerPool
from parallel.simulate import simulated_rank
from tests.parallel.planner.cases import GPT, LLAMA, MOE, PARALLEL, SANDWICH, SHARED, WIDE, arranged, run_of
from tests.parallel.planner.measured import measured_peak, peak_here

CPU = load_device("cpu")

PEAKS: list[tuple[str, dict[str, Any], Precision, int, int, str, dict[str, Any]]] = [
    ("one rank", LLAMA, "bf16", 4, 4, "none", {}),
    ("one rank in fp32, accumulating", LLAMA, "fp32", 2, 1, "none", {}),
    ("selective", LLAMA, "bf16", 4, 2, "selective", {}),
    ("full", LLAMA, "bf16", 4, 4, "full", {}),
    ("every other layer", LLAMA, "bf16", 4, 4, "every_nth", {}),
    ("layer norm, tied, learned positions", GPT, "bf16", 4, 2, "none", {}),
    ("large vocabulary", WIDE, "bf16", 2, 1, "none", {}),
    ("experts", MOE, "bf16", 4, 4, "none", {}),
    ("sharded", LLAMA, "bf16", 8, 2, "none", {"dp_shard": 4}),
    ("sharded over many", LLAMA, "bf16", 64, 1, "full", {"dp_shard": 64}),
    ("replicas", LLAMA, "bf16", 16, 1, "none", {"dp_replicate": 2, "dp_shard": 4}),
    ("tensor parallel", LLAMA, "bf16", 8, 2, "selective", {"dp_shard": 2, "tp": 4}),
    ("context parallel", LLAMA, "bf16", 8, 2, "none", {"dp_shard": 2, "cp": 2}),
    ("8 bits", LLAMA, "fp8", 8, 2, "none", {"dp_shard": 2}),
    ("8 bits, full", LLAMA, "fp8", 8, 2, "full", {"dp_shard": 2}),
    ("gathered weights kept", LLAMA, "bf16", 8, 2, "full", {"dp_shard": 2, "reshard_after_forward": False}),
]


@pytest.mark.parametrize(
    ("model", "precision", "sequences", "micro", "again", "sizes"),
    [case[1:] for case in PEAKS],
    ids=[case[0] for case in PEAKS],
)
def test_the_peak_is_within_a_tenth(
    model: dict[str, Any], precision: Precision, sequences: int, micro: int, again: str, sizes: dict[str, Any]
) -> None:
    run, arrangement = run_of(model, precision, sequences), arranged(micro, again, **sizes)
    predicted = predict_memory(run, arrangement, CPU)
    assert predicted.total == pytest.approx(measured_peak(run, arrangement), rel=0.1)
    assert predicted.reserve == 0


@pytest.mark.parametrize(
    ("schedule", "again"),
    [
        ("1f1b", "none"),
        ("1f1b", "full"),
        ("gpipe", "none"),
        ("gpipe", "full"),
        ("interleaved_1f1b", "selective"),
        ("interleaved_zero_bubble", "none"),
        ("zbv_zero_bubble", "none"),
    ],
)
def test_the_peak_of_a_pipeline(pools: dict[int, WorkerPool], schedule: str, again: str) -> None:
    """Of two processes, the one that needs most."""
    run, arrangement = run_of(LLAMA, sequences=8), arranged(1, again, pp=2, pp_schedule=schedule)
    measured = max(pools[2].run(peak_here, run, arrangement))
    assert predict_memory(run, arrangement, CPU).total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"])
def test_every_rank_of_a_pipeline_with_several_stages(pools: dict[int, WorkerPool], schedule: str) -> None:
    """What it sent is there until the step's end, and until those of weights gradients that they are made of."""
    run = run_of({**LLAMA, "num_layers": 8}, sequences=32)
    arrangement = arranged(4, pp=4, pp_schedule=schedule)
    for place, measured in enumerate(pools[4].run(peak_here, run, arrangement)):
        predicted = memory_of_rank(run, arrangement, rank_at(run, arrangement, place), "cpu")
        assert predicted.total == pytest.approx(measured, rel=0.06), place


@pytest.mark.parametrize("sizes", [{}, {"tp": 4}, {"tp": 4, "cp": 2}, {"cp": 4}], ids=str)
@pytest.mark.parametrize("model", [LLAMA, GPT, MOE, SHARED, SANDWICH, PARALLEL], ids=range(6))
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_layers_keep_what_their_twins_keep(
    model: dict[str, Any], sizes: dict[str, Any], precision: Precision
) -> None:
    """The layout's own measurement, of every layer and each way of recomputing, is met within a tenth."""
    if precision == "fp8" and "tp" in sizes:
        sizes = sizes | {"tp": 2}  # which leaves widths in sixteens
    run, arrangement = run_of(model, precision), arranged(2, **sizes)
    with simulated_rank(0, arrangement.layout.world_size):
        mesh = Mesh(arrangement.layout, "cpu")
        context = context_of(arrangement.parallel, mesh)
        blueprint = Blueprint(run.model, arrangement.parallel, mesh, context, fp8=precision == "fp8")
        kept = measure(blueprint, torch.bfloat16, (2, run.seq_len))
    for name, measured in kept.items():
        experts = int(name.rpartition(".")[2]) in run.model.moe_layers
        predicted = kept_of_layer(run, arrangement, "cpu", experts=experts)
        for how, size in measured.items():
            assert predicted.of(how) == pytest.approx(size, rel=0.1), (name, how)


@pytest.mark.parametrize("sizes", [{}, {"dp_shard": 4}], ids=str)
@pytest.mark.parametrize("budget", [900_000, 3_000_000, 6_000_000])
def test_a_budget_is_met_as_a_run_meets_it(sizes: dict[str, Any], budget: int) -> None:
    """With as many layers of each kind as the engine chooses, and its peak."""
    run = run_of(LLAMA, sequences=8)
    config = ActivationCheckpointConfig(mode="auto", memory_budget=budget)
    arrangement = replace(arranged(2, **sizes), activation_checkpoint=config)
    resolved = resolve(run, arrangement, "cpu")
    ranks = arrangement.layout.world_size
    with simulated_rank(0, ranks):
        mesh = Mesh(arrangement.layout, "cpu")
        kept = measure(Blueprint(run.model, arrangement.parallel, mesh, None), torch.bfloat16, (2, 256))
    chosen = Counter(choose(kept, budget).values())
    expected = {how: count / run.model.num_layers for how, count in chosen.items()}
    assert recomputed_layers(resolved.activation_checkpoint) == expected


def test_a_budget_that_is_too_small_is_told() -> None:
    config = ActivationCheckpointConfig(mode="auto", memory_budget=1000)
    with pytest.raises(LayoutError, match="memory_budget=.* set at least 5.*KB"):
        resolve(run_of(LLAMA), replace(arranged(2), activation_checkpoint=config), "cpu")


def test_offload_leaves_a_device_what_is_at_work() -> None:
    run, gpu = run_of(LLAMA, sequences=8), load_device("h100-80gb")
    here, there = (estimate(run, arranged(2, dp_shard=4, cpu_offload=on), gpu) for on in (False, True))
    assert (there.memory.weights, there.memory.optimizer, there.memory.gradients) == (0, 0, 0)
    assert there.memory.activations == here.memory.activations
    assert there.memory.host == pytest.approx(4 / 3 * (here.memory.weights + here.memory.optimizer))
    assert there.time.host > 0 and there.time.optimizer > here.time.optimizer
    offloaded = arranged(2, dp_shard=4, cpu_offload=True)
    assert predict_memory(run, offloaded, CPU).total == pytest.approx(
        measured_peak(run, offloaded), rel=0.1
    ), "a CPU's ranks compute in the host's memory"


def test_a_gpu_needs_less_for_norms_and_has_a_reserve() -> None:
    run, arrangement, gpu = run_of(LLAMA), arranged(4), load_device("h100-80gb")
    on_gpu, on_cpu = (predict_memory(run, arrangement, device) for device in (gpu, CPU))
    assert on_gpu.activations < on_cpu.activations
    assert on_gpu.reserve > gpu.reserved_gib * 2**30
    assert on_gpu.total == pytest.approx(sum(on_gpu.parts.values()))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("gpipe", [8, 8]),
        ("1f1b", [4, 1]),
        ("interleaved_1f1b", [5.5, 2.5]),
        ("interleaved_zero_bubble", [4, 4]),
        ("zbv_zero_bubble", [4, 4]),
    ],
)
def test_micro_batches_under_way(schedule: str, expected: list[float]) -> None:
    """Of four ranks the first and the last, at eight micro-batches a step."""
    run = run_of({**LLAMA, "num_layers": 8}, sequences=8)
    arrangement = arranged(1, pp=4, pp_schedule=schedule)
    found = [under_way(arrangement, rank, 8) for rank in ranks_of(run, arrangement)]
    assert found == expected
