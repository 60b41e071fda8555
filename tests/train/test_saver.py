"""Saves in the background: of the state as it was, one at a time, and failing aloud on all ranks."""

import errno
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from parallel.processes import WorkerPool
from tests.train.running import losses, train_here
from tests.train.test_checkpoint import load, sharded, whole_tensors
from train import checkpoint
from train.checkpoint_compare import compare
from train.checkpoint_folder import Progress, complete
from train.config import CheckpointConfig
from train.errors import RunError
from train.host_copy import HostCopy
from train.saver import Saver

RULES = CheckpointConfig(asynchronous=True)


copy = HostCopy._copy


def copies_late(self: HostCopy, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What takes longer than a forward and a backward."""
    time.sleep(0.3)
    return copy(self, shards)


def save_and_change(folder: str) -> bool:
    """Save in the background, which starts to write when the tensors have changed already."""
    changed = Event()
    save = checkpoint.save

    def late(*arguments: Any) -> Path:
        changed.wait()
        return save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", late)
        patch.setattr(HostCopy, "_copy", copies_late)
        saver, tensors = Saver(Path(folder), RULES, {}), sharded(whole_tensors())
        saver.save(tensors, Progress(1, 10, {}))
        saver.wait_for_copy()
        for tensor in tensors.values():
            tensor.add_(1)
        saver.check()  # nothing yet
        unfinished = not complete(Path(folder))
        dist.barrier()
        changed.set()
        saver.save(tensors, Progress(2, 20, {}))  # waits for the first
        assert Path(folder) / "step-00000001" in complete(Path(folder))
        saver.close()
    return unfinished


def test_saves_what_was_when_it_was_asked_to(pools: dict[int, WorkerPool], tmp_path: Path) -> None:
    assert all(pools[2].run(save_and_change, str(tmp_path)))
    assert all(pools[2].run(load, str(tmp_path / "step-00000001")))
    assert not any(pools[2].run(load, str(tmp_path / "step-00000002")))


def denied(*_: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def checks_until_failure(folder: str) -> tuple[int, str]:
    """Save while rank 0 may not write; how often all was well, and the error."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(checkpoint, "commit", denied)
        saver = Saver(Path(folder), RULES, {})
        saver.save(sharded(whole_tensors()), Progress(1, 10, {}))
        for count in range(10**6):
            try:
                saver.check()
            except RunError as error:
                saver.close()
                return count, str(error)
    raise AssertionError


def test_failure_comes_out_on_all_ranks_at_the_same_step(
    pools: dict[int, WorkerPool], tmp_path: Path
) -> None:
    (one, error), (other, same_error) = pools[2].run(checks_until_failure, str(tmp_path))
    assert (one, error) == (other, same_error)
    assert "step-00000001: not saved: PermissionError: [Errno 13] Permission denied" in error


def train_with_late_copies(config: str, overrides: list[str], waits: bool = True) -> None:
    """Train, where the update comes before the copy unless it waits for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCopy, "_copy", copies_late)
        if not waits:
            patch.setattr(Saver, "wait_for_copy", lambda self: None)
        train_here(config, overrides)


def tensors_that_differ(one: Path, other: Path) -> list[list[str]]:
    """Between two runs' checkpoints of each step; these are of six steps."""
    saved = [complete(folder / "checkpoints") for folder in (one, other)]
    assert [path.name for path in saved[0]] == [path.name for path in saved[1]]
    assert len(saved[0]) == 6
    return [[difference.name for difference in compare(*pair)[1]] for pair in zip(*saved, strict=True)]


@pytest.mark.parametrize(
    "layout",
    [
        ["model.moe.num_experts=4", "model.moe.balance=bias"],
        ["parallel.pp=2"],
        ["precision=fp16"],
        ["parallel.engine=deepspeed", "parallel.deepspeed.stage=0"],
        ["parallel.engine=deepspeed", "parallel.deepspeed.stage=2", "precision=bf16"],
    ],
    ids=" ".join,
)
def test_run_that_saves_in_the_background_is_the_same(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, layout: list[str]
) -> None:
    common = [f"run.dir={tmp_path}", "checkpoint.every_steps=1", "checkpoint.keep=9", *layout]
    pools[2].run(train_here, tiny_config, [*common, "run.name=waits"])
    there = [*common, "run.name=goes_on", "checkpoint.asynchronous=true"]
    pools[2].run(train_with_late_copies, tiny_config, [*there, "run.steps=3"])
    pools[2].run(train_with_late_copies, tiny_config, there)
    assert losses(tmp_path / "goes_on") == losses(tmp_path / "waits")
    assert tensors_that_differ(tmp_path / "waits", tmp_path / "goes_on") == [[]] * 6


def test_an_update_that_does_not_wait_would_be_seen(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    common = [f"run.dir={tmp_path}", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    pools[2].run(train_here, tiny_config, [*common, "run.name=waits"])
    there = [*common, "run.name=goes_on", "checkpoint.asynchronous=true"]
    pools[2].run(train_with_late_copies, tiny_config, there, False)
    *differ, last = tensors_that_differ(tmp_path / "waits", tmp_path / "goes_on")
    assert all(differ) and not last
