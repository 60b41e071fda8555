"""What is planned of DeepSpeed's stages is what its real steps take on this CPU."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from parallel.config import Precision
from parallel.planner.estimate import estimate
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import load_device
from parallel.planner.memory import predict_memory
from parallel.planner.rank import rank_at
from parallel.planner.search import search
from parallel.planner.traffic import bytes_by_kind, traffic_of_rank
from tests.parallel.planner.cases import LLAMA, MOE, arranged, run_of
from tests.parallel.planner.measured import counted_step, measured_peak

pytest.importorskip("deepspeed")
CPU, GPU = load_device("cpu"), load_device("h100-80gb")
MANY_WEIGHTS: dict[str, Any] = {
    **LLAMA,
    "d_model": 256,
    "max_seq_len": 64,
    "ffn": {"variant": "swiglu", "d_ff": 704},
}
"""And few activations."""


def zero(
    stage: int, again: str = "none", bucket: int = 2_000_000, micro: int = 1, **more: Any
) -> Arrangement:
    """Over four ranks. Buckets of real runs are larger than these models."""
    names = {"offload_optimizer", "offload_param"}
    offload = {name: more.pop(name) for name in names & more.keys()}
    raw = {"zero_optimization": {"reduce_bucket_size": bucket, "stage3_param_persistence_threshold": 50_000}}
    section = {"stage": stage, "config": raw, **offload}
    more.setdefault("dp_shard", 4)
    return arranged(micro, again, engine="deepspeed", deepspeed=section, **more)


CASES: list[tuple[str, dict[str, Any], Precision, int, str, int]] = [
    ("activations", LLAMA, "bf16", 8, "none", 2_000_000),
    ("weights", MANY_WEIGHTS, "bf16", 4, "full", 200_000),
    ("fp32", LLAMA, "fp32", 8, "none", 200_000),
]
PEAKS: list[tuple[str, dict[str, Any], Precision, int, Arrangement]] = [
    (f"stage {stage}, {name}", model, precision, sequences, zero(stage, again, bucket))
    for stage in range(4)
    for name, model, precision, sequences, again, bucket in CASES
]
PEAKS += [
    ("stage 1, offload", LLAMA, "bf16", 8, zero(1, offload_optimizer="cpu")),
    ("stage 2, offload", LLAMA, "bf16", 8, zero(2, "full", offload_optimizer="cpu")),
    ("stage 3, offload", LLAMA, "bf16", 8, zero(3, offload_optimizer="cpu", offload_param="cpu")),
    ("stage 2, tensor parallel", LLAMA, "bf16", 8, zero(2, tp=2)),
]


@pytest.mark.parametrize(
    ("model", "precision", "sequences", "arrangement"), [c[1:] for c in PEAKS], ids=[c[0] for c in PEAKS]
)
def test_the_peak_is_within_a_tenth(
    model: dict[str, Any], precision: Precision, sequences: int, arrangement: Arrangement
) -> None:
    run = run_of(model, precision, sequences)
    predicted = predict_memory(run, arrangement, CPU)
    assert predicted.total == pytest.approx(measured_peak(run, arrangement), rel=0.1)


@pytest.mark.parametrize("stage", range(4))
def test_a_step_sends_what_is_predicted(stage: int) -> None:
    """The second one: in the first stage 3 learns what is used when."""
    run, arrangement = run_of(LLAMA, sequences=8), zero(stage)
    _, sent = counted_step(run, arrangement, before=1)
    rank = rank_at(run, arrangement, 0)
    predicted: dict[str, float] = defaultdict(float)
    for (kind, _), size in bytes_by_kind(traffic_of_rank(run, arrangement, rank)).items():
        predicted[kind] += size
    for name in {*predicted, *sent}:
        assert predicted[name] == pytest.approx(sent.get(name, 0.0), rel=0.05, abs=4096), name


def test_higher_stages_hold_less() -> None:
    """Weights, gradients and optimizer state of a stage, by its definition (Rajbhandari et al. 2020, figure 1)."""
    run = run_of(MANY_WEIGHTS, sequences=64)
    held = [predict_memory(run, zero(stage, dp_shard=64, micro=1), GPU) for stage in range(4)]
    assert [each.optimizer for each in held[1:]] == [held[1].optimizer] * 3
    assert held[0].optimizer == pytest.approx(64 * held[1].optimizer)
    assert held[2].gradients < held[1].gradients / 10
    assert held[3].weights < held[2].weights / 5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_offloaded_is_in_the_hosts_memory(stage: int) -> None:
    run = run_of(MANY_WEIGHTS, sequences=8)
    here, there = (estimate(run, zero(stage, offload_optimizer=where), GPU) for where in ("none", "cpu"))
    assert there.memory.optimizer == 0 and there.memory.weights < here.memory.weights
    assert there.memory.host > here.memory.optimizer > 0 == here.memory.host
    assert there.time.optimizer > here.time.optimizer and there.time.host > 0 == here.time.host


def all_stages(run: RunFacts) -> Iterator[Any]:
    for stage in range(4):
        for micro in (1, 2):
            yield estimate(run, zero(stage, micro=micro, dp_shard=8), GPU)


@pytest.mark.parametrize("gib", [1.0, 0.026, 0.02])
def test_the_search_weighs_stages(gib: float) -> None:
    """Nothing that fits is much faster; with little memory higher stages are found."""
    run = run_of(MANY_WEIGHTS, sequences=16)
    device = GPU.model_copy(update={"memory_gib": gib, "reserved_gib": 0.0})
    given = zero(2).parallel.model_copy(update={"dp_shard": -1})
    found = search(run, 8, device, given=given).fitting[0]
    assert found.arrangement.parallel.engine == "deepspeed"
    assert found.arrangement.parallel.deepspeed.config == given.deepspeed.config
    fitting = [each.time.total for each in all_stages(run) if each.memory.total < 0.95 * device.memory_bytes]
    assert found.time.total <= min(fitting, default=float("inf")) * 1.05


def test_experts_are_partitioned_over_those_that_have_the_same() -> None:
    run, arrangement = run_of(MOE, sequences=8), zero(2, ep=2)
    whole = predict_memory(run, zero(2), CPU)
    shared = predict_memory(run, arrangement, CPU)
    assert shared.weights < whole.weights and shared.optimizer == pytest.approx(whole.optimizer)


def test_a_bucket_is_there_twice_where_communication_overlaps() -> None:
    run, bucket = run_of(MANY_WEIGHTS, sequences=4), 200_000
    peaks = []
    for overlaps in (False, True):
        raw = {"zero_optimization": {"reduce_bucket_size": bucket, "overlap_comm": overlaps}}
        section = {"stage": 2, "config": raw}
        arrangement = arranged(1, "full", engine="deepspeed", deepspeed=section, dp_shard=4)
        peaks.append((measured_peak(run, arrangement), predict_memory(run, arrangement, CPU).total))
    (measured, planned), (measured_twice, planned_twice) = peaks
    assert measured_twice - measured == planned_twice - planned == bucket * run.itemsize
