"""Jobs whose processes are scripts of a few lines, so that what the job script does is seen in seconds."""

from pathlib import Path

from slurm.config import SlurmConfig
from slurm.submit import submit
from slurm.template import Job
from tests.slurm.cluster import Cluster, wait_at_most

_STANDS_IN_FOR_PYTHON = """#!/bin/bash
run=$(dirname "$0")
# what check_nodes calls, with the stage and the folder for the reports
if [ "$2" = check ]; then
  . "$run/check.sh" "${@: -2}"
else
  . "$run/start.sh"
  # a shell, unlike Python, can't act on signals that were ignored when it started
  run=$run exec env --default-signal=TERM,USR2 bash "$run/train.sh"
fi
"""
HEALTHY = 'echo ok >"$2/$SLURMD_NODENAME"'
SAVES_WHEN_ASKED = """
save() {
  mkdir -p "$run/checkpoints/step-0000000$((SLURM_RESTART_COUNT + 1))"
  touch "$run/checkpoints/step-0000000$((SLURM_RESTART_COUNT + 1))/manifest.json"
  echo 'stopped by a signal after a step' >"$run/stopped"
  exit 75
}
trap save TERM USR2
touch "$run/trains.${SLURM_RESTART_COUNT:-0}"
for _ in $(seq 600); do sleep 0.1; done
"""


class FakeRun:
    """A run in `folder`, whose ranks run the lines `train` and whose nodes are checked by the lines `check`.

    While they run the lines `start`, ranks can't act on signals yet.
    """

    def __init__(self, folder: Path, train: str, check: str = HEALTHY, start: str = "") -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        stand_in = folder / "python"
        stand_in.write_text(_STANDS_IN_FOR_PYTHON)
        stand_in.chmod(0o755)
        (folder / "train.sh").write_text(train)
        (folder / "check.sh").write_text(check)
        (folder / "start.sh").write_text(start)
        self.job = Job(
            name=folder.name,
            folders=[folder],
            working_folder=folder.parent,
            config="submissions/0001/config.yaml",
            python=str(folder / "python"),
            train=("-m", "train"),
            check=("-m", "check"),
            grace_seconds=45,
        )

    def submit(self, cluster: Cluster, config: SlurmConfig, chain: int = 1) -> list[str]:
        """The numbers of the jobs."""
        return submit(self.job, config, {self.folder: "a: b\n"}, chain, ["trireme", "submit"], self.folder)

    @property
    def events(self) -> list[str]:
        """What happened, and more of it, in order."""
        file = self.folder / "jobs.tsv"
        lines = file.read_text().splitlines() if file.exists() else []
        return [" ".join(line.split("\t")[3:]) for line in lines]

    def wait_for(self, event: str, seconds: float = 60, times: int = 1) -> None:
        """Until an event that begins so has come."""
        with wait_at_most(seconds) as waits:
            for _ in waits:
                if sum(each.startswith(event) for each in self.events) >= times:
                    return

    def wait_for_file(self, name: str, seconds: float = 60) -> None:
        """Until the processes have written a file."""
        with wait_at_most(seconds) as waits:
            for _ in waits:
                if (self.folder / name).exists():
                    return

    @property
    def log(self) -> str:
        """All that its jobs printed."""
        return "".join(path.read_text() for path in sorted((self.folder / "logs").glob("slurm-*.log")))
