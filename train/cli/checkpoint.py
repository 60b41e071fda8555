"""`trireme checkpoint`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from train.errors import RunError

if TYPE_CHECKING:
    from train.checkpoint_report import Row

app = typer.Typer(
    help="The checkpoints of a run: what there is, and whether it is whole.", no_args_is_help=True
)
_Run = Annotated[str, typer.Argument(help="The folder of a run, such as runs/demo.")]
_Checkpoint = Annotated[
    str, typer.Argument(help="A checkpoint's folder, or a run's, whose newest checkpoint is taken.")
]


@app.command("list")
def list_(run: _Run) -> None:
    """Show a run's checkpoints, and why each is kept: as one of the newest, `for ever`, or as one of the best.

    Example: `trireme checkpoint list runs/demo`
    """
    from train.checkpoint_report import rows

    _show(
        ("step", "tokens", "loss", "validation loss", "size", "age", "kept"),
        [_cells(row) for row in rows(run)],
    )


@app.command()
def verify(run: _Run) -> None:
    """Read all files of a run's checkpoints again and compare their checksums. Exit code 1 where one is damaged.

    Example: `trireme checkpoint verify runs/demo`
    """
    from train.checkpoint_report import damages

    found = damages(run)
    for path, damage in found.items():
        print(f"{path}: {damage or 'whole'}")
    if any(found.values()):
        raise typer.Exit(1)


@app.command()
def prune(run: _Run) -> None:
    """Remove the checkpoints that the run's configuration doesn't keep (`checkpoint.keep` and its like).

    Example: `trireme checkpoint prune runs/demo`
    """
    from train.checkpoint_report import prune_run

    for path in prune_run(run):
        print(f"removed: {path}")


@app.command()
def diff(first: _Checkpoint, second: _Checkpoint) -> None:
    """Show which tensors differ between two checkpoints, and by how much. Exit code 1 where any does.

    Example: `trireme checkpoint diff runs/demo runs/other/checkpoints/step-00000100`
    """
    from train.checkpoint_report import find_checkpoint

    paths = find_checkpoint(first), find_checkpoint(second)
    from train.checkpoint_compare import compare

    count, found = compare(*paths)
    if found:
        _show(
            ("tensor", "unequal", "of", "largest difference", "relative"),
            [
                (d.name, d.what) if d.what else (d.name, *_numbers(d.elements, d.of, d.largest, d.relative))
                for d in found
            ],
        )
    print(f"{count - len(found)} of {count} tensors are equal")
    if found:
        raise typer.Exit(1)


@app.command()
def average(
    run: _Run,
    out: Annotated[Path, typer.Option(help="The run's folder to make, such as runs/average.")],
    steps: Annotated[str, typer.Option(help="Of these steps, such as 800,900,1000.")] = "",
    last: Annotated[int | None, typer.Option(min=1, help="Of so many of the newest checkpoints.")] = None,
) -> None:
    """Make a run of the mean of a run's weights at several steps, to generate from, evaluate, export or train on.

    Without `--steps` or `--last`, all of its checkpoints are averaged.

    Example: `trireme checkpoint average runs/demo --last 2 --out runs/average`
    """
    numbers = steps.split(",") if steps else []
    if steps and last is not None:
        raise RunError("--steps and --last both choose checkpoints: keep one")
    if not all(number.strip().isdecimal() for number in numbers):
        raise RunError(f"--steps {steps} are no numbers: give them such as --steps 800,900,1000")
    from train.average import average_run

    chosen = average_run(run, out, [int(number) for number in numbers], last)
    print(f"{out}: the mean of the weights at steps {', '.join(map(str, chosen))}")


def _numbers(elements: int, of: int, largest: float, relative: float) -> tuple[str, ...]:
    return f"{elements:,}", f"{of:,}", f"{largest:.3e}", f"{relative:.1e}"


def _cells(row: "Row") -> tuple[str, ...]:
    from train.duration import format_seconds

    size, age = f"{row.bytes / 2**20:,.1f} MiB", format_seconds(row.age_seconds)
    kept = ", ".join(row.kept)
    if row.progress is None:
        return str(row.step), "", "", "", size, age, f"{kept}; its manifest is damaged"
    losses = (row.progress.loss, row.progress.validation_loss)
    shown = ("" if loss is None else f"{loss:.4f}" for loss in losses)
    return str(row.step), f"{row.progress.tokens:,}", *shown, size, age, kept


def _show(columns: tuple[str, ...], cells: list[tuple[str, ...]]) -> None:
    """A table, which in a pipe or a file has no width to keep to."""
    from rich.table import Table

    from train.cli.console import console

    table = Table()
    for name in columns:
        table.add_column(name, no_wrap=True)
    for row in cells:
        table.add_row(*row)
    console().print(table)
