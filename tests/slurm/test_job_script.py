"""What the job script decides, on a real cluster, with processes that only pretend to train."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slurm.commands import cancel, queue
from slurm.config import SlurmConfig
from slurm.errors import SlurmError
from slurm.submit import submissions
from tests.slurm.cluster import Cluster, wait_at_most
from tests.slurm.fake import HEALTHY, SAVES_WHEN_ASKED, FakeRun

pytestmark = pytest.mark.slow

TASKS = SlurmConfig(nodes=2, procs_per_node=2, launcher="srun", max_restarts=0, bind_cpus=False)


def make(**settings: object) -> SlurmConfig:
    """`TASKS` with other settings."""
    return SlurmConfig.model_validate(TASKS.model_dump() | settings)


def wait_until_over(run: FakeRun, job: str) -> None:
    """Until Slurm has nothing more to do for a job."""
    with wait_at_most(60) as waits:
        for _ in waits:
            if not any(each.job == job and each.active for each in queue()):
                return


def test_each_process_knows_its_place(cluster: Cluster, tmp_path: Path) -> None:
    place = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $OMP_NUM_THREADS" >"$run/rank.$RANK"'
    run = FakeRun(tmp_path / "places", place)
    run.submit(cluster, make(cpus_per_process=2))
    run.wait_for("done")
    assert [(tmp_path / "places" / f"rank.{rank}").read_text().split() for rank in range(4)] == [
        [str(rank), str(rank % 2), "4", "2", "2"] for rank in range(4)
    ]


HOSTILE = [
    "; touch hit #",
    "$(touch hit)",
    "`touch hit`",
    "a'b\"c",
    "--wrap=touch hit",
    "${IFS}touch${IFS}hit",
    "% %j %a",
    "|| touch hit",
    "é船 &",
]


def test_hostile_values_are_no_commands(cluster: Cluster, tmp_path: Path) -> None:
    """Folder and name of the run, comment, environment, paths: all at once."""
    shows = 'printf %s "$EVIL" >"$run/evil"; scontrol show job $SLURM_JOB_ID >"$run/shown"'
    runs = []
    for value in HOSTILE:
        run = FakeRun(tmp_path / value.replace("/", "_"), shows)
        (number,) = run.submit(
            cluster, make(nodes=1, procs_per_node=1, comment=value, environment={"EVIL": value})
        )
        runs.append((value, number, run))
    for value, _, run in runs:
        run.wait_for("done")
        assert (run.folder / "evil").read_text() == value
        shown = (run.folder / "shown").read_text()
        assert f"JobName={value}\n" in shown and f"Comment={value}" in shown
        wait_until_over(run, number)  # it says so after it has noted it
        assert "done" in run.log
    assert not list(tmp_path.rglob("hit"))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=30))
def test_any_name_reaches_slurm_as_it_is(cluster: Cluster, name: str) -> None:
    """In a script's comments Slurm has its own rules of quoting."""
    from slurm.template import _quoted

    script = f"#!/bin/bash\n#SBATCH --job-name={_quoted(name)}\n#SBATCH --hold --output=/dev/null\ntrue\n"
    number = _sbatch(script)
    shown = cluster.command("scontrol", "show", "job", number)
    cancel([number])
    assert f"JobName={name}\n" in shown


def _sbatch(script: str) -> str:
    from slurm.commands import call

    return call("sbatch", "--parsable", given=script).strip()


def test_asked_to_stop_it_is_requeued_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """The signal that Slurm sends ahead of the time limit, and a second start that is done."""
    train = f'[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || exit 0\n{SAVES_WHEN_ASKED}'
    run = FakeRun(tmp_path / "stopped", train)
    (job,) = run.submit(cluster, TASKS)
    run.wait_for_file("trains.0")
    cluster.command("scancel", "--batch", "--signal=USR2", job)
    run.wait_for("done")
    assert run.events == ["start 0", "requeue stopped by a signal after a step", "start 1", "done done"]


def test_a_signal_before_the_processes_are_ready_is_sent_again(cluster: Cluster, tmp_path: Path) -> None:
    train = f'[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || exit 0\n{SAVES_WHEN_ASKED}'
    run = FakeRun(tmp_path / "early", train, start='touch "$run/early"; sleep 2')
    (job,) = run.submit(cluster, TASKS)
    run.wait_for_file("early")
    cluster.command("scancel", "--batch", "--signal=USR2", job)
    run.wait_for("done")
    assert run.events[1] == "requeue stopped by a signal after a step"


def test_without_requeue_it_ends_and_the_next_of_the_chain_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    train = f'[ ! -e "$run/trains.0" ] || exit 0\n{SAVES_WHEN_ASKED}'
    run = FakeRun(tmp_path / "ends", train)
    first, second = run.submit(cluster, make(nodes=1, procs_per_node=1, requeue=False), chain=2)
    run.wait_for_file("trains.0")
    cluster.command("scancel", "--batch", "--signal=USR2", first)
    run.wait_for("done")
    assert [event.split()[0] for event in run.events] == ["start", "stopped", "start", "done"]
    shown = cluster.command("scontrol", "show", "job", first)
    assert "Restarts=0" in shown and "ExitCode=75:0" in shown
    assert "Restarts=0" in cluster.command("scontrol", "show", "job", second)


def test_a_cancelled_job_saves_and_stays_away(cluster: Cluster, tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "cancelled", SAVES_WHEN_ASKED)
    (job,) = run.submit(cluster, TASKS)
    run.wait_for_file("trains.0")
    cancel([job])
    run.wait_for("cancelled")
    wait_until_over(run, job)
    assert (run.folder / "stopped").exists()
    assert [event.split()[0] for event in run.events] == ["start", "cancelled"]


