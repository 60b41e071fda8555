"""Runs and their jobs, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.commands import Queued, have_cluster, queue
from slurm.errors import SlurmError
from slurm.history import History, read_history
from slurm.submit import SUBMISSIONS
from train.duration import format_seconds
from train.errors import RunError
from train.run_folder import RunFolder, read_metrics


@dataclass(frozen=True)
class Row:
    """A run with jobs, as a line of the table."""

    run: Path
    history: History
    steps: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    total: int | None
    """The run's last step, as far as it is known."""

    def cells(self) -> list[str]:
        """run, job, state, step, loss, tokens/s, ETA, restarts, efficiency, remark."""
        history, last = self.history, self.steps[-1] if self.steps else None
        of = f"/{self.total}" if self.total else ""
        shown = ["", "", ""]
        if last is not None:
            left = (
                (self.total - last["step"]) * last["step_seconds"] if self.total and history.active else None
            )
            shown = [
                f"{last['loss']:.4f}",
                f"{last['tokens_per_second']:,.0f}",
                "" if left is None else format_seconds(left),
            ]
        remark = history.why or history.nodes
        start = [self.run.name, history.job, history.state, f"{last['step'] if last else 0}{of}"]
        return [*start, *shown, str(history.restarts), self._efficiency(), remark]

    def _efficiency(self) -> str:
        """The part of the jobs' time in which steps were done that were kept."""
        if not self.history.seconds:
            return ""
        return f"{sum(step['step_seconds'] for step in self.steps) / self.history.seconds:.0%}"


def rows(folder: str) -> list[Row]:
    """The runs with jobs below a folder, or the one that it is."""
    path = Path(folder)
    found = (
        [path]
        if (path / SUBMISSIONS).is_dir()
        else sorted(each.parent for each in path.glob(f"*/{SUBMISSIONS}"))
    )
    queued = _queue()
    histories = ((run, read_history(run, queued)) for run in found)
    return [_row(run, history) for run, history in histories if history is not None]


def jobs_of(run: str) -> list[str]:
    """The jobs of a run that wait or run.

    Raises:
        RunError: it has none, or never had.
    """
    history = read_history(Path(run), {})
    if history is None:
        raise RunError(
            f"{run} has no jobs: give the folder of a run that `trireme submit` was given, such as runs/demo"
        )
    active = {job for job, each in _queue().items() if each.active}
    jobs = [job for job in history.jobs if job in active]
    if not jobs:
        raise RunError(
            f"{run} has no job that waits or runs: `trireme jobs {run}` shows how the last one ended"
        )
    return jobs


def log_of(run: str, rank: int | None) -> Path:
    """The newest job's log, or a rank's.

    Raises:
        RunError: there is none yet.
    """
    logs = RunFolder(Path(run)).logs
    found = sorted(
        logs.glob("slurm-*.log" if rank is None else f"rank-{rank:05d}.log"),
        key=lambda path: path.stat().st_mtime,
    )
    if not found:
        what = "job" if rank is None else f"rank {rank}"
        raise RunError(f"{logs} has no log of a {what} yet: `trireme jobs {run}` shows what it waits for")
    return found[-1]


def _queue() -> dict[str, Queued]:
    if not have_cluster():
        raise SlurmError("no cluster answers here: give the command on a login node")
    return {each.job: each for each in queue()}


def _row(run: Path, history: History) -> Row:
    from train.config_file import load_config

    folder = RunFolder(run)
    steps = read_metrics(folder) if folder.metrics.is_file() else []
    newest = sorted((run / SUBMISSIONS).glob("*/config.yaml"))[-1]
    settings = load_config(str(newest)).config.run
    total = settings.steps
    if settings.tokens is not None and steps:
        total = -(-settings.tokens * steps[-1]["step"] // steps[-1]["tokens"])
    return Row(run, history, steps, total)
