"""A step's timeline is what schedules allow, and as long as the step is said to be."""

from itertools import pairwise
from typing import Any

import pytest

from parallel.planner.actions import actions_of
from parallel.planner.estimate import Estimate, estimate
from parallel.planner.hardware import load_device
from parallel.planner.timeline import Span, timeline
from tests.parallel.planner.cases import LLAMA, arranged, run_of

GPU = load_device("h100-80gb")
DEEP = {
    **LLAMA,
    "num_layers": 16,
    "d_model": 1024,
    "max_seq_len": 4096,
    "ffn": {"variant": "swiglu", "d_ff": 2752},
}


def planned(sequences: int = 32, layers: int = 16, **parallel: Any) -> Estimate:
    run = run_of({**DEEP, "num_layers": layers}, sequences=sequences)
    return estimate(run, arranged(1, **parallel), GPU)


def of_place(spans: list[Span], place: int) -> list[Span]:
    return sorted((span for span in spans if span.place == place), key=lambda span: span.start)


PIPELINES = [
    ("1f1b", 1),
    ("gpipe", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 4),
    ("interleaved_zero_bubble", 2),
    ("zbv_zero_bubble", 2),
]


@pytest.mark.parametrize(("schedule", "stages"), PIPELINES)
def test_a_rank_does_one_thing_at_a_time(schedule: str, stages: int) -> None:
    found = planned(pp=4, tp=2, pp_schedule=schedule, stages_per_rank=stages)
    spans = timeline(found)
    for place in range(4):
        for this, following in pairwise(of_place(spans, place)):
            assert this.stop <= following.start + 1e-12
        mine = of_place(spans, place)
        for what in ("forward", "backward"):
            numbers = {span.micro_batch for span in mine if span.what == what}
            assert numbers == set(range(32))


@pytest.mark.parametrize("layers", [16, 18])
@pytest.mark.parametrize(("schedule", "stages"), PIPELINES)
def test_it_is_as_long_as_the_step(schedule: str, stages: int, layers: int) -> None:
    """Bubbles come from the order there, and from a formula of the schedule here; where ranks have more layers than
    others these wait for them."""
    found = planned(64, layers, pp=4, tp=2, pp_schedule=schedule, stages_per_rank=stages)
    assert max(span.stop for span in timeline(found)) == pytest.approx(found.time.total, rel=0.07)


@pytest.mark.parametrize(
    "parallel", [{}, {"dp_shard": 4}, {"tp": 4, "dp_shard": 2}, {"dp_shard": 8, "cp": 2}]
)
def test_without_a_pipeline_it_is_the_step(parallel: dict[str, Any]) -> None:
    found = planned(**parallel)
    spans = timeline(found)
    assert max(span.stop for span in spans) == pytest.approx(found.time.total)
    time = found.time
    sent = sum(span.seconds for span in spans if span.what == "communication")
    assert sent == pytest.approx(time.dp + time.tp + time.cp + time.ep)
    assert sum(span.seconds for span in spans if span.what == "optimizer") == pytest.approx(time.optimizer)


def test_backwards_go_back_through_the_stages() -> None:
    """1f1b of 4 ranks: the first has 4 forwards before its first backward, the last 1."""
    arrangement = arranged(1, pp=4)
    for place in range(4):
        works = [action.work for action in actions_of(arrangement, place, 8)]
        assert works.index("B") == 4 - place
        assert works.count("F") == works.count("B") == 8
