"""The sources of a run's data: opened, and checked to go together. Light to import."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from data.config import DataConfig
from data.dataset import SPLITS, DatasetInfo, SplitInfo, open_dataset
from data.errors import InputError
from data.order import ROUND, Order, apportion

ALONE = "data"
"""What the source is called of a run that has one, as data.path."""


@dataclass(frozen=True)
class Source:
    """A data set, and its part of what is trained on."""

    name: str
    info: DatasetInfo
    proportion: float
    """Of all sequences; those of all sources sum to 1."""


def open_sources(config: DataConfig) -> tuple[Source, ...]:
    """The data set of `data.path`, or those of `data.sources`.

    Raises:
        InputError: there is no such data set, or one that differs from the first in more than its texts.
    """
    if config.path is not None:
        return (Source(ALONE, open_dataset(config.path), 1.0),)
    parts = apportion([source.proportion for source in config.sources], ROUND)
    for source, part in zip(config.sources, parts, strict=True):
        if not part:
            raise InputError(
                f"data.sources: {source.name} has proportion={source.proportion}, less than one in {ROUND:,} of all: "
                f"raise it, or leave the source out"
            )
    opened = tuple(
        Source(source.name, open_dataset(source.path), part / ROUND)
        for source, part in zip(config.sources, parts, strict=True)
    )
    first = opened[0]
    for other in opened[1:]:
        for what, ours, theirs in _differences(first.info, other.info):
            raise InputError(
                f"data.sources: {first.name} has {what}={ours}, {other.name} has {theirs}: prepare "
                f"{other.info.path} again to fit, with the tokenizer and the lengths of {first.info.path}"
            )
    return opened


def _differences(first: DatasetInfo, other: DatasetInfo) -> Iterator[tuple[str, object, object]]:
    """What would make sequences of the two mean different things."""
    if first.kind != other.kind:
        yield "kind", first.kind, other.kind
        return
    for field in fields(first):
        if field.name not in {"path", "digest", *SPLITS}:
            ours, theirs = getattr(first, field.name), getattr(other, field.name)
            if ours != theirs:
                yield field.name, ours, theirs
    for file in first.files:
        digests = [file_digest(info, file) for info in (first, other)]
        if digests[0] != digests[1]:
            yield f"the SHA-256 of {file}", digests[0][:12], digests[1][:12]


def file_digest(info: DatasetInfo, file: str) -> str:
    """SHA-256 of one of the files beside a data set's `dataset.json`. Raises InputError where it is missing."""
    try:
        return hashlib.sha256((info.path / file).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"{info.path / file} can't be read ({error.strerror}): prepare the data again"
        ) from error


def as_one(sources: Sequence[Source]) -> DatasetInfo:
    """What the sources are together: the first one's vocabulary and folder, all sequences, and a digest over all."""
    first = sources[0].info
    if len(sources) == 1:
        return first
    digests = json.dumps([[source.name, source.info.digest] for source in sources])
    return replace(
        first,
        train=SplitInfo.total([source.info.train for source in sources]),
        validation=SplitInfo.total([source.info.validation for source in sources]),
        digest=hashlib.sha256(digests.encode()).hexdigest(),
    )


def order_of(sources: Sequence[Source], *, shuffle: bool, seed: int) -> Order:
    """The order in which a run reads its sources."""
    sizes = [source.info.train.sequences for source in sources]
    return Order(sizes, [source.proportion for source in sources], shuffle=shuffle, seed=seed)
