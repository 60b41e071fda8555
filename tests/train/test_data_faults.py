"""Whole runs on data that went bad, or after a kill that cleaned nothing up."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from data.dataset import open_dataset
from data.prepare import prepare
from data.shards import read_index
from parallel.processes import WorkerPool
from tests.train.running import environment, train_here
from tests.train.test_command_line import refused, trireme
from train.run_folder import RunFolder, read_metrics


def test_a_bad_shard_ends_the_run_in_one_line_or_is_left_out(
    pools: dict[int, WorkerPool], tiny_config: str, corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "set"
    options: dict[str, Any] = {"seq_len": 32, "validation_fraction": 0.2, "part_bytes": 10_000}
    prepare([str(corpus)], copy, vocab_size=300, workers=1, **options)
    settings = [f"run.dir={tmp_path}", "run.steps=3", f"data.path={copy}"]
    shard = read_index(open_dataset(copy), "train")[0]
    content = bytearray(shard.path.read_bytes())
    content[-2] ^= 1
    shard.path.write_bytes(content)
    line = refused("train", tiny_config, *settings)
    assert line.startswith(f"error: {shard.path} is damaged: its SHA-256 is not")
    shard.path.write_bytes(content[:-1])
    line = refused("train", tiny_config, *settings, "parallel.dp_shard=2")
    assert line.startswith(f"error: {shard.path} has ")
    skipping = [*settings, "data.on_bad_shard=skip"]
    assert pools[2].run(train_here, tiny_config, skipping) == [3, 3]
    for row in read_metrics(RunFolder(tmp_path / "run")):
        assert row["skipped_sequences"] == shard.sequences


@pytest.mark.slow
def test_what_ranks_refuse_is_refused_once(tiny_config: str, dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset, tmp_path / "set")
    shard = read_index(open_dataset(copy), "train")[0].path
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    settings = [f"run.dir={tmp_path}", f"data.path={copy}", "parallel.dp_shard=2"]
    done = trireme("train", tiny_config, *settings, "--max-restarts=3", code=2)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert 1 <= len(told) <= 2 and all(f"{shard} is damaged" in line for line in told)


@pytest.mark.slow
def test_a_run_goes_on_after_all_of_its_processes_were_killed(tiny_config: str, tmp_path: Path) -> None:
    settings = [
        f"run.dir={tmp_path}",
        "run.steps=30",
        "checkpoint.every_steps=5",
        "data.num_workers=1",
        "parallel.dp_shard=2",
        "monitor.tensorboard=false",
    ]
    trireme("train", tiny_config, *settings, "run.name=whole")
    command = [Path(sys.executable).with_name("trireme"), "train", tiny_config, *settings, "run.name=killed"]
    folder = RunFolder(tmp_path / "killed")
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as run:
        while not (folder.checkpoints / "step-00000010").is_dir() and run.poll() is None:
            time.sleep(0.02)
        for process in [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]:
            process.kill()
    assert len(folder.metrics.read_text().splitlines()) < 30, "it was killed on its way"
    trireme("train", tiny_config, *settings, "run.name=killed")
    whole, killed = (read_metrics(RunFolder(tmp_path / name)) for name in ("whole", "killed"))
    assert [row["data_order_digest"] for row in killed] == [row["data_order_digest"] for row in whole]
    assert [row["loss"] for row in killed] == [row["loss"] for row in whole]
