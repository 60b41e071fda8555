"""Faults that are made to happen while runs train, and what the runs do about them."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import median_abs_deviation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.stream import TrainingStream
from parallel.gradients import local
from parallel.layout import Layout
from parallel.processes import WorkerPool
from parallel.torch_engine import TorchEngine
from tests.train.running import losses, train_here
from tests.train.test_command_line import trireme
from tests.train.test_stop import training, workers
from train.checkpoint_folder import digest
from train.config_file import load_config
from train.errors import ConfigError
from train.faults.health import GaveUp, robust_z
from train.faults.replicas import outliers
from train.launch import launch
from train.run_folder import RunFolder, read_metrics

SLOW = f"{Path(__file__).parent.parent / 'slurm' / 'slow'}:{os.environ.get('PYTHONPATH', '')}"
"""A path on which a module slows steps down, or holds them up."""


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


def tensors_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All shards of a checkpoint, by file and name."""
    files = (RunFolder(folder).checkpoints / f"step-{step:08d}").rglob("*.safetensors")
    tensors = {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}
    assert tensors
    return tensors


SPIKES = ["faults.spike_window=5", "faults.spike_threshold=50", "checkpoint.every_steps=4"]


def advance_data(checkpoint: Path, other: Path) -> None:
    """Have a checkpoint stand at another's position in the data."""
    manifest, position = (json.loads((path / "manifest.json").read_text()) for path in (checkpoint, other))
    manifest["progress"]["data"] = position["progress"]["data"]
    del manifest["sha256"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest(manifest)}))


@pytest.mark.parametrize("spike", [11, 12])  # in the midst of steps, and just before a checkpoint
def test_a_rollback_equals_a_run_that_never_saw_the_batches(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, spike: int
) -> None:
    common = [f"run.dir={tmp_path}", "model.dropout=0.1", "checkpoint.keep=9", *SPIKES]
    rolling = [*common, "faults.on_spike=rollback", "run.name=rolled", "run.steps=14"]
    assert pools[2].run(train_with, 1e4, [spike], tiny_config, rolling) == [14, 14]

    # the same without a fault: up to the checkpoint, and from there with the data of a run that went on to the spike
    pools[2].run(train_here, tiny_config, [*common, "run.name=clean", f"run.steps={spike}"])
    clean = RunFolder(tmp_path / "clean")
    advance_data(clean.checkpoints / "step-00000008", clean.checkpoints / f"step-{spike:08d}")
    for later in range(9, 15):
        shutil.rmtree(clean.checkpoints / f"step-{later:08d}", ignore_errors=True)
    pools[2].run(train_here, tiny_config, [*common, "run.name=clean", "run.steps=14"])

    assert losses(tmp_path / "rolled") == losses(tmp_path / "clean")
    rows = read_metrics(RunFolder(tmp_path / "rolled"))
    assert [row["data_order_digest"] for row in rows] == [
        row["data_order_digest"] for row in read_metrics(clean)
    ]
    assert [row["left_out_batches"] for row in rows] == [0] * 8 + [spike - 8] * 6
    assert [(line["fault"], line["step"]) for line in faults_of(tmp_path / "rolled")] == [
        ("spike", spike),
        ("rollback", spike),
    ]
    rolled, untouched = (tensors_of(tmp_path / name, 14) for name in ("rolled", "clean"))
    assert rolled.keys() == untouched.keys()
    assert all(torch.equal(rolled[name], untouched[name]) for name in rolled)


def test_so_many_rollbacks_and_no_more(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    rolling = [f"run.dir={tmp_path}", *SPIKES, "faults.on_spike=rollback", "faults.max_rollbacks=1"]
    assert pools[2].run(train_with, 1e4, [7, 9], tiny_config, [*rolling, "run.steps=9"]) == [9, 9]
    assert [(line["fault"], line["step"]) for line in faults_of(tmp_path / "run")] == [
        ("spike", 7),
        ("rollback", 7),
        ("spike", 6),  # batch 9
    ]
    (row,) = [row for row in read_metrics(RunFolder(tmp_path / "run")) if "spike" in row]
    assert row["step"] == 6 and row["spike"] > 50


@settings(deadline=None)  # other processes are on these cores, too
@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=30), st.floats(-1e3, 1e3))
def test_robust_z_is_that_of_scipy(past: list[float], value: float) -> None:
    deviation = median_abs_deviation(past, scale="normal")
    assume(deviation > 1e-2)
    assert robust_z(value, past) == pytest.approx((value - np.median(past)) / deviation, rel=1e-3, abs=1e-9)


