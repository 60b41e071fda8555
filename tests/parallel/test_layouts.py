"""Every layout computes the run that one process computes: same initial weights, losses and gradient norms."""

from typing import Any

import pytest

from parallel.processes import WorkerPool
from tests.parallel.parity import Case, Record, check, name_of

MOE = {"num_experts": 6, "d_ff": 20, "load_balance_loss": 0.1, "router_z_loss": 0.01}
LAST_LAYER = MOE | {"first_layer": 1, "capacity_factor": 1.2, "num_shared_experts": 1}
BIASED = MOE | {"router": "sigmoid", "balance": "bias", "bias_rate": 0.01}
PLAIN = {"sequence_parallel": False}
RECOMPUTED = {"activation_checkpoint": {"mode": "full"}}
RING = {"cp_method": "ring"}
SELECTIVE = {"activation_checkpoint": {"mode": "selective"}}
TWO_EXPERTS = {"moe": MOE | {"num_experts": 2}, "ffn": {"bias": True}}
BIASES = {"attention": {"bias": True, "qk_norm": True}, "ffn": {"bias": True}}

ENCODER_DECODER = {"type": "encoder_decoder", "num_encoder_layers": 3, "positional": {"encoding": "relative"}}
FLOW = {"type": "flow_matching", "positional": {"encoding": "rope"}, "time_embed_dim": 8}
PICTURES = {"type": "image_codes", "num_classes": 3}
UNTIED = {"tie_embeddings": False}
PARALLEL_LAYERS = {"moe": LAST_LAYER, "parallel_layers": True}


def budget(size: str) -> dict[str, Any]:
    """With so much memory for activations."""
    return {"activation_checkpoint": {"mode": "auto", "memory_budget": size}}


CASES: list[Case] = [
    ({}, 8, {}, {}),
    ({}, 2, RECOMPUTED, {}),
    ({}, 2, {}, {"moe": MOE}),
    ({"dp_shard": 2}, 4, {}, {}),
    ({"dp_shard": 2}, 1, {"reshard_after_forward": False}, {}),
    ({"dp_replicate": 2}, 2, {"activation_checkpoint": {"mode": "every_nth", "n": 2}}, {}),
    ({"dp_shard": 2}, 2, {"cpu_offload": True}, UNTIED),
    ({"dp_shard": 4}, 2, {}, {}),
    ({"dp_replicate": 2, "dp_shard": 2}, 1, {}, UNTIED),
    ({"dp_shard": 2}, 2, RECOMPUTED, {"moe": BIASED, "ffn": {"bias": True}}),
    ({"dp_shard": 4}, 1, {}, PARALLEL_LAYERS),
    ({"dp_replicate": 2, "dp_shard": 2}, 2, RECOMPUTED, PARALLEL_LAYERS | {"norm": {"type": "scalenorm"}}),
    ({"dp_replicate": 2}, 1, {"cpu_offload": True}, {"moe": BIASED, "ffn": {"bias": True}}),
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
    (
        {"cp": 2},
        4,
        PLAIN,
        UNTIED | {"attention": {"variant": "linear"}, "positional": {"encoding": "sinusoidal"}},
    ),
    ({"cp": 4}, 4, RECOMPUTED, {"positional": {"encoding": "learned"}, "norm": {"embedding": True}}),
    ({"cp": 2}, 4, SELECTIVE, {"attention": {"variant": "complex"}}),
    (
        {"cp": 2, "dp_shard": 2},
        4,
        budget("60kB"),
        {"attention": {"mask_type": "sliding_window", "window_size": 5}},
    ),
    ({"cp": 2, "tp": 2}, 4, {}, {"positional": {"encoding": "relative"}, "moe": BIASED}),
    ({"cp": 2}, 4, RING, {"moe": LAST_LAYER, "positional": {"encoding": "alibi"}}),
    ({"cp": 2}, 4, RING | SELECTIVE, {"attention": {"variant": "complex"}}),
    (
        {"cp": 2},
        2,
        RING | RECOMPUTED,
        UNTIED | {"attention": {"mask_type": "bidirectional", "qk_norm": True, "logit_soft_cap": 2.0}},
    ),
    (
        {"cp": 2, "dp_shard": 2},
        4,
        RING | budget("60kB"),
        {"attention": {"mask_type": "sliding_window", "window_size": 5}},
    ),
    ({"cp": 2, "tp": 2}, 4, RING, {"positional": {"encoding": "relative"}, "moe": BIASED}),
    ({"dp_shard": 2, "ep": 2}, 4, {}, {"moe": LAST_LAYER}),
    ({"dp_shard": 2, "ep": 2}, 2, {"cpu_offload": True}, {"moe": BIASED, "ffn": {"bias": True}}),
    ({"dp_shard": 4, "ep": 2}, 2, RECOMPUTED, {"moe": MOE}),
    ({"dp_shard": 2, "ep": 2}, 4, SELECTIVE, {"moe": BIASED}),
    ({"dp_shard": 2, "dp_replicate": 2, "ep": 2}, 2, {}, {"moe": LAST_LAYER}),
    ({"dp_shard": 2, "tp": 2, "ep": 2}, 4, budget("60kB"), {"moe": LAST_LAYER}),
    ({"dp_shard": 4}, 2, RECOMPUTED, TWO_EXPERTS),
    ({"dp_shard": 4}, 1, {}, {"moe": BIASED | {"num_experts": 3}}),
    ({"dp_shard": 4, "ep": 2}, 2, SELECTIVE, TWO_EXPERTS),
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
    ({"pp": 2, "cp": 2}, 2, RING, {"positional": {"encoding": "learned"}}),
    ({"pp": 2, "dp_shard": 2, "ep": 2}, 2, {}, {"moe": MOE}),
    ({"pp": 4}, 2, {}, {"num_layers": 4}),
]


