"""Real training on a real cluster, disturbed in every way: it ends with the losses of a run that was left alone.

All of the runs are submitted and disturbed at once, each on nodes of its own where it disturbs others.
"""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from parallel.processes import WorkerPool
from slurm.history import read_events
from tests.slurm.cluster import Cluster, job_id, wait_at_most
from tests.train.running import losses, train_here
from train.checkpoint_folder import newest_step
from train.errors import ConfigError
from train.jobs import Row, log_of, rows
from train.submission import hand_in, prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parent.parent.parent
PATH = f"{ROOT / 'tests' / 'slurm' / 'slow'}:{ROOT}"
STEPS = 60
COMMON = [
    f"run.steps={STEPS}",
    "checkpoint.every_steps=5",
    "monitor.print_every_steps=1",
    "run.grace_time=60s",
    "slurm.health.free_disk_gb=0.01",
    "slurm.health.free_shared_memory_gb=0.01",
    "slurm.health.timeout_seconds=400",
    "slurm.health.collective=false",
    "slurm.bind_cpus=false",
    "slurm.restarts_without_progress=9",
    "slurm.nodes=2",
]
SCENARIOS = {
    # nodes n1 and n2 are shared, the others are a scenario's own
    "plain": ["slurm.procs_per_node=2", "slurm.health.collective=true", "slurm.exclude=n[3-8]"],
    # asked to stop in the first minute or so of three
    "time": ["slurm.time=3", "run.grace_time=100s", "slurm.exclude=n[3-8]"],
    "kills": ["slurm.exclude=n[3-8]"],
    "preempted": ["slurm.launcher=srun", "slurm.partition=low", "slurm.exclude=n[1-2,5-8]"],
    "node": ["slurm.launcher=srun", "slurm.exclude=n[1-4,8]"],
}
ASIDE = ["slurm.health.enabled=false", "slurm.bind_cpus=false", "slurm.launcher=srun", "slurm.exclude=n[3-8]"]
"""Of short runs beside these."""


class Scenarios:
    """The submitted runs by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[str, str] = {}
        self.shown: dict[str, str] = {}
        """What the commands printed that submit several runs."""
        self.disturbed: dict[str, Future[None]] = {}

    def aside(self, name: str) -> Path:
        """A folder beside that of the runs."""
        return self.folder.with_name(f"{self.folder.name}-{name}")

    def events(self, name: str) -> list[str]:
        """Names of what happened to a run's jobs, in order."""
        return [event.name for event in read_events(self.folder / name)]

    def wait_for_step(self, name: str, step: int) -> None:
        """Until a run has come that far."""
        with wait_at_most(900) as waits:
            for _ in waits:
                if (self.folder / name / "metrics.jsonl").exists() and len(
                    losses(self.folder / name)
                ) >= step:
                    return

    def let_go(self, name: str) -> None:
        """Let a run go on past the step that it waits with."""
        (self.folder / name / "go").touch()

    def wait_until_done(self, name: str) -> None:
        """Until a run has been disturbed, if it is to be, and has ended, and well."""
        if name in self.disturbed:
            self.disturbed[name].result()
        with wait_at_most(900) as waits:
            for _ in waits:
                ends = {"done", "failed", "cancelled", "gave_up", "stopped"} & set(self.events(name))
                if ends:
                    assert ends == {"done"}, self.log(name)
                    return

    def log(self, name: str) -> str:
        """All that a run's jobs printed."""
        return "".join(path.read_text() for path in sorted((self.folder / name / "logs").glob("slurm-*.log")))


def kill_processes(cluster: Cluster, scenarios: Scenarios) -> None:
    """A worker, and when it is replaced, an agent."""
    scenarios.wait_for_step("kills", 6)
    for process in _processes_of(cluster, scenarios, "kills", b"train"):
        if b"RANK=1" in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            os.kill(process, signal.SIGKILL)
    with wait_at_most(600) as waits:
        for _ in waits:
            if "from step 6 to" in scenarios.log("kills"):
                break
    assert scenarios.events("kills") == ["start"]
    os.kill(_processes_of(cluster, scenarios, "kills", b"torch.distributed.run")[-1], signal.SIGKILL)
    scenarios.let_go("kills")


def preempt(cluster: Cluster, scenarios: Scenarios) -> None:
    """A job of a higher partition wants the nodes."""
    scenarios.wait_for_step("preempted", 6)
    cluster.command(
        "sbatch", "-p", "high", "-w", "n[3-4]", "-N2", "--exclusive", "-o/dev/null", "--wrap=sleep 3"
    )
    with wait_at_most(60) as waits:
        for _ in waits:
            if "PreemptTime=2" in cluster.command("scontrol", "show", "job", scenarios.jobs["preempted"]):
                break
    scenarios.let_go("preempted")


def lose_a_node(cluster: Cluster, scenarios: Scenarios) -> None:
    """One of two."""
    scenarios.wait_for_step("node", 6)
    cluster.kill_node("n6")
    scenarios.let_go("node")


