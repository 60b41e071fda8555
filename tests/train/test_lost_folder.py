"""A run's folder that can't be written any longer, and one in which nothing is good."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parallel.processes import WorkerPool
from tests.train.running import losses, train_here
from tests.train.test_run import refusal_to_train
from tests.train.test_stop import training, wait_for_step
from train.checkpoint_folder import MANIFEST, complete
from train.run_folder import RunFolder

MINDS_MODES = """
import ctypes, os, sys
if "MINDS_MODES" not in os.environ:
    ctypes.CDLL(None).prctl(24, 1)
    os.environ["MINDS_MODES"] = "1"
    os.execv(sys.executable, sys.orig_argv)
"""
"""Root's programs pass over a file's mode; those that are started from here on don't (PR_CAPBSET_DROP of
CAP_DAC_OVERRIDE)."""


def read_only(run: RunFolder) -> None:
    """No file can be made in it."""
    for folder in (run.path, *(path for path in run.path.rglob("*") if path.is_dir())):
        folder.chmod(0o555)


def gone(run: RunFolder) -> None:
    """As when its disk is."""
    run.path.rename(run.path.parent / "elsewhere")


@pytest.fixture
def writable_in_the_end(tmp_path: Path) -> Iterator[None]:
    """What is left can be removed."""
    yield
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir()]:
        folder.chmod(0o755)


@pytest.mark.slow
@pytest.mark.usefixtures("writable_in_the_end")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("lose", "why"), [(read_only, "PermissionError"), (gone, "FileNotFoundError")])
def test_the_next_save_ends_the_run_with_one_line_from_each_rank(
    tiny_config: str, tmp_path: Path, ranks: int, lose: Callable[[RunFolder], None], why: str
) -> None:
    settings = [f"parallel.dp_shard={ranks}", "checkpoint.every_steps=50"]
    with training(tiny_config, tmp_path, *settings, code=MINDS_MODES) as process:
        wait_for_step(tmp_path, 3)
        lose(RunFolder(tmp_path / "run"))
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert 1 <= len(told) <= ranks and len(set(told)) == 1
    assert f": not saved: {why}: " in told[0]
    assert "mend that, and give the same command again: it goes on from the newest checkpoint" in told[0]


def damage(checkpoint: Path, number: int) -> None:
    """A file of it, or its manifest."""
    if number % 2:
        (checkpoint / MANIFEST).unlink()
    else:
        next(checkpoint.glob("*.safetensors")).write_bytes(b"")


def test_a_run_does_not_begin_anew_where_all_checkpoints_are_damaged(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    overrides = [f"run.dir={tmp_path}", "checkpoint.every_steps=2"]
    pools[2].run(train_here, tiny_config, [*overrides, "run.name=whole", "run.steps=6"])
    pools[2].run(train_here, tiny_config, [*overrides, f"checkpoint.mirror={tmp_path}/mirror", "run.steps=4"])
    run = RunFolder(tmp_path / "run")
    for number, checkpoint in enumerate(complete(run.checkpoints)):
        damage(checkpoint, number)
    before = sorted(run.checkpoints.rglob("*"))
    errors = pools[2].run(refusal_to_train, tiny_config, [*overrides, "run.steps=6"])
    assert errors[0] == errors[1]
    assert "all checkpoints are damaged (step-00000002, step-00000004)" in errors[0]
    assert "bring one back from a copy" in errors[0] and "or move them away to begin anew" in errors[0]
    assert sorted(run.checkpoints.rglob("*")) == before

    pools[2].run(train_here, tiny_config, [*overrides, f"checkpoint.mirror={tmp_path}/mirror", "run.steps=6"])
    assert losses(run.path) == losses(tmp_path / "whole")

    shutil.move(run.checkpoints, tmp_path / "away")
    pools[2].run(train_here, tiny_config, [*overrides, "run.steps=6"])
    assert losses(run.path) == losses(tmp_path / "whole")
