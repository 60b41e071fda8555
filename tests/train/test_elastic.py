"""Under a torchrun that allows it, a run goes on with the machines that there are."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from parallel.processes import WorkerPool
from tests.train.running import environment, losses, train_here
from train.run_folder import RunFolder, read_metrics


def machine(config: str, port: int, settings: list[str]) -> "subprocess.Popen[str]":
    """A torchrun of one process, beside which there may be another."""
    rendezvous = [f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=last_call_timeout=3,join_timeout=120"]
    elastic = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *elastic,
            *rendezvous,
            "-m",
            "train",
            config,
            *settings,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment() | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


def wait_until(there: Callable[[], bool]) -> None:
    """At most minutes."""
    deadline = time.monotonic() + 240
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listens(port: int) -> bool:
    """Whether someone does, on this machine."""
    with socket.socket() as other:
        return other.connect_ex(("localhost", port)) == 0


@pytest.mark.slow
def test_a_run_goes_on_with_the_machines_that_there_are(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Path(__file__).parent.parent / "slurm" / "slow"
    monkeypatch.setenv("PYTHONPATH", f"{slow}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("STEP_SECONDS", "0.1")
    common = [f"run.dir={tmp_path}", "run.steps=60", "checkpoint.every_steps=5", "optimizer.lr=1e-3"]
    folder = RunFolder(tmp_path / "elastic")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ExitStack() as started:
        machines = []
        for _ in range(2):
            machines.append(started.enter_context(machine(tiny_config, port, [*common, "run.name=elastic"])))
            started.callback(machines[-1].kill)
            wait_until(lambda: listens(port))  # the first one holds the store
        log = folder.log_of(0)
        wait_until(lambda: log.exists() and "2 process(es)" in log.read_text())
        together = len(losses(tmp_path / "elastic")) if folder.metrics.exists() else 0
        wait_until(lambda: folder.metrics.exists() and len(losses(tmp_path / "elastic")) > together + 7)
        machines[1].kill()
        output = machines[0].communicate(timeout=300)[0]
    assert machines[0].returncode == 0, output
    assert "1 process(es)" in log.read_text().rpartition("2 process(es)")[2]

    pools[2].run(train_here, tiny_config, [*common, "run.name=whole"])
    ours, whole = (read_metrics(RunFolder(tmp_path / name)) for name in ("elastic", "whole"))
    assert [row["data_order_digest"] for row in ours] == [row["data_order_digest"] for row in whole]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in whole], rel=1e-4)
