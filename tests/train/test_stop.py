"""Runs that signals stop, each in processes of its own: saved, told by the exit code, and gone on with."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.train.running import environment, losses
from train.checkpoint_folder import newest_step

STEPS = 100_000  # as many as take for ever


@contextmanager
def training(config: str, folder: Path, *overrides: str, code: str = "") -> Iterator[subprocess.Popen[str]]:
    """`trireme train` of a run in `folder`/run after the statements `code`, killed at the end if need be."""
    script = f"{code}\nfrom train.cli import main\nmain()"
    settings = [f"run.dir={folder}", "schedule.total_steps=10", f"run.steps={STEPS}", *overrides]
    process = subprocess.Popen(
        [sys.executable, "-c", script, "train", config, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment() | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_step(folder: Path, step: int) -> None:
    """Until the run in `folder`/run has done that step."""
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < step:
        assert time.monotonic() < deadline, "no steps"
        time.sleep(0.05)


def workers(folder: Path) -> list[int]:
    """The processes of a run's ranks, from the place that they log to, without those that these forked to load data."""
    parents = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        command = process.info["cmdline"] or []
        if command[1:3] == ["-u", "-m"] and f"run.dir={folder}" in command:
            parents[process.pid] = process.info["ppid"]
    return [worker for worker, parent in parents.items() if parent not in parents]


def assert_goes_on(config: str, folder: Path, *overrides: str) -> None:
    """A run that was stopped, started again for two more steps, is to the last bit an undisturbed one."""
    stopped = newest_step(folder / "run" / "checkpoints")
    assert [step for step, _, _ in losses(folder / "run")] == list(range(1, stopped + 1))
    end = [f"run.steps={stopped + 2}", *overrides]
    with training(config, folder, *end) as process:
        assert process.wait(600) == 0, process.communicate()[0]
    assert not (folder / "run" / "stopped").exists()
    with training(config, folder / "whole", *end) as process:
        assert process.wait(600) == 0, process.communicate()[0]
    assert losses(folder / "run") == losses(folder / "whole" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_one_process_saves_and_says_so(tiny_config: str, tmp_path: Path, number: signal.Signals) -> None:
    with training(tiny_config, tmp_path) as process:
        wait_for_step(tmp_path, 3)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "the same command goes on from there" in output and "Traceback" not in output
    assert newest_step(tmp_path / "run" / "checkpoints") >= 3
    assert (tmp_path / "run" / "stopped").exists()


@pytest.mark.slow
def test_the_launcher_passes_signals_on_and_the_code_back(tiny_config: str, tmp_path: Path) -> None:
    two = ["parallel.dp_shard=2", "data.num_workers=1"]
    with training(tiny_config, tmp_path, *two) as process:
        wait_for_step(tmp_path, 3)
        for _ in range(3):  # clusters send it more than once
            process.send_signal(signal.SIGUSR2)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert_goes_on(tiny_config, tmp_path, *two)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_alike(tiny_config: str, tmp_path: Path) -> None:
    with training(tiny_config, tmp_path, "parallel.dp_shard=2") as process:
        wait_for_step(tmp_path, 3)
        os.kill(workers(tmp_path)[-1], signal.SIGUSR1)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert newest_step(tmp_path / "run" / "checkpoints") == len(losses(tmp_path / "run"))


@pytest.mark.slow
def test_a_signal_during_the_start_is_not_lost(tiny_config: str, tmp_path: Path) -> None:
    with training(tiny_config, tmp_path, "parallel.dp_shard=2") as process:
        deadline = time.monotonic() + 600
        while len(workers(tmp_path)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    assert len(losses(tmp_path / "run")) <= 1


@pytest.mark.slow
def test_ctrl_c_twice_stops_now(tiny_config: str, tmp_path: Path) -> None:
    slow = "import time; from train import checkpoint; checkpoint.commit = lambda *_: time.sleep(1000)"
    with training(tiny_config, tmp_path, code=slow) as process:
        wait_for_step(tmp_path, 3)
        process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert process.poll() is None, "saving"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


@pytest.mark.slow
def test_ctrl_c_twice_stops_all_processes_now(tiny_config: str, tmp_path: Path) -> None:
    with training(tiny_config, tmp_path, "parallel.dp_shard=2") as process:
        wait_for_step(tmp_path, 1)
        ranks = workers(tmp_path)
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert_gone(ranks)


@pytest.mark.slow
def test_killing_the_launcher_leaves_no_workers(tiny_config: str, tmp_path: Path) -> None:
    with training(tiny_config, tmp_path, "parallel.dp_shard=2") as process:
        wait_for_step(tmp_path, 1)
        ranks = workers(tmp_path)
        assert len(ranks) == 2
        process.kill()
        assert_gone(ranks)


def assert_gone(processes: list[int]) -> None:
    """That processes end, or have ended and wait to be reaped, within seconds."""
    deadline = time.monotonic() + 20
    while any(_alive(process) for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(process: int) -> bool:
    try:
        state = re.search(r"State:\s+(\w)", Path(f"/proc/{process}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state is not None and state[1] not in "ZX"


@pytest.mark.slow
def test_a_stop_that_takes_too_long_shows_where_it_hangs(tiny_config: str, tmp_path: Path) -> None:
    slow = "import time; from train import checkpoint; checkpoint.commit = lambda *_: time.sleep(1000)"
    with training(tiny_config, tmp_path, "run.grace_time=2s", code=slow) as process:
        wait_for_step(tmp_path, 3)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Timeout" in output and "in _save" in output
