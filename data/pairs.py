"""Pairs of a source and a target text, as a user brings them or as the standard library has them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.corpus import documents, json_fields, json_lines, utf8
from data.docstrings import documented_functions
from data.errors import InputError
from data.sources import STDLIB, Piece, find_files

STDLIB_DOCSTRINGS = "stdlib-docstrings"
FIELDS = ("source", "target")


@dataclass(frozen=True)
class Pair:
    """What a model is given, and what it is to say."""

    source: str
    target: str
    bytes: int
    """Length of both in UTF-8."""


def read_pairs(sources: Sequence[str]) -> Iterator[Pair]:
    """The pairs of the sources in order; those with an empty text are left out.

    A source is .jsonl (.gz, .zst) files, folders or globs, with an object of `source` and `target` in each line;
    or `stdlib-docstrings`: functions of Python's standard library and the first lines of their docstrings.

    Raises:
        InputError: a source names nothing, or a file can't be read or holds something else.
    """
    for name in sources:
        for source, target, where in _docstrings() if name == STDLIB_DOCSTRINGS else _jsonl(name):
            if source and target:
                yield Pair(source, target, len(utf8(source, where)) + len(utf8(target, where)))


def _docstrings() -> Iterator[tuple[str, str, str]]:
    pieces = [Piece(file, file.bytes) for file in find_files([STDLIB])]
    for document in documents(pieces):
        for code, said in documented_functions(document.text):
            yield code, said, document.key


def _jsonl(source: str) -> Iterator[tuple[str, str, str]]:
    for file in find_files([source]):
        if file.kind != "jsonl":
            raise InputError(
                f'{file.path} holds no pairs: give .jsonl files with {{"source": "...", "target": "..."}} in each '
                f"line, or {STDLIB_DOCSTRINGS}"
            )
        for offset, line in json_lines(Piece(file, file.bytes)):
            hint = "give each line a `source` and a `target`"
            texts = json_fields(line, FIELDS, file.path, offset, hint)
            yield texts[0], texts[1], f"{file.path} (byte {offset})"
