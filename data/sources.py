"""What `--source` may name, and how the files found are cut into pieces of about equal size."""

import glob
import itertools
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import InputError

Kind = Literal["text", "jsonl", "parquet", "hugging_face"]

STDLIB = "python-stdlib"
FOLDER_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class SourceFile:
    """A file (or a Hugging Face dataset's folder) that holds documents."""

    kind: Kind
    path: str
    key: str
    """Its name relative to its source: the same wherever the corpus lies."""
    bytes: int
    modified: int
    """Time of last modification, nanoseconds."""


@dataclass(frozen=True)
class Piece:
    """A range of a file, which one process reads from beginning to end."""

    file: SourceFile
    bytes: int
    start: int = 0
    """In bytes (jsonl), row groups (parquet) or rows (Hugging Face); whole files start at 0."""
    stop: int | None = None
    """Exclusive; None reads to the end of the file."""


def find_files(sources: Iterable[str]) -> list[SourceFile]:
    """The files that the sources name, each once, in an order that depends on the names alone.

    A source is a file, a folder, a glob, a folder that `datasets.save_to_disk` wrote, or `python-stdlib`.

    Raises:
        InputError: a source names nothing, or nothing that holds text.
    """
    found: dict[str, SourceFile] = {}
    for source in sources:
        for file in sorted(_resolve(source), key=lambda file: file.key):
            found.setdefault(str(Path(file.path).resolve()), file)
    if not found:
        raise InputError("no source is given: name files, folders or globs with --source")
    return list(found.values())


def cut(files: Sequence[SourceFile], limit: int) -> Iterator[Piece]:
    """Cut files larger than `limit` bytes where their format lets a reader begin in the middle."""
    for file in files:
        pieces = -(-file.bytes // limit)
        units = _units(file) if pieces > 1 else 1
        pieces = min(pieces, units)
        if pieces <= 1:
            yield Piece(file, file.bytes)
            continue
        edges = [units * i // pieces for i in range(pieces + 1)]
        for start, stop in itertools.pairwise(edges):
            yield Piece(file, file.bytes * (stop - start) // units, start, stop)


def reading_failed(path: str | Path, error: OSError) -> InputError:
    """The error to raise where a file can't be opened or read."""
    return InputError(f"{path} can't be read: {error.strerror or error}")


def _resolve(source: str) -> Iterator[SourceFile]:
    if source == STDLIB:
        yield from _standard_library()
    elif Path(source).is_dir():
        yield from _folder(Path(source))
    elif Path(source).exists():
        yield _file(Path(source), Path(source).name)
    elif glob.has_magic(source):
        yield from _glob(source)
    else:
        raise InputError(f"{source} doesn't exist: name a file, a folder, a glob in quotes, or {STDLIB}")


def _standard_library() -> Iterator[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        generated = path.name.startswith("_sysconfigdata")  # by the build of this interpreter
        if not generated and not _NOT_LIBRARY.intersection(relative.parts):
            yield _file(path, relative.as_posix())


def _folder(folder: Path) -> Iterator[SourceFile]:
    if (folder / "dataset_dict.json").is_file():
        if not (folder / "train").is_dir():
            splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise InputError(f"{folder} has no split `train`: name one of its folders as --source ({splits})")
        folder = folder / "train"
    if (folder / "state.json").is_file() or (folder / "dataset_info.json").is_file():
        yield _hugging_face(folder)
        return
    paths = [path for path in folder.rglob("*") if path.name.lower().endswith(FOLDER_SUFFIXES)]
    files = [_file(path, path.relative_to(folder).as_posix()) for path in paths if path.is_file()]
    if not files:
        raise InputError(
            f"{folder} holds no {' '.join(FOLDER_SUFFIXES)} file: for files of other names "
            f"give a glob in quotes, such as '{folder}/**/*.py'"
        )
    yield from files


def _glob(pattern: str) -> Iterator[SourceFile]:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    files = [Path(match) for match in matches if Path(match).is_file()]
    if not files:
        raise InputError(f"{pattern} matches no file: check it with `ls`, and keep it in quotes")
    for path in files:
        yield _file(path, path.relative_to(root).as_posix())


def _file(path: Path, key: str) -> SourceFile:
    name = path.name.lower()
    kind: Kind = (
        "jsonl" if name.endswith(JSONL_SUFFIXES) else "parquet" if name.endswith(".parquet") else "text"
    )
    try:
        stat = path.stat()
    except OSError as error:
        raise reading_failed(path, error) from error
    return SourceFile(kind, str(path), key, stat.st_size, stat.st_mtime_ns)


def _hugging_face(folder: Path) -> SourceFile:
    stats = [path.stat() for path in folder.iterdir()]
    size, modified = sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
    return SourceFile("hugging_face", str(folder), folder.name, size, modified)


def _units(file: SourceFile) -> int:
    """How many places a file can be cut at, plus one."""
    if file.kind == "jsonl" and file.path.lower().endswith(".jsonl"):
        return file.bytes
    if file.kind == "parquet":
        from data.corpus import open_parquet

        return open_parquet(file.path).num_row_groups
    if file.kind == "hugging_face":
        from data.corpus import open_hugging_face

        return len(open_hugging_face(file.path))
    return 1
