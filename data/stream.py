"""The stream of batches that a run trains on, its exact position, and the batches it is evaluated on.

Light to import: torch and streaming are loaded when a stream is made.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from data.config import DataConfig
from data.dataset import COLUMN, open_dataset
from data.errors import InputError
from data.mixture import as_one, open_sources, order_of
from data.verify import check_together

if TYPE_CHECKING:
    import torch

    from data.sequences import Collated

SEEDS = "seeds"
"""The input that no data set has: (B,) int64, for a model that draws random numbers."""
_STRETCH = 1 << 20
"""At most as many sequences are put in order at a time. Between two stretches nothing is read ahead."""


@dataclass(frozen=True)
class Batch:
    """Sequences: what the model takes, and what it is to say."""

    inputs: dict[str, "torch.Tensor"]
    """By the names of the model's arguments, (B, ...) each; for a decoder `tokens` (B, T) int64."""
    targets: "torch.Tensor"
    """(B, T) int64; -100 where not scored."""
    sample_ids: "torch.Tensor"
    """(B,) int64, the sequence's index in its split, counted through the sources; -1 where a batch was filled up."""

    def micro_batches(self, size: int) -> Iterator["Batch"]:
        """Successive batches of `size` sequences; the last may be smaller."""
        for begin in range(0, len(self.targets), size):
            chosen = slice(begin, begin + size)
            inputs = {name: values[chosen] for name, values in self.inputs.items()}
            yield Batch(inputs, self.targets[chosen], self.sample_ids[chosen])

    def to(self, device: "torch.device | str") -> "Batch":
        """The batch on a device."""
        return Batch(
            {name: values.to(device, non_blocking=True) for name, values in self.inputs.items()},
            self.targets.to(device, non_blocking=True),
            self.sample_ids.to(device, non_blocking=True),
        )


