"""A run may change its layout whenever it is resumed, and goes on as it would have."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel.processes import WorkerPool
from tests.train.running import losses, train_here
from train.run_folder import RunFolder, read_metrics

STAGES = [
    (2, ["parallel.tp=2"]),
    (2, ["parallel.cp=2"]),
    (4, ["parallel.tp=2", "parallel.dp_replicate=2"]),
    (2, ["parallel.ep=2"]),
    (2, ["parallel.pp=2"]),
    (4, ["parallel.tp=4", "parallel.sequence_parallel=false"]),
    (1, []),
]
"""Processes and layout of every two steps."""


@pytest.mark.slow
def test_moves_from_layout_to_layout(pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path) -> None:
    model = ["model.moe.num_experts=4", "model.moe.balance=bias", "model.positional.encoding=relative"]
    common = [
        f"run.dir={tmp_path}",
        "precision=fp64",
        "evaluation.every_steps=2",
        "evaluation.sequences=4",
        *model,
    ]
    pools[1].run(train_here, tiny_config, [*common, "run.name=one", f"run.steps={2 * len(STAGES)}"])
    for number, (world, layout) in enumerate(STAGES, start=1):
        steps = f"run.steps={2 * number}"
        pools[world].run(train_here, tiny_config, [*common, "run.name=moving", steps, *layout])
    assert [step for step, *_ in losses(tmp_path / "moving")] == list(range(1, 2 * len(STAGES) + 1))
    for one, moved in zip(
        read_metrics(RunFolder(tmp_path / "one")), read_metrics(RunFolder(tmp_path / "moving")), strict=True
    ):
        for key in one.keys() & {"loss", "grad_norm", "validation_loss"}:
            assert moved[key] == pytest.approx(one[key], rel=1e-9), (one["step"], key)


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.cp=2"])
def test_samples_are_those_of_one_process(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, layout: str
) -> None:
    common = [f"run.dir={tmp_path}", "precision=fp64", "run.steps=4", "evaluation.sample_every_steps=4"]
    model = ["model.positional.encoding=alibi"]
    pools[1].run(train_here, tiny_config, [*common, *model, "run.name=one"])
    pools[2].run(train_here, tiny_config, [*common, *model, "run.name=two", layout])
    assert _sample(tmp_path / "one") == _sample(tmp_path / "two") != ""


ENGINES = [
    (2, ["parallel.engine=deepspeed", "evaluation.sample_every_steps=2"]),
    (2, []),
    (1, ["parallel.engine=deepspeed", "parallel.deepspeed.stage=3"]),
    (4, ["parallel.engine=deepspeed", "parallel.deepspeed.stage=1", "parallel.tp=2"]),
]
"""Processes, engine and layout of every two steps."""


@pytest.mark.slow
def test_moves_from_engine_to_engine(pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path) -> None:
    common = [f"run.dir={tmp_path}", "evaluation.every_steps=2", "evaluation.sequences=4"]
    pools[1].run(train_here, tiny_config, [*common, "run.name=one", f"run.steps={2 * len(ENGINES)}"])
    for number, (world, engine) in enumerate(ENGINES, start=1):
        overrides = [*common, "run.name=moving", f"run.steps={2 * number}", *engine]
        pools[world].run(train_here, tiny_config, overrides)
    assert _sample(tmp_path / "moving") != ""
    one, moved = (read_metrics(RunFolder(tmp_path / name)) for name in ("one", "moving"))
    assert [row["step"] for row in moved] == [row["step"] for row in one]
    for here, there in zip(one, moved, strict=True):
        assert there["data_order_digest"] == here["data_order_digest"]
        for key in here.keys() & {"loss", "grad_norm", "validation_loss"}:
            assert there[key] == pytest.approx(here[key], rel=1e-5), (here["step"], key)


def _sample(folder: Path) -> str:
    """The text in the run's TensorBoard events."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("sample/text_summary")
    return event.tensor_proto.string_val[0].decode()
