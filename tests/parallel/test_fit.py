"""Layouts that a model can't have are refused with one that it can."""

from typing import Any

import pytest

from model.models import parse_model
from parallel.config import CompileConfig, ParallelConfig
from parallel.errors import LayoutError
from parallel.fit import check_async_tp, check_compile, check_fit, check_micro_batches, check_recomputation
from parallel.layout import Layout

SMALL = {"vocab_size": 64, "d_model": 48, "attention": {"num_heads": 12, "num_kv_heads": 4}}


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ({"tp": 5}, {}, "parallel.tp=5 can't share out model.attention.num_heads=12 and .*use parallel.tp=4"),
        ({"tp": 12}, {"vocab_size": 96, "attention": {"num_heads": 12, "num_kv_heads": 3}}, None),
        ({"tp": 6}, {}, "use parallel.tp=4"),
        ({"tp": 12}, {"vocab_size": 20}, "without a share of model.vocab_size=20"),
        (
            {"cp": 3, "tp": 2},
            {},
            "the 6 heads and 2 kv heads .*use parallel.cp=2, or parallel.cp_method=ring$",
        ),
        ({"cp": 9}, {}, "use parallel.cp=4$"),
        ({"cp": 15}, {"attention": {"num_heads": 12, "variant": "linear"}}, "use parallel.cp=12$"),
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
        check_fit(Layout(**layout), ParallelConfig(**layout), config, seq_len=30)
        return
    with pytest.raises(LayoutError, match=message):
        check_fit(Layout(**layout), ParallelConfig(**layout), config, seq_len=30)


@pytest.mark.parametrize(
    ("cp", "model", "message"),
    [
        (5, {"attention": {"num_heads": 1, "num_kv_heads": 1}}, None),
        (4, {}, "30 tokens are no 8 equal runs: use parallel.cp=3"),
        (3, {"attention": {"variant": "linear"}}, "=linear has none: use parallel.cp_method=heads"),
        (3, {"attention": {"kernel": "flex"}}, "=flex can't: use model.attention.kernel=auto, or"),
        (3, {"type": "encoder_decoder"}, "a model of type encoder_decoder can't work on a part"),
    ],
)
def test_rings_that_work(cp: int, model: dict[str, Any], message: str | None) -> None:
    layout, parallel = Layout(cp=cp), ParallelConfig(cp=cp, cp_method="ring")
    if message is None:
        check_fit(layout, parallel, parse_model(SMALL | model), seq_len=30)
        return
    with pytest.raises(LayoutError, match=message):
        check_fit(layout, parallel, parse_model(SMALL | model), seq_len=30)


@pytest.mark.parametrize(
    ("parallel", "model", "message"),
    [
        ({"pp": 8}, {}, "8 stages, more than model.num_layers=6: use parallel.pp=6"),
        ({"pp": 4, "pp_schedule": "interleaved_1f1b"}, {}, "8 stages, more than .*: use parallel.pp=3"),
        ({"pp": 2, "pp_schedule": "zbv_zero_bubble"}, {}, "use model.tie_embeddings=false"),
        (
            {"pp": 2, "pp_schedule": "interleaved_1f1b"},
            {"positional": {"encoding": "relative"}},
            "use parallel.pp_schedule=1f1b",
        ),
        (
            {"pp": 2, "pp_schedule": "interleaved_zero_bubble"},
            {"moe": {}},
            "use parallel.pp_schedule=interleaved_1f1b",
        ),
        ({"pp": 2}, {"type": "encoder_decoder"}, "can't be cut into stages: use parallel.pp=1"),
    ],
)
def test_pipelines_that_work(parallel: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_fit(
            Layout(pp=parallel["pp"]), ParallelConfig(**parallel), parse_model(SMALL | model), seq_len=32
        )


@pytest.mark.parametrize(
    ("installed", "works"), [("2.11.0+cu130", False), ("2.13.0+cpu", True), ("2.14.0a0", True)]
)
def test_what_an_older_torch_does_wrongly_is_refused(
    monkeypatch: pytest.MonkeyPatch, installed: str, works: bool
) -> None:
    monkeypatch.setattr("parallel.fit.installed_torch", lambda: installed)
    halves = ParallelConfig(pp=2, pp_schedule="interleaved_zero_bubble")
    overlapped = Layout(tp=2), ParallelConfig(tp=2, async_tp=True), CompileConfig(enabled=True), "bf16"
    compiled = CompileConfig(enabled=True)
    check_compile(compiled, "fp32")
    check_compile(CompileConfig(), "fp64")
    if works:
        check_compile(compiled, "fp64")
        check_fit(Layout(pp=2), halves, parse_model(SMALL), seq_len=32)
        check_async_tp(*overlapped, parse_model(SMALL), seq_len=32)
        return
    with pytest.raises(LayoutError, match="needs torch 2.13, and here is 2.11.*pp_schedule=interleaved_1f1b"):
        check_fit(Layout(pp=2), halves, parse_model(SMALL), seq_len=32)
    with pytest.raises(LayoutError, match="needs torch 2.13, and here is 2.11.*precision=fp32"):
        check_compile(compiled, "fp64")
    with pytest.raises(LayoutError, match="needs torch 2.13, and here is 2.11.*async_tp=false"):
        check_async_tp(*overlapped, parse_model(SMALL), seq_len=32)


@pytest.mark.parametrize(
    ("schedule", "fine", "wrong"), [("1f1b", 5, 3), ("interleaved_1f1b", 8, 9), ("gpipe", 1, None)]
)
def test_micro_batches_of_a_schedule(schedule: str, fine: int, wrong: int | None) -> None:
    config = ParallelConfig(pp=4, pp_schedule=schedule)  # type: ignore[arg-type]
    check_micro_batches(config, fine)
    if wrong is not None:
        with pytest.raises(LayoutError, match=f"can't do {wrong} micro-batch"):
            check_micro_batches(config, wrong)


def test_schedules_say_how_many_stages_they_have() -> None:
    assert ParallelConfig(pp=2).num_stages == 2
    assert ParallelConfig(pp=2, pp_schedule="interleaved_1f1b", stages_per_rank=3).num_stages == 6
    with pytest.raises(ValueError, match="parallel.stages_per_rank=2, but parallel.pp_schedule=1f1b has 1"):
        ParallelConfig(pp=2, stages_per_rank=2)
    with pytest.raises(ValueError, match="zbv_zero_bubble has 2"):
        ParallelConfig(pp=2, pp_schedule="zbv_zero_bubble", stages_per_rank=3)


@pytest.mark.parametrize("schedule", ["zbv_zero_bubble", "interleaved_zero_bubble"])
def test_a_backward_in_two_is_not_recomputed_in_parts(schedule: str) -> None:
    """torch: "Trying to backward an extra time"."""
    parallel = ParallelConfig(pp=2, pp_schedule=schedule)
    for mode in ("selective", "auto"):
        with pytest.raises(LayoutError, match="use none or full, or parallel.pp_schedule=interleaved_1f1b"):
            check_recomputation(Layout(pp=2), parallel, mode)
    check_recomputation(Layout(pp=2), parallel, "full")
    check_recomputation(Layout(pp=2), ParallelConfig(pp=2, pp_schedule="1f1b"), "selective")
