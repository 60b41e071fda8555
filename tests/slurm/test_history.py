"""What became of a run's jobs, from the script's notes and Slurm's queue."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from slurm.commands import Queued
from slurm.history import History, read_history
from slurm.submit import Submission, next_submission


def history(folder: Path, events: str, queued: list[Queued], now: float = 1000.0) -> History:
    """Of a run that was submitted as the jobs 7 and 8. Events: `time job start name more`, by lines."""
    record = folder / next_submission([folder]) / "submission.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps(asdict(Submission(["7", "8"], 0.0, 2, 2, ["trireme"], None))))
    rows = [line.strip().split(" ", 4) for line in events.strip().splitlines()]
    (folder / "jobs.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    found = read_history(folder, {each.job: each for each in queued}, now)
    assert found is not None
    return found


WAITS = Queued("8", "PENDING", "0:00", "", "Dependency")


def test_a_job_that_waits_says_why(tmp_path: Path) -> None:
    found = history(tmp_path, "", [Queued("7", "PENDING", "0:00", "", "Resources"), WAITS])
    assert (found.job, found.state, found.why, found.seconds) == ("7", "PENDING", "Resources", 0)


def test_what_runs_comes_before_what_waits(tmp_path: Path) -> None:
    events = "100 7 0 start 0\n200 7 0 requeue asked to stop\n300 7 1 start 5"
    found = history(tmp_path, events, [WAITS, Queued("7", "RUNNING", "10:00", "n[1-2]", "None")])
    assert (found.job, found.state, found.nodes, found.restarts) == ("7", "RUNNING", "n[1-2]", 1)
    assert found.seconds == 100 + 700


def test_a_start_that_a_dead_node_ended_counts_for_nothing(tmp_path: Path) -> None:
    found = history(tmp_path, "100 7 0 start 0\n500 7 1 start 5\n600 7 1 done done", [])
    assert (found.state, found.seconds, found.active) == ("DONE", 100, False)


@pytest.mark.parametrize(
    ("end", "state"),
    [("gave_up", "GAVE UP"), ("cancelled", "CANCELLED"), ("failed", "FAILED"), ("stopped", "STOPPED")],
)
def test_each_end_has_its_name_and_reason(tmp_path: Path, end: str, state: str) -> None:
    found = history(tmp_path, f"100 7 0 start 0\n200 7 0 {end} the reason", [])
    assert (found.state, found.why) == (state, "the reason")


def test_a_job_that_never_began_has_ended(tmp_path: Path) -> None:
    assert history(tmp_path, "", []).state == "ENDED"


def test_a_run_without_jobs_has_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path, {}) is None
