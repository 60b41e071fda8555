"""A checkpoint is a fact: whole or not at all, checked when read, readable at any layout."""

import errno
import json
import logging
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from parallel.gradients import gathered
from parallel.processes import WorkerPool
from train import checkpoint, checkpoint_folder
from train.checkpoint_folder import Progress
from train.config import CheckpointConfig
from train.errors import RunError

LOG = logging.getLogger("test")


def whole_tensors() -> dict[str, torch.Tensor]:
    """Of sizes that no number of ranks divides."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.a.weight": torch.randn(7, 5, generator=generator),
        "model.b.bias": torch.randn(3, generator=generator).bfloat16(),
        "optimizer.a.weight.step": torch.tensor(4.0),
    }


def sharded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor of one or more dimensions, cut over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {n: distribute_tensor(t, mesh, [Shard(0)]) if t.dim() else t for n, t in tensors.items()}


def save(folder: str, step: int, keep: int = 2) -> None:
    progress = Progress(step, step * 10, {"epoch": 1})
    checkpoint.save(Path(folder), sharded(whole_tensors()), progress, CheckpointConfig(keep=keep), {})


def load(path: str) -> bool:
    """Whether what is loaded equals what was saved, to the last bit."""
    tensors = sharded({name: torch.zeros_like(t) for name, t in whole_tensors().items()})
    checkpoint.load_tensors(Path(path), tensors)
    full = {n: gathered(t) for n, t in tensors.items()}
    return all(torch.equal(full[n], t) for n, t in whole_tensors().items())


def load_into_zeros(path: str, tensors: dict[str, Any]) -> None:
    checkpoint.load_tensors(
        Path(path), {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    )


@pytest.fixture
def saved(pools: dict[int, WorkerPool], tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 3 and 4, saved by two processes."""
    pools[2].run(save, str(tmp_path), 3)
    pools[2].run(save, str(tmp_path), 4)
    return tmp_path


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loads_at_any_world_size(pools: dict[int, WorkerPool], saved: Path, world: int) -> None:
    assert all(pools[world].run(load, str(saved / "step-00000004")))
    assert checkpoint_folder.load_progress(saved / "step-00000004") == Progress(4, 40, {"epoch": 1})


def test_loads_without_a_process_group(saved: Path) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in whole_tensors().items()}
    checkpoint.load_tensors(saved / "step-00000004", tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in whole_tensors().items())


def test_holds_nothing_that_executes(saved: Path) -> None:
    assert {file.suffix for file in saved.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def test_keeps_the_newest(pools: dict[int, WorkerPool], saved: Path) -> None:
    pools[2].run(save, str(saved), 5)
    assert [path.name for path in checkpoint_folder.complete(saved)] == ["step-00000004", "step-00000005"]


def test_unfinished_is_never_seen_and_cleaned_up(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(saved / "step-00000004", saved / "step-00000009.tmp")
    shutil.copytree(saved / "step-00000004", saved / "step-00000002.removed.tmp")
    (saved / "step-00000008").mkdir()
    assert checkpoint_folder.latest(saved, LOG) == saved / "step-00000004"
    checkpoint_folder.clean_up(saved, LOG)
    assert not list(saved.glob("*.tmp"))
    assert "step-00000009.tmp was left unfinished: removed" in caplog.text
    assert len(checkpoint_folder.complete(saved)) == 2


def save_where_the_disk_is_full(folder: str, step: int, fails: str) -> str | None:
    """Save while a function of rank 0 finds no space; returns the error of this rank."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            module, _, name = fails.rpartition(".")
            patch.setattr(import_module(module), name, no_space)
        try:
            save(folder, step)
        except RunError as error:
            return str(error)
    return None


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "fails", ["train.checkpoint.begin", "train.commit.to_disk", "train.checkpoint_writer.write_tensors"]
)
def test_failure_of_the_first_rank_is_told_on_all(
    pools: dict[int, WorkerPool], saved: Path, fails: str
) -> None:
    errors = pools[2].run(save_where_the_disk_is_full, str(saved), 5, fails)
    for error in errors:
        assert error is not None
        assert "step-00000005: not saved: OSError: [Errno 28] No space left" in error
        assert "free some space" in error
    assert [path.name for path in saved.iterdir()] == ["step-00000004"]  # the other one made room
    assert all(pools[2].run(load, str(saved / "step-00000004")))


def test_old_one_that_stays_is_told_on_all(pools: dict[int, WorkerPool], saved: Path) -> None:
    errors = pools[2].run(save_where_the_disk_is_full, str(saved), 5, "train.retention.remove")
    assert all(error is not None and "an old checkpoint can't be removed" in error for error in errors)
    assert checkpoint_folder.latest(saved, LOG) == saved / "step-00000005"


def test_checkpoint_is_removed_at_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while its files are removed, it no longer bears the name of a checkpoint."""
    monkeypatch.setattr(shutil, "rmtree", no_space)
    with pytest.raises(OSError, match="No space"):
        checkpoint_folder.remove(saved / "step-00000003")
    assert [path.name for path in checkpoint_folder.complete(saved)] == ["step-00000004"]


def test_flipped_bit_is_found_and_the_one_before_taken(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    (file, *_) = sorted((saved / "step-00000004").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert checkpoint_folder.latest(saved, LOG) == saved / "step-00000003"
    assert "is not what was written" in caplog.text


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": 3}', '{"files": {"../x": {}}}', "\x00"])
def test_broken_manifests_are_damage(saved: Path, manifest: str) -> None:
    (saved / "step-00000004" / "manifest.json").write_text(manifest)
    assert checkpoint_folder.find_damage(saved / "step-00000004")


def test_other_format_is_refused_not_passed_over(saved: Path) -> None:
    path = saved / "step-00000004" / "manifest.json"
    path.write_text(json.dumps({"format": 99, "parts": []}))
    with pytest.raises(
        RunError, match="checkpoint format 99, this version reads 2 and older ones: use the version that"
    ):
        checkpoint_folder.load_progress(path.parent)
    with pytest.raises(RunError, match="checkpoint format 99"):
        checkpoint_folder.latest(saved, LOG)


def test_changed_manifest_is_damage(saved: Path) -> None:
    path = saved / "step-00000004" / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 40', '"tokens": 41'))
    assert "it is not what was written" in str(checkpoint_folder.find_damage(path.parent))


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("model.c", (1,), torch.float32, "has no tensor 'model.c'"),
        ("model.a.weight", (7, 6), torch.float32, r"the run needs torch.float32 of \(7, 6\)"),
        ("model.a.weight", (7, 5), torch.bfloat16, "the run needs torch.bfloat16"),
    ],
)
def test_other_tensors_are_refused(saved: Path, name: str, shape: Any, dtype: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        load_into_zeros(str(saved / "step-00000004"), {name: (shape, dtype)})
