"""Pools of processes: what becomes of a call in which one of them ends."""

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from parallel.processes import WorkerEnded, WorkerPools
from tests.conftest import PersistentPools


def crash_at_first(mark: str) -> int:
    """Runs in every worker: the second is killed, unless that was done before."""
    if dist.get_rank() == 1 and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()
    return dist.get_rank()


def fail() -> None:
    raise ValueError("no such thing")


def test_a_process_that_ends_is_told_and_the_next_call_has_new_ones(tmp_path: Path) -> None:
    with WorkerPools() as pools:
        with pytest.raises(WorkerEnded, match="rank 1 of 2 ended by SIGSEGV"):
            pools[2].run(crash_at_first, str(tmp_path / "mark"))
        assert pools[2].run(crash_at_first, str(tmp_path / "mark")) == [0, 1]


def test_tests_call_again_where_a_process_ended_and_not_where_it_failed(tmp_path: Path) -> None:
    with PersistentPools() as pools:
        with pytest.warns(UserWarning, match="ended by SIGSEGV, in crash_at_first: called again"):
            assert pools[2].run(crash_at_first, str(tmp_path / "mark")) == [0, 1]
        with pytest.raises(RuntimeError, match="no such thing"):
            pools[2].run(fail)