def pass_time_limits(cluster: Cluster, scenarios: Scenarios) -> None:
    """Two: only then are the run's steps quick enough for it to be done within a third."""
    with wait_at_most(900) as waits:
        for _ in waits:
            if scenarios.events("time").count("requeue") >= 2:
                break
    scenarios.let_go("time")


def _processes_of(cluster: Cluster, scenarios: Scenarios, name: str, module: bytes) -> list[int]:
    """Python running a module for a run's job."""
    found = []
    for process in cluster.processes():
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        started = b"-m" in command and command[command.index(b"-m") + 1] == module
        if started and str(scenarios.folder / name).encode() in b" ".join(command):
            found.append(process)
    return found


DISTURBANCES = {
    "kills": kill_processes,
    "preempted": preempt,
    "node": lose_a_node,
    "time": pass_time_limits,
}
"""Of runs that wait with step 8, when step 6 has been told of, until they have happened; but `time` is slow instead."""


@pytest.fixture(scope="module")
def undisturbed(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[tuple[int, float, float]]]:
    """The losses of such a run that was left alone, by its number of processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for world in (2, 4):
        overrides = [f"run.steps={STEPS}", f"run.dir={folder}", f"run.name=of-{world}"]
        pools[world].run(train_here, tiny_config, overrides)
    return {world: losses(folder / f"of-{world}") for world in (2, 4)}


@pytest.fixture(scope="module")
def scenarios(
    cluster: Cluster, undisturbed: object, tiny_config: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scenarios]:
    """Submitted when the undisturbed runs, which need no cluster, have left the cores to them."""
    started = Scenarios(tmp_path_factory.mktemp("scenarios"))
    started.shown["sweep"] = trireme(*sweep_command(tiny_config, started.aside("sweep")))
    for shown in ("ladder", "ladder again"):
        started.shown[shown] = trireme(*ladder_command(tiny_config, started.aside("ladder")))
    for name, settings in SCENARIOS.items():
        path = [f"slurm.environment.PYTHONPATH={PATH}"]
        go = started.folder / name / "go"
        if name == "time":
            path += [f"slurm.environment.SLOW_UNTIL={go}", "slurm.environment.STEP_SECONDS='3'"]
        elif name in DISTURBANCES:
            path.append(f"slurm.environment.HOLD_UNTIL={go}")
        if name == "kills":  # the other waits for it in a collective
            path.append("slurm.environment.HOLD_RANK='1'")
        own = [f"run.dir={started.folder}", f"run.name={name}"]
        prepared = prepare(tiny_config, [*COMMON, *own, *path, *settings])
        (started.jobs[name],) = hand_in(prepared, 1, ["trireme", "submit", name])
    with ThreadPoolExecutor() as threads:
        for name, disturb in DISTURBANCES.items():
            started.disturbed[name] = threads.submit(disturb, cluster, started)
        yield started


def sweep_command(config: str, folder: Path) -> list[str]:
    """Submits a run for each of two learning rates."""
    settings = [f"run.dir={folder}", "run.name=sweep", "run.steps=3"]
    return ["submit", config, *settings, *ASIDE, "--array", "optimizer.lr=1e-2,1e-3"]


def ladder_command(config: str, folder: Path) -> list[str]:
    """Submits a ladder of two runs, or gathers it."""
    sizes = ["--sizes", "3e4,8e4", "--budgets", "1e9", "--out", str(folder), "--submit"]
    return ["ladder", config, "model.vocab_size=304", *ASIDE, *sizes]


def trireme(*arguments: str) -> str:
    """The command's output."""
    command = [sys.executable, "-c", "from train.cli import main; main()", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def wait_until_all_done(folder: Path, runs: int) -> list[Row]:
    """The rows of so many runs."""
    with wait_at_most(900) as waits:
        for _ in waits:
            found = rows(str(folder))
            if [row.history.state for row in found] == ["DONE"] * runs:
                break
    return found


def test_the_table_shows_all_runs(scenarios: Scenarios) -> None:
    shown = trireme("jobs", str(scenarios.folder))
    for name, job in scenarios.jobs.items():
        (line,) = [line for line in shown.splitlines() if f" {name} " in line]
        assert job in line and ("RUNNING" in line or "PENDING" in line or "DONE" in line)


def test_killed_processes_are_replaced(
    scenarios: Scenarios, undisturbed: dict[int, list[tuple[int, float, float]]]
) -> None:
    """A worker, which torchrun starts again; and an agent, which only the next start of the job replaces."""
    scenarios.wait_until_done("kills")
    assert scenarios.events("kills") == ["start", "requeue", "start", "done"]
    assert losses(scenarios.folder / "kills") == undisturbed[2]


def test_a_preempted_run_gives_way_and_goes_on(
    scenarios: Scenarios, undisturbed: dict[int, list[tuple[int, float, float]]]
) -> None:
    scenarios.wait_until_done("preempted")
    assert scenarios.events("preempted") == ["start", "requeue", "start", "done"]
    assert "stopped by a signal after step 8" in scenarios.log("preempted")
    assert losses(scenarios.folder / "preempted") == undisturbed[2]


def test_a_spare_takes_over_from_a_node_that_died(
    scenarios: Scenarios, undisturbed: dict[int, list[tuple[int, float, float]]]
) -> None:
    scenarios.wait_until_done("node")
    assert scenarios.events("node") == ["start", "requeue", "start", "done"]
    log = scenarios.log("node")
    assert "on n[5-6], from step 0" in log and "on n[5,7], from step" in log
    assert losses(scenarios.folder / "node") == undisturbed[2]


def test_submitted_and_done(
    scenarios: Scenarios, undisturbed: dict[int, list[tuple[int, float, float]]]
) -> None:
    scenarios.wait_until_done("plain")
    assert losses(scenarios.folder / "plain") == undisturbed[4]
    assert "n2: ok" in scenarios.log("plain") and "GB/s among all nodes" in scenarios.log("plain")
    submission = scenarios.folder / "plain" / "submissions" / "0001"
    assert {path.name for path in submission.iterdir()} == {
        "config.yaml",
        "job.sh",
        "submission.json",
        "uncommitted.diff",
    }
    assert f"step {STEPS}/{STEPS}" in trireme("logs", str(scenarios.folder / "plain"))
    (row,) = rows(str(scenarios.folder / "plain"))
    assert row.cells()[:4] == ["plain", scenarios.jobs["plain"], "DONE", f"{STEPS}/{STEPS}"]


def test_time_limits_pass_twice(
    scenarios: Scenarios, undisturbed: dict[int, list[tuple[int, float, float]]]
) -> None:
    scenarios.wait_until_done("time")
    assert scenarios.events("time").count("requeue") >= 2
    assert losses(scenarios.folder / "time") == undisturbed[2]


def test_an_array_is_a_run_for_each_value(scenarios: Scenarios) -> None:
    assert job_id(scenarios.shown["sweep"])
    found = wait_until_all_done(scenarios.aside("sweep"), 2)
    assert [row.run.name for row in found] == ["sweep-0", "sweep-1"]
    assert [row.steps[-1]["lr"] for row in found] == [1e-2, 1e-3]


def test_a_ladder_is_climbed_by_an_array_and_gathered(scenarios: Scenarios, tiny_config: str) -> None:
    folder, shown = scenarios.aside("ladder"), scenarios.shown["ladder"]
    assert f"_0: {folder / '30K-1e+09'}" in shown and f"_1: {folder / '80K-1e+09'}" in shown
    assert "have jobs" in scenarios.shown["ladder again"], "they are not submitted twice"
    found = wait_until_all_done(folder, 2)
    assert all("done" in log_of(str(row.run), None).read_text() for row in found), "each in its own folder"
    assert "next: trireme scaling fit" in trireme(*ladder_command(tiny_config, folder))
    assert len((folder / "points.csv").read_text().splitlines()) == 3


def test_a_cancelled_run_is_saved_and_goes_on_when_submitted_again(
    cluster: Cluster, tiny_config: str, tmp_path: Path
) -> None:
    settings = [f"run.dir={tmp_path}", "run.steps=6", *ASIDE, f"slurm.environment.PYTHONPATH={PATH}"]
    slow = [*settings, "slurm.environment.STEP_SECONDS='3'"]
    hand_in(prepare(tiny_config, slow), 1, ["trireme"])
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="has a job already"):
        hand_in(prepare(tiny_config, slow), 1, ["trireme"])
    with wait_at_most(900) as waits:
        for _ in waits:
            if (run / "metrics.jsonl").exists() and losses(run):
                break
    assert rows(str(tmp_path))[0].cells()[2] == "RUNNING"
    assert "cancelled" in trireme("cancel", str(run))
    with wait_at_most(300) as waits:
        for _ in waits:
            (row,) = rows(str(tmp_path))
            if row.history.state == "CANCELLED":
                break
    assert newest_step(run / "checkpoints") == len(losses(run)) > 0
    hand_in(prepare(tiny_config, settings), 1, ["trireme"])
    with wait_at_most(900) as waits:
        for _ in waits:
            if rows(str(tmp_path))[0].history.state == "DONE":
                break
    assert [step for step, _, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_is_served_here_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from train.cli import main; main()", "tensorboard", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as served:
        assert served.stdout is not None
        address = served.stdout.readline().split()[-1]
        assert f"-L {address.rpartition(':')[2]}:localhost:" in served.stdout.readline()
        try:
            with wait_at_most(120) as waits:
                for _ in waits:
                    with suppress(OSError), urllib.request.urlopen(address) as page:
                        assert page.status == 200
                        break
        finally:
            served.kill()
