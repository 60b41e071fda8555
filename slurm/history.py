"""What became of a run's jobs: the script's own notes, and what Slurm has in its queue."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.commands import Queued
from slurm.submit import submissions

EVENTS = "jobs.tsv"
_ENDS = {
    "done": "DONE",
    "failed": "FAILED",
    "cancelled": "CANCELLED",
    "gave_up": "GAVE UP",
    "stopped": "STOPPED",
}


@dataclass(frozen=True)
class Event:
    """A line of jobs.tsv."""

    time: float
    """Seconds since 1970."""
    job: str
    start: int
    """How often the job was requeued before."""
    name: str
    """start, restart, requeue, or one of the ends."""
    more: str
    """Why, or of a start the step of the checkpoint."""


@dataclass(frozen=True)
class History:
    """A run's jobs."""

    jobs: Sequence[str]
    """Numbers, oldest first."""
    job: str
    """The one that runs, waits next, or came last."""
    state: str
    """As Slurm calls it while the job is in its queue, then how it ended."""
    why: str
    nodes: str
    restarts: int
    """Of all its jobs, and within them."""
    seconds: float
    """That its jobs have run for."""

    @property
    def active(self) -> bool:
        """Whether a job runs or waits."""
        return self.state not in {*_ENDS.values(), "ENDED"}


def read_history(run: Path, queued: Mapping[str, Queued], now: float | None = None) -> History | None:
    """What became of a run's jobs; None where none was submitted. `queued`: Slurm's queue by the jobs' numbers."""
    jobs = [job for submission in submissions(run) for job in submission.jobs]
    if not jobs:
        return None
    events = read_events(run)
    waiting = [queued[job] for job in jobs if job in queued and queued[job].active]
    running = [each for each in waiting if each.state != "PENDING"]
    last = events[-1] if events else None
    if waiting:
        current = (running or waiting)[0]
        job, state, nodes = current.job, current.state, current.nodes
        why = current.reason if current.state == "PENDING" else ""
    else:
        job, nodes = (last.job if last else jobs[-1]), ""
        state = _ENDS.get(last.name, "ENDED") if last else "ENDED"
        why = last.more if last and last.name != "done" else ""
    restarts = sum(event.name in {"requeue", "restart"} for event in events)
    seconds = _seconds(events, (now or time.time()) if running else None)
    return History(jobs, job, state, why, nodes, restarts, seconds)


def read_events(run: Path) -> list[Event]:
    """All events of a run's jobs, in order."""
    file = run / EVENTS
    if not file.is_file():
        return []
    rows = [line.split("\t", 4) for line in file.read_text().splitlines()]
    return [Event(float(at), job, int(start), name, more) for at, job, start, name, more in rows]


def _seconds(events: Sequence[Event], now: float | None) -> float:
    """From each start to what ended it. A start that nothing ended, as when a node failed, counts for nothing."""
    total, began = 0.0, None
    for event in events:
        if event.name == "start":
            began = event.time
        elif event.name != "restart" and began is not None:
            total += event.time - began
            began = None
    return total + (now - began if now is not None and began is not None else 0.0)
