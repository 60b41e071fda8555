"""`trireme prepare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from data.prepare import PrepareReport, Progress


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
) -> None:
    """Make a data set: text to tokenizer to token shards. Interrupted, it goes on where it stopped.

    Example: `trireme prepare --source 'texts/**/*.txt' --out datasets/mine --vocab-size 8192`
    """
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
