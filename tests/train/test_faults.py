"""Faults that are made to happen while runs train, and what the runs do about them."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.stream import TrainingStream
from parallel.gradients import local
from parallel.processes import WorkerPool
from parallel.torch_engine import TorchEngine
from tests.train.running import train_here
from train.faults.health import GaveUp
from train.run_folder import RunFolder, read_metrics


def gradients_times(factor: float, batches: Iterable[int]) -> Any:
    """Of those global batches, counted from 1, the last rank's gradients are multiplied."""
    forward_backward = TorchEngine.forward_backward
    take = TrainingStream.__next__
    taken = 0

    def counted(self: TrainingStream) -> Any:
        nonlocal taken
        batch = take(self)
        taken = self.state_dict()["batches"]
        return batch

    def wrong(self: TorchEngine, batch: Any, step: int) -> Any:
        loss = forward_backward(self, batch, step)
        if taken in batches and dist.get_rank() == dist.get_world_size() - 1:
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                local(parameter.grad).mul_(factor)
        return loss

    return patch.multiple(TorchEngine, forward_backward=wrong), patch.object(
        TrainingStream, "__next__", counted
    )


def train_with(factor: float, batches: list[int], config: str, overrides: list[str]) -> int | str:
    """A run with wrong gradients: its last step, or why it gave up."""
    first, second = gradients_times(factor, batches)
    with first, second:
        try:
            return train_here(config, overrides)
        except GaveUp as gave_up:
            return str(gave_up)


def faults_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of faults.jsonl."""
    return [json.loads(line) for line in RunFolder(folder).faults.read_text().splitlines()]


def test_steps_of_no_finite_gradient_are_skipped_and_counted(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    common = [f"run.dir={tmp_path}", "faults.max_skipped_steps=2"]
    parts = [*common, "run.name=parts"]
    # one in a row at a time, and one of them just before the run is interrupted
    assert pools[2].run(train_with, math.nan, [2, 4], tiny_config, [*parts, "run.steps=4"]) == [4, 4]
    assert pools[2].run(train_with, math.inf, [6], tiny_config, [*parts, "run.steps=7"]) == [7, 7]
    rows = read_metrics(RunFolder(tmp_path / "parts"))
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 2, 2, 3, 3]
    assert all(math.isfinite(row["grad_norm"]) for row in rows if row["step"] not in (2, 4, 6))
    written = faults_of(tmp_path / "parts")
    assert [(line["fault"], line["step"]) for line in written] == [
        ("skipped", 2),
        ("skipped", 4),
        ("skipped", 6),
    ]
    assert all(len(set(line["sample_ids"])) == 8 for line in written)
    events = EventAccumulator(str(tmp_path / "parts" / "tensorboard")).Reload()
    assert events.Scalars("train/skipped_steps")[-1].value == 3


def test_a_run_gives_up_after_too_many_in_a_row(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    common = [f"run.dir={tmp_path}", "faults.max_skipped_steps=3", "checkpoint.every_steps=3"]
    parts = [*common, "run.name=parts"]
    # also where the run was interrupted between them
    assert pools[2].run(train_with, math.nan, [2, 3, 4], tiny_config, [*parts, "run.steps=3"]) == [3, 3]
    first, second = pools[2].run(train_with, math.nan, [4], tiny_config, [*parts, "run.steps=9"])
    assert first == second
    assert "gave up at step 4" in first and "3 steps in a row" in first and "max_skipped_steps" in first
    last = faults_of(tmp_path / "parts")[-1]
    assert last["step"] == 4 and len(last["sample_ids"]) == 8
