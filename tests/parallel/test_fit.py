"""Layouts that a model can't have are refused with one that it can."""

from typing import Any

import pytest

from model.models import parse_model
from parallel.errors import LayoutError
from parallel.fit import check_fit
from parallel.layout import Layout

SMALL = {"vocab_size": 64, "d_model": 48, "attention": {"num_heads": 12, "num_kv_heads": 4}}


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ({"tp": 5}, {}, "parallel.tp=5 can't share out model.attention.num_heads=12 and .*use parallel.tp=4"),
        ({"tp": 12}, {"vocab_size": 96, "attention": {"num_heads": 12, "num_kv_heads": 3}}, None),
        ({"tp": 6}, {}, "use parallel.tp=4"),
        ({"tp": 12}, {"vocab_size": 20}, "without a share of model.vocab_size=20"),
        ({"cp": 3, "tp": 2}, {}, "the 6 heads and 2 kv heads .*use parallel.cp=2"),
        (
            {"cp": 4},
            {"attention": {"num_heads": 4}},
            "doesn't divide the sequences of 30 tokens: use parallel.cp=2",
        ),
        ({"cp": 2}, {"type": "flow_matching"}, "a model of type flow_matching can't work on a part"),
        ({"ep": 2}, {}, "has no experts"),
        ({"ep": 4}, {"moe": {"num_experts": 6}}, "doesn't divide model.moe.num_experts=6: use parallel.ep=3"),
    ],
)
def test_the_nearest_that_works(layout: dict[str, int], model: dict[str, Any], message: str | None) -> None:
    config = parse_model(SMALL | model)
    if message is None:
        check_fit(Layout(**layout), config, seq_len=30)
        return
    with pytest.raises(LayoutError, match=message):
        check_fit(Layout(**layout), config, seq_len=30)
