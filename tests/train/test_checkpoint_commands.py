"""`trireme checkpoint`: what there is, whether it is whole, and how two differ."""

from pathlib import Path

import pytest
import torch

from parallel.processes import WorkerPool
from tests.train import test_checkpoint
from tests.train.fake_checkpoints import fake_checkpoint
from train import checkpoint
from train.checkpoint_folder import MANIFEST, Progress, complete
from train.cli import app
from train.config import CheckpointConfig
from train.config_file import load_config
from train.errors import RunError
from train.run_folder import RunFolder, to_yaml


@pytest.fixture
def run(tiny_config: str, tmp_path: Path) -> RunFolder:
    """A run of four checkpoints, that keeps two for other reasons than being new."""
    rules = ["keep=1", "every_steps=2", "keep_every=4", "keep_best=1"]
    overrides = [*(f"checkpoint.{rule}" for rule in rules), "evaluation.every_steps=2"]
    folder = RunFolder(tmp_path / "run")
    for step, loss in ((2, 1.5), (4, 2.5), (6, 2.0), (10, 3.0)):
        fake_checkpoint(folder.checkpoints, step, loss)
    folder.config.write_text(to_yaml(load_config(tiny_config, overrides).config))
    return folder


def trireme(*arguments: object) -> int:
    """Run the command in this process. Returns its exit code."""
    return app([str(argument) for argument in arguments], standalone_mode=False) or 0


def test_list_says_what_there_is_and_why(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoints / "step-00000006" / "weights.safetensors").write_bytes(bytes(3 * 2**20))
    assert trireme("checkpoint", "list", run.path) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [[row[0], *row[1:4], row[6]] for row in cells] == [
        ["2", "20", "0.5000", "1.5000", "best"],
        ["4", "40", "0.2500", "2.5000", "for ever"],
        ["6", "60", "0.1667", "2.0000", ""],
        ["10", "100", "0.1000", "3.0000", "newest"],
    ]
    assert cells[2][4] == "3.0 MiB"
    assert all(row[5].endswith("s") for row in cells)


def test_list_shows_a_damaged_manifest(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoints / "step-00000010" / MANIFEST).write_text("{")
    assert trireme("checkpoint", "list", run.path) == 0
    assert "newest; its manifest is damaged" in capsys.readouterr().out


def test_prune_applies_the_rules_of_the_run(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert trireme("checkpoint", "prune", run.path) == 0
    assert capsys.readouterr().out == f"removed: {run.checkpoints / 'step-00000006'}\n"
    assert [path.name[-2:] for path in complete(run.checkpoints)] == ["02", "04", "10"]
    assert trireme("checkpoint", "prune", run.path) == 0
    assert capsys.readouterr().out == ""


def test_verify_names_the_damaged_file(
    pools: dict[int, WorkerPool], run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    pools[2].run(test_checkpoint.save, str(run.checkpoints), 12, 9)
    assert trireme("checkpoint", "verify", run.path) == 0
    assert capsys.readouterr().out.count(": whole\n") == 5
    (file, *_) = sorted((run.checkpoints / "step-00000012").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert trireme("checkpoint", "verify", run.path) == 1
    *whole, last = capsys.readouterr().out.splitlines()
    assert len(whole) == 4 and all(line.endswith(": whole") for line in whole)
    assert last == f"{file.parent}: {file.name} is not what was written"


def save_another(folder: str) -> None:
    """Of one process, with one element of a tensor changed, one tensor of another dtype, and one more."""
    tensors = test_checkpoint.whole_tensors()
    tensors["model.a.weight"][6, 2] += 0.5
    tensors |= {"model.b.bias": tensors["model.b.bias"].float(), "model.c": torch.zeros(1)}
    checkpoint.save(Path(folder), tensors, Progress(1, 10, {}), CheckpointConfig(), {})


def test_diff_says_which_tensors_differ_and_by_how_much(
    pools: dict[int, WorkerPool], run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pools[2].run(test_checkpoint.save, str(run.checkpoints), 12, 9)
    pools[1].run(save_another, str(tmp_path / "other"))
    other = tmp_path / "other" / "step-00000001"
    assert trireme("checkpoint", "diff", run.path, run.checkpoints / "step-00000012") == 0
    assert capsys.readouterr().out == "3 of 3 tensors are equal\n"
    assert trireme("checkpoint", "diff", run.path, other) == 1
    out = capsys.readouterr().out
    scale = test_checkpoint.whole_tensors()["model.a.weight"].abs().max().item()
    (line,) = [line for line in out.splitlines() if "model.a.weight" in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "model.a.weight",
        "1",
        "35",
        "5.000e-01",
        f"{0.5 / scale:.1e}",
    ]
    assert "torch.bfloat16 of (3,) and torch.float32 of (3,)" in out
    assert "only in" in out
    assert out.endswith("1 of 4 tensors are equal\n")


def test_what_is_no_run_or_has_no_checkpoint_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run's folder"):
        trireme("checkpoint", "list", tmp_path)
    run.checkpoints.rename(tmp_path / "gone")
    for command in ("list", "verify"):
        with pytest.raises(RunError, match="has no checkpoint"):
            trireme("checkpoint", command, run.path)


def test_diff_refuses_a_damaged_checkpoint(run: RunFolder) -> None:
    (run.checkpoints / "step-00000010" / MANIFEST).write_text("{}")
    with pytest.raises(RunError, match="is damaged"):
        trireme("checkpoint", "diff", run.path, run.checkpoints / "step-00000002")
