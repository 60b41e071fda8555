"""Slurm's own commands, asked and answered."""

import getpass
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from slurm.errors import SlurmError

_FIELDS = "%F|%K|%T|%M|%N|%r"


def have_cluster() -> bool:
    """Whether this machine has Slurm's commands, and a cluster that answers them."""
    if shutil.which("scontrol") is None:
        return False
    return subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0


def call(*command: str, given: str | None = None) -> str:
    """The output of one of Slurm's commands.

    Raises:
        SlurmError: it isn't there, or it failed, with what it said.
    """
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SlurmError(
            f"there is no {command[0]} on this machine: give the command on a login node of the cluster"
        ) from None
    if done.returncode:
        said = [
            line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()
        ]
        raise SlurmError(f"{command[0]}: {'; '.join(said) or f'exit code {done.returncode}'}")
    return done.stdout


@dataclass(frozen=True)
class Queued:
    """A job that Slurm has in its queue, waiting, running, or ended a while ago."""

    job: str
    """Its number; of an array, `number_index`, or `number_[indices]` of those that wait together."""
    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    elapsed: str
    nodes: str
    reason: str
    """Why it waits; `None` where it doesn't."""

    @property
    def active(self) -> bool:
        """Waiting or running."""
        return self.state in {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}


def queue() -> list[Queued]:
    """This user's jobs, arrays task by task."""
    lines = call("squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", _FIELDS).splitlines()
    rows = [line.split("|") for line in lines]
    return [
        Queued(job if index == "N/A" else f"{job}_{index}", state, elapsed, nodes, reason)
        for job, index, state, elapsed, nodes, reason in rows
    ]


def cancel(jobs: Sequence[str]) -> None:
    """End jobs; those that train save first."""
    call("scancel", *jobs)
