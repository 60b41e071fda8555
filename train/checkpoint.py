"""Checkpoints: safetensors and JSON, each existing wholly or not at all, readable at any layout."""

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from train.agree import on_first_rank
from train.checkpoint_folder import Progress
from train.checkpoint_writer import SafetensorsWriter
from train.commit import begin, commit, give_up, place
from train.config import CheckpointConfig
from train.errors import NoSpace, RunError, of_disk
from train.retention import make_room, prune
from train.stored import Stored

log = logging.getLogger(__name__)


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    progress: Progress,
    rules: CheckpointConfig,
    origin: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
    spare: Callable[[], Path | None] = lambda: None,
) -> Path:
    """Write `folder`/step-NNNNNNNN, called by all ranks together; then remove those that no rule keeps.

    It is written aside, hashed, brought to the disk and renamed, so that what bears the name is whole. Either all
    ranks return or all raise. Where the disk is full, those that would go then go at once, and it is tried once more.

    origin: what else the manifest says, such as the layout.
    group: of all ranks, through which they agree; left out, the default one.
    spare: which of the old ones must not go yet; asked on rank 0.

    Raises:
        NoSpace: the disk is full all the same.
        RunError: it can't be written to.
    """
    final = place(folder, progress.step)
    try:
        _write(final, tensors, progress, origin, group)
    except NoSpace as error:
        gone = on_first_rank(lambda: make_room(folder, rules), f"{folder}: no room can be made", group)
        if not gone:
            raise
        log.warning("%s; removed to make room: %s", error, ", ".join(path.name for path in gone))
        _write(final, tensors, progress, origin, group)
    on_first_rank(
        lambda: prune(folder, rules, spare()), f"{folder}: an old checkpoint can't be removed", group
    )
    return final


def _write(
    final: Path,
    tensors: Mapping[str, Tensor],
    progress: Progress,
    origin: Mapping[str, Any],
    group: dist.ProcessGroup | None,
) -> None:
    what = f"{final}: not saved"
    origin = {"world_size": dist.get_world_size(), **origin}
    try:
        aside = on_first_rank(lambda: begin(final), what, group)
        writer = SafetensorsWriter(aside)
        dcp_save(dict(tensors), storage_writer=writer, process_group=group)
        on_first_rank(lambda: commit(final, writer.written, progress, origin), what, group)
    except (CheckpointException, RunError) as error:
        failure = error if isinstance(error, RunError) else _told(error, what)
        on_first_rank(lambda: give_up(final), what, group)
        raise failure from None


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place, at whatever layout they are. Several processes call it together.

    Raises:
        RunError: a name is missing, or its shape or dtype differs.
    """
    stored = Stored(path).facts
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
        raise _told(error, f"{path}: not loaded") from None


def _told(error: CheckpointException, what: str) -> RunError:
    """What went wrong on the ranks; that there is no room only if it is that on all of them."""
    told = [
        of_disk(what, cause)
        if isinstance(cause, OSError)
        else RunError(f"{what}: {type(cause).__name__}: {cause}")
        for cause, _ in error.failures.values()
    ]
    return min(told, key=lambda each: isinstance(each, NoSpace))
