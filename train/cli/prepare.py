"""`trireme prepare`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from data.prepare import PrepareReport, Progress


class Kind(StrEnum):
    """What a source holds."""

    TEXT = "text"
    PAIRS = "pairs"
    IMAGES = "images"
    CODES = "codes"


def prepare(
    source: Annotated[
        list[str],
        typer.Option(
            help="A text, .jsonl(.gz, .zst) or .parquet file, a folder of such, a glob in quotes, a Hugging Face "
            "dataset on disk, or `python-stdlib`. Repeat it for more."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens of the vocabulary that is trained.")] = 4096,
    tokenizer: Annotated[
        Path | None, typer.Option(help="An existing sentencepiece .model, instead of training one.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a training sequence.")] = 512,
    validation_fraction: Annotated[
        float, typer.Option(help="Part of the documents kept for validation.")
    ] = 0.05,
    text_field: Annotated[
        str, typer.Option(help="The field that holds the text, in .jsonl, .parquet and datasets.")
    ] = "text",
    workers: Annotated[
        int | None, typer.Option(help="Processes; left out, as many as cores where the corpus is large.")
    ] = None,
    kind: Annotated[
        Kind,
        typer.Option(help="What the source holds: text, pairs, images, or codes of a codebook of yours."),
    ] = Kind.TEXT,
    source_len: Annotated[
        int, typer.Option(help="Pairs: tokens of a source; --seq-len is that of targets.")
    ] = 512,
    labels: Annotated[
        str | None, typer.Option(help="Images and codes: an .npy of classes, where the source is an .npy.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Images: resize files to so many pixels of height and width.")
    ] = None,
    patch_size: Annotated[int, typer.Option(help="Images: pixels of height and width for one code.")] = 4,
    codebook_size: Annotated[int, typer.Option(help="Images: codes, found by k-means.")] = 512,
) -> None:
    """Make a data set: text to tokenizer to token shards. Interrupted, it goes on where it stopped.

    Of images, a codebook of patches is learned, and they become sequences of codes. They are a folder of PNG and
    JPEG files, each class in a folder of its own, or an .npz with `images` and `labels`.

    Example: `trireme prepare --source 'texts/**/*.txt' --out datasets/mine --vocab-size 8192`

    Pairs are .jsonl files with a `source` and a `target` in each line, or `stdlib-docstrings`: functions of Python's
    standard library and the first lines of their docstrings.

    Example: `trireme prepare --kind pairs --source pairs.jsonl --source-len 256 --seq-len 64 --out datasets/pairs`

    Example: `trireme prepare --kind images --source pictures/ --image-size 32 --out datasets/pictures`
    """
    if kind == Kind.PAIRS:
        _prepare_pairs(source, out, vocab_size, tokenizer, source_len, seq_len, validation_fraction)
        return
    if kind != Kind.TEXT:
        _prepare_pictures(
            kind, source, out, labels, patch_size, codebook_size, image_size, validation_fraction
        )
        return
    from data.prepare import prepare as make

    with _Shown() as progress:
        report = make(
            source,
            out,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            seq_len=seq_len,
            validation_fraction=validation_fraction,
            text_field=text_field,
            workers=workers,
            progress=progress,
        )
    _print(report)


def _prepare_pairs(
    source: list[str],
    out: Path,
    vocab_size: int,
    tokenizer: Path | None,
    source_len: int,
    seq_len: int,
    validation_fraction: float,
) -> None:
    from data.prepare_pairs import prepare_pairs

    info = prepare_pairs(
        source,
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        source_len=source_len,
        seq_len=seq_len,
        validation_fraction=validation_fraction,
    )
    print(
        f"{info.train.documents:,} pairs for training, {info.validation.documents:,} for validation; "
        f"{info.train.tokens:,} and {info.validation.tokens:,} tokens of targets, of a vocabulary of "
        f"{info.vocab_size:,}"
    )
    print(f"next: trireme train docstrings data.path={info.path} run.name=mine")


def _prepare_pictures(
    kind: Kind,
    source: list[str],
    out: Path,
    labels: str | None,
    patch_size: int,
    codebook_size: int,
    image_size: int | None,
    validation_fraction: float,
) -> None:
    from data.errors import InputError
    from data.prepare_pictures import prepare_pictures

    if len(source) != 1:
        raise InputError(
            f"--source {' '.join(source)}: of {kind} there is one source: name one folder or file"
        )
    info = prepare_pictures(
        source[0],
        out,
        kind="images" if kind == Kind.IMAGES else "codes",
        labels=labels,
        patch_size=patch_size,
        codebook_size=codebook_size,
        image_size=image_size,
        validation_fraction=validation_fraction,
    )
    print(
        f"{info.train.documents:,} pictures for training, {info.validation.documents:,} for validation, of "
        f"{info.height} x {info.width} codes of {info.start_id:,}, in {len(info.class_names)} classes"
    )
    print(f"next: trireme train image_codes data.path={info.path} run.steps=1000")


_WORDS = {"tokenizer": "training the tokenizer", "tokens": "tokenizing"}


class _Shown:
    """Shows progress: a bar in a terminal, a line for each tenth elsewhere."""

    def __enter__(self) -> "Progress":
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._last = ("", -1)
        self._bar: Progress | None = None
        console = Console()
        if not console.is_terminal:
            return self._line
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("reading")
        self._bar.start()
        return self._move

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _move(self, stage: str, done: int, total: int) -> None:
        assert self._bar is not None
        self._bar.update(self._task, description=_WORDS[stage], completed=done, total=total)

    def _line(self, stage: str, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if (stage, tenth) != self._last:
            self._last = (stage, tenth)
            print(f"{_WORDS[stage]}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", flush=True)


def _print(report: "PrepareReport") -> None:
    from rich.console import Console
    from rich.table import Table

    dataset = report.dataset
    table = Table("", "train", "validation", title=str(dataset.path), title_justify="left")
    for name in ("documents", "tokens", "bytes", "sequences"):
        table.add_row(name, f"{getattr(dataset.train, name):,}", f"{getattr(dataset.validation, name):,}")
    Console().print(table)
    print(
        f"{report.documents:,} documents, {report.tokens:,} tokens of a vocabulary of {dataset.vocab_size:,}, "
        f"{report.bytes_per_token:.2f} bytes/token, {report.tokens_per_second:,.0f} tokens/s"
    )
    print(f"next: trireme train tiny data.path={dataset.path}")
