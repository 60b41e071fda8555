"""A prepared data set: how its folder is laid out, and what its `dataset.json` says.

    DIR/dataset.json      written last: a folder without it is unfinished
    DIR/tokenizer.model   of text; of pictures' codes, codebook.safetensors
    DIR/train/index.json  and part-00000/shard.00000.mds ...
    DIR/validation/       likewise

A sample has a column of seq_len + 1 tokens, of which the first seq_len are input and the last seq_len targets.
Codes of labelled pictures have another, `classes`, with a number each.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.errors import InputError

FORMAT = 1
COLUMN = "tokens"
SPLITS: tuple["Split", ...] = ("train", "validation")
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class SplitInfo:
    """What a split holds."""

    documents: int
    """Of pictures' codes, the pictures."""
    tokens: int
    """With one end-of-document token a document, without padding; each is the target of one sequence."""
    bytes: int
    """Of the documents' text in UTF-8; of the pictures' pixels."""
    sequences: int


@dataclass(frozen=True)
class DatasetInfo:
    """A prepared data set of any kind."""

    kind: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    """What lies beside `dataset.json` and is needed to make sense of tokens."""

    path: Path
    seq_len: int
    vocab_size: int
    """Tokens that there are; a model's vocabulary may be padded."""
    pad_id: int
    """The token that is never a target."""
    train: SplitInfo
    validation: SplitInfo
    digest: str
    """SHA-256 over all shards and `files`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What a sample has beside its id."""
        return (COLUMN,)


@dataclass(frozen=True)
class TextInfo(DatasetInfo):
    """Text in the tokens of a tokenizer."""

    kind: ClassVar[str] = "text"
    files: ClassVar[tuple[str, ...]] = ("tokenizer.model",)

    bos_id: int
    eos_id: int

    @property
    def tokenizer_path(self) -> Path:
        """The sentencepiece model."""
        return tokenizer_path(self.path)


@dataclass(frozen=True)
class ImageCodesInfo(DatasetInfo):
    """Pictures in the codes of a codebook, row by row, after a start token, which is `pad_id` too."""

    kind: ClassVar[str] = "image_codes"
    files: ClassVar[tuple[str, ...]] = ("codebook.safetensors",)

    height: int
    """Rows of codes in a picture."""
    width: int
    """Codes in a row."""
    class_names: tuple[str, ...]
    """By class number; empty where pictures have no class."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What a sample has beside its id."""
        return (COLUMN, "classes") if self.class_names else (COLUMN,)

    @property
    def start_id(self) -> int:
        """The first token of every sequence; all below it are codes."""
        return self.vocab_size - 1

    @property
    def codebook_path(self) -> Path:
        """The pixels of each code; there is none where the user brought codes without."""
        return self.path / "codebook.safetensors"


KINDS: dict[str, type[DatasetInfo]] = {info.kind: info for info in (TextInfo, ImageCodesInfo)}


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
    info = KINDS[described.get("kind", "text")]
    values: dict[str, Any] = {
        field.name: described[field.name] for field in fields(info) if field.name != "path"
    }
    for name, value in values.items():
        if name in SPLITS:
            values[name] = SplitInfo(**value)
        elif isinstance(value, list):
            values[name] = tuple(value)
    return info(path=folder, **values)


def write_dataset(info: DatasetInfo, options: Mapping[str, Any]) -> None:
    """Write dataset.json, with which the data set is finished."""
    described = {"format": FORMAT, "kind": info.kind} | asdict(info) | {"options": dict(options)}
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
