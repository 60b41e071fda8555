"""Ranks that hold the others up: found, and named with their machines."""

import json
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from data.stream import TrainingStream
from parallel.processes import WorkerPool
from tests.train.test_run import warnings_of_training
from train.faults import stragglers
from train.faults.stragglers import Alone, find_slow
from train.run_folder import RunFolder


def train_with_a_slow_rank(what: str, config: str, overrides: list[str]) -> list[str]:
    """A run in which rank 1 waits for its batches, or has a slow processor: what is said aloud."""
    take, work = TrainingStream.__next__, stragglers._processor_work

    def late(self: TrainingStream) -> Any:
        time.sleep(0.3)
        return take(self)

    def slow() -> None:
        time.sleep(0.3)
        work()

    planted: dict[str, AbstractContextManager[Any]] = {
        "data": patch.object(TrainingStream, "__next__", late),
        "processor": patch.object(stragglers, "_processor_work", slow),
    }
    # other processes are on these cores, too: what isn't planted counts only where it is enormous
    thresholds = {
        "data": {"_SLOWER": 1e3, "_DATA_SHARE": 0.4},
        "processor": {"_SLOWER": 20.0, "_DATA_SHARE": 1e3},
    }
    with (
        patch.multiple(stragglers, **thresholds[what]),
        planted[what] if dist.get_rank() == 1 else nullcontext(),
    ):
        return warnings_of_training(config, overrides)


@pytest.mark.parametrize(
    ("what", "told"), [("data", "its batches come 0."), ("processor", "its processor takes ")]
)
def test_a_slow_rank_is_named_with_its_machine(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, what: str, told: str
) -> None:
    settings = [f"run.dir={tmp_path}", "faults.find_slow_every_steps=3", "run.steps=4"]
    for lines in pools[2].run(train_with_a_slow_rank, what, tiny_config, settings):
        assert [line for line in lines if "rank 1" in line and told in line] == lines
        assert lines[0].startswith(f"step 3: rank 1 on {socket.gethostname()} is slow: ")
    (line,) = RunFolder(tmp_path / "run").faults.read_text().splitlines()
    fault = json.loads(line)
    assert (fault["fault"], fault["step"], fault["ranks"]) == ("slow ranks", 3, [1])


USUAL = Alone("node1", 0.01, 0.02, 0.03)


@pytest.mark.parametrize(
    ("ranks", "slow"),
    [
        ([USUAL] * 4, {}),
        ([USUAL, Alone("node2", 0.01, 0.05, 0.03)], {1: "its device takes 2.5 times as long as others"}),
        (
            [Alone("node2", 0.01, 0.02, 0.06), USUAL, USUAL],
            {0: "its processor takes 2.0 times as long as others"},
        ),
        (
            [USUAL, USUAL, Alone("node2", 0.2, 0.02, 0.03), USUAL],
            {2: "its batches come 0.190 s later than others', of a step of 1.000 s"},
        ),
        ([USUAL, Alone("node2", 0.1, 0.029, 0.03)], {}),
        ([Alone("node2", 0.0, 0.001, 0.001), *[USUAL] * 3], {}),  # a fast one
    ],
)
def test_who_is_slow(ranks: list[Alone], slow: dict[int, str]) -> None:
    told = {rank: f"rank {rank} on node2 is slow: {what}" for rank, what in slow.items()}
    assert find_slow(ranks, step_seconds=1.0) == told
