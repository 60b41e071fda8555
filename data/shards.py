"""The files that hold a data set's sequences, and what is wrong with them. Light to import."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.dataset import DatasetInfo, Split
from data.errors import InputError

_THREADS = 4
"""That compute checksums, for which Python lets them run beside each other."""
MEND = (
    "restore it from a copy, or prepare the data again; data.on_bad_shard=skip leaves bad training shards out"
)


@dataclass(frozen=True)
class Shard:
    """A file of successive sequences, as the index describes it."""

    path: Path
    bytes: int
    sha256: str
    sequences: int

    def fault(self, contents: bool) -> str | None:
        """What is wrong with the file, or None. With `contents` all of it is read."""
        try:
            size = self.path.stat().st_size
            if size != self.bytes:
                return f"has {size:,} bytes, {self.bytes:,} were written"
            if not contents:
                return None
            with self.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"can't be read ({error.strerror})"
        return None if digest == self.sha256 else "is damaged: its SHA-256 is not that of what was written"


def read_index(info: DatasetInfo, split: Split) -> list[Shard]:
    """The shards of a split, in order.

    Raises:
        InputError: the index is missing or damaged.
    """
    index = info.path / split / "index.json"
    try:
        shards = [
            Shard(
                index.parent / described["raw_data"]["basename"],
                described["raw_data"]["bytes"],
                described["raw_data"]["hashes"]["sha256"],
                described["samples"],
            )
            for described in json.loads(index.read_text())["shards"]
        ]
        sequences = sum(shard.sequences for shard in shards)
    except OSError as error:
        raise InputError(f"{index} can't be read ({error.strerror}): prepare the data again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{index} is damaged ({type(error).__name__}: {error}): prepare the data again"
        ) from error
    expected = getattr(info, split).sequences
    if sequences != expected:
        raise InputError(
            f"{index} lists {sequences} sequences, {expected} were written: prepare the data again"
        )
    return shards


def find_faults(shards: Sequence[Shard], contents: bool) -> dict[int, str]:
    """The faults of those that have any, by their place in the list."""
    with ThreadPoolExecutor(_THREADS) as threads:
        faults = threads.map(lambda shard: shard.fault(contents), shards)
        return {at: fault for at, fault in enumerate(faults) if fault}


def describe(shards: Sequence[Shard], faults: dict[int, str]) -> str:
    """The first fault in a line, and how many there are."""
    first = min(faults)
    more = f" (and {len(faults) - 1} more of {len(shards)} shards)" if len(faults) > 1 else ""
    return f"{shards[first].path} {faults[first]}{more}"


def check(infos: Iterable[DatasetInfo], splits: Sequence[Split]) -> None:
    """Make sure that every shard is there, and of its size.

    Raises:
        InputError: the first that isn't.
    """
    for info in infos:
        for split in splits:
            shards = read_index(info, split)
            if faults := find_faults(shards, contents=False):
                raise InputError(f"{describe(shards, faults)}: {MEND}")


def without(sources: Sequence[Sequence[Shard]], bad: Sequence[Iterable[int]]) -> NDArray[np.int64]:
    """What to read in place of each sequence: itself, or where its shard is bad, one of the good ones of its source.

    sources: the shards of each; bad: of each, those that are. The stand-ins are spread evenly over the source, so
    that every other sequence keeps its place in the order.

    Raises:
        InputError: a source has no good shard.
    """
    ids = np.arange(sum(shard.sequences for shards in sources for shard in shards))
    first = 0
    for shards, places in zip(sources, bad, strict=True):
        is_bad = np.isin(np.arange(len(shards)), list(places))
        lost = np.repeat(is_bad, [shard.sequences for shard in shards])
        mine = ids[first : first + len(lost)]
        first += len(lost)
        good = mine[~lost]
        if not len(good):
            raise InputError(f"none of the shards below {shards[0].path.parent.parent} is good: {MEND}")
        mine[lost] = good[np.arange(lost.sum()) * len(good) // max(lost.sum(), 1)]
    return ids
