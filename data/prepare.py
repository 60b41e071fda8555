"""From text to a data set that training reads: tokenizer, token shards, and what describes them."""

import errno
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpus import documents
from data.dataset import (
    SPLITS,
    Split,
    SplitInfo,
    TextInfo,
    dataset_path,
    digest_of,
    tokenizer_path,
    write_bytes,
    write_dataset,
    write_json,
)
from data.errors import InputError
from data.parts import Part, PartReport, group, place, read_report, write_part
from data.sources import Piece, SourceFile, cut, find_files
from data.tokenizer import Tokenizer, train

_PART_BYTES = (2 << 20, 256 << 20)
"""The smallest and the largest part; between them a corpus makes `_PARTS`."""
_PARTS = 512
_BYTES_PER_WORKER = 16 << 20
"""Starting a process takes as long as reading this much."""
_TOKENIZER_BYTES = 32 << 20
"""As much text trains the tokenizer."""
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("tokenizer", "tokens"), and how many bytes of input of how many are done."""


@dataclass(frozen=True)
class PrepareReport:
    """What was made."""

    dataset: TextInfo
    tokens_per_second: float
    """Of this call, which may have found parts already done."""

    @property
    def documents(self) -> int:
        """Of both splits."""
        return self.dataset.train.documents + self.dataset.validation.documents

    @property
    def tokens(self) -> int:
        """Of both splits."""
        return self.dataset.train.tokens + self.dataset.validation.tokens

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token, both splits."""
        return (self.dataset.train.bytes + self.dataset.validation.bytes) / self.tokens


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    seq_len: int = 512,
    validation_fraction: float = 0.05,
    text_field: str = "text",
    workers: int | None = None,
    part_bytes: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> PrepareReport:
    """Make a data set in `out`. The same input and options give the same bytes, however many `workers`.

    Called again after an interruption it goes on with the parts that are missing. A corpus is cut into parts by
    size (`part_bytes`; by default such that there are some hundreds), each written by one process.

    Raises:
        InputError: the sources, the options or `out` can't be used, or the disk is full.
    """
    _check_options(vocab_size, seq_len, validation_fraction, workers)
    folder = Path(os.path.normpath(out))  # else MISSING/../SET would not exist before MISSING is made
    files = find_files(sources)
    total = sum(file.bytes for file in files)
    limit = part_bytes or min(max(total // _PARTS, _PART_BYTES[0]), _PART_BYTES[1])
    pieces = list(cut(files, limit))
    options = {
        "sources": list(sources),
        "vocab_size": None if tokenizer else vocab_size,
        "tokenizer": str(tokenizer) if tokenizer else None,
        "seq_len": seq_len,
        "validation_fraction": validation_fraction,
        "text_field": text_field,
        "part_bytes": limit,
    }
    with _disk_full_explained(folder), _claimed(folder, options, files):
        if not tokenizer_path(folder).exists():
            progress("tokenizer", 0, total)
            try:
                write_bytes(tokenizer_path(folder), _make_tokenizer(pieces, options))
            except InputError:
                _start_anew(folder)
                raise
        parts = [
            Part(index, members, str(folder), seq_len, validation_fraction, text_field)
            for index, members in enumerate(group(pieces, limit))
        ]
        began = time.perf_counter()
        reports, written = _write_parts(parts, workers, progress)
        seconds = time.perf_counter() - began
        info = _describe(folder, reports, seq_len, validation_fraction)
        write_dataset(info, options)
    shutil.rmtree(folder / "unfinished")
    return PrepareReport(info, written / seconds)


def _check_options(vocab_size: int, seq_len: int, validation_fraction: float, workers: int | None) -> None:
    if seq_len < 1:
        raise InputError(f"--seq-len {seq_len}: give a positive number of tokens")
    if vocab_size < 1:
        raise InputError(f"--vocab-size {vocab_size}: give a positive number, such as 4096")
    if not 0 < validation_fraction < 1:
        raise InputError(f"--validation-fraction {validation_fraction}: give a part of 1, such as 0.05")
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: give at least 1")


@contextmanager
def _claimed(folder: Path, options: dict[str, Any], files: list[SourceFile]) -> Iterator[None]:
    """Make `folder` ours: new, or left by an interrupted call with the same input and options."""
    listing = json.dumps([[file.key, file.bytes, file.modified] for file in files])
    asked = options | {"input": hashlib.sha256(listing.encode()).hexdigest()}
    if dataset_path(folder).exists():
        raise InputError(f"{folder} already holds a data set: choose another --out, or delete it first")
    claim = folder / "unfinished" / "options.json"
    if not claim.exists():
        if folder.exists() and (not folder.is_dir() or set(os.listdir(folder)) - {"unfinished"}):  # noqa: PTH208
            raise InputError(f"{folder} exists and holds other things: choose another --out")
        _make(claim.parent)
        write_json(claim, asked)
    with claim.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up by the system when the process ends
        except BlockingIOError:
            raise InputError(f"{folder} is being prepared by another process: wait for it") from None
        begun = json.load(file)
        if changed := [name for name in asked if begun.get(name) != asked[name]]:
            raise InputError(
                f"{folder} holds an unfinished data set of another {changed[0].replace('_', ' ')}: give the same "
                f"again to go on with it, or start anew with `rm -r {folder}`"
            )
        yield


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise InputError(f"{folder.parent} can't be made ({error.strerror}): choose another --out") from error


@contextmanager
def _disk_full_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise InputError(
            f"no space is left on the disk of {folder}: free some and give the same command again, "
            f"it goes on where it stopped"
        ) from error


def _make_tokenizer(pieces: list[Piece], options: dict[str, Any]) -> bytes:
    if options["tokenizer"]:
        Tokenizer.load(options["tokenizer"])
        return Path(options["tokenizer"]).read_bytes()
    return train(
        _sample(pieces, options["text_field"], options["validation_fraction"]), options["vocab_size"]
    )


def _sample(pieces: list[Piece], text_field: str, validation_fraction: float) -> Iterator[str]:
    """Training documents from all over the corpus, in an order that depends on the pieces' names alone."""
    quota = max(_TOKENIZER_BYTES // len(pieces), 1 << 16)
    left = _TOKENIZER_BYTES
    held_out: list[float] = []
    for piece in sorted(pieces, key=lambda piece: place(f"{piece.file.key}@{piece.start}")):
        from_piece = min(quota, left)
        for document in documents([piece], text_field):
            if from_piece <= 0:
                break
            if (at := place(document.key)) < validation_fraction:
                held_out.append(at)
                continue
            yield document.text[:from_piece]
            from_piece -= document.bytes
            left -= document.bytes
        if left <= 0:
            return
    if left == _TOKENIZER_BYTES and held_out:
        raise _empty_split("train", len(held_out), min(held_out), max(held_out), validation_fraction)


def _write_parts(parts: list[Part], workers: int | None, progress: Progress) -> tuple[list[PartReport], int]:
    """Write the parts that are missing. Returns all reports in order, and the tokens written now."""
    reports: dict[int, PartReport] = {}
    total = sum(part.bytes for part in parts)
    for part in parts:
        if (report := read_report(part)) is not None:
            reports[part.index] = report
    missing = [part for part in parts if part.index not in reports]
    done = total - sum(part.bytes for part in missing)
    written = 0
    progress("tokens", done, total)
    for part, report in _run(missing, workers):
        reports[part.index] = report
        written += report.train.tokens + report.validation.tokens
        done += part.bytes
        progress("tokens", done, total)
    return [reports[part.index] for part in parts], written


def _run(parts: list[Part], workers: int | None) -> Iterator[tuple[Part, PartReport]]:
    """Each part with its report, as they are done."""
    if workers is None:
        worth = sum(part.bytes for part in parts) // _BYTES_PER_WORKER
        workers = max(1, min(len(os.sched_getaffinity(0)), worth))
    workers = min(workers, len(parts))
    if workers <= 1:
        for part in parts:
            yield part, write_part(part)
        return
    # spawned, not forked: the caller may have threads
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        futures: dict[Future[PartReport], Part] = {pool.submit(write_part, part): part for part in parts}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process was killed, perhaps for want of memory: give the same command again with "
            "fewer --workers, finished parts are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when its parent is gone, so that no orphan writes beside the parent's successor."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the parent gets it too, and lets parts under way be finished

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _describe(folder: Path, reports: list[PartReport], seq_len: int, validation_fraction: float) -> TextInfo:
    """Merge the parts' indexes. Raises InputError where a split is empty."""
    splits = {split: SplitInfo.total([getattr(report, split) for report in reports]) for split in SPLITS}
    for split in SPLITS:
        if not splits[split].documents:
            _start_anew(folder)
            lowest, highest = (
                min(report.lowest for report in reports),
                max(report.highest for report in reports),
            )
            count = sum(info.documents for info in splits.values())
            raise _empty_split(split, count, lowest, highest, validation_fraction)
    for split in SPLITS:
        _merge_indexes(folder / split)
    tokenizer = Tokenizer.load(tokenizer_path(folder))
    return TextInfo(
        path=folder,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        train=splits["train"],
        validation=splits["validation"],
        digest=digest_of(folder, TextInfo.files),
    )


def _merge_indexes(folder: Path) -> None:
    """Write the index over all parts, with the shards' names relative to it.

    streaming's own merge_index does this by way of URLs, so that a `#` or `?` in the folder's name defeats it.
    """
    shards = []
    for part in sorted(folder.glob("part-*/index.json")):
        for shard in json.loads(part.read_text())["shards"]:
            name = f"{part.parent.name}/{shard['raw_data']['basename']}"
            shards.append(shard | {"raw_data": shard["raw_data"] | {"basename": name}})
    write_json(folder / "index.json", {"version": 2, "shards": shards})


def _empty_split(
    split: Split, documents: int, lowest: float, highest: float, validation_fraction: float
) -> InputError:
    """What to do where all documents, with places from `lowest` to `highest`, fall into the other split."""
    if not documents:
        return InputError("the corpus holds no text: all its documents are empty")
    if documents == 1:
        return InputError(
            "the corpus is a single document, which can't be split into train and validation: cut it into several, "
            "such as `split -l 200 FILE FILE.` and --source 'FILE.*', or a .jsonl with a document a line"
        )
    # between two documents' places a fraction leaves one on either side
    wanted = math.nextafter(lowest, 1) if split == "validation" else highest
    return InputError(
        f"with --validation-fraction {validation_fraction} none of the {documents} documents falls into the "
        f"{split} split: set it to {_between(wanted, lowest, highest)}, or give more documents"
    )


def _between(wanted: float, lowest: float, highest: float) -> str:
    """The shortest decimal near `wanted` in (lowest, highest]."""
    for digits in range(1, 17):
        for value in (math.floor(wanted * 10**digits), math.ceil(wanted * 10**digits)):
            if lowest < value / 10**digits <= highest:
                return f"{value / 10**digits:.{digits}f}"
    return repr(wanted)


def _start_anew(folder: Path) -> None:
    """Remove what a call that can't succeed has made, so that another with better options finds nothing."""
    for name in (*SPLITS, "unfinished"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    tokenizer_path(folder).unlink(missing_ok=True)
