"""Laying out a model: what needs blocks is refused where there are none."""

from typing import Any, cast

import pytest

from model.models import MODELS
from parallel.apply import lay_out
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig
from parallel.errors import LayoutError
from parallel.mesh import Mesh
from tests.model.bigram import PLACE, BigramConfig


@pytest.mark.parametrize(("recompute", "compilation"), [({"mode": "full"}, {}), ({}, {"enabled": True})])
def test_without_blocks(
    recompute: dict[str, Any], compilation: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "bigram", PLACE)
    with pytest.raises(LayoutError, match=r"model.type=bigram has no blocks.*leave both out"):
        lay_out(
            BigramConfig(vocab_size=7),
            ParallelConfig(),
            "fp32",
            ActivationCheckpointConfig(**recompute),
            CompileConfig(**compilation),
            cast(Mesh, None),
            None,
            seed=0,
            micro_batch=(1, 8),
        )
