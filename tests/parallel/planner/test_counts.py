"""The predicted FLOPs and bytes of a step are those that a real step's operators have."""

from collections import defaultdict
from typing import Any

import pytest

from model.count import flops_per_token
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.rank import Rank, rank_at
from parallel.planner.traffic import bytes_by_kind, traffic_of_rank
from parallel.planner.work import work_of_rank
from parallel.processes import WorkerPool
from tests.parallel.planner.cases import GPT, LLAMA, MOE, SANDWICH, SHARED, arranged, run_of
from tests.parallel.planner.measured import counted_here, counted_step

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"dp_shard": 4},
    {"dp_shard": 2, "reshard_after_forward": False},
    {"dp_replicate": 2, "dp_shard": 2},
    {"tp": 4, "dp_shard": 2},
    {"tp": 4, "sequence_parallel": False},
    {"cp": 2, "dp_shard": 2},
    {"tp": 2, "cp": 4},
]


FEW = 4096
"""Bytes of counts, losses and norms."""
CASES = [(LLAMA, sizes, again) for sizes in LAYOUTS for again in ("none", "full")]
CASES += [(model, sizes, "full") for model in (GPT, SANDWICH, SHARED) for sizes in (LAYOUTS[3], LAYOUTS[4])]


@pytest.mark.parametrize(("model", "sizes", "again"), CASES)
def test_a_step_is_what_it_is_predicted_to_be(
    model: dict[str, Any], sizes: dict[str, Any], again: str
) -> None:
    run, arrangement = run_of(model, sequences=8), arranged(1, again, **sizes)
    flops, sent = counted_step(run, arrangement)
    rank = rank_at(run, arrangement, 0)
    work = work_of_rank(run, arrangement, rank).total.matmul * arrangement.micro_batches(run)
    assert work == pytest.approx(flops, rel=0.05)
    check_bytes(predicted_bytes(run, arrangement, [rank]), [sent])


@pytest.mark.parametrize(
    ("model", "sizes", "again"),
    [
        (MOE, {"dp_shard": 2, "ep": 2}, "none"),
        (MOE, {"dp_shard": 2, "ep": 2}, "full"),
        (LLAMA, {"pp": 2}, "full"),
        (LLAMA, {"pp": 2, "pp_schedule": "interleaved_1f1b"}, "none"),
    ],
)
def test_two_processes_send_what_is_predicted(
    pools: dict[int, WorkerPool], model: dict[str, Any], sizes: dict[str, Any], again: str
) -> None:
    """Together: rows go to where their experts are, and stages differ."""
    run, arrangement = run_of(model, sequences=8), arranged(1, again, **sizes)
    counted = pools[2].run(counted_here, run, arrangement)
    ranks = [rank_at(run, arrangement, place if arrangement.layout.pp > 1 else 0) for place in (0, 1)]
    works = [work_of_rank(run, arrangement, rank).total.matmul for rank in ranks]
    assert sum(works) * arrangement.micro_batches(run) == pytest.approx(sum(f for f, _ in counted), rel=0.05)
    check_bytes(predicted_bytes(run, arrangement, ranks), [sent for _, sent in counted])


def predicted_bytes(run: RunFacts, arrangement: Arrangement, ranks: list[Rank]) -> dict[str, float]:
    """Of these ranks together, by kind."""
    predicted: dict[str, float] = defaultdict(float)
    for rank in ranks:
        for (kind, _), size in bytes_by_kind(traffic_of_rank(run, arrangement, rank)).items():
            predicted[kind] += size
    return predicted


def check_bytes(predicted: dict[str, float], counted: list[dict[str, float]]) -> None:
    """Each kind within a twentieth."""
    for kind in set(predicted).union(*counted):
        sent = sum(sizes.get(kind, 0.0) for sizes in counted)
        assert predicted[kind] == pytest.approx(sent, rel=0.05, abs=FEW * len(counted)), kind


@pytest.mark.parametrize("model", [LLAMA, GPT, MOE, SHARED], ids=range(4))
def test_one_rank_does_the_models_own_flops(model: dict[str, Any]) -> None:
    """Three forwards, as `model.count` counts them."""
    run, arrangement = run_of(model), arranged(2)
    work = work_of_rank(run, arrangement, rank_at(run, arrangement, 0))
    expected = flops_per_token(run.model, run.seq_len) * 2 * run.seq_len
    assert 3 * work.forward.flops == pytest.approx(expected)
    assert work.recompute.flops == 0


def test_experts_are_counted_by_those_that_are_used() -> None:
    run, arrangement = run_of(MOE), arranged(1)
    work = work_of_rank(run, arrangement, rank_at(run, arrangement, 0))
    moe = run.model.moe
    assert moe is not None
    twice = run.model.model_copy(update={"moe": moe.model_copy(update={"num_experts": 16})})

    more = work_of_rank(
        RunFacts(twice, 256, 4), arrangement, rank_at(RunFacts(twice, 256, 4), arrangement, 0)
    )
    assert more.forward.matmul == pytest.approx(work.forward.matmul, rel=0.05)
