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
    submit: Annotated[
        bool, typer.Option("--submit", help="On a Slurm cluster, as an array of jobs; again, to gather them.")
    ] = False,
    cluster: Annotated[
        list[str] | None, typer.Option(help="With --submit: a profile, as `trireme submit` takes it.")
    ] = None,
) -> None:
    """Train each size at each budget, one after another, and write points.csv for `trireme scaling fit`.

    The same command again goes on where it was interrupted. With --submit it writes the points that there are, and
    submits the runs that are neither done nor have a job.

    Example: `trireme ladder dial --sizes 150K,300K,600K,1.2M --budgets 1e12,3e12,1e13`

    Example: `trireme ladder dial --sizes 1M,2M,4M,8M --budgets 1e14,1e15 --submit slurm.gpus_per_node=1`
    """
    from train.scaling.ladder import Progress, climb, gather, plan_ladder
    from train.scaling.points import make_folder

    rungs = plan_ladder(config, overrides or [], _counts("sizes", sizes), _counts("budgets", budgets), out)
    make_folder(out)
    from rich.live import Live

    from train.cli.console import console

    shown_on, live = console(markup=True), sys.stdout.isatty()
    if submit:
        states = gather(rungs, out / "points.csv")
        shown_on.print(_table(rungs, states))
        _submit(rungs, states, out, cluster or [])
        return
    states = [Progress()] * len(rungs)
    with Live(console=shown_on, auto_refresh=False, transient=True) as shown:
        for index, state in climb(rungs, out / "points.csv"):
            states[index] = state
            if live:
                shown.update(_table(rungs, states), refresh=True)
            elif state.done:
                print(f"{index + 1}/{len(rungs)}  {rungs[index].name}  loss {state.loss:.4f}", flush=True)
    shown_on.print(_table(rungs, states))
    print(f"next: trireme scaling fit {out / 'points.csv'}")


def _submit(
    rungs: "Sequence[Rung]", states: "Sequence[Progress]", out: Path, profiles: "Sequence[str]"
) -> None:
    from train.cli.submit import tell
    from train.config_file import load_config
    from train.submission import at_work, hand_in, prepare_runs

    undone = [rung for rung, state in zip(rungs, states, strict=True) if not state.done]
    if not undone:
        print(f"next: trireme scaling fit {out / 'points.csv'}")
        return
    busy = at_work(rung.folder.path.absolute() for rung in undone)
    idle = [rung for rung in undone if rung.folder.path.absolute() not in busy]
    if idle:
        loaded = [load_config(rung.config, rung.settings, profiles) for rung in idle]
        prepared = prepare_runs(loaded, array=out.name)
        tell(prepared, hand_in(prepared, 1, sys.argv))
    else:
        print(f"{len(busy)} run(s) have jobs: `trireme jobs {out}` shows how they do")


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
