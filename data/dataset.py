"""A prepared data set: how its folder is laid out, and what its `dataset.json` says.

    DIR/dataset.json      written last: a folder without it is unfinished
    DIR/tokenizer.model
    DIR/train/index.json  and part-00000/shard.00000.mds ...
    DIR/validation/       likewise

A sample is a row of seq_len + 1 tokens, of which the first seq_len are input and the last seq_len targets.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data.errors import InputError

FORMAT = 1
COLUMN = "tokens"
SPLITS: tuple["Split", ...] = ("train", "validation")
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class SplitInfo:
    """What a split holds."""

    documents: int
    tokens: int
    """With one end-of-document token a document, without padding; each is the target of one sequence."""
    bytes: int
    """Of the documents' text in UTF-8."""
    sequences: int


@dataclass(frozen=True)
class DatasetInfo:
    """A prepared data set."""

    path: Path
    seq_len: int
    vocab_size: int
    """Of the tokenizer, not padded."""
    bos_id: int
    eos_id: int
    pad_id: int
    train: SplitInfo
    validation: SplitInfo
    digest: str
    """SHA-256 over all shards and the tokenizer."""

    @property
    def tokenizer_path(self) -> Path:
        """The sentencepiece model."""
        return tokenizer_path(self.path)


def dataset_path(folder: Path) -> Path:
    """Where the description of the data set in `folder` is."""
    return folder / "dataset.json"


def tokenizer_path(folder: Path) -> Path:
    """Where the tokenizer of the data set in `folder` is."""
    return folder / "tokenizer.model"


def open_dataset(path: str | Path) -> DatasetInfo:
    """Read what a prepared data set says of itself.

    Raises:
        InputError: there is no finished data set, or it is of another version.
    """
    folder = Path(path)
    try:
        described = json.loads(dataset_path(folder).read_text())
    except FileNotFoundError:
        state = "is unfinished" if folder.is_dir() else "doesn't exist"
        raise InputError(
            f"{folder} {state}: no dataset.json; make it with `trireme prepare --source FILES --out {folder}`"
        ) from None
    except OSError as error:
        raise InputError(f"{dataset_path(folder)} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{dataset_path(folder)} is damaged ({error}): prepare the data again") from error
    if described.get("format") != FORMAT:
        raise InputError(
            f"{folder} is of format {described.get('format')}, this version reads {FORMAT}: prepare the data again"
        )
    names = ("seq_len", "vocab_size", "bos_id", "eos_id", "pad_id", "digest")
    return DatasetInfo(
        path=folder,
        train=SplitInfo(**described["train"]),
        validation=SplitInfo(**described["validation"]),
        **{name: described[name] for name in names},
    )


def write_dataset(info: DatasetInfo, options: Mapping[str, Any]) -> None:
    """Write dataset.json, with which the data set is finished."""
    described = {"format": FORMAT} | asdict(info) | {"options": dict(options)}
    del described["path"]
    write_json(dataset_path(info.path), described)


def write_json(path: Path, value: Any) -> None:
    """Write a file that exists wholly or not at all."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that exists wholly or not at all."""
    aside = path.with_name(path.name + ".unfinished")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
