"""Comparing the shards of a run's data with what was written, all ranks together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.dataset import SPLITS, DatasetInfo, Split
from data.errors import InputError
from data.shards import MEND, Shard, describe, find_faults, read_index, without


@dataclass(frozen=True)
class Checked:
    """What of the training splits is left out."""

    bad: tuple[str, ...] = ()
    """Each bad shard, and what is wrong with it."""
    lost: int = 0
    """Sequences in them."""
    stand_ins: NDArray[np.int64] | None = None
    """What is read in place of each sequence; None where all are good."""


def check_together(
    infos: Sequence[DatasetInfo], verify: Literal["contents", "size"], on_bad: Literal["fail", "skip"]
) -> Checked:
    """Check every shard, once on each node, whose ranks share the work; the result is the same on all ranks.

    Raises:
        InputError: a shard is bad, unless it is of a training split, and on_bad says `skip`.
    """
    shards = {(split, at): read_index(info, split) for split in SPLITS for at, info in enumerate(infos)}
    faults = _find_together(shards, verify == "contents")
    for (split, at), found in faults.items():
        if found and (on_bad == "fail" or split == "validation"):
            raise InputError(f"{describe(shards[split, at], found)}: {MEND}")
    train = [(shards["train", at], faults["train", at]) for at in range(len(infos))]
    if not any(found for _, found in train):
        return Checked()
    return Checked(
        tuple(f"{source[at].path} {fault}" for source, found in train for at, fault in found.items()),
        sum(source[at].sequences for source, found in train for at in found),
        without([source for source, _ in train], [found for _, found in train]),
    )


def _find_together(
    shards: dict[tuple[Split, int], list[Shard]], contents: bool
) -> dict[tuple[Split, int], dict[int, str]]:
    """The faults in each list of shards, by place: those that any node finds."""
    import torch.distributed as dist

    places = [(key, at) for key, listed in shards.items() for at in range(len(listed))]
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine = places[int(os.environ.get("RANK", "0")) % local_ranks :: local_ranks]
    found = find_faults([shards[key][at] for key, at in mine], contents)
    everywhere = [{mine[at]: fault for at, fault in found.items()}]
    if dist.is_initialized():
        everywhere = everywhere * dist.get_world_size()
        dist.all_gather_object(everywhere, everywhere[0])
    faults = {place: fault for one in everywhere for place, fault in one.items()}
    return {
        key: {at: faults[key, at] for at in range(len(shards[key])) if (key, at) in faults} for key in shards
    }
