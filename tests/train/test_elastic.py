"""A run goes on with the machines that there are, and with the processes of a machine that can be started."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from parallel.processes import WorkerPool
from tests.train.fake_checkpoints import fake_checkpoint
from tests.train.running import environment, losses, train_here
from tests.train.test_faults import SLOW
from tests.train.test_stop import training, workers
from train.config_file import load_config
from train.elastic import keep_training
from train.errors import ConfigError
from train.launch import launch
from train.resolve import resolve
from train.run_folder import RunFolder, read_metrics
from train.torchrun import Ended


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
    deadline = time.monotonic() + 600
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
    monkeypatch.setenv("PYTHONPATH", SLOW)
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
        output = machines[0].communicate(timeout=600)[0]
    assert machines[0].returncode == 0, output
    assert "1 process(es)" in log.read_text().rpartition("2 process(es)")[2]

    pools[2].run(train_here, tiny_config, [*common, "run.name=whole"])
    ours, whole = (read_metrics(RunFolder(tmp_path / name)) for name in ("elastic", "whole"))
    assert [row["data_order_digest"] for row in ours] == [row["data_order_digest"] for row in whole]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in whole], rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_without_a_process_that_keeps_dying(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["parallel.dp_shard=2", "run.steps=40", "checkpoint.every_steps=5", "optimizer.lr=1e-3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", SLOW)
    monkeypatch.setenv("STEP_SECONDS", "0.1")
    broken = tmp_path / "broken"
    monkeypatch.setenv("BROKEN_DEVICES", str(broken))
    folder = RunFolder(tmp_path / "run")
    with training(tiny_config, tmp_path, *settings, "--max-restarts=3", "--elastic") as process:
        wait_until(lambda: (folder.checkpoints / "step-00000005").is_dir() or process.poll() is not None)
        broken.write_text("1")
        victim = next(worker for worker in workers(tmp_path) if local_rank(worker) == "1")
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    (told,) = [line for line in output.splitlines() if line.startswith("warning: process ")]
    assert told.startswith("warning: process 1 failed first in two starts from step ")
    assert told.endswith("as 1 process(es), parallel.dp_replicate=1 parallel.dp_shard=1")
    starts = [line for line in folder.log_of(0).read_text().splitlines() if "process(es), " in line]
    assert "2 process(es)" in starts[0] and "1 process(es)" in starts[-1]

    monkeypatch.delenv("STEP_SECONDS")
    pools[2].run(train_here, tiny_config, [f"run.dir={tmp_path}", "run.name=whole", *settings])
    ours, whole = (read_metrics(RunFolder(tmp_path / name)) for name in ("run", "whole"))
    assert [row["data_order_digest"] for row in ours] == [row["data_order_digest"] for row in whole]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in whole], rel=1e-4)


def local_rank(process: int) -> str:
    """Of a worker."""
    return psutil.Process(process).environ()["LOCAL_RANK"]


Failures = list[int | None]


def starts(
    config: str, folder: Path, settings: list[str], failures: Failures, saving: list[int] | None = None
) -> tuple[int, list[tuple[int, str, str]]]:
    """Of a run whose starts fail by these processes and then succeed: the code, and each start's processes and layout.

    saving: the starts that bring a new checkpoint.
    """
    made: list[tuple[int, str, str]] = []

    def start(processes: int, overrides: Sequence[str], environment: Mapping[str, str]) -> Ended:
        sizes = " ".join(setting.partition("dp_")[2] for setting in overrides[-2:])
        made.append((processes, sizes, environment.get("CUDA_VISIBLE_DEVICES", "all")))
        if len(made) in (saving or []):
            fake_checkpoint(RunFolder(folder / "run").checkpoints, len(made))
        return Ended(1, failures[len(made) - 1]) if len(made) <= len(failures) else Ended(0)

    overrides = [f"run.dir={folder}", *settings]
    plan = resolve(load_config(config, overrides))
    return keep_training(start, config, overrides, plan, 9, lambda: False), made


FOUR = ["parallel.dp_replicate=2", "parallel.dp_shard=2"]


@pytest.mark.parametrize(
    ("settings", "failures", "saving", "last"),
    [
        (FOUR, [1, 1], [], (2, "replicate=2 shard=1", "0,2,3")),  # three don't divide the batch
        (FOUR, [1, 1, 1, 1], [], (2, "replicate=2 shard=1", "0,3")),
        (FOUR, [1, 1, 1, 1, 0, 0], [], (1, "replicate=1 shard=1", "3")),
        (
            FOUR,
            [1, 2, 1, None, 1, 1],
            [6],
            (4, "replicate=2 shard=2", "all"),
        ),  # never twice, or with a checkpoint
        (["parallel.dp_replicate=4", "parallel.dp_shard=1"], [3, 3], [], (2, "replicate=2 shard=1", "0,1,2")),
        (["parallel.tp=2", "parallel.dp_shard=2"], [0, 0], [], (2, "replicate=1 shard=1", "1,2,3")),
    ],
)
def test_who_is_left_out_and_what_remains(
    tiny_config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    failures: Failures,
    saving: list[int],
    last: tuple[int, str, str],
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, made = starts(tiny_config, tmp_path, settings, failures, saving)
    assert code == 0 and made[-1] == last and len(made) == len(failures) + 1


def test_devices_keep_the_names_that_they_were_given(
    tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    assert starts(tiny_config, tmp_path, FOUR, [1, 1])[1][-1][2] == "GPU-a,GPU-c,GPU-d"


def test_where_nothing_remains_the_run_ends(
    tiny_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, made = starts(tiny_config, tmp_path, ["parallel.tp=2", "parallel.dp_shard=1"], [1, 1])
    assert (code, len(made)) == (1, 2)
    assert (
        "process 1 failed first in two starts from step 0, and without it no layout"
        in capsys.readouterr().err
    )


def test_elastic_needs_restarts(tiny_config: str) -> None:
    with pytest.raises(ConfigError, match="it needs --max-restarts=3"):
        launch(tiny_config, [], elastic=True)
