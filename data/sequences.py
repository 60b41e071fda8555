"""Reading the sequences of a data set. Imports streaming, which takes seconds: import this when training starts."""

import atexit
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data.dataset import COLUMN, SOURCE, SOURCE_PADDING, DatasetInfo
from data.errors import InputError
from data.light_streaming import import_streaming
from data.order import Order
from data.shards import MEND
from data.shared_memory import choosing_names, free_number

import_streaming()

import streaming.base.dataset  # noqa: E402
from streaming import Stream, StreamingDataLoader, StreamingDataset  # noqa: E402
from streaming.base.constant import LOCALS  # noqa: E402
from streaming.base.format import reader_from_json  # noqa: E402
from streaming.base.shared import SharedMemory  # noqa: E402
from streaming.base.shared.prefix import _get_path, _pack_locals  # noqa: E402
from streaming.base.spanner import Spanner  # noqa: E402
from streaming.base.world import World  # noqa: E402

IGNORE_INDEX = -100

Sample = dict[str, Any]
"""A sample's columns: `tokens` (T + 1,), others of any length, or numbers."""
Collated = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Targets (B, T), sample ids (B,), columns (B, ...), int64; padding is bool."""

_CANONICAL_NODES = 1
"""With one, global batch n is the nth run of `global_batch_size` samples of the epoch's order, whatever the number of
nodes, of which streaming asks that they divide the canonical ones or the reverse."""


def _take_number(
    streams_local: list[str], streams_remote: list[str | None], world: World
) -> tuple[int, SharedMemory]:
    """In place of streaming's `get_shm_prefix`: the number by which this run's segments are called, and the first.

    There every rank looks for a free number by itself, so that of runs that start at once a rank of one may join
    the other, and all wait for ever. Here each node's first rank takes one and tells the others.
    """
    number, memory = -1, None
    if world.is_local_leader:
        number, memory = _claim(streams_local)
    if dist.is_initialized():
        numbers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(numbers, (world.node, number))
        number = max(taken for node, taken in numbers if node == world.node)
    return number, memory or SharedMemory(_get_path(number, LOCALS), False)


def _claim(streams_local: list[str]) -> tuple[int, SharedMemory]:
    with choosing_names():
        number = free_number()
        content = _pack_locals(streams_local, number)
        memory = SharedMemory(_get_path(number, LOCALS), True, len(content))
    memory.buf[: len(content)] = content
    return number, memory


streaming.base.dataset.get_shm_prefix = _take_number


class TrainingSequences(StreamingDataset):
    """The training splits of all sources, dealt out to data ranks. Items are (sample id, columns).

    What streaming calls an epoch is here a stretch of the run's order, `epoch_size` places long.
    """

    def __init__(
        self,
        infos: Sequence[DatasetInfo],
        order: Order,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        epoch_size: int,
        stand_ins: NDArray[np.int64] | None = None,
    ) -> None:
        """stand_ins: what is read in place of each sequence, where some can't be."""
        super().__init__(
            streams=[Stream(local=str(info.path), split="train") for info in infos],
            batch_size=batch_size,
            epoch_size=epoch_size,
            num_canonical_nodes=_CANONICAL_NODES,
            # streaming's own defaults, which it would announce in every process
            predownload=8 * batch_size,
            shuffle_block_size=4_000_000,
        )
        self.pad_id = infos[0].pad_id
        self._order, self._stand_ins = order, stand_ins
        self._positions: list[SharedMemory] = []
        # Processes coordinate as what they are (`_unique_rank_world`, from the environment) and read as the data
        # ranks they are: several may share one, in whatever order the mesh has them. streaming's `replication`
        # knows consecutive ones only. Nodes do not matter to the order, see _CANONICAL_NODES.
        self._parallel_rank_world = World(
            num_nodes=1, ranks_per_node=world_size, workers_per_rank=1, worker=rank
        )
        self.length = epoch_size // world_size

    def resample_streams(
        self, epoch: int, stream_id: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sequences of an epoch, in place of streaming's own mixtures.

        Those draw anew for each epoch which part of a source it has, so that over several epochs some sequences come
        often and others never; and what they repeat, they shuffle within the epoch, whatever has come yet.
        """
        places = self._order.ids(epoch * self.epoch_size, (epoch + 1) * self.epoch_size)
        if self._stand_ins is not None:
            places = self._stand_ins[places]
        return np.array([len(places)]), places

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Nothing is downloaded: what is missing when it is read is an error then."""

    def __getitem__(self, at: int) -> tuple[int, Sample]:
        shard, sample = self.spanner[at]
        return int(at), _read(self.shards[shard], sample)

    def collate(self, items: list[tuple[int, Sample]]) -> Collated:
        """(B, T) targets, (B,) sample ids, and the columns, of which `tokens` is (B, T)."""
        ids, samples = zip(*items, strict=True)
        return _collated(samples, torch.tensor(ids), self.pad_id)

    def seek(self, epoch: int, sample: int) -> None:
        """Make the next iteration begin at this sample of the epoch; all ranks together."""
        self.next_epoch = epoch  # streaming ignores a position before the epoch that it would begin next
        self.load_state_dict(
            {
                "epoch": epoch,
                "sample_in_epoch": sample,
                "num_canonical_nodes": _CANONICAL_NODES,
                "shuffle_seed": self.shuffle_seed,
                "initial_physical_nodes": 1,
            }
        )
        self._positions.append(
            self._resume_shm
        )  # it keeps the last alone, and only the first frees the memory

    def close(self, loader: StreamingDataLoader) -> None:
        """End the threads and workers that read, and remove the shared memory and lock files."""
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()
        if hasattr(self, "_iterator"):
            self._iterator.exit()
        for memory in self._shared_memory():
            memory.cleanup()
            # streaming would remove the names again at exit, when they may be another run's
            atexit.unregister(memory.cleanup)
        if self._unique_rank_world.is_local_leader:
            for lock in (self._shared_barrier.filelock_path, self._cache_filelock_path):
                Path(lock).unlink(missing_ok=True)

    def _shared_memory(self) -> Iterator[SharedMemory]:
        yield self._locals_shm
        yield self._shared_barrier._arr.shm
        yield self._next_epoch.arr.shm
        yield self._cache_usage.arr.shm
        yield self._shard_states.shm
        yield self._shard_access_times.shm
        yield from self._positions


def make_loader(sequences: TrainingSequences, num_workers: int) -> StreamingDataLoader:
    """A loader of this rank's share of each global batch."""
    return StreamingDataLoader(
        sequences,
        batch_size=sequences.batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=sequences.collate,
        worker_init_fn=_leave_signals_to_parent,
    )


def _leave_signals_to_parent(worker: int) -> None:
    """A signal to the whole job asks the parent to stop, for which it still needs its batch; then it ends us."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class ValidationSequences:
    """The validation split by index: no shuffling, no shared state, nothing to close."""

    def __init__(self, info: DatasetInfo) -> None:
        index = json.loads((info.path / "validation" / "index.json").read_text())
        self._shards = [reader_from_json(str(info.path), "validation", shard) for shard in index["shards"]]
        self._spanner = Spanner(np.array([len(shard) for shard in self._shards]))
        self._info = info

    def __len__(self) -> int:
        return self._info.validation.sequences

    def batch(self, ids: Sequence[int], size: int) -> Collated:
        """As TrainingSequences.collate, B = `size`: the sequences, then padding of id -1."""
        empty: Sample = {
            name: np.full_like(value, self._info.pad_id) if isinstance(value, np.ndarray) else 0
            for name, value in self._sample(0).items()
        }
        fill = size - len(ids)
        sample_ids = torch.tensor([*ids, *[-1] * fill], dtype=torch.int64)
        return _collated([*map(self._sample, ids), *[empty] * fill], sample_ids, self._info.pad_id)

    def _sample(self, at: int) -> Sample:
        shard, sample = self._spanner[at]
        return _read(self._shards[shard], sample)


def _read(shard: Any, at: int) -> Sample:
    """A sample of a shard. Raises InputError where the file is not what it was when the run began."""
    try:
        return shard[at]
    except (OSError, ValueError, IndexError) as error:
        path = Path(shard.dirname, shard.split, shard.raw_data.basename)
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} can't be read ({reason}): {MEND}") from error


def _collated(samples: Sequence[Sample], ids: Tensor, pad_id: int) -> Collated:
    columns = {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples]).astype(np.int64))
        for name in samples[0]
    }
    rows = columns[COLUMN]
    targets = rows[:, 1:]
    columns[COLUMN] = rows[:, :-1].contiguous()
    if SOURCE in columns:
        columns[SOURCE_PADDING] = columns[SOURCE] == pad_id
    return targets.masked_fill(targets == pad_id, IGNORE_INDEX), ids, columns
