"""Whole runs: they learn, resume to the last bit, compute alike on any number of processes, and say what they do."""

import hashlib
import json
import logging
import math
import os
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel.processes import WorkerPool
from tests.train.running import losses, train_here
from train import checkpoint_folder
from train.config_file import load_config
from train.errors import RunError
from train.launch import launch
from train.resolve import resolve
from train.run_folder import RunFolder, check_same_run, folder_of, read_metrics
from train.torchrun import Ended, Torchrun


@pytest.mark.parametrize("world", [1, 2])
def test_resumed_run_equals_an_undisturbed_one(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, world: int
) -> None:
    # evaluation and samples leave gathered bf16 weights behind, which must not be what is saved
    between = ["evaluation.every_steps=2", "evaluation.sample_every_steps=4", "precision=bf16"]
    common = [f"run.dir={tmp_path}", "model.dropout=0.1", *between]
    whole = [*common, "run.name=whole", "run.steps=8"]
    parts = [*common, "run.name=parts"]
    pools[world].run(train_here, tiny_config, whole)
    pools[world].run(train_here, tiny_config, [*parts, "run.steps=4"])
    assert pools[world].run(train_here, tiny_config, [*parts, "run.steps=8"]) == [8] * world
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_resumed_after_a_crash_past_the_checkpoint(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    common = [f"run.dir={tmp_path}", "run.steps=6"]
    pools[1].run(train_here, tiny_config, [*common, "run.name=whole"])
    pools[1].run(train_here, tiny_config, [*common, "run.name=crashed", "checkpoint.every_steps=2"])
    crashed = RunFolder(tmp_path / "crashed")
    # as after a kill in step 6: its checkpoint is only half there, its line is cut short
    (crashed.checkpoints / "step-00000006").rename(crashed.checkpoints / "step-00000006.tmp")
    crashed.metrics.write_text(crashed.metrics.read_text()[:-20])
    pools[1].run(train_here, tiny_config, [*common, "run.name=crashed"])
    assert losses(tmp_path / "crashed") == losses(tmp_path / "whole")


def warnings_of_training(config: str, overrides: list[str]) -> list[str]:
    """Train, and return what was warned of on this rank."""
    handler = BufferingHandler(1000)
    logging.getLogger("train").addHandler(handler)
    try:
        train_here(config, overrides)
    finally:
        logging.getLogger("train").removeHandler(handler)
    return [record.getMessage() for record in handler.buffer if record.levelno >= logging.WARNING]


def test_goes_back_to_the_newest_undamaged_checkpoint(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    common = [f"run.dir={tmp_path}", "checkpoint.every_steps=2"]
    pools[2].run(train_here, tiny_config, [*common, "run.name=whole", "run.steps=8"])
    pools[2].run(train_here, tiny_config, [*common, "run.name=flipped", "run.steps=6"])
    checkpoints = RunFolder(tmp_path / "flipped").checkpoints
    damaged = max((checkpoints / "step-00000006").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (checkpoints / "step-00000007.tmp").mkdir()
    told, untold = pools[2].run(
        warnings_of_training, tiny_config, [*common, "run.name=flipped", "run.steps=8"]
    )
    assert untold == []
    assert [line.partition("checkpoints/")[2] for line in told] == [
        "step-00000007.tmp was left unfinished: removed",
        f"step-00000006 is damaged ({damaged.name} is not what was written): going back to the one before",
    ]
    assert losses(tmp_path / "flipped") == losses(tmp_path / "whole")


def test_a_finished_run_whose_last_checkpoint_is_damaged_goes_on(
    pools: dict[int, WorkerPool],
    tiny_config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = [f"run.dir={tmp_path}", "run.steps=4", "checkpoint.every_steps=2", "parallel.dp_shard=2"]
    pools[2].run(train_here, tiny_config, overrides)
    whole = losses(tmp_path / "run")
    last = RunFolder(tmp_path / "run").checkpoints / "step-00000004"
    next(last.glob("*.safetensors")).write_bytes(b"")

    def torchrun(
        self: Torchrun, processes: int, restarts: int, command: list[str], environment: dict[str, str]
    ) -> Ended:
        return Ended(pools[processes].run(train_here, tiny_config, command[3:])[0] - 4)

    monkeypatch.setattr(Torchrun, "run", torchrun)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        launch(tiny_config, overrides)
    assert ended.value.code == 0
    assert "already done" not in capsys.readouterr().out
    assert checkpoint_folder.find_damage(last) is None
    assert losses(tmp_path / "run") == whole
    launch(tiny_config, overrides)
    assert "already done" in capsys.readouterr().out


def test_checkpoint_of_a_newer_format_stops_all_ranks(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    overrides = [f"run.dir={tmp_path}", "run.steps=2"]
    pools[2].run(train_here, tiny_config, overrides)
    manifest = RunFolder(tmp_path / "run").checkpoints / "step-00000002" / "manifest.json"
    manifest.write_text('{"format": 3}')
    errors = pools[2].run(refusal_to_train, tiny_config, [*overrides, "run.steps=3"])
    assert all("checkpoint format 3, this version reads 2" in error for error in errors)


def refusal_to_train(config: str, overrides: list[str]) -> str:
    """On each rank, what is wrong."""
    with pytest.raises(RunError) as caught:
        train_here(config, overrides)
    return str(caught.value)


def test_any_number_of_processes_computes_the_same_run(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    common = [f"run.dir={tmp_path}", "precision=fp64", "run.steps=12"]
    pools[1].run(train_here, tiny_config, [*common, "run.name=one", "data.micro_batch_size=8"])
    pools[2].run(train_here, tiny_config, [*common, "run.name=two"])
    pools[4].run(train_here, tiny_config, [*common, "run.name=four", "parallel.dp_replicate=2"])
    one = losses(tmp_path / "one")
    for other in ("two", "four"):
        for (_, loss, norm), (_, other_loss, other_norm) in zip(one, losses(tmp_path / other), strict=True):
            assert other_loss == pytest.approx(loss, rel=1e-9)
            assert other_norm == pytest.approx(norm, rel=1e-9)


# the biases that even the experts' load are state, too
@pytest.mark.parametrize("model", [[], ["model.moe.num_experts=4", "model.moe.balance=bias"]])
def test_moves_to_another_number_of_processes(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, model: list[str]
) -> None:
    common = [f"run.dir={tmp_path}", "precision=fp64", *model]
    pools[1].run(train_here, tiny_config, [*common, "run.name=one", "run.steps=8"])
    pools[2].run(train_here, tiny_config, [*common, "run.name=moved", "run.steps=4"])
    pools[1].run(train_here, tiny_config, [*common, "run.name=moved", "run.steps=8"])
    for (_, loss, norm), (_, moved_loss, moved_norm) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "moved"), strict=True
    ):
        assert (moved_loss, moved_norm) == (pytest.approx(loss, rel=1e-9), pytest.approx(norm, rel=1e-9))


def test_saves_by_time_and_keeps_the_best(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    overrides = [
        f"run.dir={tmp_path}",
        "run.steps=6",
        "checkpoint.every_time=0.0001s",
        "evaluation.every_steps=2",
    ]
    pools[2].run(train_here, tiny_config, [*overrides, "checkpoint.keep=1", "checkpoint.keep_best=3"])
    folder = RunFolder(tmp_path / "run")
    kept = [checkpoint_folder.load_progress(path) for path in checkpoint_folder.complete(folder.checkpoints)]
    rows = {row["step"]: row for row in read_metrics(folder)}
    assert [progress.step for progress in kept] == [2, 4, 6]
    assert [p.loss for p in kept] == [rows[p.step]["loss"] for p in kept]
    assert [p.validation_loss for p in kept] == [rows[p.step]["validation_loss"] for p in kept]


def test_learns_and_records(pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path) -> None:
    overrides = [
        f"run.dir={tmp_path}",
        "run.steps=30",
        "evaluation.every_steps=15",
        "evaluation.sample_every_steps=30",
        "evaluation.sample_tokens=8",
        "evaluation.sample_prompt=The",
    ]
    pools[2].run(train_here, tiny_config, overrides)
    folder = RunFolder(tmp_path / "run")
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[-1]["tokens"] == 30 * 8 * 32
    assert rows[0]["loss"] == pytest.approx(math.log(304), rel=0.05)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert [row["step"] for row in rows if "validation_loss" in row] == [15, 30]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(8 * 32 / row["step_seconds"])
        assert 0 < row["mfu"] < 1
        assert 0 <= row["data_seconds"] < row["step_seconds"]
        assert row["memory_bytes"] > 2**20

    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 31))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([r["loss"] for r in rows])
    assert [event.step for event in events.Scalars("validation/loss")] == [15, 30]
    assert {"config/text_summary", "sample/text_summary"} <= set(events.Tags()["tensors"])
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    text = events.Tensors("sample/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "The" in text
    manifest = json.loads((folder.checkpoints / "step-00000030" / "manifest.json").read_text())
    assert (manifest["world_size"], manifest["engine"], manifest["layout"]["dp_shard"]) == (2, "torch", 2)
    assert manifest["versions"].keys() == {"trireme", "torch"}
    assert manifest["config_sha256"] == hashlib.sha256(folder.config.read_bytes()).hexdigest()


def test_records_how_evenly_experts_are_used(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    experts = ["model.moe.num_experts=4", "model.moe.first_layer=1", "model.moe.capacity_factor=0.75"]
    overrides = [f"run.dir={tmp_path}", "run.steps=5", "monitor.print_every_steps=2", *experts]
    pools[2].run(train_here, tiny_config, overrides)
    folder = RunFolder(tmp_path / "run")
    rows = [row["experts"] for row in read_metrics(folder)]
    assert len(rows) == 5
    for row in rows:
        ((imbalance,), (dropped,)) = row["imbalance"], row["dropped"]
        assert 1 <= imbalance <= 2  # an expert is at most one of a token's two
        assert 0.25 <= dropped <= 1 - 0.75 / 2

    events = EventAccumulator(str(folder.tensorboard), size_guidance={"histograms": 0})
    events.Reload()
    curves = {name: events.Scalars(f"experts/{name}/0") for name in ("imbalance", "dropped")}
    for name, curve in curves.items():
        assert [event.step for event in curve] == [1, 2, 3, 4, 5]
        assert [event.value for event in curve] == pytest.approx([row[name][0] for row in rows], abs=1e-4)
    histograms = events.Histograms("experts/load/0")
    assert [event.step for event in histograms] == [2, 4]
    for event in histograms:
        loads = event.histogram_value.bucket
        assert event.histogram_value.bucket_limit == [1, 2, 3, 4]
        assert sum(loads) == pytest.approx(1)
        assert max(loads) * 4 == pytest.approx(curves["imbalance"][event.step - 1].value)


def test_stops_by_tokens(pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", "run.steps=null", "run.tokens=600"]  # 256 a step
    assert pools[1].run(train_here, tiny_config, overrides) == [3]


def test_stops_by_time_and_goes_on(pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", "run.steps=100000"]
    (first,) = pools[1].run(train_here, tiny_config, [*overrides, "run.wall_time=1s"])
    assert 0 < first < 100_000
    (second,) = pools[1].run(train_here, tiny_config, [*overrides, "run.wall_time=1s"])
    assert second > first
    assert len(read_metrics(RunFolder(tmp_path / "run"))) == second


@pytest.mark.parametrize("override", ["model.d_model=64", "optimizer.lr=0.5", "run.seed=1", "precision=bf16"])
def test_folder_of_another_run_is_refused(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, override: str
) -> None:
    from train import run_folder
    from train.config_file import load_config
    from train.resolve import resolve

    pools[1].run(train_here, tiny_config, [f"run.dir={tmp_path}", "run.steps=1"])
    plan = resolve(load_config(tiny_config, [f"run.dir={tmp_path}", override]), world_size=1)
    with pytest.raises(RunError, match=f"was begun with {override.partition('=')[0]}=") as caught:
        run_folder.check_same_run(run_folder.folder_of(plan.config), plan)
    assert "begin another run with run.name=NAME" in str(caught.value)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, precision: str
) -> None:
    overrides = [
        f"run.dir={tmp_path}",
        "run.steps=20",
        f"precision={precision}",
        "activation_checkpoint.mode=full",
    ]
    pools[2].run(train_here, tiny_config, overrides)
    rows = losses(tmp_path / "run")
    assert rows[-1][1] < 0.85 * rows[0][1]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "model"), [(1, []), (2, []), (2, ["model.moe.num_experts=4"])])
def test_compiled_run_equals_an_eager_one(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, world: int, model: list[str]
) -> None:
    common = [f"run.dir={tmp_path}", "run.steps=4", "activation_checkpoint.mode=full", *model]
    pools[world].run(train_here, tiny_config, [*common, "run.name=eager"])
    pools[world].run(train_here, tiny_config, [*common, "run.name=compiled", "compile.enabled=true"])
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert compiled != eager, "compiled code rounds otherwise"
    for (_, loss, norm), (_, compiled_loss, compiled_norm) in zip(eager, compiled, strict=True):
        assert (compiled_loss, compiled_norm) == (pytest.approx(loss, 1e-5), pytest.approx(norm, 1e-4))


def test_read_only_run_folder_is_refused(
    tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = resolve(load_config(tiny_config, [f"run.dir={tmp_path}"]), world_size=1)
    check_same_run(folder_of(plan.config), plan)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(RunError, match="run can't be written: set run.dir to a folder that can"):
        check_same_run(folder_of(plan.config), plan)
