"""Tensor, sequence, context and expert parallelism compute the run of one process, in every combination."""

from math import prod
from typing import Any

import pytest

from parallel.processes import WorkerPool
from tests.parallel.parity import compare, reference, train

MOE = {"num_experts": 6, "d_ff": 20, "load_balance_loss": 0.1, "router_z_loss": 0.01}
LAST_LAYER = MOE | {"first_layer": 1, "capacity_factor": 1.2, "num_shared_experts": 1}
BIASED = MOE | {"router": "sigmoid", "balance": "bias", "bias_rate": 0.01}
PLAIN = {"sequence_parallel": False}
RECOMPUTED = {"activation_checkpoint": {"mode": "full"}}
SELECTIVE = {"activation_checkpoint": {"mode": "selective"}}
BIASES = {"attention": {"bias": True, "qk_norm": True}, "ffn": {"bias": True}}


def budget(size: str) -> dict[str, Any]:
    """With so much memory for activations."""
    return {"activation_checkpoint": {"mode": "auto", "memory_budget": size}}


CASES: list[tuple[dict[str, int], int, dict[str, Any], dict[str, Any]]] = [
    ({"tp": 2}, 4, PLAIN, {}),
    ({"tp": 2}, 4, {}, {"norm": {"type": "scalenorm"}, "loss": {"z_loss": 0.01, "label_smoothing": 0.1}}),
    ({"tp": 2}, 2, RECOMPUTED, BIASES | {"tie_embeddings": False}),
    ({"tp": 2}, 8, {}, {"positional": {"encoding": "alibi"}, "norm": {"placement": "post"}}),
    ({"tp": 2}, 4, PLAIN, {"positional": {"encoding": "relative"}, "attention": {"variant": "complex"}}),
    ({"tp": 2}, 4, {}, {"positional": {"encoding": "learned"}, "attention": {"variant": "linear"}}),
    ({"tp": 2}, 4, {}, {"moe": LAST_LAYER}),
    ({"tp": 2}, 4, PLAIN | RECOMPUTED, {"moe": BIASED, "ffn": {"bias": True}}),
    ({"tp": 4}, 4, {}, BIASES | {"norm": {"type": "layernorm", "placement": "sandwich", "embedding": True}}),
    ({"tp": 4}, 4, PLAIN, BIASES | {"ffn": {"variant": "mlp", "bias": True}, "parallel_layers": True}),
    ({"tp": 2}, 4, SELECTIVE, {"moe": LAST_LAYER}),
    ({"tp": 2}, 4, PLAIN | budget("40kB"), BIASES | {"moe": LAST_LAYER}),
    ({"dp_shard": 2, "tp": 2}, 2, {}, {}),
    ({"dp_replicate": 2, "tp": 2}, 2, {"cpu_offload": True}, {"moe": MOE}),
    ({"cp": 2}, 4, {}, {"moe": LAST_LAYER, "positional": {"encoding": "alibi"}}),
    ({"cp": 2}, 4, PLAIN, {"attention": {"variant": "linear"}, "positional": {"encoding": "sinusoidal"}}),
    ({"cp": 4}, 4, RECOMPUTED, {"positional": {"encoding": "learned"}, "norm": {"embedding": True}}),
    ({"cp": 2}, 4, SELECTIVE, {"attention": {"variant": "complex"}}),
    (
        {"cp": 2, "dp_shard": 2},
        4,
        budget("60kB"),
        {"attention": {"mask_type": "sliding_window", "window_size": 5}},
    ),
    ({"cp": 2, "tp": 2}, 4, {}, {"positional": {"encoding": "relative"}, "moe": BIASED}),
    ({"dp_shard": 2, "ep": 2}, 4, {}, {"moe": LAST_LAYER}),
    ({"dp_shard": 2, "ep": 2}, 2, {"cpu_offload": True}, {"moe": BIASED, "ffn": {"bias": True}}),
    ({"dp_shard": 4, "ep": 2}, 2, RECOMPUTED, {"moe": MOE}),
    ({"dp_shard": 2, "ep": 2}, 4, SELECTIVE, {"moe": BIASED}),
    ({"dp_shard": 2, "dp_replicate": 2, "ep": 2}, 2, {}, {"moe": LAST_LAYER}),
    ({"dp_shard": 2, "tp": 2, "ep": 2}, 4, budget("60kB"), {"moe": LAST_LAYER}),
    ({"dp_shard": 2, "cp": 2, "ep": 4}, 4, {}, {"moe": MOE | {"num_experts": 8}}),
    ({"pp": 2}, 2, {"pp_schedule": "gpipe"}, {"positional": {"encoding": "relative"}}),
    ({"pp": 2}, 2, RECOMPUTED, {"moe": MOE, "tie_embeddings": False}),
    (
        {"pp": 2},
        2,
        {"pp_schedule": "interleaved_1f1b"},
        {"num_layers": 5, "positional": {"encoding": "learned"}},
    ),
    ({"pp": 2}, 2, {"pp_schedule": "interleaved_1f1b"} | SELECTIVE, {"num_layers": 4, "moe": MOE}),
    ({"pp": 2}, 2, budget("40kB"), {"num_layers": 4}),
    ({"pp": 2}, 2, {"pp_schedule": "interleaved_zero_bubble"}, {"num_layers": 4}),
    ({"pp": 2}, 2, {"pp_schedule": "zbv_zero_bubble"}, {"num_layers": 4, "tie_embeddings": False}),
    ({"pp": 2, "dp_shard": 2}, 2, {}, {}),
    (
        {"pp": 2, "dp_replicate": 2},
        1,
        {"pp_schedule": "zbv_zero_bubble"},
        {"num_layers": 4, "tie_embeddings": False},
    ),
    ({"pp": 2, "tp": 2}, 2, {}, {}),
    ({"pp": 2, "cp": 2}, 2, {}, {"positional": {"encoding": "alibi"}}),
    ({"pp": 2, "dp_shard": 2, "ep": 2}, 2, {}, {"moe": MOE}),
    ({"pp": 4}, 2, {}, {"num_layers": 4}),
]


def name_of(case: tuple[dict[str, int], int, dict[str, Any], dict[str, Any]]) -> str:
    """The layout and what is special."""
    layout, _, parallel, model = case
    return " ".join([*(f"{name}{size}" for name, size in layout.items()), *parallel, *model])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_layout_computes_the_run_of_one_process(
    pools: dict[int, WorkerPool], case: tuple[dict[str, int], int, dict[str, Any], dict[str, Any]]
) -> None:
    layout, micro, parallel, model = case
    ranks = prod(size for name, size in layout.items() if name != "ep")
    compare(pools[ranks].run(train, layout, micro, "fp64", parallel, model), reference(model))
