"""From pieces of files to documents."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import InputError, first_line
from data.sources import Piece, reading_failed

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Document:
    """A text of the corpus."""

    key: str
    """Stable and unique in its source: the file's key, with `#row` where a file holds several.

    In a .jsonl the row is the byte at which the line begins (before compression).
    """
    text: str
    bytes: int
    """Length in UTF-8."""


def documents(pieces: Iterable[Piece], text_field: str = "text") -> Iterator[Document]:
    """The documents of the pieces in order, the empty ones left out. Rows hold their text in `text_field`.

    Raises:
        InputError: a file can't be read or decoded, or a row has no text; the message names file and line.
    """
    for piece in pieces:
        match piece.file.kind:
            case "text":
                rows = _text_file(piece)
            case "jsonl":
                rows = _jsonl(piece, text_field)
            case "parquet":
                rows = _parquet(piece, text_field)
            case "hugging_face":
                rows = _hugging_face(piece, text_field)
        for key, where, text in rows:
            size = len(utf8(text, where))
            if size:
                yield Document(key, text, size)


def open_parquet(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises InputError where the file isn't one."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except OSError as error:
        raise reading_failed(path, error) from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no parquet file: {first_line(error)}") from error


def open_hugging_face(path: str) -> Any:
    """A `datasets.Dataset`, mapped into memory. Raises InputError where the folder isn't one."""
    import datasets

    try:
        return datasets.load_from_disk(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no Hugging Face dataset as `save_to_disk` writes it: {first_line(error)}"
        ) from error


Row = tuple[str, str, Any]
"""Key, where it stands for messages, and what should be a string."""


def _text_file(piece: Piece) -> Iterator[Row]:
    file = piece.file
    try:
        content = Path(file.path).read_bytes()
    except OSError as error:
        raise reading_failed(file.path, error) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file.path} is not UTF-8 (byte {error.start}, line {line}): "
            f"leave it out, or convert it with `iconv -t utf-8`"
        ) from error
    yield file.key, file.path, text


def _jsonl(piece: Piece, field: str) -> Iterator[Row]:
    path = piece.file.path
    for offset, line in json_lines(piece):
        (text,) = json_fields(line, (field,), path, offset, "name the field that has with --text-field")
        yield f"{piece.file.key}#{offset}", f"{path} (byte {offset})", text


def json_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in [start, stop), blank ones left out, and the byte that each begins at.

    Raises:
        InputError: the file can't be read.
    """
    path = piece.file.path
    try:
        with _decompressed(path) as lines:
            offset = piece.start
            if offset:  # the line that begins before the range belongs to the range before
                lines.seek(offset - 1)
                offset += len(lines.readline()) - 1
            for line in lines:
                if piece.stop is not None and offset >= piece.stop:
                    break
                if line.strip():
                    yield offset, line
                offset += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}; download or compress it again") from error
    except OSError as error:
        raise reading_failed(path, error) from error


def _decompressed(path: str) -> BinaryIO:
    if path.lower().endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    if path.lower().endswith(".zst"):
        return _zstandard(path)
    return Path(path).open("rb")


def _zstandard(path: str) -> BinaryIO:
    import io

    import zstandard

    class Stream(io.RawIOBase):
        """Reads every frame, and tells of damage as OSError."""

        def __init__(self) -> None:
            self._file = Path(path).open("rb")  # noqa: SIM115 - closed in close
            self._reader = zstandard.ZstdDecompressor().stream_reader(self._file, read_across_frames=True)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                return self._reader.readinto(buffer)
            except zstandard.ZstdError as error:
                raise OSError(f"damaged: {error}") from error

        def close(self) -> None:
            self._file.close()
            super().close()

    return io.BufferedReader(Stream(), 1 << 20)


def json_fields(line: bytes, fields: Sequence[str], path: str, offset: int, hint: str) -> list[str]:
    """The texts in these fields of the object that a line is; `hint` says what to do where one is missing.

    Raises:
        InputError: the line is no object, or has no such texts.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        example = ", ".join(f'"{field}": "..."' for field in fields)
        raise InputError(
            f"{path}, line {_line_number(path, offset)} is not JSON: {first_line(error)}; "
            f"each line must be an object such as {{{example}}}"
        ) from error
    for field in fields:
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            has = f"its fields are {', '.join(row)}" if isinstance(row, dict) else "it is no object"
            raise InputError(
                f"{path}, line {_line_number(path, offset)} has no text in field `{field}` ({has}): {hint}"
            )
    return [row[field] for field in fields]


def _line_number(path: str, offset: int) -> int:
    """The number, from 1, of the line that begins at byte `offset`."""
    number = 1
    with _decompressed(path) as lines:
        for line in lines:
            offset -= len(line)
            if offset < 0:
                break
            number += 1
    return number


def _parquet(piece: Piece, field: str) -> Iterator[Row]:
    import pyarrow as pa

    path = piece.file.path
    parquet = open_parquet(path)
    _check_column(path, field, parquet.schema_arrow.names)
    groups = range(piece.start, parquet.num_row_groups if piece.stop is None else piece.stop)
    row = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.start))
    try:
        for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=list(groups), columns=[field]):
            for text in batch.column(0).to_pylist():
                yield f"{piece.file.key}#{row}", f"{path}, row {row}", text
                row += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged near row {row}: {first_line(error)}") from error


def _hugging_face(piece: Piece, field: str) -> Iterator[Row]:
    path = piece.file.path
    dataset = open_hugging_face(path)
    _check_column(path, field, dataset.column_names)
    dataset = dataset.select_columns([field])
    stop = len(dataset) if piece.stop is None else piece.stop
    for begin in range(piece.start, stop, _ROWS_AT_ONCE):
        for row, text in enumerate(dataset[begin : min(begin + _ROWS_AT_ONCE, stop)][field], begin):
            yield f"{piece.file.key}#{row}", f"{path}, row {row}", text


def _check_column(path: str, field: str, columns: list[str]) -> None:
    if field not in columns:
        raise InputError(
            f"{path} has no column `{field}`: choose one with --text-field ({', '.join(columns)})"
        )


def utf8(text: Any, where: str) -> bytes:
    """A text's bytes. Raises InputError where it is none."""
    if not isinstance(text, str):
        raise InputError(f"{where} holds {type(text).__name__} where text is expected: remove the row")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds half a surrogate pair, which is not text: remove or mend it"
        ) from error