@pytest.mark.slow
def test_the_command_gives_up_with_one_line(tiny_config: str, tmp_path: Path) -> None:
    wild = ["optimizer.lr=1e30", "schedule.warmup_steps=0", "faults.max_skipped_steps=3"]
    settings = [f"run.dir={tmp_path}", "run.steps=50", "checkpoint.every_steps=1"]
    done = trireme("train", tiny_config, *settings, *wild, code=1)
    (line,) = done.stderr.splitlines()
    last = faults_of(tmp_path / "run")[-1]
    assert line.startswith(f"error: gave up at step {last['step']}: ") and len(last["sample_ids"]) == 8


@pytest.mark.slow
def test_a_hung_run_ends_and_every_rank_shows_where_it_stands(tiny_config: str, tmp_path: Path) -> None:
    settings = ["parallel.dp_shard=2", "faults.hang_timeout=20s", "monitor.tensorboard=false"]
    held = {"PYTHONPATH": SLOW, "HOLD_UNTIL": str(tmp_path / "never"), "HOLD_RANK": "1"}
    with patch.dict(os.environ, held), training(tiny_config, tmp_path, *settings) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output
    assert len(losses(tmp_path / "run")) == 6, "step 7 is told of when step 8 is under way"
    stacks = [RunFolder(tmp_path / "run").log_of(rank).read_text() for rank in range(2)]
    for rank, stack in enumerate(stacks):
        assert f"rank {rank} hangs: step 8 didn't end within 20s" in stack
        assert f"rank {rank}, in step 8:" in stack and "in _watch" in stack
    assert "in slow_step" in stacks[1], "the one that sleeps"
    assert "in all_reduce" in stacks[0], "the one that waits for it"


def flip_a_bit(self: TorchEngine, rank: int, name: str) -> None:
    """Of the first element that this rank has of a weight; one that an update's rounding can't swallow."""
    if dist.get_rank() == rank:
        self.weights()[f"model.{name}"].to_local().view(torch.int32).view(-1)[0] ^= 1 << 16  # type: ignore[attr-defined]


def train_corrupted(rank: int, name: str, config: str, overrides: list[str]) -> str:
    """A run in which one bit of a rank's weights changes after step 3: why it gave up."""
    step, steps = TorchEngine.step, 0

    def corrupting(self: TorchEngine, lr: float) -> torch.Tensor:
        nonlocal steps
        norm = step(self, lr)
        steps += 1
        if steps == 3:
            flip_a_bit(self, rank, name)
        return norm

    with patch.object(TorchEngine, "step", corrupting), pytest.raises(GaveUp) as gave_up:
        train_here(config, overrides)
    return str(gave_up.value)


@pytest.mark.parametrize(
    ("layout", "rank", "name", "named"),
    [
        (["parallel.dp_replicate=4"], 2, "blocks.1.feedforward.down.weight", [2]),
        (["parallel.tp=4"], 1, "norm.weight", [1]),
        (["parallel.dp_replicate=2", "parallel.tp=2"], 3, "blocks.0.feedforward.down.weight", [1, 3]),
        (["parallel.dp_replicate=2", "parallel.dp_shard=2"], 0, "norm.weight", [0, 2]),
    ],
)
def test_a_flipped_bit_is_found_and_the_rank_named(
    pools: dict[int, WorkerPool],
    tiny_config: str,
    tmp_path: Path,
    layout: list[str],
    rank: int,
    name: str,
    named: list[int],
) -> None:
    settings = [f"run.dir={tmp_path}", *layout, "faults.compare_every_steps=2", "run.steps=5"]
    if layout == ["parallel.tp=4"]:
        settings += ["model.attention.num_kv_heads=4"]
    messages = set(pools[4].run(train_corrupted, rank, name, tiny_config, settings))
    (message,) = messages
    ranks = ", ".join(map(str, named))
    assert f"gave up at step 4: the weights of rank {ranks} are not" in message and "after step 2" in message
    assert faults_of(tmp_path / "run")[-1]["ranks"] == named


def test_wrong_weights_are_not_saved(pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path) -> None:
    seldom = ["faults.compare_every_steps=100", "checkpoint.every_steps=2", "parallel.dp_replicate=2"]
    settings = [f"run.dir={tmp_path}", *seldom]
    for message in pools[2].run(train_corrupted, 1, "norm.weight", tiny_config, settings):
        assert "gave up at step 4" in message and "after step 2" in message
    (checkpoint,) = RunFolder(tmp_path / "run").checkpoints.iterdir()
    assert checkpoint.name == "step-00000002"


