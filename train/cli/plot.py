"""`trireme plot`"""

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, such as runs/demo.")],
    out: Annotated[
        Path | None, typer.Option(help="The picture; default: curves.png in the first run.")
    ] = None,
) -> None:
    """Draw the curves of one or several runs into a PNG.

    Example: `trireme plot runs/demo runs/wide --out compare.png`
    """
    from train.plot import plot_runs

    print(plot_runs(runs, out))