MORE_CASES: list[Case] = [
    ({"dp_shard": 2}, 1, {}, ENCODER_DECODER | UNTIED),
    ({"tp": 2}, 4, PLAIN, ENCODER_DECODER),
    ({"tp": 2}, 2, RECOMPUTED, ENCODER_DECODER | {"moe": MOE}),
    ({"dp_shard": 2, "tp": 2}, 2, {}, ENCODER_DECODER),
    ({"tp": 2}, 4, PLAIN, FLOW),
    ({"tp": 2}, 2, {}, FLOW),
    ({"dp_shard": 2, "tp": 2}, 2, {}, FLOW | UNTIED),
    ({"pp": 2}, 2, {}, FLOW | UNTIED),
    ({"tp": 2}, 4, PLAIN, PICTURES),
    ({"tp": 2}, 2, {}, PICTURES | UNTIED),
    ({"dp_shard": 2, "tp": 2}, 2, {}, PICTURES),
    ({"pp": 2}, 2, {}, PICTURES),
    ({"cp": 2}, 4, {}, PICTURES),
    ({"cp": 2}, 4, RING, PICTURES),
    ({"cp": 3}, 4, RING, {"attention": {"num_heads": 2, "num_kv_heads": 1}}),
    ({"dp_shard": 2, "tp": 2}, 1, RECOMPUTED, UNTIED),
    ({"cp": 2}, 1, {}, UNTIED),
    ({"cp": 2, "dp_shard": 2}, 1, {}, UNTIED),
    ({"cp": 2, "dp_replicate": 2}, 2, {}, {}),
    ({"dp_shard": 2, "tp": 2, "ep": 2}, 1, PLAIN, {"moe": MOE} | UNTIED),
    ({"pp": 2, "dp_shard": 2}, 1, RECOMPUTED, UNTIED),
    ({"pp": 2, "dp_shard": 4}, 1, {}, TWO_EXPERTS),
    ({"dp_replicate": 2, "dp_shard": 4}, 1, {"cpu_offload": True}, TWO_EXPERTS),
    ({"pp": 2, "tp": 2}, 1, PLAIN, {"moe": MOE} | UNTIED),
    ({"pp": 4}, 1, {"pp_schedule": "gpipe"}, {"num_layers": 4} | UNTIED),
    ({"pp": 2, "dp_shard": 2}, 1, {"pp_schedule": "interleaved_1f1b"}, {"num_layers": 4, "moe": MOE}),
    ({"pp": 2, "tp": 2}, 1, {"pp_schedule": "interleaved_zero_bubble"}, {"num_layers": 4}),
    ({"pp": 2, "cp": 2}, 1, RING | {"pp_schedule": "interleaved_zero_bubble"}, {"num_layers": 4}),
    ({"dp_shard": 2, "tp": 2, "pp": 2}, 2, {}, {}),
    ({"dp_shard": 2, "tp": 2, "pp": 2}, 1, RECOMPUTED, {"moe": LAST_LAYER} | UNTIED),
    ({"dp_shard": 2, "cp": 2, "tp": 2, "ep": 2}, 2, {}, {"moe": MOE}),
    ({"dp_replicate": 2, "dp_shard": 2, "pp": 2, "ep": 2}, 1, {}, {"moe": MOE}),
]
"""Other models, gradients accumulated with and without a tied head, more ranks than heads, 8 processes."""

SINGLE: list[Case] = [
    ({"dp_shard": 4}, 2, {}, {}),
    ({"dp_replicate": 2, "dp_shard": 2}, 1, {}, UNTIED),
    ({"tp": 2}, 4, PLAIN, {}),
    ({"dp_shard": 2, "tp": 2}, 2, {}, {}),
    ({"cp": 2, "dp_shard": 2}, 1, {}, UNTIED),
    ({"cp": 2, "dp_shard": 2}, 1, RING, UNTIED),
    ({"dp_shard": 4, "ep": 2}, 2, RECOMPUTED, {"moe": MOE}),
    ({"pp": 2, "dp_shard": 2}, 2, {}, {}),
    ({"pp": 2, "tp": 2}, 2, {}, {}),
]
"""What is proved in fp32 too."""


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=name_of
)
def test_layout_computes_the_run_of_one_process(
    pools: dict[int, WorkerPool], case: Case, record_property: Record
) -> None:
    check(pools, case, "fp64", 1e-9, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", SINGLE, ids=name_of)
def test_single_precision(pools: dict[int, WorkerPool], case: Case, record_property: Record) -> None:
    check(pools, case, "fp32", 1e-4, record_property)