def test_replicas_compute_alike(pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path) -> None:
    for layout in (["parallel.dp_replicate=2"], ["parallel.tp=2", "parallel.sequence_parallel=false"]):
        settings = [f"run.dir={tmp_path}", f"run.name={layout[0]}", *layout, "faults.compare_every_steps=1"]
        assert pools[2].run(train_here, tiny_config, [*settings, "run.steps=4"]) == [4, 4]


@pytest.mark.parametrize(
    ("everything", "uncut", "layout", "found"),
    [
        ([1, 1, 2, 1], [0, 0, 0, 0], Layout(dp_replicate=4), [2]),
        ([1, 2, 1, 2], [0, 0, 0, 0], Layout(dp_replicate=2, dp_shard=2), []),
        ([1, 2, 1, 3], [0, 0, 0, 0], Layout(dp_replicate=2, dp_shard=2), [1, 3]),
        ([1, 2, 3, 4], [5, 5, 6, 5], Layout(tp=4), [2]),
        ([1, 2, 3, 4], [5, 5, 6, 6], Layout(dp_shard=2, tp=2), []),
        ([1, 2, 3, 4], [5, 6, 7, 8], Layout(pp=2, cp=2), []),
        ([1, 2, 1, 3], [5, 5, 5, 6], Layout(dp_replicate=2, tp=2), [1, 3]),
    ],
)
def test_who_differs(everything: list[int], uncut: list[int], layout: Layout, found: list[int]) -> None:
    assert outliers(everything, uncut, layout) == found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_worker_is_started_again_and_computes_what_it_would_have(
    tiny_config: str, tmp_path: Path, ranks: int
) -> None:
    settings = [
        f"parallel.dp_shard={ranks}",
        "run.steps=20",
        "checkpoint.every_steps=5",
        "data.num_workers=1",
    ]
    slow = {"PYTHONPATH": SLOW, "STEP_SECONDS": "0.2"}
    with (
        patch.dict(os.environ, slow),
        training(tiny_config, tmp_path, *settings, "--max-restarts=1") as process,
    ):
        while not (tmp_path / "run" / "checkpoints" / "step-00000010").is_dir() and process.poll() is None:
            time.sleep(0.02)
        assert len(losses(tmp_path / "run")) < 15, "it is killed on its way"
        os.kill(workers(tmp_path)[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "from step 11 to 20" in output
    with training(tiny_config, tmp_path / "whole", *settings) as process:
        assert process.wait(600) == 0, process.communicate()[0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole" / "run")
    killed, whole = tensors_of(tmp_path / "run", 20), tensors_of(tmp_path / "whole" / "run", 20)
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_worker_killed_while_it_compiles_is_started_again(
    tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["parallel.dp_shard=2", "run.steps=4"]
    compiled = tmp_path / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    compiling = [*settings, "compile.enabled=true", "--max-restarts=1"]
    with training(tiny_config, tmp_path, *compiling) as process:
        # unlike globbing, walking bears folders that are gone when it comes to them
        while not any(name.endswith(".cpp") for _, _, names in os.walk(compiled) for name in names):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        os.kill(workers(tmp_path)[-1], signal.SIGKILL)
        metrics = RunFolder(tmp_path / "run").metrics
        assert not metrics.exists() or not metrics.read_bytes(), "it is killed in its first step"
        output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert output.count("from step 1 to 4") == 2
    with training(tiny_config, tmp_path / "whole", *settings) as process:
        assert process.wait(600) == 0, process.communicate()[0]
    plain, recompiled = losses(tmp_path / "whole" / "run"), losses(tmp_path / "run")
    assert len(recompiled) == 4, "each step once"
    assert np.array(recompiled) == pytest.approx(np.array(plain), rel=1e-4), (
        "what is compiled rounds otherwise"
    )


def test_restarts_are_the_launchers_to_give(tiny_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="give --max-restarts=2 to torchrun instead"):
        launch(tiny_config, [], max_restarts=2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("faults.on_spike=rollback", "set checkpoint.every_steps=1000"),
        ("faults.compare_every_steps=5", "set faults.compare_every_steps=null, or parallel.dp_replicate=2"),
    ],
)
def test_what_could_not_work_is_refused(tiny_config: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_config, [override])
