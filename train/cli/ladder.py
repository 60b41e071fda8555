"""`trireme ladder`"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from train.scaling.ladder import Progress, Rung


def ladder(
    config: Annotated[str, typer.Argument(help="A configuration file, or the name of one below configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value ...", metavar="OVERRIDES")
    ] = None,
    *,
    sizes: Annotated[str, typer.Option(help="Parameters of the models, such as 1M,2M,4M.")],
    budgets: Annotated[str, typer.Option(help="FLOPs that each size gets, such as 1e14,1e15.")],
    out: Annotated[Path, typer.Option(help="A folder for the runs and points.csv.")] = Path("runs/ladder"),
) -> None:
    """Train each size at each budget, one after another, and write points.csv for `trireme scaling fit`.

    The same command again goes on where it was interrupted.

    Example: `trireme ladder dial --sizes 150K,300K,600K,1.2M --budgets 1e12,3e12,1e13`
    """
    from train.scaling.ladder import Progress, climb, plan_ladder
    from train.scaling.points import make_folder

    rungs = plan_ladder(config, overrides or [], _counts("sizes", sizes), _counts("budgets", budgets), out)
    make_folder(out)
    states = [Progress()] * len(rungs)
    from rich.console import Console
    from rich.live import Live

    console, live = Console(highlight=False), sys.stdout.isatty()
    with Live(console=console, auto_refresh=False, transient=True) as shown:
        for index, state in climb(rungs, out / "points.csv"):
            states[index] = state
            if live:
                shown.update(_table(rungs, states), refresh=True)
            elif state.done:
                print(f"{index + 1}/{len(rungs)}  {rungs[index].name}  loss {state.loss:.4f}", flush=True)
    console.print(_table(rungs, states))
    print(f"next: trireme scaling fit {out / 'points.csv'}")


def _table(rungs: "Sequence[Rung]", states: "Sequence[Progress]") -> "Table":
    from rich.table import Table

    from train.counts import format_count

    spent = sum(rung.flops * state.step / rung.steps for rung, state in zip(rungs, states, strict=True))
    table = Table(caption=f"{spent / sum(rung.flops for rung in rungs):.0%} of the FLOPs are spent")
    for name in ("run", "parameters", "tokens", "FLOPs", "step", "loss"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for rung, state in zip(rungs, states, strict=True):
        loss = "" if state.loss is None else f"{state.loss:.4f}"
        table.add_row(
            rung.name,
            format_count(rung.params),
            format_count(rung.tokens),
            f"{rung.flops:.3g}",
            f"{state.step}/{rung.steps}",
            f"[green]{loss}[/]" if state.done else loss,
        )
    return table


def _counts(name: str, text: str) -> list[float]:
    """Numbers between commas, each once."""
    from train.counts import parse_count
    from train.errors import ConfigError

    try:
        return sorted({parse_count(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}") from None
