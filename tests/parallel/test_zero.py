"""DeepSpeed ZeRO computes the run that one process computes."""

import pytest

from parallel.processes import WorkerPool
from tests.parallel.parity import Case, Record, check, name_of, zero
from tests.parallel.test_layouts import (
    BIASED,
    BIASES,
    ENCODER_DECODER,
    FLOW,
    LAST_LAYER,
    MOE,
    PICTURES,
    PLAIN,
    RECOMPUTED,
    SELECTIVE,
    UNTIED,
    budget,
)

CASES: list[Case] = [
    ({}, 4, zero(0), {}),
    ({}, 2, zero(1), UNTIED),
    ({}, 8, zero(2), {}),
    ({}, 2, zero(3), {}),
    ({"dp_shard": 2}, 2, zero(0), {"moe": BIASED}),
    ({"dp_shard": 2}, 1, zero(1), BIASES),
    ({"dp_shard": 2}, 4, zero(2) | SELECTIVE, {}),
    ({"dp_shard": 2}, 2, zero(3) | RECOMPUTED, {"moe": BIASED}),
    ({"dp_shard": 2}, 2, zero(1, offload_optimizer="cpu"), {}),
    ({"dp_shard": 2}, 2, zero(2, offload_optimizer="cpu"), UNTIED),
    ({"dp_shard": 2}, 2, zero(3, offload_optimizer="cpu", offload_param="cpu"), {}),
    ({"dp_shard": 2, "ep": 2}, 2, zero(1), {"moe": BIASED}),
    ({"dp_shard": 2, "ep": 2}, 4, zero(2), {"moe": LAST_LAYER}),
    ({"tp": 2}, 4, zero(0), {}),
    ({"tp": 2}, 4, zero(1), BIASES | {"norm": {"type": "layernorm", "placement": "sandwich"}}),
    ({"tp": 2}, 2, zero(2) | PLAIN, {"moe": MOE}),
    ({"tp": 2}, 4, zero(3), {"positional": {"encoding": "relative"}}),
    ({"cp": 2}, 4, zero(3), {"moe": LAST_LAYER}),
]

MORE_CASES: list[Case] = [
    ({"dp_shard": 4}, 2, zero(0), {}),
    ({"dp_shard": 4}, 1, zero(1), {}),
    ({"dp_shard": 4}, 2, zero(2), {"moe": LAST_LAYER}),
    ({"dp_shard": 4}, 1, zero(3), UNTIED),
    ({"dp_shard": 2, "tp": 2}, 2, zero(1), UNTIED),
    ({"dp_shard": 2, "tp": 2}, 1, zero(2) | PLAIN | RECOMPUTED, BIASES | {"moe": MOE}),
    ({"dp_shard": 2, "tp": 2}, 2, zero(3) | budget("40kB"), {}),
    ({"tp": 4}, 4, zero(2), {}),
    ({"dp_shard": 2, "cp": 2}, 4, zero(2), {"positional": {"encoding": "alibi"}}),
    ({"dp_shard": 4, "ep": 2}, 1, zero(1), {"moe": MOE}),
    ({"dp_shard": 4, "ep": 4}, 2, zero(2), {"moe": MOE | {"num_experts": 8}}),
    ({"dp_shard": 2, "tp": 2, "ep": 2}, 2, zero(1) | PLAIN, {"moe": LAST_LAYER}),
    ({"dp_shard": 2, "tp": 2, "ep": 2}, 1, zero(2), {"moe": BIASED}),
    ({"dp_shard": 2, "cp": 2, "ep": 4}, 2, zero(2), {"moe": MOE | {"num_experts": 8}}),
    ({"cp": 2}, 2, zero(0), {}),
    ({"cp": 2}, 2, zero(3) | {"cp_method": "ring"}, {"positional": {"encoding": "relative"}}),
    ({"dp_shard": 2}, 2, zero(1) | {"compile": True}, {"moe": MOE}),
    ({"dp_shard": 2}, 2, zero(2) | {"compile": True}, {}),
    ({"dp_shard": 2}, 2, zero(3), ENCODER_DECODER),
    ({"dp_shard": 2}, 2, zero(3), FLOW),
    ({"dp_shard": 2}, 2, zero(3), PICTURES),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=name_of
)
def test_zero_computes_the_run_of_one_process(
    pools: dict[int, WorkerPool], case: Case, record_property: Record
) -> None:
    check(pools, case, "fp32", 1e-4, record_property)
