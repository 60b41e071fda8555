"""`trireme jobs`, `logs`, `cancel` and `tensorboard`"""

import os
import sys
from typing import Annotated

import typer

_Run = Annotated[str, typer.Argument(help="The folder of a run, such as runs/demo.")]


def jobs(
    folder: Annotated[str, typer.Argument(help="A folder of runs, or of one run.")] = "runs",
) -> None:
    """Show the runs that were submitted to the cluster: their jobs, how far they are, and how well they use their time.

    Efficiency is the time of the steps that count, by the time that the jobs have run for.

    Example: `trireme jobs`
    """
    from rich.table import Table

    from train.cli.console import console
    from train.jobs import rows

    table = Table()
    for name in ("run", "job", "state", "step", "loss", "tokens/s", "ETA", "restarts", "efficiency"):
        table.add_column(name, no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows(folder):
        table.add_row(*row.cells())
    console().print(table)


def logs(
    run: _Run,
    rank: Annotated[int | None, typer.Option(min=0, help="A rank's own log instead of the job's.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows, until Ctrl-C.")] = False,
) -> None:
    """Show the log of a run's newest job.

    Example: `trireme logs -f runs/demo --rank 3`
    """
    from train.jobs import log_of

    path = log_of(run, rank)
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", "+1", *(["-F"] if follow else []), "--", str(path)])


def cancel(run: _Run) -> None:
    """End all jobs of a run, waiting and running. What trains saves first; submitted again, it goes on from there.

    Example: `trireme cancel runs/demo`
    """
    from slurm.commands import cancel as cancel_jobs
    from train.jobs import jobs_of

    ended = jobs_of(run)
    cancel_jobs(ended)
    print(f"cancelled: {', '.join(ended)}")


def tensorboard(
    folder: Annotated[str, typer.Argument(help="A folder of runs, or of one run.")] = "runs",
) -> None:
    """Serve TensorBoard of all runs below a folder, on this machine alone, and say how to reach it from another.

    Example: `trireme tensorboard runs`
    """
    import getpass
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(f"here: http://localhost:{port}")
    print(
        f"from elsewhere: ssh -N -L {port}:localhost:{port} {getpass.getuser()}@{socket.gethostname()}",
        flush=True,
    )
    module = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        folder,
        "--host",
        "localhost",
        "--port",
        str(port),
    ]
    os.execv(sys.executable, module)
