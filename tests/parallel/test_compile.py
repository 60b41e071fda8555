"""Blocks that are compiled compute the run of one process, recomputed and cut as any others."""

from math import prod
from typing import Any

import pytest

from parallel.processes import WorkerPool
from tests.parallel.parity import compare, reference, train

COMPILED = {"compile": True}
SELECTIVE = COMPILED | {"activation_checkpoint": {"mode": "selective"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "parallel"), [({}, SELECTIVE), ({"tp": 2}, SELECTIVE), ({"pp": 2}, COMPILED)], ids=str
)
def test_layout_computes_the_run_of_one_process(
    pools: dict[int, WorkerPool], layout: dict[str, int], parallel: dict[str, Any]
) -> None:
    compare(pools[prod(layout.values())].run(train, layout, 4, "fp64", parallel, {}), reference({}))
