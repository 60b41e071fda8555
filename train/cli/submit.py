"""`trireme submit`"""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from train.submission import Prepared


def submit(
    config: Annotated[str, typer.Argument(help="A configuration file, or the name of one below configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value ...", metavar="OVERRIDES")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="slurm.nodes")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="slurm.gpus_per_node: and as many processes.")
    ] = None,
    procs_per_node: Annotated[int | None, typer.Option(help="slurm.procs_per_node, without GPUs.")] = None,
    time: Annotated[str | None, typer.Option(help="slurm.time: the limit, such as 24:00:00.")] = None,
    cluster: Annotated[
        list[str] | None, typer.Option(help="A profile: a file, or the name of one below configs/clusters/.")
    ] = None,
    chain: Annotated[int, typer.Option(min=1, help="So many jobs that go on with the run in turn.")] = 1,
    array: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE,VALUE,...: a run of each value; given again, of each combination."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job script and submit nothing.")
    ] = False,
) -> None:
    """Train on a Slurm cluster: the job saves ahead of its time limit, is requeued, and goes on until it is done.

    Example: `trireme submit tiny data.path=datasets/mine --nodes 4 --gpus-per-node 8 --time 24:00:00`

    Example: `trireme submit tiny data.path=datasets/mine --procs-per-node 2 --array optimizer.lr=1e-3,3e-4`
    """
    from train.submission import hand_in, prepare, show

    options = {"nodes": nodes, "gpus_per_node": gpus_per_node, "procs_per_node": procs_per_node, "time": time}
    given = [f"slurm.{name}={value}" for name, value in options.items() if value is not None]
    prepared = prepare(config, [*(overrides or []), *given], cluster or [], array or [])
    if dry_run:
        show(prepared)
        return
    tell(prepared, hand_in(prepared, chain, sys.argv))


def tell(prepared: "Prepared", jobs: "Sequence[str]") -> None:
    """Print which jobs train which runs."""
    for job in jobs:
        for number, run in enumerate(prepared.runs):
            print(f"job {job}{f'_{number}' if prepared.job.array else ''}: {run}")
    print("`trireme jobs` shows how they do")
