"""Handing a script to Slurm, and keeping what was handed in with the run."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from slurm.commands import call
from slurm.config import SlurmConfig
from slurm.template import Job, render

SUBMISSIONS = "submissions"
_SCRIPT, _RECORD, _DIFF = "job.sh", "submission.json", "uncommitted.diff"


@dataclass(frozen=True)
class Submission:
    """What was submitted, as in submission.json."""

    jobs: list[str]
    """Numbers; more than one in a chain."""
    time: float
    """Seconds since 1970."""
    nodes: int
    processes_per_node: int
    command: list[str]
    """What the user gave."""
    revision: str | None
    """Of the project, in git; beside it, uncommitted.diff."""


def next_submission(runs: Sequence[Path]) -> str:
    """The folder, within each of the runs', of what is submitted next."""
    taken = [int(path.name) for run in runs for path in (run / SUBMISSIONS).glob("[0-9]*")]
    return f"{SUBMISSIONS}/{max(taken, default=0) + 1:04d}"


def submissions(run: Path) -> list[Submission]:
    """All that was submitted of a run, oldest first."""
    records = sorted((run / SUBMISSIONS).glob(f"*/{_RECORD}"))
    return [Submission(**json.loads(path.read_text())) for path in records]


def check(script: str) -> None:
    """Have the cluster check a script without running it.

    Raises:
        SlurmError: it can't run there, and why.
    """
    call("sbatch", "--test-only", given=script)


def submit(
    job: Job, config: SlurmConfig, configs: dict[Path, str], chain: int, command: Sequence[str], project: Path
) -> list[str]:
    """Write each run's configuration, submit the script `chain` times, and keep it all in the runs' folders.

    configs: by the run's folder, the text of its `job.config`. Jobs of a chain wait for each other by their name.
    Returns the jobs' numbers.

    Raises:
        SlurmError: the cluster refuses it. Nothing was written then.
    """
    if chain > 1:
        singleton = ",".join(filter(None, [config.dependency, "singleton"]))
        config = config.model_copy(update={"dependency": singleton})
    script = render(job, config)
    check(script)
    for run, text in configs.items():
        (run / job.config).parent.mkdir(parents=True)
        (run / "logs").mkdir(exist_ok=True)
        (run / job.config).write_text(text)
    if job.array:
        job.logs.mkdir()
        for number, run in enumerate(job.folders):
            (job.logs / str(number)).symlink_to(run / "logs")
    jobs = [call("sbatch", "--parsable", given=script).strip().partition(";")[0] for _ in range(chain)]
    revision, diff = _revision(project)
    for number, run in enumerate(configs):
        own = [f"{name}_{number}" for name in jobs] if job.array else jobs
        record = Submission(own, time.time(), config.nodes, config.processes_per_node, [*command], revision)
        folder = (run / job.config).parent
        (folder / _SCRIPT).write_text(script)
        (folder / _DIFF).write_text(diff)
        (folder / _RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")
    return jobs


def _revision(project: Path) -> tuple[str | None, str]:
    """The commit that a folder is at, None where it is no checkout, and what differs from it."""
    git = ["git", "-C", str(project)]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        shown = subprocess.run([*git, "rev-parse", "HEAD"], env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        return None, ""
    if shown.returncode:
        return None, ""
    diff = subprocess.run([*git, "diff", "HEAD"], env=environment, capture_output=True, text=True, check=True)
    return shown.stdout.strip(), diff.stdout
