"""A disk that is full during a save: the save is missed, aloud and by all ranks, and the run is the same in the end."""

import errno
import io
import json
import logging
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.processes import WorkerPool
from tests.train.fake_checkpoints import fake_checkpoint
from tests.train.running import losses, train_here
from tests.train.test_checkpoint import load, save
from train import checkpoint_writer
from train.checkpoint_compare import compare
from train.checkpoint_folder import MANIFEST, complete, step_of
from train.config import CheckpointConfig
from train.errors import RunError
from train.faults.record import FaultRecord
from train.lines import Lines
from train.metrics import Metrics
from train.monitor import JsonLines, Listener, Monitor
from train.retention import make_room
from train.run_folder import RunFolder, read_metrics
from train.tensor_files import write_tensors
from train.worker import LogFile

FULL = OSError(errno.ENOSPC, "No space left on device")


def fails_at(full: Callable[[Path], bool]) -> Any:
    """`write_tensors` that finds the disk full, when half of a file is written, for files of which `full` holds."""

    def write(path: Path, *arguments: Any) -> Any:
        written = write_tensors(path, *arguments)
        if dist.get_rank() == 1 and full(path):
            path.write_bytes(path.read_bytes()[: written.bytes // 2])
            raise FULL
        return written

    return write


def train_on_a_full_disk(config: str, overrides: list[str], full: Sequence[int]) -> tuple[str, list[str]]:
    """Train while rank 1 finds no room at some steps. Returns the error, if there is one, and what was warned of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("train").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        names = [f"step-{step:08d}.tmp" for step in full]
        patch.setattr(checkpoint_writer, "write_tensors", fails_at(lambda path: path.parent.name in names))
        try:
            train_here(config, overrides)
        except RunError as error:
            return str(error), said
        finally:
            logging.getLogger("train").removeHandler(handler)
    return "", said


@pytest.mark.parametrize("background", [False, True])
def test_training_goes_on_and_ends_the_same(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, background: bool
) -> None:
    common = [f"run.dir={tmp_path}", "checkpoint.every_steps=1", f"checkpoint.asynchronous={background}"]
    pools[2].run(train_here, tiny_config, [*common, "run.name=undisturbed"])
    outcomes = pools[2].run(train_on_a_full_disk, tiny_config, [*common, "run.name=full"], [3, 4])
    for error, said in outcomes:
        assert error == ""
        missed = [line for line in said if "the next save tries again" in line]
        assert [line.partition(":")[0][-13:] for line in missed] == ["step-00000003", "step-00000004"]
        assert "No space left on device: free some space; training goes on" in missed[0]
        assert "(2 missed in a row, of at most 3)" in missed[1]
    folders = [RunFolder(tmp_path / name) for name in ("undisturbed", "full")]
    assert losses(folders[0].path) == losses(folders[1].path)
    ends = [complete(folder.checkpoints) for folder in folders]
    assert [step_of(path) for path in ends[1]] == [5, 6]
    assert compare(ends[0][-1], ends[1][-1])[1] == []
    assert not list(folders[1].checkpoints.glob("*.tmp"))
    counts = [row["missed_saves"] for row in read_metrics(folders[1])]
    assert max(counts) == 2 and counts[0] == counts[-1] == 0


def test_too_many_in_a_row_end_the_run_on_all_ranks(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    rules = ["checkpoint.every_steps=1", "checkpoint.max_missed_saves=1"]
    overrides = [f"run.dir={tmp_path}", *rules]
    (error, _), (same, _) = pools[2].run(train_on_a_full_disk, tiny_config, overrides, [2, 4, 5])
    assert error == same
    assert "step-00000005: not saved" in error and "2 saves in a row" in error
    assert "checkpoint.max_missed_saves" in error and "goes on from the newest checkpoint" in error
    assert step_of(complete(RunFolder(tmp_path / "run").checkpoints)[-1]) == 3


@pytest.mark.parametrize("background", [False, True])
def test_last_save_must_not_be_missed(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, background: bool
) -> None:
    overrides = [f"run.dir={tmp_path}", "run.steps=2", f"checkpoint.asynchronous={background}"]
    for error, _ in pools[2].run(train_on_a_full_disk, tiny_config, overrides, [2]):
        assert "step-00000002: not saved" in error and "free some space and give the same command" in error
    assert list(RunFolder(tmp_path / "run").checkpoints.iterdir()) == []


def save_where_only_two_have_room(folder: str, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        full = fails_at(lambda path: len(complete(path.parent.parent)) == 2)
        patch.setattr(checkpoint_writer, "write_tensors", full)
        save(folder, step)


def test_what_would_go_then_goes_at_once(pools: dict[int, WorkerPool], tmp_path: Path) -> None:
    for step in (3, 4, 5):
        pools[2].run(save_where_only_two_have_room, str(tmp_path), step)
    assert [step_of(path) for path in complete(tmp_path)] == [4, 5]
    assert all(pools[2].run(load, str(tmp_path / "step-00000005")))


@pytest.mark.parametrize(
    ("rules", "damaged", "gone"),
    [
        ({"keep": 1}, [], [10, 20, 30]),
        ({"keep": 2}, [], [10, 20, 30]),
        ({"keep": 3}, [], [10, 20]),
        ({"keep": 2}, [40], [10, 20]),
        ({"keep": 2}, [30, 40], [10, 30]),
        ({"keep": 2, "keep_best": 1}, [], [20, 30]),
        ({"keep": 2, "every_steps": 10, "keep_every": 20}, [], [10, 30]),
    ],
)
def test_room_is_made_by_the_rules_alone(
    tmp_path: Path, rules: dict[str, Any], damaged: list[int], gone: list[int]
) -> None:
    """What the rules keep stays, and so does the newest that is whole."""
    for step in (10, 20, 30, 40):
        path = fake_checkpoint(tmp_path, step, validation_loss=float(step))
        if step in damaged:
            (path / MANIFEST).write_text("{}")
    assert [step_of(path) for path in make_room(tmp_path, CheckpointConfig(**rules))] == gone


class SmallDisk(io.BytesIO):
    """Takes so many bytes, and then no more until it is made larger."""

    name, size = "metrics.jsonl", 700

    def write(self, content: Any) -> int:
        taken = content[: self.size - self.tell()]
        if not taken:
            raise FULL
        return super().write(taken)


def metrics_of(step: int) -> Metrics:
    numbers = dict.fromkeys(("loss", "grad_norm", "lr", "tokens_per_second", "mfu"), 1.0)
    seconds = {"step_seconds": 1.0, "data_seconds": 0.0}
    return Metrics(
        step, step, **numbers, memory_bytes=1, **seconds, data_order_digest="", sequences={}, epochs={}
    )


def test_metrics_are_written_once_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert lines.file is not None
    lines.file.close()
    disk = lines.file = SmallDisk()  # type: ignore[assignment]
    for step in range(1, 7):
        if step == 6:
            disk.size = 10**6
        lines.step(metrics_of(step))
    text = disk.getvalue().decode()
    assert [line.partition(",")[0] for line in text.splitlines()] == [f'{{"step": {n}' for n in range(1, 7)]
    assert caplog.text.count("No space left on device: written once it can be") == 1


def write_faults(path: Path, bytes_at_first: int) -> list[str]:
    """Two faults, the first where a file may only have so many bytes. Returns what was warned of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("train").addHandler(handler)
    record, (_, most) = FaultRecord(path, dist.get_rank()), resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, limit in ((1, bytes_at_first), (2, most)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        record.write("skipped", step, torch.tensor([dist.get_rank()]), loss=1.0)
    record.lines.close()
    logging.getLogger("train").removeHandler(handler)
    return said


@pytest.mark.parametrize("bytes_at_first", [0, 10])
def test_faults_are_written_once_they_can_be(
    pools: dict[int, WorkerPool], tmp_path: Path, bytes_at_first: int
) -> None:
    said, unsaid = pools[2].run(write_faults, tmp_path / "faults.jsonl", bytes_at_first)
    assert len(said) == 1 and "File too large: written once it can be" in said[0] and unsaid == []
    written = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [(line["step"], line["sample_ids"]) for line in written] == [(1, [0, 1]), (2, [0, 1])]


def test_what_finds_no_room_to_the_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines(Path("/dev/full"))
    lines.append({"step": 1})
    lines.close()
    assert [record.getMessage().rpartition("device: ")[2] for record in caplog.records] == [
        "written once it can be",
        "its last lines are lost",
    ]


def test_a_log_that_finds_no_room_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("of a rank")
    log.addHandler(LogFile("/dev/full"))
    for number in range(3):
        log.warning("line %d", number)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: /dev/full: ") and line.endswith(": no more is written there")


@pytest.mark.parametrize("error", [FULL, OSError(errno.EROFS, "Read-only file system")])
def test_listener_without_room_is_left_out_aloud(caplog: pytest.LogCaptureFixture, error: OSError) -> None:
    class Picture(JsonLines):
        def __init__(self) -> None:
            pass

        def step(self, metrics: Metrics) -> None:
            raise error

    listeners: list[Listener] = [Picture()]
    monitor = Monitor(listeners)
    monitor.step(metrics_of(1))
    monitor.step(metrics_of(2))
    assert caplog.text.count(f"Picture: [Errno {error.errno}]") == 1