class TrainingStream:
    """Endless iterator of one data rank's share of the global batches.

    Global batch n, as a set of sequences, is a function of the data sets, the seed and n: of neither `world_size`,
    nor what was saved and loaded on the way. Of each source every sequence comes once before any comes again.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        rank: int,
        world_size: int,
        inputs: tuple[str, ...] = (COLUMN,),
    ) -> None:
        """Every process of the group makes one, together; all of its `rank` (of `world_size` data ranks) read
        the same. inputs: the columns that batches shall have, and `seeds`, which are a function of
        (seed, batch, sample).

        Raises:
            InputError: no data set, too small a one, or a batch that the ranks can't share.
        """
        self._sources = open_sources(config)
        self._config, self._seed, self._inputs = config, seed, inputs
        _check_processes()
        self._order = order_of(self._sources, shuffle=config.shuffle, seed=seed)
        if config.global_batch_size % world_size:
            raise InputError(
                f"data.global_batch_size={config.global_batch_size} can't be shared by {world_size} data ranks: "
                f"make it a multiple"
            )
        available = as_one(self._sources).train.sequences
        if available < config.global_batch_size:
            raise InputError(
                f"{' and '.join(str(source.info.path) for source in self._sources)} has {available} training "
                f"sequences, fewer than one global batch: set data.global_batch_size to at most that, or prepare more"
            )
        self._checked = check_together(
            [source.info for source in self._sources], config.verify, config.on_bad_shard
        )
        self._batches_per_stretch = min(available, _STRETCH) // config.global_batch_size or 1
        from data.sequences import TrainingSequences, make_loader

        self._sequences = TrainingSequences(
            [source.info for source in self._sources],
            self._order,
            rank=rank,
            world_size=world_size,
            batch_size=config.global_batch_size // world_size,
            epoch_size=self._batches_per_stretch * config.global_batch_size,
            stand_ins=self._checked.stand_ins,
        )
        self._loader = make_loader(self._sequences, config.num_workers)
        self._iterator: Iterator[Collated] | None = None
        self._batches = 0

    def __iter__(self) -> "TrainingStream":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            batch = next(self._iterator, None)
            if batch is None:  # the end of a stretch
                assert self._batches % self._batches_per_stretch == 0
                self._iterator = iter(self._loader)
                batch = next(self._iterator)
        except (
            InputError
        ) as error:  # from a reading process it comes with the lines of its traceback before it
            raise InputError(str(error).splitlines()[-1].partition("InputError: ")[2] or str(error)) from None
        self._batches += 1
        return _batch(batch, self._inputs, f"{self._seed}/{self._batches}")

    @property
    def bad_shards(self) -> tuple[str, ...]:
        """The training shards that are left out, and why."""
        return self._checked.bad

    @property
    def skipped_sequences(self) -> int:
        """How many sequences of the data are left out with them."""
        return self._checked.lost

    @property
    def taken(self) -> dict[str, int]:
        """How many sequences of each source were in the global batches so far."""
        counts = self._order.taken(self._batches * self._config.global_batch_size)
        return {source.name: count for source, count in zip(self._sources, counts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was taken: the same on all ranks, and for any number of them."""
        return {
            "batches": self._batches,
            "global_batch_size": self._config.global_batch_size,
            "seed": self._seed,
            "sequences": self.taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which `state_dict` was called; all ranks together, at any time.

        Raises:
            InputError: the state is of another seed, global batch size or mixture.
        """
        here = self.state_dict()
        for name, key in (("global_batch_size", "data.global_batch_size"), ("seed", "run.seed")):
            if state[name] != here[name]:
                raise InputError(
                    f"the checkpoint's position in the data is one of {key}={state[name]}, the configuration has "
                    f"{here[name]}: set {key}={state[name]}, or start a new run"
                )
        self._batches = state["batches"]
        if state.get("sequences") != self.taken:
            raise InputError(
                f"the checkpoint's position in the data after {self._batches} batches is {state.get('sequences')}, "
                f"the configuration's would be {self.taken} (sequences of each source): set data.sources as they "
                f"were, or start a new run"
            )
        stretch, batch = divmod(self._batches, self._batches_per_stretch)
        self._sequences.seek(stretch, batch * self._config.global_batch_size)
        self._iterator = None

    def close(self) -> None:
        """Stop the reading processes and give the shared memory back. The stream can't be used any more."""
        self._iterator = None
        self._sequences.close(self._loader)


def validation_batches(
    path: str,
    batch_size: int,
    rank: int,
    world_size: int,
    limit: int | None = None,
    inputs: tuple[str, ...] = (COLUMN,),
) -> Iterator[Batch]:
    """This data rank's batches of the validation split, in a fixed order.

    With `limit`, of so many sequences, evenly spread over the split, whose neighbours are alike.
    Over all ranks each sequence comes exactly once. Every rank gets equally many batches of `batch_size`; the last
    are filled up with sequences without targets, of id -1. inputs: as in TrainingStream; the seeds are a function
    of the sample.
    """
    from data.sequences import ValidationSequences

    sequences = ValidationSequences(open_dataset(path))
    count = len(sequences) if limit is None else min(limit, len(sequences))
    ids = [at * len(sequences) // count for at in range(count)]
    for begin in range(rank * batch_size, count + rank * batch_size, world_size * batch_size):
        yield _batch(sequences.batch(ids[begin : begin + batch_size], batch_size), inputs, "validation")


def _batch(collated: "Collated", inputs: tuple[str, ...], draw: str) -> Batch:
    """What of the columns is asked for, and a seed for each sample of this `draw`."""
    targets, ids, columns = collated
    if SEEDS in inputs:
        columns = columns | {SEEDS: _seeds(draw, ids)}
    return Batch({name: columns[name] for name in inputs}, targets, ids)


def _seeds(draw: str, ids: "torch.Tensor") -> "torch.Tensor":
    import torch

    digests = (blake2b(f"{draw}/{at}".encode(), digest_size=8).digest() for at in ids.tolist())
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


def _check_processes() -> None:
    """Make sure that streaming will see the processes that there are.

    streaming takes rank and counts from RANK, WORLD_SIZE and LOCAL_WORLD_SIZE alone, and one process where they
    aren't set, which is right without torchrun. It meets the other ranks in the default torch.distributed group,
    which it would make itself, and in shared memory, which each node's first rank creates: without
    LOCAL_WORLD_SIZE every process takes itself for a node of its own, and all create the same segments.
    """
    import torch.distributed as dist

    told = int(os.environ.get("WORLD_SIZE", "1"))
    actual = dist.get_world_size() if dist.is_initialized() else 1
    if told != actual:
        raise InputError(
            f"WORLD_SIZE={told}, but torch.distributed joins {actual} processes: start them with torchrun, "
            f"or unset WORLD_SIZE for a single process"
        )
    if told > 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        raise InputError(
            "LOCAL_WORLD_SIZE isn't set: start with torchrun, or set it to the number of processes on each node"
        )