def test_preempted_it_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    train = f'[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || exit 0\n{SAVES_WHEN_ASKED}'
    run = FakeRun(tmp_path / "preempted", train)
    run.submit(cluster, make(partition="low", exclude="n[1-6]"))
    run.wait_for_file("trains.0")
    cluster.command("srun", "-p", "high", "-w", "n[7-8]", "-N2", "--exclusive", "sleep", "1")
    run.wait_for("done")
    assert [event.split()[0] for event in run.events] == ["start", "requeue", "start", "done"]


def test_a_crash_loop_ends_with_a_report(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "crashes").mkdir()
    run = FakeRun(tmp_path / "crashes" / "run", 'echo "the reason" >&2; exit 3')
    run.submit(cluster, make(restarts_without_progress=1))
    run.wait_for("gave_up")
    assert [event.split()[0] for event in run.events] == [
        "start",
        "requeue",
        "start",
        "requeue",
        "start",
        "gave_up",
    ]
    report = (run.folder / "gave_up.txt").read_text()
    assert "Started 3 times from step 0" in report and "failed with code 3" in report


def test_progress_forgives_crashes(cluster: Cluster, tmp_path: Path) -> None:
    train = """
[ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] || exit 0
if [ "$RANK" = 0 ]; then
  mkdir -p "$run/checkpoints/step-0000000${SLURM_RESTART_COUNT:-0}"
  touch "$run/checkpoints/step-0000000${SLURM_RESTART_COUNT:-0}/manifest.json"
fi
sleep 0.5
exit 3
"""
    run = FakeRun(tmp_path / "progress", train)
    run.submit(cluster, make(restarts_without_progress=1))
    run.wait_for("done")
    assert len([event for event in run.events if event.startswith("start")]) == 4


def test_tasks_that_fail_start_again_within_the_job(cluster: Cluster, tmp_path: Path) -> None:
    train = (
        '[ -e "$run/failed" ] && exit 0\n[ "$RANK" != 1 ] || { touch "$run/failed"; kill -9 $$; }\nsleep 30'
    )
    run = FakeRun(tmp_path / "again", train)
    run.submit(cluster, make(max_restarts=2))
    run.wait_for("done")
    assert [event.split()[0] for event in run.events] == ["start", "restart", "done"]


def test_a_users_mistake_is_not_made_again(cluster: Cluster, tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "mistake", "exit 2")
    run.submit(cluster, make(max_restarts=2))
    run.wait_for("failed")
    assert [event.split()[0] for event in run.events] == ["start", "failed"]


def test_a_sick_node_is_named_and_left_out(cluster: Cluster, tmp_path: Path) -> None:
    """The first two nodes that are free would be n1 and n2."""
    check = f'if [ "$SLURMD_NODENAME" = n2 ]; then echo "GPU 3 is gone" >"$2/n2"; else {HEALTHY}; fi'
    run = FakeRun(tmp_path / "sick", 'echo "$SLURM_JOB_NODELIST" >"$run/nodes"', check)
    cluster.wait_until_idle()
    (job,) = run.submit(cluster, make(exclude="n[4-8]"))
    run.wait_for("done", 90)
    assert run.events[1] == "requeue left out n2"
    assert (run.folder / "nodes").read_text().strip() == "n[1,3]"
    assert "n2: GPU 3 is gone" in run.log
    left_out = re.search(r"ExcNodeList=(\S+)", cluster.command("scontrol", "show", "job", job))
    assert left_out is not None
    names = cluster.command("scontrol", "show", "hostnames", left_out[1]).split()
    assert sorted(names) == ["n2", "n4", "n5", "n6", "n7", "n8"]


def test_a_node_that_does_not_answer_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    check = f'[ "$SLURMD_NODENAME" != n5 ] || sleep 60\n{HEALTHY}'
    run = FakeRun(tmp_path / "mute", "true", check)
    cluster.wait_until_idle()
    run.submit(cluster, make(exclude="n[1-4,8]", health={"timeout_seconds": 10}))
    run.wait_for("done", 90)
    assert run.events[1] == "requeue left out n5" and "n5: did not answer" in run.log


def test_nodes_that_answered_in_time_are_healthy_however_late_the_check_ends(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = FakeRun(tmp_path / "late", "true", f'{HEALTHY}; [ "$1" = together ] || sleep 60')
    run.submit(cluster, make(health={"timeout_seconds": 6}))
    run.wait_for("done", 90)
    assert [event.split()[0] for event in run.events] == ["start", "done"]


def test_no_healthy_node_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "sick", "true", 'echo bad >"$2/$SLURMD_NODENAME"')
    run.submit(cluster, TASKS)
    run.wait_for("failed no node is healthy")


def test_a_chain_runs_in_turn(cluster: Cluster, tmp_path: Path) -> None:
    train = 'mkdir "$run/lock" || exit 9; sleep 0.5; rmdir "$run/lock"'
    run = FakeRun(tmp_path / "chain", train)
    jobs = run.submit(cluster, make(nodes=1, procs_per_node=1), chain=3)
    run.wait_for("done", times=3)
    assert len(jobs) == 3 and submissions(run.folder)[0].jobs == jobs
    assert [event.split()[0] for event in run.events] == ["start", "done"] * 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"partition": "nowhere"}, "invalid partition"),
        ({"nodes": 100}, "node"),
        ({"exclude": "n[1-8]"}, "node"),
    ],
)
def test_what_the_cluster_can_not_take_is_refused_and_leaves_nothing(
    cluster: Cluster, tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    run = FakeRun(tmp_path / "refused", "true")
    with pytest.raises(SlurmError, match=says):
        run.submit(cluster, make(**settings))
    assert not (run.folder / "submissions").exists()
