"""One part of a corpus: read, tokenized, cut into sequences and written as MDS shards by one process."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import documents
from data.dataset import COLUMN, SPLITS, Split, SplitInfo, tokenizer_path, write_json
from data.light_streaming import import_streaming
from data.sources import Piece
from data.tokenizer import Tokenizer

_SEQUENCES_AT_ONCE = 64


@dataclass(frozen=True)
class Part:
    """What one process does at a time."""

    index: int
    pieces: tuple[Piece, ...]
    out: str
    seq_len: int
    validation_fraction: float
    text_field: str

    @property
    def name(self) -> str:
        """The name of its folder in each split."""
        return f"part-{self.index:05}"

    @property
    def bytes(self) -> int:
        """Size of its input."""
        return sum(piece.bytes for piece in self.pieces)

    @property
    def report(self) -> Path:
        """Written when the part is finished."""
        return Path(self.out) / "unfinished" / f"{self.name}.json"


@dataclass(frozen=True)
class PartReport:
    """What a part holds."""

    train: SplitInfo
    validation: SplitInfo
    lowest: float
    """The lowest `place` of its documents, and the highest."""
    highest: float


def place(key: str) -> float:
    """Where in [0, 1) a document falls: below the validation fraction it belongs to the validation split."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big") / 2**48


def group(pieces: Iterable[Piece], limit: int) -> list[tuple[Piece, ...]]:
    """Group successive pieces up to about `limit` bytes."""
    groups: list[list[Piece]] = []
    filled = limit
    for piece in pieces:
        if filled + piece.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.bytes
    return [tuple(group) for group in groups]


def read_report(part: Part) -> PartReport | None:
    """The report of a part that is finished."""
    if not part.report.is_file():
        return None
    report = json.loads(part.report.read_text())
    train, validation = (SplitInfo(**report.pop(split)) for split in SPLITS)
    return PartReport(train, validation, **report)


def write_part(part: Part) -> PartReport:
    """Write a part's shards and then its report.

    The shards are written aside and renamed; what a killed predecessor left is removed first.
    """
    out = Path(part.out)
    aside = part.report.with_suffix("")
    for leftover in (aside, *(out / split / part.name for split in SPLITS)):
        if leftover.exists():
            shutil.rmtree(leftover)
    tokenizer = Tokenizer.load(tokenizer_path(out))
    writers: dict[Split, SequenceWriter] = {
        split: SequenceWriter(aside / split, part.seq_len, tokenizer) for split in SPLITS
    }
    lowest, highest = 1.0, 0.0
    for document in documents(part.pieces, part.text_field):
        at = place(document.key)
        lowest, highest = min(lowest, at), max(highest, at)
        split: Split = "validation" if at < part.validation_fraction else "train"
        writers[split].add(tokenizer.encode(document.text), document.bytes)
    infos = {split: writers[split].finish() for split in SPLITS}
    for split in SPLITS:
        if (aside / split).exists():
            (out / split).mkdir(exist_ok=True)
            (aside / split).rename(out / split / part.name)
    report = PartReport(infos["train"], infos["validation"], lowest, highest)
    write_json(part.report, asdict(report))
    shutil.rmtree(aside, ignore_errors=True)
    return report


class SequenceWriter:
    """Cuts the documents given to it, one after the other, into sequences of seq_len + 1 tokens.

    Neighbours overlap by one token, and an end-of-document token comes before the first document, so that
    every token is a target exactly once. The last sequence is filled up with padding.
    """

    def __init__(self, folder: Path, seq_len: int, tokenizer: Tokenizer) -> None:
        self._folder, self._seq_len, self._tokenizer = folder, seq_len, tokenizer
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._pending = [tokenizer.eos_id]
        self._writer: Any = None
        self._documents = self._tokens = self._bytes = self._sequences = 0

    def add(self, ids: Sequence[int], size: int) -> None:
        """A document of these tokens, whose text has `size` bytes."""
        self._pending += ids
        self._pending.append(self._tokenizer.eos_id)
        self._documents += 1
        self._tokens += len(ids) + 1
        self._bytes += size
        if len(self._pending) > _SEQUENCES_AT_ONCE * self._seq_len:
            self._cut()

    def finish(self) -> SplitInfo:
        """Write what is left and the index. Without any document nothing is written."""
        self._cut()
        if len(self._pending) > 1:
            self._pending += [self._tokenizer.pad_id] * (self._seq_len + 1 - len(self._pending))
            self._cut()
        if self._writer is not None:
            self._writer.finish()
            _to_disk(self._folder)
        return SplitInfo(self._documents, self._tokens, self._bytes, self._sequences)

    def _cut(self) -> None:
        """Write as many whole sequences as are pending."""
        count = (len(self._pending) - 1) // self._seq_len
        if not count:
            return
        if self._writer is None:
            self._writer = self._open()
        tokens = np.array(self._pending, self._dtype)
        for i in range(count):
            begin = i * self._seq_len
            self._writer.write({COLUMN: tokens[begin : begin + self._seq_len + 1]})
        del self._pending[: count * self._seq_len]
        self._sequences += count

    def _open(self) -> Any:
        import_streaming()
        from streaming import MDSWriter

        columns = {COLUMN: f"ndarray:{self._dtype.name}:{self._seq_len + 1}"}
        return MDSWriter(columns=columns, out=str(self._folder), hashes=["sha256"])


def _to_disk(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
