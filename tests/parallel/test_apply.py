"""Laying out a model: what needs blocks is refused where there are none."""

from typing import Any

import pytest

from model.models import MODELS
from parallel.apply import lay_out
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig
from parallel.errors import LayoutError
from parallel.layout import Layout
from parallel.mesh import mesh_of
from parallel.processes import WorkerPool
from tests.model.bigram import PLACE, BigramConfig


def refusal(recompute: dict[str, Any], compilation: dict[str, Any]) -> str:
    """Runs in a worker: what is said of laying out a model without blocks."""
    MODELS["bigram"] = PLACE
    try:
        lay_out(
            BigramConfig(vocab_size=7),
            ParallelConfig(),
            "fp32",
            ActivationCheckpointConfig(**recompute),
            CompileConfig(**compilation),
            mesh_of(Layout(), "cpu"),
            None,
            seed=0,
            micro_batch=(1, 8),
        )
    except LayoutError as error:
        return str(error)
    finally:
        del MODELS["bigram"]
    return ""


@pytest.mark.parametrize(("recompute", "compilation"), [({"mode": "full"}, {}), ({}, {"enabled": True})])
def test_without_blocks(
    pools: dict[int, WorkerPool], recompute: dict[str, Any], compilation: dict[str, Any]
) -> None:
    (said,) = pools[1].run(refusal, recompute, compilation)
    assert said.startswith("model.type=bigram has no blocks") and said.endswith("leave both out")
    assert pools[1].run(refusal, {}, {}) == [""]
