"""A prepared data set: how its folder is laid out, and what its `dataset.json` says.

    DIR/dataset.json      written last: a folder without it is unfinished
    DIR/tokenizer.model   of text and pairs of texts; of pictures' codes, codebook.safetensors
    DIR/train/index.json  and part-00000/shard.00000.mds ...
    DIR/validation/       likewise

A sample has a column of seq_len + 1 tokens, of which the first seq_len are input and the last seq_len targets.
Codes of labelled pictures have another, `classes`, with a number each; pairs have `source`, of source_len tokens.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.errors import InputError

FORMAT = 1
COLUMN = "tokens"
SOURCE = "source"
SOURCE_PADDING = "source_padding"
"""Made of the source when it is read: True at padding."""
SPLITS: tuple["Split", ...] = ("train", "validation")
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class SplitInfo:
    """What a split holds."""

    documents: int
    """Of pictures' codes, the pictures; of pairs, the pairs."""
    tokens: int
    """With one end-of-document token a document, without padding; each is the target of one sequence."""
    bytes: int
    """Of the documents' text in UTF-8 (of pairs, both texts); of the pictures' pixels."""
    sequences: int

    @classmethod
    def total(cls, splits: Sequence["SplitInfo"]) -> "SplitInfo":
        """What they hold together."""
        return cls(
            **{field.name: sum(getattr(split, field.name) for split in splits) for field in fields(cls)}
        )


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
        """What batches of it can have."""
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
class PairsInfo(TextInfo):
    """Pairs of texts, a source and a target, in the tokens of one tokenizer.

    A source ends in the end-of-document token, and padding. A target comes after one token of padding, where a
    decoder starts (as in T5), and ends likewise, unless it was cut.
    """

    kind: ClassVar[str] = "pairs"

    source_len: int
    """Tokens of a source; seq_len is that of targets."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What batches of it can have."""
        return (COLUMN, SOURCE, SOURCE_PADDING)


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
        """What batches of it can have."""
        return (COLUMN, "classes") if self.class_names else (COLUMN,)

    @property
    def start_id(self) -> int:
        """The first token of every sequence; all below it are codes."""
        return self.vocab_size - 1

    @property
    def codebook_path(self) -> Path:
        """The pixels of each code; there is none where the user brought codes without."""
        return self.path / "codebook.safetensors"


KINDS: dict[str, type[DatasetInfo]] = {info.kind: info for info in (TextInfo, PairsInfo, ImageCodesInfo)}


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
    damaged = f"{dataset_path(folder)} is damaged ({{}}): prepare the data again"
    try:
        described = json.loads(dataset_path(folder).read_text())
    except FileNotFoundError:
        state = "is unfinished" if folder.is_dir() else "doesn't exist"
        raise InputError(
            f"{folder} {state}: no dataset.json; make it with `trireme prepare --source FILES --out {folder}`"
        ) from None
    except OSError as error:
        raise InputError(f"{dataset_path(folder)} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(damaged.format(error)) from error
    if not isinstance(described, dict):
        raise InputError(damaged.format("it holds no object"))
    if described.get("format") != FORMAT:
        raise InputError(
            f"{folder} is of format {described.get('format')}, this version reads {FORMAT}: prepare the data again"
        )
    try:
        return _info(folder, described)
    except (KeyError, TypeError) as error:
        raise InputError(damaged.format(f"{type(error).__name__}: {error}")) from error


def _info(folder: Path, described: dict[str, Any]) -> DatasetInfo:
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


def digest_of(folder: Path, files: Sequence[str]) -> str:
    """SHA-256 over the `files` in a folder and the indexes of its splits, which hold those of all shards."""
    digest = hashlib.sha256()
    for name in (*files, *(f"{split}/index.json" for split in SPLITS)):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write in, which becomes `folder` at the end, or is removed.

    Raises:
        InputError: `folder` exists, or can't be made.
    """
    if folder.exists():
        raise InputError(f"{folder} exists: choose another --out, or delete it first")
    aside = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(folder)
    except OSError as error:
        raise InputError(f"{folder} can't be made ({error.strerror}): choose another --out") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def empty_split(split: Split, count: int, what: str, validation_fraction: float) -> InputError:
    """The error to raise where none of `count` pictures or pairs falls into a split."""
    return InputError(
        f"with --validation-fraction {validation_fraction} none of {count} {what} falls into the {split} split: "
        f"set another, such as 0.1, or give more {what}"
    )


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
