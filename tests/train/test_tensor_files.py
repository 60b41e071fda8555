"""Files of tensors as they are written for checkpoints: what any reader of safetensors reads, with the hash noted."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from parallel.processes import WorkerPool
from tests.train.test_checkpoint import load, save
from train import checkpoint_writer, tensor_files
from train.checkpoint_folder import MANIFEST, digest, find_damage
from train.stored import Stored
from train.tensor_files import Piece, write_tensors

DTYPES = [*tensor_files._DTYPES]


def pieces_of(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    return [Piece(name, t.dtype, tuple(t.shape), (0,) * t.dim()) for name, t in tensors.items()]


@pytest.mark.parametrize(("chunk", "unwritten"), [(2**23, 2**26), (7, 20)])
def test_any_reader_reads_what_was_written(
    tmp_path: Path, chunk: int, unwritten: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_CHUNK", chunk)
    monkeypatch.setattr(tensor_files, "_UNWRITTEN", unwritten)
    values = torch.arange(-15, 15).view(5, 6)
    tensors = {str(dtype): values.abs().to(dtype) for dtype in DTYPES}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "turned": values.t(),
        "cut": values[1:3, 2:],
    }
    written = write_tensors(tmp_path / "file", pieces_of(tensors), lambda piece: tensors[piece.name])
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    content = (tmp_path / "file").read_bytes()
    assert (written.bytes, written.xxh3_128) == (len(content), xxhash.xxh3_128(content).hexdigest())


def save_in_many_files(folder: str, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "_FILE_BYTES", 4)
        save(folder, step)


def test_large_shares_are_written_as_several_files(pools: dict[int, WorkerPool], tmp_path: Path) -> None:
    pools[2].run(save_in_many_files, str(tmp_path), 4)
    path = tmp_path / "step-00000004"
    assert sum(file.suffix == ".safetensors" for file in path.iterdir()) > 2
    assert find_damage(path) is None
    assert all(pools[1].run(load, str(path))) and all(pools[4].run(load, str(path)))


def test_parts_of_several_ranks_are_put_together(pools: dict[int, WorkerPool], tmp_path: Path) -> None:
    pools[4].run(save, str(tmp_path), 1)
    pools[1].run(save, str(tmp_path), 2)
    cut, whole = (Stored(tmp_path / f"step-0000000{step}") for step in (1, 2))
    assert cut.facts == whole.facts
    assert all(torch.equal(cut.read(name), whole.read(name)) for name in whole.facts)


def test_checkpoints_of_the_first_format_are_checked_by_their_own_hash(
    pools: dict[int, WorkerPool], tmp_path: Path
) -> None:
    pools[2].run(save, str(tmp_path), 4)
    path = tmp_path / "step-00000004"
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    for name, fact in manifest["files"].items():
        del fact["xxh3_128"]
        fact["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    manifest["format"] = 1
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest(manifest)}))
    assert find_damage(path) is None
    assert all(pools[1].run(load, str(path)))
    name = next(iter(manifest["files"]))
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert find_damage(path) == f"{name} is not what was written"


def test_file_without_a_known_hash_is_damage(pools: dict[int, WorkerPool], tmp_path: Path) -> None:
    pools[1].run(save, str(tmp_path), 4)
    path = tmp_path / "step-00000004"
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    for fact in manifest["files"].values():
        del fact["xxh3_128"]
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest(manifest)}))
    assert find_damage(path) is not None
