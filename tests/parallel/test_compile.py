"""Blocks that are compiled compute the run of one process, recomputed and cut as any others."""

import pytest
from torch._dynamo.utils import counters

from parallel.fit import ALL_WORKS, torch_version
from parallel.processes import WorkerPool
from tests.parallel.parity import Case, Record, check, name_of, ranks_of

COMPILED = {"compile": True}
SELECTIVE = COMPILED | {"activation_checkpoint": {"mode": "selective"}}

PRECISION, BOUND = ("fp64", 1e-9) if torch_version() >= ALL_WORKS else ("fp32", 1e-4)
"""Before that torch compiles attention in fp64 wrongly."""

CASES: list[Case] = [
    ({}, 4, SELECTIVE, {}),
    ({"tp": 2}, 4, SELECTIVE, {}),
    ({"pp": 2}, 4, COMPILED, {}),
    ({"cp": 2}, 4, COMPILED, {"positional": {"encoding": "alibi"}}),
    ({"cp": 2}, 4, SELECTIVE | {"cp_method": "ring"}, {"positional": {"encoding": "alibi"}}),
    (
        {"dp_shard": 2, "ep": 2},
        4,
        COMPILED,
        {"moe": {"num_experts": 6, "d_ff": 20, "load_balance_loss": 0.1}},
    ),
]


def compiled_graphs() -> int:
    """Runs in a worker: how many graphs were compiled there since it was last asked."""
    count = counters["stats"]["unique_graphs"]
    counters.clear()
    return count


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_layout_computes_the_run_of_one_process(
    pools: dict[int, WorkerPool], case: Case, record_property: Record
) -> None:
    pool = pools[ranks_of(case)]
    pool.run(compiled_graphs)
    check(pools, case, PRECISION, BOUND, record_property)
    assert all(pool.run(compiled_graphs)), "what isn't compiled after all is no proof"
