"""Checkpoints: safetensors and JSON, each existing wholly or not at all, readable at any layout."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from train.agree import on_first_rank
from train.checkpoint_folder import FORMAT, MANIFEST, UNFINISHED, Progress, checksum, digest, remove
from train.config import CheckpointConfig
from train.errors import RunError
from train.retention import prune


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    progress: Progress,
    rules: CheckpointConfig,
    origin: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `folder`/step-NNNNNNNN, called by all ranks together; then remove those that no rule keeps.

    It is written aside, checksummed, brought to the disk and renamed, so that what bears the name is whole. Either all
    ranks return or all raise.

    origin: what else the manifest says, such as the layout.
    group: of all ranks, through which they agree; left out, the default one.

    Raises:
        RunError: the disk is full, or can't be written to.
    """
    final = folder / f"step-{progress.step:08d}"
    aside = final.with_suffix(UNFINISHED)
    what = f"{final}: not saved"
    try:
        on_first_rank(lambda: _begin(aside), what, group)
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        dcp_save(dict(tensors), storage_writer=writer, process_group=group)
        on_first_rank(lambda: _commit(aside, final, progress, origin), what, group)
    except CheckpointException as error:
        _give_up(aside, _reason(error, what))
    except RunError as error:
        _give_up(aside, str(error))
    on_first_rank(lambda: prune(folder, rules), f"{folder}: an old checkpoint can't be removed", group)
    return final


def _give_up(aside: Path, reason: str) -> NoReturn:
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    mend = "free some space and give the same command again: it goes on from the newest checkpoint"
    raise RunError(f"{reason}; {mend}") from None


def _begin(aside: Path) -> None:
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)


def _commit(aside: Path, final: Path, progress: Progress, origin: Mapping[str, Any]) -> None:
    files = sorted(file for file in aside.rglob("*") if file.is_file())
    libraries = ["trireme", "torch", *(["deepspeed"] if origin.get("engine") == "deepspeed" else [])]
    manifest = {
        "format": FORMAT,
        "versions": {name: version(name) for name in libraries},
        "world_size": dist.get_world_size(),
        **origin,
        "progress": asdict(progress),
        "files": {
            str(file.relative_to(aside)): {"bytes": file.stat().st_size, "sha256": checksum(file)}
            for file in files
        },
    }
    manifest_file = aside / MANIFEST
    manifest_file.write_text(json.dumps(manifest | {"sha256": digest(manifest)}, indent=1) + "\n")
    for path in [*files, manifest_file, aside]:
        _to_disk(path)
    if final.exists():  # the same step again, after going back to an earlier checkpoint
        remove(final)
    aside.rename(final)
    _to_disk(final.parent)


def stored_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The whole shape and the dtype of each tensor of a checkpoint, by name."""
    stored = {}
    for name, fact in HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata.items():
        assert isinstance(fact, TensorStorageMetadata)
        stored[name] = tuple(fact.size), fact.properties.dtype
    return stored


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place, at whatever layout they are. Several processes call it together.

    Raises:
        RunError: a name is missing, or its shape or dtype differs.
    """
    stored = stored_tensors(path)
    for name, tensor in tensors.items():
        if name not in stored:
            raise RunError(f"{path}: has no tensor {name!r}: it was saved from another model")
        shape, dtype = stored[name]
        if shape != tuple(tensor.shape) or dtype != tensor.dtype:
            raise RunError(
                f"{path}: {name} is {dtype} of {shape}, but the run needs {tensor.dtype} of {tuple(tensor.shape)}"
            )
    reader = HuggingFaceStorageReader(str(path))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant
            dcp_load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise RunError(_reason(error, f"{path}: not loaded")) from None


def _reason(error: CheckpointException, what: str) -> str:
    cause = next(iter(error.failures.values()))[0]
    return f"{what}: {type(cause).__name__}: {cause}"


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
