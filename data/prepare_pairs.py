"""From pairs of texts to a data set of sources and targets."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import (
    COLUMN,
    SOURCE,
    SPLITS,
    PairsInfo,
    Split,
    SplitInfo,
    digest_of,
    empty_split,
    made_whole,
    tokenizer_path,
    write_dataset,
)
from data.errors import InputError
from data.light_streaming import import_streaming
from data.pairs import Pair, read_pairs
from data.parts import place
from data.tokenizer import Tokenizer, train

_TOKENIZER_BYTES = 32 << 20
"""As much text trains the tokenizer."""


def prepare_pairs(
    sources: Sequence[str],
    out: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    source_len: int = 512,
    seq_len: int = 512,
    validation_fraction: float = 0.05,
) -> PairsInfo:
    """Make a data set in `out`. The same input and options give the same bytes. It is written aside, and renamed.

    Sources and targets (see `data.pairs.read_pairs`) longer than source_len and seq_len tokens are cut. A pair
    that comes again is left out, and pairs of the same source belong to the same split.

    Raises:
        InputError: the sources, the options or `out` can't be used.
    """
    for name, length in (("--source-len", source_len), ("--seq-len", seq_len)):
        if length < 1:
            raise InputError(f"{name} {length}: give a positive number of tokens")
    folder = Path(os.path.normpath(out))
    with made_whole(folder) as aside:
        if tokenizer is None:
            model = train(_training_texts(sources, validation_fraction), vocab_size)
        else:
            Tokenizer.load(tokenizer)
            model = Path(tokenizer).read_bytes()
        tokenizer_path(aside).write_bytes(model)
        vocabulary = Tokenizer.load(tokenizer_path(aside))
        empty = SplitInfo(documents=0, tokens=0, bytes=0, sequences=0)
        info = PairsInfo(
            path=aside,
            seq_len=seq_len,
            vocab_size=vocabulary.vocab_size,
            pad_id=vocabulary.pad_id,
            train=empty,
            validation=empty,
            digest="",
            bos_id=vocabulary.bos_id,
            eos_id=vocabulary.eos_id,
            source_len=source_len,
        )
        splits = _write(info, vocabulary, _in_splits(sources, validation_fraction))
        for split, made in splits.items():
            if not made.documents:
                count = sum(made.documents for made in splits.values())
                raise empty_split(split, count, "pairs", validation_fraction)
        info = replace(
            info,
            train=splits["train"],
            validation=splits["validation"],
            digest=digest_of(aside, info.files),
        )
        write_dataset(info, {"sources": list(sources), "validation_fraction": validation_fraction})
    return replace(info, path=folder)


def _in_splits(sources: Sequence[str], validation_fraction: float) -> Iterator[tuple[Split, Pair]]:
    """Every pair once, and where it belongs, which its source decides."""
    seen: set[bytes] = set()
    for pair in read_pairs(sources):
        digest = hashlib.blake2b(repr((pair.source, pair.target)).encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield "validation" if place(pair.source) < validation_fraction else "train", pair


def _training_texts(sources: Sequence[str], validation_fraction: float) -> Iterator[str]:
    left = _TOKENIZER_BYTES
    for split, pair in _in_splits(sources, validation_fraction):
        if split == "train" and left > 0:
            left -= pair.bytes
            yield from (pair.source, pair.target)


def source_ids(tokenizer: Tokenizer, source: str, source_len: int) -> list[int]:
    """At most source_len tokens, of which the last is the end-of-document token."""
    return [*tokenizer.encode(source)[: source_len - 1], tokenizer.eos_id]


def _write(
    info: PairsInfo, tokenizer: Tokenizer, pairs: Iterator[tuple[Split, Pair]]
) -> dict[Split, SplitInfo]:
    import_streaming()
    from streaming import MDSWriter

    dtype = np.dtype(np.uint16 if info.vocab_size <= 1 << 16 else np.uint32)
    columns = {
        COLUMN: f"ndarray:{dtype.name}:{info.seq_len + 1}",
        SOURCE: f"ndarray:{dtype.name}:{info.source_len}",
    }
    writers = {
        split: MDSWriter(columns=columns, out=str(info.path / split), hashes=["sha256"]) for split in SPLITS
    }
    splits: dict[Split, SplitInfo] = {split: getattr(info, split) for split in SPLITS}
    for split, pair in pairs:
        source = source_ids(tokenizer, pair.source, info.source_len)
        target = [*tokenizer.encode(pair.target), info.eos_id][: info.seq_len]
        sample: dict[str, Any] = {
            COLUMN: _padded([info.pad_id, *target], info.seq_len + 1, info.pad_id, dtype),
            SOURCE: _padded(source, info.source_len, info.pad_id, dtype),
        }
        writers[split].write(sample)
        made = splits[split]
        splits[split] = SplitInfo(
            made.documents + 1, made.tokens + len(target), made.bytes + pair.bytes, made.sequences + 1
        )
    for writer in writers.values():
        writer.finish()
    return splits


def _padded(ids: list[int], length: int, pad_id: int, dtype: np.dtype[Any]) -> np.ndarray:
    return np.fromiter(itertools.chain(ids, itertools.repeat(pad_id, length - len(ids))), dtype, length)
