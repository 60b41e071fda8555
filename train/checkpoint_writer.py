"""How torch's distributed checkpoints are written here: each rank's share as a few files, side by side."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from train.tensor_files import Piece, Written, write_tensors

_THREADS = 4
"""Of a rank, each with a file: one alone doesn't keep a fast disk busy."""
_FILE_BYTES = 2**26
"""A rank with less than this has one file."""


class SafetensorsWriter(StorageWriter):
    """Writes into a folder that exists; afterwards rank 0 knows what all ranks have written.

    torch's own (`HuggingFaceStorageWriter`) puts a file together in memory first and doesn't hash it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[Written] = []
        """By all ranks; filled on rank 0, at the end."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Each is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """A rank's plan stays as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the ranks, for the names of their files."""
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files."""
        items = {_piece(item): item for item in plan.items}

        def read(piece: Piece) -> Tensor:
            tensor = planner.resolve_data(items[piece])
            assert isinstance(tensor, Tensor)
            return tensor

        def write(numbered: tuple[int, list[Piece]]) -> WriteResult:
            number, pieces = numbered
            name = f"rank-{plan.storage_data:05d}-{number}.safetensors"
            written = write_tensors(self.folder / name, pieces, read)
            return WriteResult(items[pieces[0]].index, written.bytes, written)

        with ThreadPoolExecutor(_THREADS) as threads:
            results = list(threads.map(write, enumerate(_shared_out(list(items)))))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0: note the files of all ranks."""
        self.written = [result.storage_data for of_rank in results for result in of_rank]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """torch asks this to choose a writer by itself, which isn't done here."""
        return False


def _piece(item: WriteItem) -> Piece:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is no tensor"
    return Piece(item.index.fqn, data.properties.dtype, tuple(data.chunk.sizes), tuple(data.chunk.offsets))


def _shared_out(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in as many files as are worth it, of about the same size."""
    total = sum(piece.bytes for piece in pieces)
    files: list[list[Piece]] = [[] for _ in range(min(_THREADS, total // _FILE_BYTES, len(pieces)) or 1)]
    sizes = [0] * len(files)
    for piece in sorted(pieces, key=lambda piece: -piece.bytes):
        smallest = sizes.index(min(sizes))
        files[smallest].append(piece)
        sizes[smallest] += piece.bytes
    return [file for file in files if file]
