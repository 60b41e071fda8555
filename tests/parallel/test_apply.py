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
from tests.parallel.parity import engine_config


def refusal(recompute: dict[str, Any], compilation: dict[str, Any]) -> str:
    """Runs in a worker: what is said of laying out a model without blocks."""
    MODELS["bigram"] = PLACE
    try:
        config = engine_config(
            BigramConfig(vocab_size=7),
            ParallelConfig(),
            activation_checkpoint=ActivationCheckpointConfig(**recompute),
            compile=CompileConfig(**compilation),
        )
        lay_out(config, mesh_of(Layout(), "cpu"), None)
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
